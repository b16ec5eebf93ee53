"""How the time per weight of each storage type is measured: small files that differ in one thing, timed and fitted.

llama.cpp rearranges some types while it loads, so bare kernels would mislead: the engine is timed itself, on files of
the real model's widths (`_synthetic`). One file per type has the same layers and weights; one with many thin layers
separates `layer` from the weights, a large head gives each h_t, a long prompt `attended` (symbols: `_type_speed`). A
type that does not fit a width is measured in the matrices it fits, q8_0 in the others. The table is the least-squares
fit of the relative errors, nothing negative, no type below FLOOR of the average. In prefill each weight carries its
share of what a layer costs besides, for prompts of about PROMPT tokens. Files hold more bytes than the cache, so that
weights come from memory as in a real model. Other thread counts are the ratio of two times of the q8_0 file.

Files are timed in turn, the order reversed every second round; a round in which others used the cores is repeated, at
most as often as there are rounds and while PATIENCE lasts.

Source: Lawson & Hanson, "Solving Least Squares Problems", 1974 (least squares within bounds).
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Protocol

from fivefold.engines._synthetic import Design, Shape, kind_for
from fivefold.engines._type_speed import BASE, TypeSpeeds, default_threads
from fivefold.files import storage
from fivefold.machine import DISTURBED, Neighbours, usable_cores
from fivefold.model import load

TYPES = ("q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1", "f16", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k")
WEIGHTS, HEAD_WEIGHTS = 64_000_000, 24_000_000
MOST_LAYERS = 32
ROUNDS, PREFILL_ROUNDS = 5, 3
PATIENCE = 8.0
"""Seconds after which rounds of one kind are no longer repeated."""
FLOOR = 0.1
TOKENS, SHORT, PROMPT, LONG = 16, 8, 128, 640


class Runs(Protocol):
    """What is needed of a session."""

    def generate(self, prompt: Sequence[int], max_tokens: int) -> Iterable[int]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A design timed with `threads` (None: the engine's default)."""

    design: Design
    threads: int | None = None

    @property
    def file(self) -> str:
        return hashlib.sha256(repr(self.design).encode()).hexdigest()[:16] + ".gguf"


def arms(shape: Shape, types: Sequence[str] = TYPES, threads: Sequence[int] = ()) -> list[Arm]:
    """What is timed: first the base file and the thin one, then types, heads and thread counts."""
    columns = {c for _, c in shape.matrices().values()}
    usable = [t for t in types if any(kind_for(t, c) == t for c in columns)]
    deep = max(2, min(MOST_LAYERS, round(WEIGHTS / shape.layer)))
    ffn = 256 if shape.ffn % 256 == 0 else 32 if shape.ffn % 32 == 0 else shape.ffn
    narrow = replace(shape, ffn=min(ffn, shape.ffn))
    thin = max(2, min(MOST_LAYERS, round(WEIGHTS / narrow.layer)))
    base = Design(shape=shape, layers=deep, kind=BASE)
    designs = [base, Design(shape=narrow, layers=thin, kind=BASE)]
    designs += [replace(base, kind=kind) for kind in usable]
    rows = max(1, HEAD_WEIGHTS // shape.width // 64) * 64
    heads = (kind for kind in usable if kind_for(kind, shape.width) == kind)
    designs += [replace(base, layers=1, vocab=rows, head=kind) for kind in heads]
    return [*(Arm(design=d) for d in dict.fromkeys(designs)), *(Arm(design=base, threads=n) for n in threads)]


def measure(
    shape: Shape, *, types: Sequence[str] = TYPES, opener: Callable[[Arm, Path], Runs] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TypeSpeeds:
    """Write, open, time in turn, fit. `opener` and `clock` can be given by tests."""
    default, open_arm = default_threads(), opener or _open
    counts = sorted({n for n in (1 << i for i in range(10)) if n < default} | {usable_cores()} - {default})
    every = arms(shape, types, counts)
    sessions: list[Runs] = []
    with tempfile.TemporaryDirectory(prefix="fivefold-") as folder:
        try:
            for i, arm in enumerate(every):
                sessions.append(open_arm(arm, Path(folder)))
                if not any(later.design == arm.design for later in every[i + 1 :]):
                    (Path(folder) / arm.file).unlink(missing_ok=True)  # the session keeps what it needs of it
            long_, read, step, others = _timed(every, sessions, clock)
        finally:
            for session in sessions:
                session.close()
    return replace(fit(every, step, read, long_, threads=default), others=others)


def _open(arm: Arm, folder: Path) -> Runs:
    from fivefold.engines import llama_cpp

    file = folder / arm.file
    if not file.is_file():
        with storage(file):
            arm.design.write(file)
    model = load(file)
    return llama_cpp.open(model.but(run=replace(model.run, threads=arm.threads, context=2048)))


def _timed(
    every: Sequence[Arm], sessions: Sequence[Runs], clock: Callable[[], float]
) -> tuple[float, list[float], list[float], float]:
    """Seconds per token of the thin file after a long prompt; to read a prompt, and per token, of each arm; others."""

    def step(session: Runs, prompt: int) -> float:
        moments = [clock() for _ in session.generate([1] * prompt, 1 + TOKENS)]
        return (moments[-1] - moments[0]) / TOKENS

    def read(session: Runs) -> float:
        start = clock()
        for _ in session.generate([1] * PROMPT, 1):
            pass
        return clock() - start

    step(sessions[1], LONG)  # the context is made for the longest call and kept
    for session in (sessions[0], *sessions[2:]):
        read(session)
    unread = [i for i, arm in enumerate(every) if arm.design.vocab > 256 or i == 1]

    def reading() -> list[float]:
        return [step(sessions[1], LONG), *(0.0 if i in unread else read(s) for i, s in enumerate(sessions))]

    def decoding(backwards: bool) -> list[float]:
        order = list(range(len(sessions)))
        found = {i: step(sessions[i], SHORT) for i in (reversed(order) if backwards else order)}
        return [found[i] for i in order]

    steps, busy = _rounds(decoding, ROUNDS)
    reads, too = _rounds(lambda _: reading(), PREFILL_ROUNDS)
    return reads[0], reads[1:], steps, max(busy, too)


def _rounds(work: Callable[[bool], list[float]], wanted: int) -> tuple[list[float], float]:
    """Medians over the `wanted` quietest rounds, and the share of the cores that others used in the worst of them."""
    done: list[tuple[float, list[float]]] = []
    start = time.monotonic()
    while len(done) < 2 * wanted and sum(share <= DISTURBED for share, _ in done) < wanted:
        if done and time.monotonic() - start > PATIENCE:
            break
        with Neighbours() as neighbours:
            values = work(len(done) % 2 == 1)
        done.append((neighbours.share, values))
    kept = sorted(done, key=lambda r: r[0])[:wanted]
    return [median(column) for column in zip(*(values for _, values in kept), strict=True)], kept[-1][0]


def fit(
    every: Sequence[Arm], step: Sequence[float], read: Sequence[float], long_step: float, *, threads: int
) -> TypeSpeeds:
    """The table that explains the times best, by relative error. `long_step` is of the thin file (the second arm).

    `step[i]` seconds per token of arm i after a short prompt, `read[i]` seconds to read a prompt (0: not timed).
    """
    plain = [i for i, arm in enumerate(every) if arm.threads is None]
    rows, seconds = [], []
    for i in plain:
        rows.append(_decode_row(every[i].design, SHORT))
        seconds.append(step[i])
    rows.append(_decode_row(every[1].design, LONG))
    seconds.append(long_step)
    average = step[0] / every[0].design.weights().total()
    found = _bounded(rows, seconds, FLOOR * average)
    head = {name[5:]: s for name, s in found.items() if name.startswith("head ")}
    rows, seconds = [], []
    for i in (i for i in plain if read[i]):
        design = every[i].design
        rows.append({f"type {t}": float(n * PROMPT) for t, n in design.weights(prompt=True).items()})
        kind = kind_for(design.head, design.shape.width)
        seconds.append(max(read[i] - head[kind] * design.vocab * design.shape.width, 1e-9))
    prompt = _bounded(rows, seconds, FLOOR * read[0] / (PROMPT * every[0].design.weights(prompt=True).total()))
    scale = {arm.threads: (step[i] / step[0], read[i] / read[0]) for i, arm in enumerate(every) if arm.threads}
    return TypeSpeeds(
        threads=threads, head=head, scale=scale,
        decode={name[5:]: s for name, s in found.items() if name.startswith("type ")},
        prefill={name[5:]: s for name, s in prompt.items() if name.startswith("type ")},
        base={"layer": found["layer"], "attended": found["attended"]},
    )


def _decode_row(design: Design, prompt: int) -> dict[str, float]:
    shape = design.shape
    position = prompt + (TOKENS - 1) / 2
    return {
        "layer": float(design.layers), "attended": design.layers * position * shape.units,
        **{f"type {t}": float(n) for t, n in design.weights().items()},
        f"head {kind_for(design.head, shape.width)}": float(design.vocab * shape.width),
    }


def _bounded(rows: Sequence[Mapping[str, float]], seconds: Sequence[float], least: float) -> dict[str, float]:
    """Unknown -> seconds, least squares of the relative errors; none negative, no type or head below `least`."""
    import numpy as np
    from scipy.optimize import lsq_linear

    names = list(dict.fromkeys(chain.from_iterable(rows)))
    matrix = np.array([[row.get(name, 0.0) / s for name in names] for row, s in zip(rows, seconds, strict=True)])
    size = matrix.max(axis=0)
    low = np.array([least if name.startswith(("type ", "head ")) else 0.0 for name in names])
    solution = lsq_linear(matrix / size, np.ones(len(rows)), (low * size, np.inf), method="bvls", tol=1e-14).x
    return {name: float(x) for name, x in zip(names, solution / size, strict=True)}
