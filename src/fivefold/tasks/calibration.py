"""Calibration: when the model is 80 % sure, is it right 80 % of the time?

The confidence of an answer is the probability the model gives it: of the most likely token against the token that
really follows, or of the chosen answer against the right one. Answers are sorted by confidence and cut into bins of
equal mass (adaptive, where bins of equal width leave most of them empty), answers of one confidence together:

    ECE = sum_b n_b / n * |mean confidence in b - share right in b|

It misleads in two ways. |x| of a noisy x is too large, so few answers look miscalibrated: a perfectly calibrated model
shows about `floor` = sum_b n_b / n * sqrt(2 / pi) * s_b, where s_b is the standard error of the share right in b.
Compare ECEs of one number of answers only, and none near its floor. And a bin can hide an excess and a lack that
cancel, so ECE is a lower bound of the true error once the floor is taken off. Low ECE is not quality: who always
answers with the base rate has none.

Fifteen bins, fewer where they would hold under twenty answers. The interval comes from a bootstrap over whole clusters
(the windows of a text; items) with bins held: half is Student's t times the spread of the ECE. Its lower end also goes
down by the floor with the bootstrap's s_b, since the bias lies between none (every gap is large) and all of it (none
is). So it is wide, and reaches 0 whenever a calibrated model could have shown as much.

Sources: Guo et al., arXiv 1706.04599; Nixon et al., Measuring Calibration in Deep Learning, arXiv 1904.01685.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fivefold.errors import DataError, NotFinite
from fivefold.quantity import Measurement, Quantity
from fivefold.tasks._intervals import student95
from fivefold.tasks.choice import Answers

BINS, PER_BIN, ROUNDS = 15, 20, 2000


def bins_of(confidence: ArrayLike, bins: int = 0) -> NDArray[np.int64]:
    """The bin of each answer, shape (n,), by equal mass; equal confidences share one. 0 bins: as many as n allows."""
    x = np.asarray(confidence, np.float64)
    count = bins or min(BINS, max(1, len(x) // PER_BIN))
    return np.searchsorted(np.quantile(x, np.arange(1, count) / count), x, side="left")


def ece(confidence: ArrayLike, right: ArrayLike, bins: int = 0) -> float:
    """Expected calibration error, 0 to 1. Raises DataError (no pairs, no probabilities) and NotFinite."""
    x, hit = _checked(confidence, right)
    return float(np.abs(np.bincount(bins_of(x, bins), x - hit)).sum()) / len(x)


def floor(confidence: ArrayLike, bins: int = 0) -> float:
    """What `ece` shows on average of a perfectly calibrated model of independent answers with these confidences."""
    x = np.asarray(confidence, np.float64)
    return math.sqrt(2 / math.pi) * float(np.sqrt(np.bincount(bins_of(x, bins), x * (1 - x))).sum()) / len(x)


def calibration(confidence: ArrayLike, right: ArrayLike, clusters: ArrayLike, seed: int = 0) -> Quantity:
    """`ece` of answers (n,) with a 95 % interval over `clusters` (n,); none, and the reason, with one cluster only."""
    x, hit = _checked(confidence, right)
    value, where = ece(x, hit), bins_of(x)
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes = np.bincount(groups).astype(np.float64)
    count = len(sizes)
    if count < 2:
        return Quantity(value=value, unit="fraction", method="measured", n=len(x), reason="no interval: one window")
    gaps = np.zeros((count, where.max() + 1))
    np.add.at(gaps, (groups, where), x - hit)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=ROUNDS).astype(np.float64)
    sampled = draws @ gaps
    found = np.abs(sampled).sum(1) / (draws @ sizes)
    small = math.sqrt(count / (count - 1))
    half = student95(count - 1) * small * float(found.std())
    bias = math.sqrt(2 / math.pi) * small * float(sampled.std(0).sum()) / len(x)
    return Quantity(
        value=value, unit="fraction", method="measured", n=len(x),
        low=max(0.0, value - bias - half), high=min(1.0, value + half),
    )


def of_choices(answers: Answers) -> Measurement:
    """choice_ece: the probability of the chosen answer against its being right, the item as the unit.

    The probabilities are those of `tasks.choice`; where scores are divided by length, they are not the model's own.
    """
    sure = np.array([p.max() for p in answers.probabilities])
    found = calibration(sure, answers.correct, np.arange(len(sure)))
    return Measurement({"choice_ece": found}, {"choice_ece_floor": round(floor(sure), 4)})


def _checked(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, hit = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if x.shape != hit.shape or x.ndim != 1 or not len(x):
        raise DataError(f"{x.size} confidences and {hit.size} answers make no calibration; give one of each per answer")
    if not np.isfinite(x).all():
        raise NotFinite("the model gives probabilities that are not numbers")
    if not ((x >= -1e-6) & (x <= 1 + 1e-4)).all():
        raise DataError("a confidence is not a probability, so there is no calibration; score the model again")
    return np.clip(x, 0.0, 1.0), hit
