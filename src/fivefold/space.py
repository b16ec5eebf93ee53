"""A technique's fields are its search dimensions; this module reads them off the type annotations. It never samples.

    type: Literal["q4_0", "q8_0"]                       a choice
    sparsity: Annotated[float, Range(0.0, 0.9)] = 0.5   a number in a closed interval
    rank: Annotated[int, Range(1, 64, log=True)] = 16   searched on a logarithmic scale
    steps: Annotated[int, Range(1, 10_000), Fixed()]    legal to set, never searched
    type: Annotated[Literal[...], Search("q4_0", ...)]  many legal values, a few worth searching

The string under a field is its help.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_origin

from fivefold.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Range:
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True)
class Fixed:
    """The search leaves this field at its default."""


@dataclass(frozen=True, slots=True, init=False)
class Search:
    """The values worth searching, out of those that are legal."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One field of one technique. `legal` and `search` are choices; for numbers `range` holds the interval."""

    name: str
    kind: Literal["choice", "int", "float", "bool", "text"]
    default: Any
    required: bool
    legal: tuple[Any, ...] = ()
    search: tuple[Any, ...] = ()
    range: Range | None = None
    fixed: bool = False
    help: str = ""

    @property
    def searched(self) -> bool:
        return not self.fixed and bool(self.search or self.range)

    def check(self, value: Any, owner: str) -> Any:
        """The value, coerced from int to float where needed; RecipeError with one sentence otherwise."""
        if self.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        kinds: dict[str, type] = {"int": int, "float": float, "bool": bool, "text": str}
        expected = kinds.get(self.kind)
        if expected and (not isinstance(value, expected) or (self.kind == "int" and isinstance(value, bool))):
            raise RecipeError(f"{owner}: {self.name}={value!r} is not of type {expected.__name__}; change it")
        if self.legal and not any(value == v and type(value) is type(v) for v in self.legal):
            hint = nearest(str(value), [str(v) for v in self.legal])
            near = f" (did you mean {hint!r}?)" if hint else ""
            raise RecipeError(f"{owner}: {self.name}={value!r} is not one of {', '.join(map(repr, self.legal))}{near}")
        if self.range and not self.range.low <= value <= self.range.high:
            raise RecipeError(
                f"{owner}: {self.name}={value!r} is outside [{self.range.low:g}, {self.range.high:g}]; choose within it"
            )
        return value


def nearest(word: str, known: typing.Iterable[str]) -> str | None:
    """The known word closest to `word`, or None when nothing is close."""
    import difflib

    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def dimensions(technique: type) -> tuple[Dimension, ...]:
    """The fields of a technique class, in their order, as dimensions."""
    found: tuple[Dimension, ...] = _dimensions(technique)
    return found


@functools.cache
def _dimensions(technique: Any) -> tuple[Dimension, ...]:
    hints = typing.get_type_hints(technique, include_extras=True)
    helps = field_help(technique)
    return tuple(_dimension(f, hints[f.name], helps.get(f.name, "")) for f in fields(technique))


def _dimension(f: Any, hint: Any, help_text: str) -> Dimension:
    marks: tuple[Any, ...] = ()
    if get_origin(hint) is typing.Annotated:
        hint, *rest = get_args(hint)
        marks = tuple(rest)
    bounds = next((m for m in marks if isinstance(m, Range)), None)
    fixed = any(isinstance(m, Fixed) for m in marks)
    search = next((m.values for m in marks if isinstance(m, Search)), None)
    required = f.default is MISSING
    default = None if required else f.default
    common: dict[str, Any] = {"name": f.name, "default": default, "required": required, "help": help_text}
    if get_origin(hint) is Literal:
        legal = get_args(hint)
        return Dimension(kind="choice", legal=legal, search=search or legal, fixed=fixed, **common)
    if hint is bool:
        return Dimension(kind="bool", search=(False, True), fixed=fixed, **common)
    if hint is str:
        return Dimension(kind="text", search=search or (), fixed=fixed, **common)
    if hint not in (int, float) or bounds is None:
        raise TypeError(f"field {f.name}: {hint!r} is not a Literal, bool, str, or an int or float with a Range")
    return Dimension(
        kind="int" if hint is int else "float", range=bounds, search=search or (), fixed=fixed, **common
    )


def field_help(technique: type) -> dict[str, str]:
    """Field name -> the string literal written under it in the body of the class, or of one it inherits from."""
    found: dict[str, str] = {}
    for one in reversed(technique.__mro__[:-1]):
        found |= _written_help(one)
    return found


def _written_help(one: type) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
    except (OSError, TypeError):
        return {}
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    return {
        here.target.id: " ".join(after.value.value.split()) for here, after in itertools.pairwise(body)
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name)
        and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }
