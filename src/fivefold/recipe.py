"""Recipe: techniques that fit together, as a value with one spelling.

    prune_depth(layers=4) + mixed_precision(size=0.6) + repair(steps=120) + threads(count=2)

A technique says which traits of the model it *needs* and which it *breaks*. That alone gives the order (life-cycle
stage first; inside a stage whoever breaks a trait goes after whoever needs it; ties: the weaker perturbation first)
and decides what fits: the check walks the techniques in order over the set of traits left. A misfit is refused
before any work with the shortest repair. Pairs that are legal but poor get no rule; the study measures them.

A technique is one file, `techniques/<stage>/<name>.py`, with one `Technique` in it; the file's name is its public
name. `parse` and `str` are inverse. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import enum
import functools
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from fivefold.errors import Misfit, RecipeError
from fivefold.model import Model, Trait
from fivefold.space import dimensions, nearest

MAX_TEXT = 4000
CALIBRATION_TOKENS = 4096


class Stage(enum.IntEnum):
    """The survey's five stages, in life-cycle order."""

    ARCHITECTURE = 0
    PRETRAINING = 1
    FINETUNING = 2
    INFERENCE = 3
    SYSTEM = 4


@dataclass(frozen=True, kw_only=True)
class Technique:
    """Base of every technique. Fields are configuration, help and search space at once (see `space`).

    A subclass sets the class variables and writes `apply`. `check` may refuse a model by its blueprint before any
    work (raise Misfit with one sentence). `apply` returns a changed Model with its coverage; it never falls back to
    another algorithm.
    """

    needs: ClassVar[frozenset[Trait]] = frozenset()
    breaks: ClassVar[frozenset[Trait]] = frozenset()
    lowers: ClassVar[Mapping[str, Literal["direct", "indirect"]]] = {}
    may_raise: ClassVar[tuple[str, ...]] = ()
    runtime: ClassVar[bool] = False
    """True: only a plan of how to run is edited, so a cached artifact is re-used without a rebuild."""
    perturbation: ClassVar[float] = 1.0
    """How much the technique disturbs the model, for breaking ties in the order: weaker first."""
    headline: ClassVar[str] = ""
    """What the source reports for its own models and machines, with the source's own numbers."""

    def __post_init__(self) -> None:
        for dimension in dimensions(type(self)):
            value = dimension.check(getattr(self, dimension.name), self.name)
            object.__setattr__(self, dimension.name, value)

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def stage(self) -> Stage:
        return Stage[type(self).__module__.split(".")[-2].upper()]

    def check(self, model: Model) -> None:
        """Refuse a model this technique cannot treat, before any work; raises Misfit. Default: accepts."""

    def plan(self, model: Model) -> Model:
        """The plans and the blueprint as `apply` will leave them, without its work. Default: a build edits neither."""
        return self.apply(model) if self.runtime else model

    def inputs(self, model: Model) -> str:
        """What besides fields, code, parent and data decides the result, such as a table measured on this machine.

        A digest that becomes part of the artifact's key; may measure. Default: nothing.
        """
        return ""

    def effort(self, model: Model) -> float:
        """Arithmetic operations it takes to apply, roughly; a plan's forecast, corrected by what trials then cost."""
        return 0.0

    def effort_once(self, model: Model) -> float:
        """Operations that all settings of the technique share on one model, such as a calibration pass."""
        return 0.0 if self.runtime else CALIBRATION_TOKENS * 2.0 * model.blueprint.parameters

    def apply(self, model: Model) -> Model:
        raise NotImplementedError(f"{self.name} has no apply")

    def finish(self, model: Model) -> Model:
        """Called on the last technique of its stage in a recipe, after its `apply`: what earlier ones only planned is
        done once, here. Default: nothing was put off."""
        return model

    def __str__(self) -> str:
        shown = []
        for f, dimension in zip(fields(self), dimensions(type(self)), strict=True):
            value = getattr(self, f.name)
            if dimension.required or value != dimension.default:
                shown.append(f"{f.name}={_spell(value)}")
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def _spell(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


@functools.cache
def catalogue() -> Mapping[str, type[Technique]]:
    """Public name -> technique class, in life-cycle order, found by walking the folders."""
    from fivefold import techniques

    found: dict[str, type[Technique]] = {}
    for stage in Stage:
        package = importlib.import_module(f"{techniques.__name__}.{stage.name.lower()}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
            if not info.name.startswith("_"):
                found[info.name] = _technique_in(importlib.import_module(f"{package.__name__}.{info.name}"))
    return found


def _technique_in(module: Any) -> type[Technique]:
    own = [
        c for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Technique) and c.__module__ == module.__name__
    ]
    assert len(own) == 1, f"{module.__name__} must define exactly one Technique, not {len(own)}"
    return own[0]


class Recipe:
    """An ordered, hashable value of techniques. Raises Misfit when they do not fit a fresh model.

    `Recipe()` changes nothing and is spelled `parent`.
    """

    __slots__ = ("techniques",)
    techniques: tuple[Technique, ...]

    def __init__(self, *techniques: Technique) -> None:
        names = [t.name for t in techniques]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            raise Misfit(f"{twice} appears twice in the recipe; remove one")
        object.__setattr__(self, "techniques", tuple(_ordered(techniques)))
        fit(self.techniques, frozenset(Trait), "a fresh model")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a Recipe is a value; make another one")

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The inverse of `str`. Raises RecipeError or Misfit with one sentence."""
        if len(text) > MAX_TEXT:
            raise RecipeError(f"the recipe is {len(text)} characters long; the limit is {MAX_TEXT}")
        if text.strip() in ("", "parent"):
            return cls()
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            return cls(*(_technique(node) for node in _terms(tree)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise RecipeError(
                f"the recipe {_short(text)} does not parse; write it like: gguf(type=\"q8_0\") + threads(count=2)"
            ) from None

    def __str__(self) -> str:
        return " + ".join(map(str, self.techniques)) or "parent"

    def __repr__(self) -> str:
        return f"Recipe.parse({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.techniques == other.techniques

    def __hash__(self) -> int:
        return hash(self.techniques)

    def __iter__(self) -> Iterator[Technique]:
        return iter(self.techniques)

    def __len__(self) -> int:
        return len(self.techniques)

    @property
    def build(self) -> Recipe:
        """The part that makes the artifact."""
        return Recipe(*(t for t in self if not t.runtime))

    @property
    def runtime(self) -> Recipe:
        """The part that only says how the artifact is run."""
        return Recipe(*(t for t in self if t.runtime))

    def check(self, model: Model) -> None:
        """Refuse, before any work, a model this recipe cannot treat. Raises Misfit."""
        self.plan(model)

    def plan(self, model: Model) -> Model:
        """The plans and the blueprint the recipe will end with, without its work; raises Misfit like `check`.

        A technique that builds is checked on the model as planned so far; one that only says how the artifact runs
        is checked on the finished plan.
        """
        fit(self.techniques, model.traits, model.name)
        for technique in self:
            if not technique.runtime:
                technique.check(model)
            model = technique.plan(model).without(*technique.breaks)
        for technique in self:
            if technique.runtime:
                technique.check(model)
        return model

    def apply(self, model: Model) -> Model:
        """The model after every technique, traits taken away as declared."""
        self.check(model)
        for technique, last in self.stages():
            model = technique.apply(model).without(*technique.breaks)
            model = technique.finish(model) if last else model
        return model

    def stages(self) -> Iterator[tuple[Technique, bool]]:
        """The techniques in order, each with whether it is the last of its stage."""
        for technique, after in itertools.zip_longest(self.techniques, self.techniques[1:]):
            yield technique, after is None or after.stage != technique.stage


def _ordered(techniques: Iterable[Technique]) -> list[Technique]:
    """Topological order inside each stage: needs before breaks, weaker perturbation first on ties."""
    rest = sorted(techniques, key=lambda t: (t.stage, t.perturbation, t.name))
    done: list[Technique] = []
    while rest:
        stage = [t for t in rest if t.stage == rest[0].stage]
        free = [t for t in stage if not any(t.breaks & other.needs for other in stage if other is not t)]
        chosen = (free or stage)[0]
        rest.remove(chosen)
        done.append(chosen)
    return done


def fit(techniques: Iterable[Technique], traits: frozenset[Trait], owner: str) -> None:
    """Walk the techniques over the traits; Misfit names the trait, who took it and the shortest repair."""
    techniques = tuple(techniques)
    problem = _first_misfit(techniques, traits)
    if problem is None:
        return
    technique, trait, culprit = problem
    repair = next(
        drop for size in range(1, len(techniques) + 1) for drop in itertools.combinations(techniques, size)
         if _first_misfit(tuple(t for t in techniques if t not in drop), traits) is None
    )
    taken = f"which {culprit} takes away" if culprit else f"which {owner} does not have"
    choice = f" (or {culprit.name})" if culprit and len(repair) == 1 and repair[0] is technique else ""
    raise Misfit(f"{technique} needs {trait.value}, {taken}; remove {', '.join(t.name for t in repair)}{choice}")


def _first_misfit(
    techniques: tuple[Technique, ...], traits: frozenset[Trait]
) -> tuple[Technique, Trait, Technique | None] | None:
    have = set(traits)
    taken: dict[Trait, Technique] = {}
    for technique in techniques:
        for trait in sorted(technique.needs - have):
            return technique, trait, taken.get(trait)
        for trait in technique.breaks & have:
            taken[trait] = technique
        have -= technique.breaks
    return None


def _terms(node: ast.expr) -> Iterator[ast.expr]:
    terms: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        terms.append(node.right)
        node = node.left
    terms.append(node)
    return reversed(terms)


def _technique(node: ast.expr) -> Technique:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name) or call.args:
        raise RecipeError(
            f"{_short(ast.unparse(node))} is not a technique; write name(field=value), fields by name"
        )
    return make(call.func.id, {_keyword(k): ast.literal_eval(k.value) for k in call.keywords})


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise RecipeError("a recipe cannot hold **; write each field as name=value")
    return keyword.arg


def make(name: str, values: Mapping[str, Any]) -> Technique:
    """A technique by its public name; RecipeError suggests the nearest name or field."""
    known = catalogue()
    if name not in known:
        hint = nearest(name, known)
        near = f"did you mean {hint}?" if hint else "see: fivefold catalogue"
        raise RecipeError(f"there is no technique {_short(name)}; {near}")
    dims = {d.name: d for d in dimensions(known[name])}
    for key in values:
        if key not in dims:
            hint = nearest(key, dims)
            near = f"did you mean {hint}?" if hint else f"fields: {', '.join(dims) or 'none'}"
            raise RecipeError(f"{name} has no field {_short(key)}; {near}")
    lacking = [d.name for d in dims.values() if d.required and d.name not in values]
    if lacking:
        raise RecipeError(f"{name} needs {lacking[0]}=...; add it")
    return known[name](**values)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")
