from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from fivefold.errors import RecipeError
from fivefold.space import Fixed, Range, Search, dimensions, nearest


@dataclass(frozen=True, kw_only=True)
class Example:
    kind: Literal["a", "b"]
    """Which one."""
    rank: Annotated[int, Range(1, 64, log=True)] = 16
    share: Annotated[float, Range(0.0, 1.0), Fixed()] = 0.5
    width: Annotated[int, Range(1, 9), Search(2, 4)] = 2
    fast: bool = False


def test_fields_become_dimensions() -> None:
    kind, rank, share, width, fast = dimensions(Example)
    assert (kind.kind, kind.legal, kind.search, kind.required, kind.help) == (
        "choice", ("a", "b"), ("a", "b"), True, "Which one.")
    assert rank.searched and rank.range == Range(1, 64, log=True)
    assert not share.searched
    assert width.search == (2, 4) and width.check(9, "x") == 9
    assert fast.search == (False, True)


@pytest.mark.parametrize(
    ("index", "value"), [(0, "c"), (0, 1), (1, 0), (1, 65), (1, 2.5), (1, True), (2, 1.01), (2, "1"), (4, 1)]
)
def test_illegal_values_are_refused(index: int, value: object) -> None:
    with pytest.raises(RecipeError):
        dimensions(Example)[index].check(value, "example")


def test_integers_become_floats_where_a_float_is_due() -> None:
    value = dimensions(Example)[2].check(1, "example")
    assert isinstance(value, float)


def test_nearest() -> None:
    assert nearest("q4_00", ["q4_0", "q8_0"]) == "q4_0"
    assert nearest("zzz", ["q4_0"]) is None
