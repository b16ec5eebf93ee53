"""Flips: on how many items did compression turn right into wrong, or wrong into right?

Accuracy is a difference of two counts that mostly cancel. In the table of the same items before and after

                     after right    after wrong
    before right          a              b            change of accuracy = (c - b) / n
    before wrong          c              d            flips              = (b + c) / n

a model may keep its accuracy and still answer a tenth of the items differently; a user of the parent meets that tenth.
Items that go from one wrong answer to another are no flips and counted apart: flips + wrong_to_wrong = 1 - label
loyalty (`tasks.loyalty`).

It misleads where the parent guesses: near chance a coin is thrown again and half of the flips say nothing. So read it
beside the parent's accuracy, and test b against c with McNemar's (`tasks.paired`).

Source: Dutta et al., Accuracy is Not All You Need, arXiv 2407.09141.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fivefold.quantity import Measurement, Quantity
from fivefold.tasks import _intervals
from fivefold.tasks.choice import Answers, same_items


@dataclass(frozen=True, eq=False)
class Flips:
    """Which items of n changed, three masks of shape (n,) that never overlap."""

    right_to_wrong: NDArray[np.bool_]
    wrong_to_right: NDArray[np.bool_]
    wrong_to_wrong: NDArray[np.bool_]

    @property
    def shares(self) -> dict[str, Quantity]:
        """Each kind as a share of all items, with Wilson's 95 % interval."""
        return {name: _intervals.proportion(getattr(self, name))
                for name in ("right_to_wrong", "wrong_to_right", "wrong_to_wrong")}

    @property
    def measurement(self) -> Measurement:
        """flips with Wilson's 95 % interval; the counts of each kind in the context."""
        counts = {name: int(getattr(self, name).sum()) for name in self.shares}
        return Measurement({"flips": _intervals.proportion(self.right_to_wrong | self.wrong_to_right)}, counts)

    def __str__(self) -> str:
        shown = [f"{name.replace('_', ' ')} {100 * (q.value or 0):.1f} %"
                 f" [{100 * (q.low or 0):.1f}, {100 * (q.high or 0):.1f}]" for name, q in self.shares.items()]
        return ", ".join(shown)


def flips(parent: Answers, candidate: Answers) -> Flips:
    """Raises DataError when the items differ."""
    same_items(parent, candidate)
    before, after = parent.correct, candidate.correct
    moved = parent.predictions != candidate.predictions
    return Flips(before & ~after, ~before & after, ~before & ~after & moved)
