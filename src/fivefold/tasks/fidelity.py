"""Fidelity: how far a candidate departs from its parent, token by token, on the same text.

The parent is recorded once: for every position the log-probabilities of its k most likely tokens, their ids, the mass
of all the others (the tail), and the log-probability of the token that really follows. A candidate is then compared
in its own engine without the parent in memory:

    agreement   share of positions where both have the same most likely token
    kl          mean of KL(parent || candidate) in nats
    loss        mean of -log q(true token); perplexity = exp(loss)
    ece         how far the confidence in the most likely token is from how often it is the true one (`calibration`)

KL is computed over k + 1 outcomes, the k tokens and "any other": sum_i p_i log(p_i / q_i) + t_p log(t_p / t_q).
Merging outcomes never raises a KL divergence (data-processing inequality), so this is a lower bound; what is missing
is the divergence inside the tail, weighted by the tail's mass. Measured on SmolLM2-135M against its Q4_0 file (1,020
tokens of encyclopedia, exact KL 0.742): k = 16 gives 78 % of the exact value, 64 gives 88 %, 256 gives 95 %. So
compare candidates at one k only. Standard errors take the window as the unit (`_intervals`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import Session
from fivefold.errors import DataError, NotFinite
from fivefold.files import atomic_file
from fivefold.quantity import Measurement, Quantity
from fivefold.tasks import _intervals, calibration

TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Reference:
    """The parent's answers at n positions: `ids`, `logp` (n, k) most likely first, `tail`, `true_logp` (n,).

    `windows` are the texts (G lists of ids); `window` (n,) says which one a position belongs to.
    """

    windows: tuple[tuple[int, ...], ...]
    vocab: int
    ids: NDArray[np.int32]
    logp: NDArray[np.float32]
    tail: NDArray[np.float64]
    true_logp: NDArray[np.float32]

    @classmethod
    def record(cls, session: Session, windows: Sequence[Sequence[int]], k: int = 256) -> Self:
        """Score every window with the parent. Windows need at least 2 tokens. Raises NotFinite, DataError."""
        if not windows or min(map(len, windows)) < 2 or k < 1:
            raise DataError("fidelity needs windows of at least 2 tokens and k of at least 1; give a longer text")
        k = min(k, session.vocab)
        parts = []
        for window in windows:
            scored = _scored(session, window)
            top = np.argpartition(scored, -k, axis=1)[:, -k:]
            order = np.argsort(-np.take_along_axis(scored, top, 1), axis=1, kind="stable")
            ids = np.take_along_axis(top, order, 1).astype(np.int32)
            logp = np.take_along_axis(scored, ids, 1)
            parts.append((ids, logp, _tail(scored, logp), _true(scored, window)))
        ids, logp, tail, true = (np.concatenate(column) for column in zip(*parts, strict=True))
        return cls(tuple(tuple(map(int, w)) for w in windows), session.vocab, ids, logp, tail, true)

    @property
    def window(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.windows)), [len(w) - 1 for w in self.windows])

    @property
    def true(self) -> NDArray[np.int64]:
        """The token that really follows, at each position."""
        return np.array([t for w in self.windows for t in w[1:]], np.int64)

    def itself(self) -> Fidelity:
        """The recorded model against itself: it agrees everywhere, at its own log-loss. Nothing is scored again."""
        n = len(self.true_logp)
        return Fidelity(
            np.ones(n, bool), np.zeros(n), -self.true_logp.astype(np.float64), self.window,
            np.exp(self.logp[:, 0].astype(np.float64)), self.ids[:, 0] == self.true,
        )

    def save(self, path: Path) -> Path:
        """One .npz without pickle, whole or absent."""
        tokens = np.array([t for w in self.windows for t in w], np.int32)
        lengths = np.array([len(w) for w in self.windows], np.int64)
        arrays: dict[str, Any] = {
            "tokens": tokens, "lengths": lengths, "vocab": np.int64(self.vocab), "ids": self.ids, "logp": self.logp,
            "tail": self.tail, "true_logp": self.true_logp,
        }
        return atomic_file(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises DataError when the file is not what `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as file:
                lengths, tokens, vocab = file["lengths"], file["tokens"], int(file["vocab"])
                ids, logp, tail, true = (file[name] for name in ("ids", "logp", "tail", "true_logp"))
            ends = np.cumsum(lengths)
            windows = tuple(tuple(part.tolist()) for part in np.split(tokens, ends[:-1]))
            n = int((lengths - 1).sum())
            right = ends[-1] == len(tokens) and lengths.min() >= 2 and ids.shape == logp.shape == (n, ids.shape[1])
            if not right or tail.shape != (n,) or true.shape != (n,) or ids.min() < 0 or ids.max() >= vocab:
                raise ValueError
        except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile):
            raise DataError(f"{path} is not a complete fidelity reference; record it again") from None
        return cls(windows, vocab, ids, logp, tail, true)


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Per-token arrays, shape (n,), for paired comparison; `window` is the cluster of each token.

    `confidence` is the probability of the most likely token, `right` says whether it is the true one.
    """

    agree: NDArray[np.bool_]
    kl: NDArray[np.float64]
    loss: NDArray[np.float64]
    window: NDArray[np.int64]
    confidence: NDArray[np.float64]
    right: NDArray[np.bool_]

    @property
    def per_token(self) -> dict[str, NDArray[Any]]:
        return {"agreement": self.agree, "kl": self.kl, "loss": self.loss}

    @property
    def kl_quantiles(self) -> dict[str, Quantity]:
        """The median, 90th and 99th percentile of the KL divergence per token."""
        shares = {"median": 0.5, "p90": 0.9, "p99": 0.99}
        return {name: _intervals.quantile(self.kl, share, "nat/token") for name, share in shares.items()}

    @property
    def measurement(self) -> Measurement:
        """agreement, kl, kl_p99, loss, perplexity, ece with 95 % intervals."""
        loss = _intervals.mean(self.loss, self.window, "nat/token")
        quantiles = self.kl_quantiles
        found = {
            "agreement": _intervals.proportion(self.agree, self.window),
            "kl": _intervals.mean(self.kl, self.window, "nat/token"),
            "kl_p99": quantiles["p99"],
            "loss": loss,
            "perplexity": _exp(loss),
            "ece": calibration.calibration(self.confidence, self.right, self.window),
        }
        context = {"tokens": len(self.kl), "windows": len(set(self.window.tolist())),
                   "kl_median": quantiles["median"].value, "kl_p90": quantiles["p90"].value,
                   "ece_floor": round(calibration.floor(self.confidence), 4)}
        return Measurement(found, context)


def fidelity(session: Session, reference: Reference) -> Fidelity:
    """Score the reference's windows with a candidate. Raises DataError (other vocabulary) and NotFinite."""
    if session.vocab != reference.vocab:
        raise DataError(
            f"the candidate has {session.vocab} tokens and its parent {reference.vocab};"
            " fidelity compares models with one vocabulary"
        )
    agree, kl, loss, sure, right = [], [], [], [], []
    start = 0
    for window in reference.windows:
        rows = slice(start, start + len(window) - 1)
        start = rows.stop
        scored = _scored(session, window)
        ids, logp, tail = reference.ids[rows], reference.logp[rows].astype(np.float64), reference.tail[rows]
        theirs = np.take_along_axis(scored, ids, 1)
        rest = np.maximum(_tail(scored, theirs), TINY)
        inside = (np.exp(logp) * (logp - theirs.astype(np.float64))).sum(1)
        kl.append(inside + tail * np.log(np.maximum(tail, TINY) / rest))
        top = scored.argmax(1)
        agree.append(top == ids[:, 0])
        sure.append(np.exp(scored[np.arange(len(top)), top].astype(np.float64)))
        right.append(top == np.asarray(window[1:]))
        loss.append(-_true(scored, window).astype(np.float64))
    agrees, diverges, losses, confident, hits = map(np.concatenate, (agree, kl, loss, sure, right))
    return Fidelity(agrees, diverges, losses, reference.window, confident, hits)


def _scored(session: Session, window: Sequence[int]) -> NDArray[np.float32]:
    """Log-probabilities (len(window) - 1, vocab) of the tokens after the first."""
    scored = session.score(window)[:-1]
    if np.isnan(_true(scored, window)).any():
        raise NotFinite("the model gives log-probabilities that are not numbers")
    return scored


def _true(scored: NDArray[np.float32], window: Sequence[int]) -> NDArray[np.float32]:
    return scored[np.arange(len(window) - 1), np.asarray(window[1:])]


def _tail(scored: NDArray[np.float32], chosen: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mass outside the chosen columns: the same float32 values are summed and subtracted, so little cancels."""
    total = np.array([np.exp(row).sum(dtype=np.float64) for row in scored])
    return np.maximum(total - np.exp(chosen).sum(1, dtype=np.float64), 0.0)


def _exp(loss: Quantity) -> Quantity:
    def up(x: float | None) -> float | None:
        return None if x is None else float(np.exp(min(x, 700.0)))

    return Quantity(
        value=up(loss.value), unit="1", method=loss.method, n=loss.n, low=up(loss.low), high=up(loss.high),
        reason=loss.reason,
    )
