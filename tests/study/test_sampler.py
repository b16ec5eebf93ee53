"""Spaces are derived; samplers never repeat, use their seed only, learn from failures; ours beats chance."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from made_up import formula, machine, made_up_table, trial

from fivefold.budget import Budget
from fivefold.errors import UserError
from fivefold.model import Model
from fivefold.recipe import Recipe, catalogue
from fivefold.space import dimensions
from fivefold.study._fivefold import chances, regress
from fivefold.study.pareto import Goal
from fivefold.study.predictor import Predictor
from fivefold.study.sampler import LEVELS, NAMES, SearchSpace, grid, make, parts_of
from fivefold.study.trial import Outcome, Trial

GOAL = Goal(("latency", "size", "kl"), Budget.parse("size<=0.9x"))
SMALL = ("gguf", "kv_cache", "threads", "prune_depth")


@pytest.fixture(scope="module")
def space(bare: Model) -> SearchSpace:
    return SearchSpace.build(bare, {name: catalogue()[name] for name in SMALL})


def run(name: str, space: SearchSpace, bare: Model, steps: int, seed: int = 0) -> list[Trial]:
    sampler = make(name, GOAL, Predictor(machine(), bare))
    history = [trial(0, "parent", **formula("parent"))]
    while len(history) < steps:
        recipe = sampler.ask(history, space, random.Random(f"{seed}:{len(history)}"))
        if recipe is None:
            break
        history.append(trial(len(history), str(recipe), **formula(str(recipe))))
    return history


def test_types_that_do_not_fit_the_rows_are_dropped_with_a_sentence(bare: Model) -> None:
    space = SearchSpace.build(bare)
    assert "q6_k" not in space.levels["gguf"]["type"] and "q8_0" in space.levels["gguf"]["type"]
    assert all(sentence and "\n" not in sentence for sentence in space.dropped.values())
    assert any("gguf" in spelled and "q6_k" in spelled for spelled in space.dropped)


def test_one_request_at_a_time_leaves_no_batch_to_choose(bare: Model) -> None:
    assert "batch" not in SearchSpace.build(bare).levels
    assert "batch" in SearchSpace.build(bare, batch=8).levels


def test_techniques_that_exclude_each_other_share_a_group(bare: Model) -> None:
    groups = SearchSpace.build(bare).groups
    home = {name: group for group in groups for name in group}
    assert home["gguf"] == home["mixed_precision"] and home["gguf"] != home["threads"]
    assert sorted(home) == sorted(SearchSpace.build(bare).levels)


def test_every_recipe_of_the_space_fits(space: SearchSpace, bare: Model) -> None:
    rng = random.Random(0)
    for _ in range(50):
        recipe = space.draw(rng, ())
        assert recipe is not None
        recipe.check(bare)
        assert space.recipe(parts_of(recipe, space)) == recipe


def test_grid_covers_the_interval() -> None:
    for technique in catalogue().values():
        for d in dimensions(technique):
            if d.searched:
                values = grid(d)
                assert 1 <= len(values) <= max(LEVELS, len(d.search or ()))
                for value in values:
                    d.check(value, "x")


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_is_proposed_twice_and_the_seed_decides(name: str, space: SearchSpace, bare: Model) -> None:
    history = run(name, space, bare, 12)
    recipes = [t.recipe for t in history]
    assert len(recipes) == 12 == len(set(recipes))
    assert recipes == [t.recipe for t in run(name, space, bare, 12)]
    assert recipes != [t.recipe for t in run(name, space, bare, 12, seed=1)] or name == "fivefold"


@pytest.mark.parametrize("name", NAMES)
def test_an_exhausted_space_gives_none(name: str, bare: Model) -> None:
    space = SearchSpace.build(bare, {"threads": catalogue()["threads"]})
    history = run(name, space, bare, 10)
    assert sorted(t.recipe for t in history) == ["parent", "threads(count=1)", "threads(count=2)"]


@pytest.mark.parametrize("name", NAMES)
def test_failed_and_refused_trials_are_history_too(name: str, space: SearchSpace, bare: Model) -> None:
    history = [
        trial(0, "parent", **formula("parent")), trial(1, 'gguf(type="q8_0")', Outcome.OUT_OF_MEMORY),
        trial(2, "threads(count=1)", Outcome.REFUSED), trial(3, "prune_depth(layers=1)", Outcome.NOT_FINITE),
    ]
    recipe = make(name, GOAL, Predictor(machine(), bare)).ask(history, space, random.Random(0))
    assert recipe is not None and str(recipe) not in [t.recipe for t in history]


def test_an_unknown_sampler_is_a_sentence() -> None:
    with pytest.raises(UserError, match="samplers: fivefold, random, tpe, nsga2"):
        make("magic", GOAL)


def failures(*recipes: str) -> Sequence[Trial]:
    return [trial(i, r, Outcome.CRASHED) for i, r in enumerate(recipes)]


def test_chances_fall_for_what_failed_and_only_for_that() -> None:
    both = 'gguf(type="q8_0") + threads(count=2)'
    chance = chances([*failures(both), trial(8, 'gguf(type="q8_0")'), trial(9, "threads(count=2)")])
    assert chance(Recipe.parse(both)) == pytest.approx(1 / 2)
    assert chance(Recipe.parse('gguf(type="q4_0")')) == pytest.approx(2 / 3)
    assert chance(Recipe.parse("prune_depth(layers=1)")) == 1.0
    assert chances(failures("threads(count=2)"))(Recipe.parse("threads(count=1)")) == pytest.approx(1 / 5)


def test_effects_of_techniques_add_up_in_the_regression(space: SearchSpace) -> None:
    """Told A and B apart, the posterior of A+B is near their sum and no surer than for what was seen."""
    a, b = Recipe.parse("threads(count=2)"), Recipe.parse("prune_depth(layers=1)")
    both = Recipe.parse("prune_depth(layers=1) + threads(count=2)")
    mean, spread = regress([(a, -1.0, 0.01), (b, -0.5, 0.01)], [a, b, both], space)
    assert mean[:2] == pytest.approx([-1.0, -0.5], abs=0.05)
    assert mean[2] == pytest.approx(-1.5, abs=0.15)
    assert spread[2] > spread[0]


def test_a_way_to_run_is_expected_to_leave_quality_as_it_is(space: SearchSpace) -> None:
    a, both = Recipe.parse("prune_depth(layers=1)"), Recipe.parse("prune_depth(layers=1) + threads(count=2)")
    other = Recipe.parse("prune_depth(layers=2)")
    mean, spread = regress([(a, -1.0, 0.01)], [both, other], space, 0.15)
    assert mean[0] == pytest.approx(-1.0, abs=0.05)
    assert spread[0] < 0.5 * spread[1]


def test_a_storage_type_teaches_about_the_next_in_size(space: SearchSpace) -> None:
    def of(kind: str) -> Recipe:
        return Recipe.parse(f'gguf(type="{kind}")')

    known = [(of("q8_0"), 0.0, 0.01), (of("q4_1"), -1.0, 0.01)]
    mean, _ = regress(known, [of("q4_0"), of("q5_0"), of("q5_1")], space)
    assert mean[0] < mean[2] and mean[1] < mean[2]


def test_ours_meets_the_budget_where_chance_wastes_trials(space: SearchSpace, bare: Model) -> None:
    """With a limit only quantized files meet, the cost model keeps proposals inside it from the start."""
    limit = 0.9 * formula("parent")["size"]
    runs = {name: run(name, space, bare, 15)[1:] for name in ("fivefold", "random")}
    inside = {name: [formula(t.recipe)["size"] <= limit for t in trials] for name, trials in runs.items()}
    assert sum(inside["fivefold"]) > sum(inside["random"])
    assert sum(inside["fivefold"]) >= 12


def test_the_made_up_table_has_what_the_tests_need() -> None:
    outcomes = {t.outcome for t in made_up_table()}
    assert outcomes == {Outcome.MEASURED, Outcome.OUT_OF_MEMORY} and len(made_up_table()) > 60
