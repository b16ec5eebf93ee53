"""Rotations learned: of all that leave the function as it is, those that rounding to one type hurts least.

Like `quarot`, the residual stream and every head's values are turned by orthogonal matrices that are folded into the
weights (`_shared/rotation`). Random ones differ among themselves in what rounding then costs. Here they are learned:
from the random Hadamard start, `steps` steps of Cayley descent on

    KL(parent || model with turned weights rounded to `type`)

over calibration text, the gradient taken through the rounding (`_shared/turning`). Rotations stay orthogonal,
so the result is the parent's function again, only better to round; what is kept is the state with the lowest held-out
KL, so it is never worse there than the random rotation it began with.

A step costs about 8 x parameters x tokens operations, and twice the rounding of all matrices. The memory is the model,
its activations and one layer's turned copy. As with `quarot` nothing is rotated online, a tied head may become a matrix
of its own (`residual=False` turns only values and outputs), and a model without outliers gains little. It is fitted to
plain rounding in one type: a rounding with feedback afterwards (`gptq`, `mixed_precision`) may not need the same.

Sources: Liu et al., SpinQuant, arXiv 2405.16406; Li, Fuxin, Todorovic, Cayley SGD, arXiv 2002.01113.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fivefold.errors import Misfit
from fivefold.model import Model, TrainPlan, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range

SEQUENCE = 256
HELD_OUT = 4
TEXT_TOKENS = 65_536
AT_ONCE = 2
RATES = {"residual": 1.0, "heads": 10.0}
"""The stream turns every matrix, a head's rotation two small parts of them."""


@dataclass(frozen=True, kw_only=True)
class SpinQuant(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.DENSE_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    lowers = {"memory": "indirect"}
    may_raise = ("memory", "network", "compute")
    headline = "Llama-2-7B W4A4KV4: perplexity 5.9 (fp 5.5), zero-shot 64.0 (fp 66.9)"
    perturbation = 0.5

    type: Annotated[Literal["q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"], Fixed()] = "q4_0"
    """The storage type whose rounding the rotations are fitted to."""
    residual: bool = True
    """Turn the residual stream too; False: only values and outputs of attention heads, which unties nothing."""
    steps: Annotated[int, Range(1, 10_000, log=True), Fixed()] = 32
    """Training steps."""
    tokens: Annotated[int, Range(64, 65_536, log=True), Fixed()] = 1024
    """Tokens per step, in sequences of 256."""
    rate: Annotated[float, Range(1e-5, 1.0, log=True), Fixed()] = 3e-4
    """Peak angle of a step of the stream, in radians (root mean square); heads turn ten times as far. Far larger ones
    only draw the rounding errors anew."""
    seed: Annotated[int, Range(0, 1 << 30), Fixed()] = 0
    """Of the start and of the order of the text."""

    def check(self, model: Model) -> None:
        from fivefold.techniques._shared.gguf_types import block
        from fivefold.techniques._shared.rotation import check

        check(model, self.name)
        shape = model.blueprint
        wrong = [w for w in (shape.width, shape.heads * shape.head_dim, shape.ffn) if w % block(self.type)]
        if wrong:
            raise Misfit(f"{self} cannot round rows of {wrong[0]} to {self.type}, whose blocks hold {block(self.type)};"
                         " use quarot instead")

    def effort_once(self, model: Model) -> float:
        return 0.0

    def effort(self, model: Model) -> float:
        return model.blueprint.parameters * (8.0 * self.tokens + 400.0) * self.steps

    def plan(self, model: Model) -> Model:
        from fivefold.techniques._shared.rotation import unties

        untied = self.residual and unties(model)
        return model.but(blueprint=replace(model.blueprint, tied=model.blueprint.tied and not untied))

    def apply(self, model: Model) -> Model:
        import torch

        from fivefold.techniques._shared.rotation import fold, random_start, said
        from fivefold.techniques._shared.turning import Turned
        from fivefold.training.module import load_module

        train, held = self._text(model)
        start = random_start(model.blueprint, self.seed, residual=self.residual)
        turned = Turned(load_module(model, torch.float32), start, self.type)
        done = self._fit(turned, train, held)
        rotation = turned.rotation()
        del turned
        result, changed = fold(model, self.name, rotation)
        return result.covered(
            f"spin_quant: held-out KL as {self.type} {done.before:.4f} -> {done.after:.4f} at step {done.best_step} of"
            f" {self.steps}; {said(model, result, changed)}"
        )

    def _fit(self, turned: Any, train: Any, held: Any) -> Any:
        import torch

        from fivefold.techniques._shared.turning import Cayley
        from fivefold.training.distill import forward_kl
        from fivefold.training.loop import Group, fit, windows

        known = [(row, turned.exact(row)) for row in (torch.as_tensor(r)[None] for r in held)]

        def loss(rows: Any) -> Any:
            tokens = torch.as_tensor(rows)
            with torch.autocast("cpu", torch.bfloat16):
                return forward_kl(turned.logits(tokens), turned.exact(tokens))

        def score() -> float:
            with torch.no_grad():
                return sum(float(forward_kl(turned.logits(t), a)) for t, a in known) / len(known)

        plan = TrainPlan(steps=self.steps, learning_rate=self.rate, tokens_per_step=self.tokens,
                         sequence=held.shape[1], seed=self.seed)
        stream = windows(train, max(1, self.tokens // held.shape[1]), self.seed, AT_ONCE)
        groups = [Group(parameters={name: p}, rate=RATES[name]) for name, p in turned.rotations().items()]
        return fit(plan, groups, loss, stream, score, optimizer=Cayley())

    def _text(self, model: Model) -> tuple[Any, Any]:
        """(training windows, held-out windows) of the calibration text, the latter spread over it."""
        from fivefold.techniques._shared.calibration import windows

        length = min(SEQUENCE, model.blueprint.context)
        wanted = min(TEXT_TOKENS, self.steps * self.tokens) // length + HELD_OUT
        found = windows(model, max(wanted, 2 * HELD_OUT), length)
        apart = len(found) // HELD_OUT
        out = [apart // 2 + apart * k for k in range(HELD_OUT)]
        return found[[i for i in range(len(found)) if i not in out]], found[out]
