"""Compare: a paired verdict on model B against model A, and their resources side by side.

Quality is decided on the same items: log-loss per token on held-out text (items are windows), or right and wrong
answers of a labelled task. `tasks.paired` turns the paired differences into ACCEPT, REGRESSION or INCONCLUSIVE with
the number of items that would decide. Resources come from interleaved rounds in fresh processes, so the ratio B / A is
free of the machine's drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fivefold.engines import open_session
from fivefold.errors import DataError
from fivefold.files import sha256
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity
from fivefold.tasks.paired import Decision, Verdict, verdict

METRICS = ("latency", "ttft", "decode", "prefill", "memory", "size", "energy", "money", "network")
QUALITY = ("agreement", "kl", "loss", "perplexity", "accuracy", "label_loyalty", "probability_loyalty")
WINDOW = 128
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`rows`: metric -> (A, B, B / A)."""

    decision: Decision
    verdict: Verdict
    sentence: str
    rows: Mapping[str, tuple[Quantity, Quantity, Quantity]]


def compare(
    a: Model, b: Model, *, task: str = "fidelity", margin: float = 0.01, items: int = 64, workload: Any = None,
    text: str = "encyclopedia", country: str = "world",
) -> Comparison:
    """Raises DataError when the models cannot be paired (another tokenizer on a text task)."""
    judge = _on_text if task == "fidelity" else _on_labels
    decided, first, second, what = judge(a, b, task, margin, items, text)
    rows: dict[str, tuple[Quantity, Quantity, Quantity]] = {}
    for name in QUALITY:
        if name in first or name in second:
            missing = Quantity.missing("1", "is the reference")
            rows[name] = (first.get(name, missing), second.get(name, missing), _ratio(first, second, name))
    if workload is not None:
        rows |= _resources(a, b, workload, country)
    return Comparison(decision=decided.decision, verdict=decided, sentence=f"{what}: {decided}", rows=rows)


def _on_text(
    a: Model, b: Model, task: str, margin: float, items: int, text: str
) -> tuple[Verdict, Measurement, Measurement, str]:
    from fivefold.tasks.fidelity import Reference, fidelity
    from fivefold.tasks.text import windows
    from fivefold.tokenizer import Tokenizer

    if sha256(a.tokenizer_file) != sha256(b.tokenizer_file):
        raise DataError(
            "the models have different tokenizers, so their tokens cannot be paired; compare them on a labelled task,"
            " for example --task piqa"
        )
    sample = windows(Tokenizer(a.tokenizer_file), text, "evaluation", items * WINDOW, WINDOW)
    session = open_session(a)
    try:
        reference = Reference.record(session, sample)
        own = fidelity(session, reference)
    finally:
        session.close()
    session = open_session(b)
    try:
        other = fidelity(session, reference)
    finally:
        session.close()
    decided = verdict(own.loss, other.loss, margin, better="lower", clusters=own.window)
    return decided, own.measurement, other.measurement, f"log-loss of B against A on {text}, margin {margin:g} nat"


def _on_labels(
    a: Model, b: Model, task: str, margin: float, items: int, text: str
) -> tuple[Verdict, Measurement, Measurement, str]:
    from fivefold.tasks import choice
    from fivefold.tasks.loyalty import loyalty
    from fivefold.tokenizer import Tokenizer

    questions = choice.load(task, items)
    results = []
    for model in (a, b):
        session = open_session(model)
        try:
            results.append(choice.answer(session, Tokenizer(model.tokenizer_file), questions))
        finally:
            session.close()
    first, second = results
    decided = verdict(first.correct, second.correct, margin)
    other = second.measurement.merged(loyalty(first, second))
    return decided, first.measurement, other, f"accuracy of B against A on {task}, margin {margin:g}"


def _resources(
    a: Model, b: Model, workload: Any, country: str
) -> dict[str, tuple[Quantity, Quantity, Quantity]]:
    from fivefold.meters.interleaved import Interleaved, Job

    with Interleaved([Job(model=a, workload=workload, label="A"), Job(model=b, workload=workload, label="B")],
                     country=country) as pair:
        first, second = pair.run(ROUNDS)
        paired = {n: pair.ratio(n, 1, 0) for n in ("latency", "ttft", "decode", "prefill", "energy")}
    return {
        name: (first[name], second[name], paired.get(name) or _ratio(first, second, name))
        for name in METRICS if name in first and name in second
    }


def _ratio(a: Measurement, b: Measurement, name: str) -> Quantity:
    x, y = a.value(name), b.value(name)
    if not x or y is None or name in ("agreement", "kl"):
        return Quantity.missing("1", "")
    return Quantity(value=y / x, unit="1", method=b[name].method)
