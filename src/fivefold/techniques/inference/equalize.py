"""Columns scaled, without changing the function, so that rounding errors fall where they cost least.

Column j of a linear layer may be multiplied by s_j if its input is divided by s_j. Four such scalings per layer can be
folded away: into the norm before q, k, v, the one before gate and up (their gains stay 32-bit vectors in every file),
into v's rows for o, and into up's rows for down. The step of a block of weights follows its largest ones, so scaling a
column up refines its own rounding and coarsens its neighbours'. The best scales follow from two numbers per column, its
size m_j and the cost d_j of an error in it (`_shared/column_scales`); for one matrix alone

    s_j = (d_j / m_j^2)^(1/4)

d comes from the loss: the Fisher information of each matrix's input and output (`_shared/sensitivity`), and counts only
what later columns cannot make up for, since a rounding with feedback is to follow (`mixed_precision`, `gptq`). AWQ
instead takes the mean activation to a power and tries it on each block's output.

By itself it saves nothing. It gains nothing where every column is rounded alone (8 bits and more hardly profit), and
embedding and head have no scaling that could be folded. It needs a backward pass over the calibration text, and room
for columns^2 numbers per matrix.

Sources: Nagel et al., Data-Free Quantization Through Weight Equalization, arXiv 1906.04721; Lin et al., AWQ, arXiv
2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fivefold.errors import Misfit
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range

if TYPE_CHECKING:
    from fivefold.techniques._shared.column_scales import Columns

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
WINDOW = 512
PARTS = {"q": ("self_attn", "attn_q"), "k": ("self_attn", "attn_k"), "v": ("self_attn", "attn_v"),
         "o": ("self_attn", "attn_output"), "gate": ("mlp", "ffn_gate"), "up": ("mlp", "ffn_up"),
         "down": ("mlp", "ffn_down")}


@dataclass(frozen=True, kw_only=True)
class Equalize(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH, Trait.UNFITTED, Trait.PLAIN_GRAPH})
    lowers = {"memory": "indirect"}
    perturbation = 3.55
    """It disturbs nothing, but should see what pruning leaves."""

    block: Annotated[Literal[32, 64, 128, 256], Fixed()] = 32
    """Neighbouring weights that will share a scale; matrices it does not divide are refused."""
    windows: Annotated[int, Range(1, 4096), Fixed()] = 32
    """Calibration windows of 512 tokens."""

    def check(self, model: Model) -> None:
        shape = model.blueprint
        if shape.family not in FAMILIES:
            raise Misfit(
                f"{self} knows where scales of {', '.join(FAMILIES)} can be folded, not of {shape.family}; leave"
                " equalize out"
            )
        wrong = [w for w in (shape.width, shape.heads * shape.head_dim, shape.ffn) if w % self.block]
        if wrong:
            raise Misfit(f"{self} does not fit: blocks of {self.block} do not divide rows of {wrong[0]}; choose another"
                         " block")

    def effort_once(self, model: Model) -> float:
        return 8.0 * self.windows * WINDOW * model.blueprint.parameters

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.calibration import windows
        from fivefold.techniques._shared.modules import rewritten, stored_tensors

        self.check(model)
        tokens = windows(model, self.windows, WINDOW)
        known = columns(model, tokens)
        changed: dict[str, Any] = {}
        left: list[float] = []
        stored = stored_tensors(model)
        prefix = "model." if "model.norm.weight" in stored else ""
        for layer in range(model.blueprint.layers):
            left += _Layer(model, f"{prefix}layers.{layer}.", stored, changed).scaled(known[layer], self.block)
        tensors = {**stored, **changed}
        mean = sum(left) / len(left)
        return rewritten(model, self.name, tensors).covered(
            f"equalize: {len(left)} scalings folded into {model.blueprint.layers} of {model.blueprint.layers} layers,"
            f" {mean:.2f} of the loss of rounding foretold to be left on average (least {min(left):.2f}, most"
            f" {max(left):.2f}), from {tokens.size} calibration tokens; embedding and head kept"
        )


def columns(model: Model, tokens: Any) -> list[dict[str, Columns]]:
    """Per layer, part -> what is known of its columns."""
    import torch

    from fivefold.export.gguf_ import exported_tensors
    from fivefold.techniques._shared.column_scales import columns_of
    from fivefold.techniques._shared.sensitivity import curvatures
    from fivefold.training.module import load_module

    found = curvatures(model, load_module(model, torch.float32), tokens, outputs=True)
    tensors = exported_tensors(model.path)
    out = []
    for layer in range(model.blueprint.layers):
        own = {}
        for part, (_, exported) in PARTS.items():
            name = f"blk.{layer}.{exported}.weight"
            own[part] = columns_of(torch.from_numpy(tensors[name].numpy()), found.pop(name).shrunk(tokens.size))
        out.append(own)
    return out


class _Layer:
    """The tensors of one layer; those that scales change are put into `changed`."""

    def __init__(self, model: Model, at: str, stored: Mapping[str, Any], changed: dict[str, Any]) -> None:
        self.shape, self.at, self.stored, self.changed = model.blueprint, at, stored, changed
        self.plus = 1.0 if model.blueprint.family == "gemma" else 0.0

    def scaled(self, known: Mapping[str, Columns], block: int) -> list[float]:
        """Fold all four scalings; of each, the share of the loss that is left."""
        from fivefold.techniques._shared.column_scales import best

        left = []
        for norm, parts in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
            scales, share = best([known[part] for part in parts], block)
            self._norm(norm, scales)
            for part in parts:
                self._columns(part, scales)
            left.append(share)
        scales, share = best([known["o"]], block, spread=self._by_query, free=self.shape.kv_heads * self.shape.head_dim)
        self._columns("o", self._by_query(scales))
        self._rows("v", scales)
        scales, last = best([known["down"]], block)
        self._columns("down", scales)
        self._rows("up", scales)
        return [*left, share, last]

    def _by_query(self, scales: Any) -> Any:
        """Scales of values -> of o's inputs: query heads that share values share them."""
        shape = self.shape
        each = scales.view(shape.kv_heads, 1, shape.head_dim)
        return each.expand(shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim).reshape(-1)

    def _read(self, name: str) -> Any:
        return self.changed[name] if name in self.changed else self.stored[name].torch()

    def _write(self, name: str, value: Any) -> None:
        self.changed[name] = value.to(self.stored[name].torch().dtype)

    def _name(self, part: str, kind: str = "weight") -> str:
        return f"{self.at}{PARTS[part][0]}.{part}_proj.{kind}"

    def _columns(self, part: str, scales: Any) -> None:
        name = self._name(part)
        self._write(name, self._read(name).double() * scales)

    def _rows(self, part: str, scales: Any) -> None:
        name, bias = self._name(part), self._name(part, "bias")
        self._write(name, self._read(name).double() / scales[:, None])
        if bias in self.stored:
            self._write(bias, self._read(bias).double() / scales)

    def _norm(self, norm: str, scales: Any) -> None:
        name = f"{self.at}{norm}.weight"
        self._write(name, (self._read(name).double() + self.plus) / scales - self.plus)
