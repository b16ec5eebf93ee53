"""Compare: a paired verdict on model B against model A, and their resources side by side.

Quality is decided on the same items: log-loss per token on held-out text (items are windows), or right and wrong
answers of a labelled task. `tasks.paired` turns the paired differences into ACCEPT, REGRESSION or INCONCLUSIVE with the
number of items that would decide. Beside the verdict stands what a mean hides: calibration, flips, the groups of tokens
or items that are hurt most (`tasks.subgroups`) and, when asked for, what an attack on the questions leaves
(`tasks.robustness`). Resources come from interleaved rounds in fresh processes, so the ratio B / A is free of the
machine's drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fivefold.engines import Session, open_session
from fivefold.errors import DataError
from fivefold.files import sha256
from fivefold.model import Model
from fivefold.quantity import Measurement, Quantity
from fivefold.study.quality import attacked, scored, victims
from fivefold.tasks.choice import Answers, ChoiceSet
from fivefold.tasks.paired import Decision, Verdict, interval, verdict
from fivefold.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fivefold.tasks.robustness import Attack
    from fivefold.tasks.subgroups import Groups

METRICS = ("latency", "ttft", "decode", "prefill", "memory", "size", "energy", "money", "network")
QUALITY = (
    "agreement", "kl", "worst_group_kl", "loss", "perplexity", "ece", "accuracy", "label_loyalty",
    "probability_loyalty", "flips", "choice_ece", "after_attack", "attack_queries",
)
OF_TWO = ("agreement", "kl", "worst_group_kl", "label_loyalty", "probability_loyalty", "flips")
"""Metrics of B against A, so that A has none of its own and no ratio is formed."""
WINDOW = 128
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What `a` and `b` measured on the same items, the verdict on `what`, and what the means hide."""

    what: str
    verdict: Verdict
    a: Measurement
    b: Measurement
    groups: Groups
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`rows`: metric -> (A, B, B / A). `groups`: quality by subgroup of inputs. `notes`: sentences on both."""

    decision: Decision
    verdict: Verdict
    sentence: str
    rows: Mapping[str, tuple[Quantity, Quantity, Quantity]]
    groups: Groups
    notes: tuple[str, ...] = ()


def compare(
    a: Model, b: Model, *, task: str = "fidelity", margin: float = 0.01, items: int = 64, workload: Any = None,
    text: str = "encyclopedia", country: str = "world", attack: int = 0,
) -> Comparison:
    """`attack` items of a labelled task are attacked too. Raises DataError when the models cannot be paired (another
    tokenizer on a text task), UserError for an attack without a labelled task."""
    on_text = task == "fidelity"
    targets = victims(() if on_text else (task,), attack)
    judged = _on_text(a, b, margin, items, text) if on_text else _on_labels(a, b, task, margin, items, targets)
    rows: dict[str, tuple[Quantity, Quantity, Quantity]] = {}
    for name in QUALITY:
        if name in judged.a or name in judged.b:
            missing = Quantity.missing("1", "is the reference")
            first = missing if name in OF_TWO else judged.a.get(name, missing)
            rows[name] = (first, judged.b.get(name, missing), _ratio(judged.a, judged.b, name))
    if workload is not None:
        rows |= _resources(a, b, workload, country)
    return Comparison(
        decision=judged.verdict.decision, verdict=judged.verdict, sentence=f"{judged.what}: {judged.verdict}",
        rows=rows, groups=judged.groups, notes=judged.notes,
    )


def _on_text(a: Model, b: Model, margin: float, items: int, text: str) -> Judgement:
    from fivefold.tasks.fidelity import Reference, fidelity
    from fivefold.tasks.subgroups import of_tokens
    from fivefold.tasks.text import windows

    if sha256(a.tokenizer_file) != sha256(b.tokenizer_file):
        raise DataError(
            "the models have different tokenizers, so their tokens cannot be paired; compare them on a labelled task,"
            " for example --task piqa"
        )
    tokenizer = Tokenizer(a.tokenizer_file)
    sample = windows(tokenizer, text, "evaluation", items * WINDOW, WINDOW)
    session = open_session(a)
    try:
        reference = Reference.record(session, sample)
    finally:
        session.close()
    session = open_session(b)
    try:
        other = fidelity(session, reference)
    finally:
        session.close()
    own = reference.itself()
    groups = of_tokens(reference, other, tokenizer)
    found = other.measurement
    if groups.worst is not None:
        found = found.merged(Measurement({"worst_group_kl": groups.worst.values["kl"]}))
    return Judgement(
        what=f"log-loss of B against A on {text}, margin {margin:g} nat", a=own.measurement, b=found, groups=groups,
        verdict=verdict(own.loss, other.loss, margin, better="lower", clusters=own.window), notes=(str(groups),),
    )


def _on_labels(
    a: Model, b: Model, task: str, margin: float, items: int, targets: tuple[ChoiceSet, ...]
) -> Judgement:
    from fivefold.tasks import choice
    from fivefold.tasks.flips import flips
    from fivefold.tasks.subgroups import of_items

    asked = choice.load(task, items)
    (first, before), (second, after) = (_asked(model, asked, targets) for model in (a, b))
    own, other = scored([first]), scored([second], [first])
    groups = of_items(asked, first, second)
    notes = [str(groups), f"flips: {flips(first, second)}"]
    if before is not None and after is not None:
        own, other = own.merged(before.measurement), other.merged(after.measurement)
        notes += _of_attack(before, after)
    return Judgement(
        what=f"accuracy of B against A on {task}, margin {margin:g}", a=own, b=other, groups=groups, notes=tuple(notes),
        verdict=verdict(first.correct, second.correct, margin),
    )


def _asked(model: Model, asked: ChoiceSet, targets: tuple[ChoiceSet, ...]) -> tuple[Answers, Attack | None]:
    from fivefold.tasks.choice import answer

    session: Session = open_session(model)
    tokenizer = Tokenizer(model.tokenizer_file)
    try:
        answers = answer(session, tokenizer, asked)
        return answers, attacked(session, tokenizer, targets) if targets else None
    finally:
        session.close()


def _of_attack(a: Attack, b: Attack) -> list[str]:
    """The paired difference after the attack, and one answer of B that it turned."""
    d = b.held.astype(float) - a.held
    found = []
    if len(d) > 1:
        low, high = interval(d)
        found.append(f"accuracy after attack, B - A: {100 * d.mean():+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
                     f" on {len(d)} items")
    turned = [i for i in b.items if i.before and not i.after]
    if turned:
        found.append(f"turned by {turned[0].edits} of its words: {' '.join(turned[0].text.split())[:200]}")
    return found


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
    if not x or y is None or name in OF_TWO:
        return Quantity.missing("1", "")
    return Quantity(value=y / x, unit="1", method=b[name].method)
