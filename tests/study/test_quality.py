"""Quality of a study: what each trial carries, what a goal may speak of, and what an attack may be asked of."""

import json
from pathlib import Path

import numpy as np
import pytest

from fivefold.budget import Budget
from fivefold.errors import BudgetError, DataError, UserError
from fivefold.metrics import METRICS
from fivefold.study import quality
from fivefold.study.pareto import ASIDE, ON_TASKS, UNSCREENED, Goal
from fivefold.tasks.choice import Answers


def of(*shares: float, digest: str = "d", name: str = "t") -> Answers:
    """Two choices, the first is right."""
    return Answers(name, digest, tuple(np.array([p, 1 - p]) for p in shares), np.zeros(len(shares), np.int64))


def test_scored_carries_what_accuracy_hides() -> None:
    base = [of(0.9, 0.8, 0.3, 0.6), of(0.2, 0.7, digest="e", name="u")]
    found = [of(0.9, 0.4, 0.7, 0.6), of(0.1, 0.7, digest="e", name="u")]
    measured = quality.scored(found, base)
    assert set(measured) == set(ON_TASKS)
    assert measured.value("accuracy") == quality.scored(base).value("accuracy") == pytest.approx(4 / 6)
    assert measured.value("flips") == pytest.approx(2 / 6)
    told = measured.context
    assert (told["right_to_wrong"], told["wrong_to_right"], told["wrong_to_wrong"]) == (1, 1, 0)
    sure = np.array([0.9, 0.6, 0.7, 0.6, 0.9, 0.7])
    assert measured.value("choice_ece") == pytest.approx(abs(sure.mean() - 4 / 6)), "six items make one bin"
    assert quality.scored(base, base).value("flips") == 0 and "flips" not in quality.scored(base)
    json.dumps(measured.to_json())
    with pytest.raises(DataError, match="different items"):
        quality.scored(found, [of(0.9, 0.8), of(0.2, 0.7)])


def test_a_screen_waits_with_what_it_cannot_know() -> None:
    goal = Goal(("ece", "flips", "size"), Budget.parse("flips<=10%, ece<=5%, choice_ece<=20%, kl<=0.2"))
    assert goal.of_screen() == Goal(("kl", "size"), Budget.parse("kl<=0.2"))
    assert set(UNSCREENED) | set(ASIDE) <= set(METRICS)


@pytest.mark.parametrize(("budget", "said"), [
    ("after_attack>=0.5", "--attack 50"), ("attack_queries>=20", "--attack 50"),
    ("worst_group_kl<=0.5", "fivefold compare A B"), ("flips<=5%", "add --task piqa"),
    ("choice_ece<=5%", "add --task piqa"),
])
def test_a_goal_that_no_trial_answers_is_told(budget: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        quality.check(Goal(("size",), Budget.parse(budget)), ())
    quality.check(Goal(("size", "ece"), Budget.parse("ece<=5%")), ())


def test_pick_tells_the_same(tmp_path: Path) -> None:
    from fivefold.study.study import Study

    with pytest.raises(BudgetError, match="not measured in a study"):
        Study(tmp_path).pick(Budget.parse("after_attack>=0.5"))


def test_what_is_to_be_attacked(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{i}", "choices": ["a", "b"], "answer": 0}) for i in range(9)))
    assert [len(s.items) for s in quality.victims([str(file)], 4)] == [4]
    assert quality.victims([str(file)], 0) == ()
    with pytest.raises(UserError, match="add --task"):
        quality.victims([], 4)
    with pytest.raises(UserError, match="cannot be attacked"):
        quality.victims([str(file)], -1)
