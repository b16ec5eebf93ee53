from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.errors import Misfit, RecipeError
from fivefold.model import Trait
from fivefold.recipe import MAX_TEXT, Recipe, Technique, _ordered, catalogue, fit, make
from fivefold.space import dimensions


def technique(label: str, needs: str = "", breaks: str = "", strength: float = 1.0) -> Technique:
    """A technique of the inference stage; traits are given by the first letters t(rainable), d(ense), f(ull depth)."""
    letters = {"t": Trait.TRAINABLE, "d": Trait.DENSE_WEIGHTS, "f": Trait.FULL_DEPTH}

    @dataclass(frozen=True, kw_only=True)
    class Example(Technique):
        pass

    Example.__module__ = f"fivefold.techniques.inference.{label}"
    Example.needs = frozenset(letters[c] for c in needs)
    Example.breaks = frozenset(letters[c] for c in breaks)
    Example.perturbation = strength
    return Example()


def test_who_breaks_goes_after_who_needs() -> None:
    a, b = technique("a", breaks="t"), technique("b", needs="t", strength=9.0)
    assert [t.name for t in _ordered([a, b])] == ["b", "a"]


def test_weaker_perturbation_first_on_ties() -> None:
    made = [technique("x", strength=3), technique("y", strength=1), technique("z", strength=2)]
    names = [t.name for t in _ordered(made)]
    assert names == ["y", "z", "x"]


def test_a_misfit_names_the_trait_and_the_shortest_repair() -> None:
    one, two, three = technique("one", "t", "t"), technique("two", "t", "t"), technique("three", "d")
    with pytest.raises(Misfit, match=r"two needs trainable, which one takes away; remove one"):
        fit((one, two, three), frozenset(Trait), "it")
    with pytest.raises(Misfit, match=r"three needs dense weights, which tiny does not have; remove three"):
        fit((three,), frozenset(Trait) - {Trait.DENSE_WEIGHTS}, "tiny")
    fit((three, one), frozenset(Trait), "it")


def test_the_repair_really_repairs_and_none_is_shorter() -> None:
    chain = [technique("a", "", "t"), technique("b", "t", "d"), technique("c", "d"), technique("e", "t")]
    with pytest.raises(Misfit, match="remove a"):
        fit(chain, frozenset(Trait), "it")


def test_every_technique_round_trips_with_every_legal_choice() -> None:
    for name, cls in catalogue().items():
        base = {d.name: (d.legal or d.search or (int(d.range.low) if d.kind == "int" else d.range.low,))[0]
                for d in dimensions(cls) if d.required}
        for d in dimensions(cls):
            for value in (*d.legal, *d.search):
                recipe = Recipe(make(name, {**base, d.name: value}))
                assert Recipe.parse(str(recipe)) == recipe


def test_order_of_writing_does_not_matter() -> None:
    assert Recipe.parse('threads(count=2) + gguf(type="q8_0")') == Recipe.parse('gguf(type="q8_0")+threads(count=2)')


def test_runtime_and_build_parts_make_the_whole() -> None:
    recipe = Recipe.parse('gguf(type="q8_0") + threads(count=2)')
    assert str(recipe.build) == 'gguf(type="q8_0")'
    assert str(recipe.runtime) == "threads(count=2)"
    assert Recipe(*recipe.build, *recipe.runtime) == recipe
    assert str(Recipe()) == "parent" and Recipe.parse("parent") == Recipe()


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("thread(count=2)", "did you mean threads"), ("threads(cnt=2)", "did you mean count"),
        ("threads", "needs count"), ("threads(count=0)", "outside"), ("threads(count=1)+threads(count=2)", "twice"),
        ("threads(count=", "does not parse"),
        ("threads(2)", "by name"), ("threads(**{})", r"\*\*"), ("a.b()", "not a technique"), ("1", "not a technique"),
        ("threads(count=__import__('os'))", "does not parse"), ("x" * (MAX_TEXT + 1), "characters"),
        ("(" * 1000, "does not parse"), ("threads(count=1) - threads(count=2)", "not a technique"),
        ("threads(count=1\x00)", "does not parse"),
    ],
)
def test_bad_recipes_get_one_sentence(text: str, needle: str) -> None:
    with pytest.raises(RecipeError, match=needle) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200) | st.text("threads(count=12)+ \"'", max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        recipe = Recipe.parse(text)
    except RecipeError as error:
        assert "\n" not in str(error)
    else:
        assert Recipe.parse(str(recipe)) == recipe


def test_a_recipe_is_a_value() -> None:
    with pytest.raises(AttributeError):
        Recipe().techniques = ()  # type: ignore[misc]
