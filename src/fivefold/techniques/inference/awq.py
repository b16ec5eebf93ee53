"""AWQ: columns that carry large activations are scaled up before rounding, so that rounding hurts them less.

A column j of a linear layer may be multiplied by s_j if whatever feeds it is divided by s_j: the function stays the
same, but a rounding step of the group is now s_j times smaller for that column. Chosen is

    s_j = mean(|x_j|)^a, normalised;   a on a grid of 0 to 1 for the least error of the block's output

with the block rounded to nearest at `bits` and `group`. Four scalings per layer are folded away: into the norm before
q, k, v and the one before gate and up; into v's rows for o (shared by the query heads of a key-value head); into up's
rows for down. The graph stays plain and the weights floating point, so what rounds comes after it in the recipe:

    awq(bits=4, group=32) + rtn(bits=4, group=32)         or gptq, gguf, mixed_precision ...

By itself it saves nothing. It gains most where few columns are much larger than the rest, at 3 and 4 bits; gptq makes
up for the same errors in another way, so the two together gain less than the sum. It looks at means only and can
hardly overfit: a thousand tokens do. The memory is the model in float32, the windows' hidden states and one block.

Source: Lin et al., AWQ: Activation-aware Weight Quantization, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.errors import Misfit, ModelError
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range
from fivefold.techniques._shared.targets import linear_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from fivefold.techniques._shared.streaming import Stage

JUDGED = 1024
"""Tokens on which the error of a block's output is judged."""
SAME = 1e-2
"""Most relative change of a layer's output by folding that float32 arithmetic explains."""
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class Awq(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    lowers = {"memory": "indirect", "compute": "indirect"}
    headline = "Llama-3-8B in 4 bits, TinyChat: 2.7x faster on a 4090, 2.9x on Orin"
    perturbation = 3.5
    """It disturbs nothing, but should see what pruning leaves."""

    bits: Literal[2, 3, 4, 8] = 4
    """Bits of the rounding that is to follow."""
    group: Annotated[Literal[32, 64, 128, 0], Fixed()] = 32
    """Neighbouring weights that will share a scale; 0 is the whole row."""
    symmetric: Annotated[bool, Fixed()] = False
    """Whether the rounding that is to follow has no offsets."""
    points: Annotated[int, Range(2, 1000), Fixed()] = 20
    """Values of a that are tried."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 8
    """Calibration windows of 512 tokens for the mean activations."""

    def check(self, model: Model) -> None:
        shapes = linear_shapes(model, str(self))
        first = {name.rpartition("layers.0.")[2] for name in shapes if "layers.0." in name}
        if first != set(PARTS):
            strange = min((first or {"none under that name"}) ^ set(PARTS))
            raise Misfit(
                f"{self} knows decoders with q, k, v, o, gate, up and down projections, and {model.name}"
                f" ({model.blueprint.family}) differs in {strange}; leave awq out"
            )
        wrong = {columns for _, columns in shapes.values() if columns % (self.group or 1)}
        if wrong:
            raise Misfit(
                f"{self} does not fit: groups of {self.group} do not divide rows of {min(wrong)}; choose another group"
            )

    def effort_once(self, model: Model) -> float:
        return 0.0

    def effort(self, model: Model) -> float:
        return model.blueprint.parameters * 2.0 * (JUDGED * self.points + 3 * 512 * self.windows)

    def apply(self, model: Model) -> Model:
        import torch

        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import rewritten, stored_tensors
        from fivefold.techniques._shared.streaming import stages
        from fivefold.training.module import load_module, stored_name

        self.check(model)
        tokens = windows(model, self.windows)
        module = load_module(model, torch.float32)
        before = after = 0.0
        groups = 0
        for stage in stages(module, tokens):
            for plain, scaled in self.scale(stage):
                before, after, groups = before + plain, after + scaled, groups + 1
        stored = stored_tensors(model)
        tensors: dict[str, Any] = dict(stored)
        for name, value in module.state_dict().items():
            if ".layers." in name:
                place = stored_name(module, stored, name)
                tensors[place] = value.to(stored[place].torch().dtype)
        gain = 1 - after / before if before else 0.0
        return rewritten(model, "awq", tensors).covered(
            f"awq: {groups} scalings folded into {model.blueprint.layers} of {model.blueprint.layers} layers,"
            f" {gain:.0%} less output error of the blocks at {self.bits} bits, judged on"
            f" {min(JUDGED, tokens.size)} of {tokens.size} calibration tokens"
        )

    def scale(self, stage: Stage) -> Iterator[tuple[float, float]]:
        """Scale one layer in place; of each scaling, the block's share of output error without and with it."""
        layer = stage.layer
        attention, mlp = layer.self_attn, layer.mlp
        second = getattr(layer, "pre_feedforward_layernorm", None) or layer.post_attention_layernorm
        q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        repeat = o.in_features // v.out_features
        head = getattr(attention, "head_dim", v.out_features)
        want = stage.run(stage.hidden[0])
        yield self._one(stage, attention, [q, k, v], layer.input_layernorm)
        yield self._one(stage, o, [o], v, lambda s: _shared(s, repeat, head))
        yield self._one(stage, mlp, [mlp.gate_proj, mlp.up_proj], second)
        yield self._one(stage, mlp.down_proj, [mlp.down_proj], mlp.up_proj)
        moved = (stage.run(stage.hidden[0]) - want).norm() / want.norm()
        if not moved < SAME:
            raise ModelError(
                f"{self.name} changed what layer {stage.number} computes by {float(moved):.1%}: this family does not"
                " let its scales be folded away; leave awq out"
            )

    def _one(
        self, stage: Stage, block: Any, parts: list[Any], source: Any,
        same: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda s: (s, s),
    ) -> tuple[float, float]:
        """Choose the scales of the inputs of `parts` and fold them into `source`. `same` makes scales equal that must
        be: it gives those of the inputs and of the source's outputs."""
        import torch

        total, count = torch.zeros(parts[0].in_features), 0
        for x in stage.inputs(parts[0]):
            total += x.abs().sum(0)
            count += len(x)
        mean = (total / count).clamp_min(1e-8)
        calls = list(stage.calls(block, max(1, JUDGED // stage.hidden[0].shape[1])))
        want = [_run(block, call) for call in calls]
        size = sum(float(w.square().sum()) for w in want)
        originals = [part.weight.data.clone() for part in parts]
        found: list[tuple[float, Tensor, Tensor]] = []
        for point in range(self.points):
            inner, outer = same(mean.pow(point / self.points))
            middle = (inner.max() * inner.min()).sqrt()
            inner, outer = inner / middle, outer / middle
            for part, original in zip(parts, originals, strict=True):
                part.weight.data.copy_(self._rounded(original * inner) / inner)
            lost = sum(float((_run(block, c) - w).square().sum()) for c, w in zip(calls, want, strict=True))
            found.append((lost, inner, outer))
        lost, inner, outer = min(found, key=lambda f: f[0])
        for part, original in zip(parts, originals, strict=True):
            part.weight.data.copy_(original * inner)
        _divide(source, outer)
        return found[0][0] / max(size, 1e-30), lost / max(size, 1e-30)

    def _rounded(self, weight: Tensor) -> Tensor:
        from fivefold.techniques._shared.grids import Grid, round_to

        return round_to(weight, Grid(bits=self.bits, group=self.group, symmetric=self.symmetric)).matrix()


def _run(block: Any, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    import torch

    with torch.no_grad():
        out = block(*call[0], **call[1])
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first.float()


def _shared(scales: Tensor, repeat: int, head: int) -> tuple[Tensor, Tensor]:
    """One scale for the same channel of all `repeat` query heads of a key-value head: their geometric mean."""
    few = scales.log().view(-1, repeat, head).mean(1).exp()
    return few[:, None].expand(-1, repeat, -1).reshape(-1), few.reshape(-1)


def _divide(source: Any, scales: Tensor) -> None:
    """Divide a norm's gains or a linear layer's rows, and its bias. Gemma's norms multiply by 1 + weight."""
    weight = source.weight.data
    if weight.dim() == 2:
        weight /= scales[:, None]
    elif type(source).__name__.startswith("Gemma"):
        weight.copy_((1 + weight) / scales - 1)
    else:
        weight /= scales
    if getattr(source, "bias", None) is not None:
        source.bias.data /= scales
