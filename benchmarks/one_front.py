"""One front: the searched combination of techniques against the best single one, at equal bytes; and what order does.

    python benchmarks/one_front.py [--sizes 78,92,105] [--windows 8] [--steps 120] [--orders ""]

Model, text and engine as in quantization.py: SmolLM2-135M (the off-grid parent), GGUF files run by llama.cpp, KL to
the parent in F32. At each size every recipe below is built for that size; the best single technique and the best
combination are chosen by their KL on the encyclopedia's screen split, which nothing is calibrated on, and both are then
measured on the evaluation split. Differences are paired by token, intervals clustered by window.

Order effects: of the pairs of techniques that are legal in both orders (no trait broken that the other needs), each is
applied in both, then stored in one type; a recipe puts the weaker perturbation first, and this says whether that is the
better order.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _common import number, publish, table
from quantization import WINDOW, Array, Judge, overhead, plain_file, weight_bytes

from fivefold import bundled
from fivefold.errors import Misfit
from fivefold.export import export
from fivefold.model import Model, Trait
from fivefold.recipe import Recipe, Technique, fit
from fivefold.tasks.paired import interval
from fivefold.tasks.text import windows
from fivefold.techniques._shared.gguf_types import matrices
from fivefold.tokenizer import Tokenizer

MIXED = 'mixed_precision(bits={bits:.5f}, rounding="both", windows=128)'
SINGLES = {
    "mixed_precision": "mixed_precision(bits={bits:.5f})",
    "mixed_precision, both ways, 128 windows": MIXED,
    "gguf iq4_nl / iq4_nl": 'gguf(type="iq4_nl", embedding="iq4_nl")',
    "gguf q5_0 / iq4_nl": 'gguf(type="q5_0", embedding="iq4_nl")',
    "gguf q5_0 / q8_0": 'gguf(type="q5_0", embedding="q8_0")',
}
COMBINATIONS = {
    "quarot + mixed": f"quarot(residual=False) + {MIXED}",
    "awq + mixed": f"awq + {MIXED}",
    "equalize + mixed, feedback": "equalize + mixed_precision(bits={bits:.5f}, windows=128)",
    "equalize + mixed": f"equalize + {MIXED}",
    "equalize + mixed + repair": f"equalize + {MIXED} + repair(steps={{steps}})",
    "mixed + repair": f"{MIXED} + repair(steps={{steps}})",
    "awq + mixed + repair": f"awq + {MIXED} + repair(steps={{steps}})",
}
ORDERED = ("quarot(residual=False)", "awq", "prune_depth(layers=1)", "wanda(sparsity=0.2)", "sparsegpt(sparsity=0.2)",
           "low_rank", "smooth_quant")
STORED = 'gguf(type="iq4_nl", embedding="q8_0")'
GOALS = {78.0: 0.5, 81.0: 0.5, 92.0: 0.3, 105.0: 0.3}


class Tokens(Judge):
    """KL of every token, (windows, 512), on the evaluation text or on that for choosing."""

    def __init__(self, parent: Model, count: int, work: Path) -> None:
        super().__init__(parent, count, work)
        known = Tokenizer(parent.path)
        self.screen = np.array(windows(known, "encyclopedia", "screen", 2 * WINDOW, WINDOW), np.int64)
        plain = replace(parent.export, format="gguf", default="f32")
        self.expected = list(self._run(export(parent.but(export=plain), work / "screen"), self.screen))

    def _run(self, model: Model, tokens: Array) -> Iterator[Array]:
        kept, self.tokens = self.tokens, tokens
        try:
            yield from self.answers(model)
        finally:
            self.tokens = kept

    def kl(self, model: Model) -> Array:
        return np.stack([divergence(theirs.astype(np.float32), ours)
                         for ours, theirs in zip(self.answers(model), self.parent, strict=True)])

    def screened(self, model: Model) -> float:
        return float(np.mean([divergence(theirs, ours)
                              for ours, theirs in zip(self._run(model, self.screen), self.expected, strict=True)]))


def divergence(theirs: Array, ours: Array) -> Array:
    out: Array = (np.exp(theirs) * (theirs - ours)).sum(1)
    return out


@dataclass(frozen=True, kw_only=True)
class Built:
    name: str
    recipe: str
    model: Model
    screened: float
    seconds: float
    note: str


def build(judge: Tokens, parent: Model, name: str, recipe: str, folder: Path) -> Built:
    started = time.monotonic()
    made = Recipe.parse(recipe).apply(parent.but(work=folder / "work"))
    seconds = time.monotonic() - started
    model = export(made, folder / "out")
    shutil.rmtree(folder / "work", ignore_errors=True)
    found = Built(name=name, recipe=recipe, model=model, screened=judge.screened(model), seconds=seconds,
                  note=made.coverage[-1])
    print(f"{name}: screen {found.screened:.4f}, {weight_bytes(model) / 1e6:.1f} MB, {seconds:.0f} s", flush=True)
    return found


def best(builts: Sequence[Built], megabytes: float) -> Built:
    """The least KL on the screen split among those that fit."""
    return min((b for b in builts if weight_bytes(b.model) <= megabytes * 1e6), key=lambda b: b.screened)


def front(judge: Tokens, parent: Model, sizes: Sequence[float], steps: int, work: Path) -> tuple[str, list[str]]:
    """The table, and a line per goal."""
    weights, extra = sum(r * c for r, c in matrices(parent).values()), overhead(parent, work)
    rows, said = [], []
    for size in sizes:
        given = {"bits": (size * 1e6 - extra) * 8 / weights, "steps": steps}
        folder = work / f"{size:g}"
        made = {
            kind: [build(judge, parent, name, text.format(**given), folder / f"{kind}{i}")
                   for i, (name, text) in enumerate(recipes.items())]
            for kind, recipes in (("single", SINGLES), ("combined", COMBINATIONS))
        }
        single, combined = best(made["single"], size), best(made["combined"], size)
        plain = judge.kl(plain_file(parent, size, folder, extra))
        ours, theirs = judge.kl(combined.model), judge.kl(single.model)
        low, high = interval((ours - theirs).reshape(-1), np.arange(len(ours)).repeat(WINDOW))
        ratio, ends = float(ours.mean() / plain.mean()), bootstrap(ours.mean(1), plain.mean(1))
        for name, built, kl in (("plain solver", None, plain), (single.name, single, theirs),
                                (combined.name, combined, ours)):
            difference = f"{float((ours - theirs).mean()):+.4f} [{low:+.4f}, {high:+.4f}]" if kl is ours else ""
            rows.append([
                f"{size:g} MB: {name}", number(weight_bytes(built.model) / 1e6 if built else size, 1),
                number(float(kl.mean()), 4), number(float(kl.mean() / plain.mean())) if built else "", difference,
                number(built.seconds, 0) if built else "",
            ])
        goal = GOALS.get(size, 0.3)
        said.append(
            f"- {size:g} MB: {ratio:.2f} [{ends[0]:.2f}, {ends[1]:.2f}] times the plain solver's KL, asked for at most"
            f" {goal}: **{'reached' if ratio <= goal else 'not reached'}**; less KL than the best single technique:"
            f" **{'yes' if high < 0 else 'no' if low > 0 else 'inconclusive'}**. `{combined.recipe}`: {combined.note}"
        )
        print("\n".join(said[-1:]), flush=True)
        shutil.rmtree(folder)
    heads = ("file", "MB", "KL", "ratio to the plain solver", "combination - single, per token", "seconds to make")
    return table(heads, rows), said


def bootstrap(ours: Array, theirs: Array, rounds: int = 10_000) -> tuple[float, float]:
    """95 % interval of the ratio of means, whole windows drawn."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(rounds, len(ours)))
    low, high = np.quantile(ours[drawn].mean(1) / theirs[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def orders(judge: Tokens, parent: Model, techniques: Sequence[str], work: Path) -> str:
    """One row per pair that is legal in both orders."""
    rows = []
    known = [next(iter(Recipe.parse(text))) for text in techniques]
    for pair in itertools.combinations(known, 2):
        if not all(legal(order) for order in (pair, pair[::-1])):
            continue
        chosen = Recipe(*pair).techniques
        found = []
        for i, order in enumerate((chosen, chosen[::-1])):
            folder = work / f"order{i}"
            found.append(judge.kl(export(in_order(order, parent.but(work=folder / "work")), folder / "out")))
            shutil.rmtree(folder)
        difference = found[1] - found[0]
        low, high = interval(difference.reshape(-1), np.arange(len(difference)).repeat(WINDOW))
        verdict = "yes" if low > 0 else "no" if high < 0 else "no difference seen"
        rows.append([" then ".join(map(str, chosen)), number(float(found[0].mean()), 4),
                     number(float(found[1].mean()), 4), f"[{low:+.4f}, {high:+.4f}]", verdict])
        print(rows[-1], flush=True)
    heads = ("weaker perturbation first", "KL", "KL the other way round", "difference", "the rule holds")
    return table(heads, rows)


def legal(order: Sequence[Technique]) -> bool:
    try:
        fit(order, frozenset(Trait), "a fresh model")
    except Misfit:
        return False
    return True


def in_order(order: Sequence[Technique], model: Model) -> Model:
    """In exactly that order, which a Recipe would choose itself; then stored."""
    for technique in order:
        technique.check(model)
        model = technique.apply(model).without(*technique.breaks)
    return Recipe.parse(STORED).apply(model)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--sizes", default="78,92,105")
    options.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    options.add_argument("--steps", type=int, default=120, help="of repair")
    options.add_argument("--orders", default=";".join(ORDERED), help="techniques for the order effects; empty: none")
    options.add_argument("--quick", action="store_true", help="write no fragment")
    given = options.parse_args()
    parent = bundled.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        judge = Tokens(parent, given.windows, work)
        sizes = [float(s) for s in given.sizes.split(",") if s]
        shown, said = front(judge, parent, sizes, given.steps, work)
        ways = orders(judge, parent, [t for t in given.orders.split(";") if t], work)
    body = (f"SmolLM2-135M off-grid parent in llama.cpp, {given.windows * WINDOW} evaluation tokens in windows of"
            f" {WINDOW}; KL against the parent in F32. Chosen by KL on 1,024 tokens of the screen split among"
            f" {len(SINGLES)} single and {len(COMBINATIONS)} combined recipes.\n\n" + "\n".join(said) + f"\n\n{shown}"
            f"\n\n**Order.** Pairs legal in both orders, stored as {STORED}:\n\n{ways}")
    publish("one_front", "One front", body, packages=("xllamacpp", "torch"), keep=not given.quick)


if __name__ == "__main__":
    main()
