"""Where rounded matrices go: the torch engine's grouped layers, or the llama.cpp types that hold exactly such a grid.

    torch   2, 3, 4, 8 bits; any group that divides the rows, or the whole row
    gguf    groups of 32: q4_0 and q8_0 hold w = s (q - centre), q4_1 holds w = s q + z

Codes and half-precision scales are the same numbers in both, so what was solved is what is served, bit for bit. What
no type holds is refused, never rounded again: llama.cpp's 2 and 3 bit types put scales of scales over 256 columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fivefold.errors import Misfit, ModelError
from fivefold.model import Model, Trait, read_config
from fivefold.weights import StoredTensor, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from fivefold.techniques._shared.grids import Codes, Grid

Shapes = dict[str, tuple[int, int]]
INSIDE = re.compile(r"(?:(.*)\.)?(?:layers|h)\.\d+\..+")
HEAD = re.compile(r"(?:.*\.)?(embed_tokens|lm_head|wte)")
TYPES = {(4, True): "q4_0", (4, False): "q4_1", (8, True): "q8_0"}
BLOCK = 32
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Wish(Protocol):
    """What the techniques that round to groups have in common; `str` spells the technique."""

    @property
    def bits(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...

    @property
    def into(self) -> Literal["torch", "gguf"]: ...

    @property
    def head(self) -> Literal["keep", "int8"]: ...


class Breaks:
    """`breaks` of a technique by its `into`; of the class, both together."""

    def __get__(self, one: Wish | None, owner: type) -> frozenset[Trait]:
        lost = {"torch": frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE}),
                "gguf": frozenset({Trait.FLOAT_WEIGHTS, Trait.TORCH_GRAPH})}
        return lost["torch"] | lost["gguf"] if one is None else lost[one.into]


@dataclass(frozen=True)
class Target:
    wish: Wish

    @property
    def grid(self) -> Grid:
        from fivefold.techniques._shared.grids import Grid

        return Grid(bits=self.wish.bits, group=self.wish.group, symmetric=self.wish.symmetric)

    def check(self, model: Model) -> Shapes:
        """Module name -> (rows, columns) of what will be rounded. Raises Misfit with one sentence."""
        wish = self.wish
        if wish.into == "gguf":
            self._check_type()
        shapes = linear_shapes(model, str(wish))
        if wish.into == "gguf":
            from fivefold.techniques._shared.gguf_types import matrices

            matrices(model)
        elif any("." not in name.split(".h.")[0].split(".layers.")[0] and name.startswith(("h.", "layers."))
                 for name in shapes):
            raise Misfit(
                f"{wish} needs weights under the names of the model's modules, and {model.name} leaves out the base"
                " model's; save the model again with transformers"
            )
        wrong = Counter(columns for _, columns in shapes.values()
                        if columns % (wish.group or 2) or (wish.into == "gguf" and columns % BLOCK))
        if wrong:
            columns, count = wrong.most_common(1)[0]
            options = [g for g in (128, 64, 32) if all(c % g == 0 for _, c in shapes.values())]
            repair = f"choose group={options[0]}" if options else "use int8, which takes any width"
            raise Misfit(
                f"{wish} does not fit {wrong.total()} of {len(shapes)} linear layers, {count} have rows of {columns},"
                f" which groups of {wish.group or BLOCK} do not divide; {repair}"
            )
        return shapes

    def _check_type(self) -> None:
        wish = self.wish
        if wish.bits < 4:
            raise Misfit(
                f"{wish} fits no type of llama.cpp: its {wish.bits}-bit types put scales of scales over 256 columns;"
                ' set into="torch", or use mixed_precision'
            )
        if (wish.bits, wish.symmetric) not in TYPES:
            raise Misfit(f"{wish} fits no type of llama.cpp: its 8-bit type has no offsets; set symmetric=True")
        if wish.group != BLOCK:
            kind = TYPES[wish.bits, wish.symmetric]
            raise Misfit(f"{wish} fits no type of llama.cpp: {kind} has groups of {BLOCK}; set group={BLOCK}")

    def plan(self, model: Model) -> Model:
        """The export plan as `write` leaves it, without the solved codes."""
        if self.wish.into == "torch":
            scales = (16 if self.wish.symmetric else 32) / (self.wish.group or model.blueprint.width)
            return model.but(export=model.export.storing(self.wish.bits + scales, self.wish.head))
        from fivefold.techniques._shared.gguf_types import exported_names, fits, matrices

        names = exported_names(model)
        kind = TYPES[self.wish.bits, self.wish.symmetric]
        inside = {names[f"{name}.weight"] for name in linear_shapes(model, str(self.wish))}
        head = "f16" if self.wish.head == "keep" else "q8_0"
        types = {name: kind if name in inside else head if fits(head, columns) else "f16"
                 for name, (_, columns) in matrices(model).items()}
        plan = replace(model.export, format="gguf", default=kind, embedding=head, types=types, importance=None)
        return model.but(export=plan)

    def write(self, model: Model, technique: str, solved: Iterable[tuple[str, Codes]]) -> Model:
        """A model with these matrices (module name -> codes) in them, packed one after the other."""
        return self._write_torch(model, technique, solved) if self.wish.into == "torch" \
            else self._write_gguf(model, technique, solved)

    def said(self, count: int, total: int) -> str:
        """Coverage."""
        wish = self.wish
        where = f"in groups of {wish.group}" if wish.group else "per row"
        grid = "symmetric" if wish.symmetric else "with offsets"
        kind = f" as {TYPES[wish.bits, wish.symmetric]}" if wish.into == "gguf" else ""
        kept = "f16" if wish.into == "gguf" else "kept"
        rest = f"embedding and head {kept if wish.head == 'keep' else 'in 8 bits'}"
        return f"{count} of {total} linear layers in {wish.bits} bits {where}, {grid}{kind}; {rest}"

    def _write_torch(self, model: Model, technique: str, solved: Iterable[tuple[str, Codes]]) -> Model:
        from fivefold.engines._layers import grouped, packed, write_layers
        from fivefold.techniques._shared.modules import workspace

        done = {name: grouped.pack(c.codes, c.scale, c.offset, c.grid.bits) for name, c in solved}
        layers: dict[str, dict[str, Any]] = {name: {"kind": "grouped"} for name in done}
        if self.wish.head == "int8":
            layers |= {name: {"kind": "packed", "bits": 8, "group": 0} for name in head_names(model)}

        def make(name: str, weight: StoredTensor, settings: dict[str, Any]) -> dict[str, Tensor]:
            return done.pop(name) if name in done else packed.pack(weight.torch(), settings["bits"], 0)

        return model.but(path=write_layers(model.path, workspace(model, technique), layers, make))

    def _write_gguf(self, model: Model, technique: str, solved: Iterable[tuple[str, Codes]]) -> Model:
        from fivefold.export.gguf_ import exported_tensors
        from fivefold.techniques._shared.gguf_types import exported_names
        from fivefold.techniques._shared.modules import workspace
        from fivefold.weights import write_solved

        names, tensors = exported_names(model), exported_tensors(model.path)
        kind = TYPES[self.wish.bits, self.wish.symmetric]
        found = {}
        for name, codes in solved:
            exported = names[f"{name}.weight"]
            found[exported] = kind, _ggml(_as_exported(model, tensors[exported], codes), kind)
        planned = self.plan(model)
        folder = write_solved(workspace(model, technique), found)
        return planned.but(export=replace(planned.export, solved=folder))


def linear_shapes(model: Model, owner: str) -> Shapes:
    """Module name -> (outputs, inputs) of every linear layer inside the decoder's layers, from the headers alone."""
    config = read_config(model.path)
    if any(config.get(key) for key in EXPERTS):
        raise Misfit(
            f"{owner} does not treat mixtures of experts, which {model.name} is; use gguf(type=\"q8_0\") instead"
        )
    found: Shapes = {}
    for name, tensor in read_tensors(model.path):
        module = name.removesuffix(".weight")
        if module != name and len(tensor.shape) == 2 and INSIDE.fullmatch(module):
            rows, columns = tensor.shape[::-1] if transposed(model) else tensor.shape
            found[module] = (rows, columns)
    if not found:
        raise Misfit(f"{owner} finds no linear layers in a model of {model.blueprint.family}; use gguf instead")
    return found


def transposed(model: Model) -> bool:
    """Whether the family stores its matrices as (inputs, outputs)."""
    return model.blueprint.family == "gpt2"


def head_names(model: Model) -> list[str]:
    """Modules of the token embedding and, when it has a matrix of its own, the head."""
    names = [n.removesuffix(".weight") for n, t in read_tensors(model.path) if n.endswith(".weight")]
    return [n for n in names if HEAD.fullmatch(n) and not (model.blueprint.tied and n.endswith("lm_head"))]


def matrices_of(model: Model, shapes: Shapes) -> Iterable[tuple[str, Tensor]]:
    """Every matrix as float32 (outputs, inputs), read one after the other."""
    for name, tensor in read_tensors(model.path):
        module = name.removesuffix(".weight")
        if module in shapes and module != name:
            weight = tensor.torch().float()
            yield module, weight.T.contiguous() if transposed(model) else weight


def _as_exported(model: Model, tensor: Any, codes: Codes) -> Codes:
    """Rows in the order of the exported file, scales as it scales the weights; checked on the unrounded matrix."""
    import torch

    from fivefold.techniques._shared.grids import half
    from fivefold.techniques._shared.sensitivity import row_order

    own = torch.from_numpy(tensor.source.numpy())
    own = own.T if transposed(model) else own
    order = row_order(model, tensor.name, len(own))
    own, wanted = own[order], torch.from_numpy(tensor.numpy())
    factor = float((own * wanted).sum() / (own * own).sum().clamp_min(1e-30))
    factor = 1.0 if abs(factor - 1) < 1e-5 else factor
    if not torch.allclose(own * factor, wanted, rtol=1e-4, atol=1e-8):
        raise ModelError(
            f"{tensor.name} is not {tensor.source.name} with its rows in another order; set into=\"torch\""
        )
    offset = None if codes.offset is None else half(codes.offset[order] * factor)
    return replace(codes, codes=codes.codes[order], scale=half(codes.scale[order] * factor), offset=offset)


def _ggml(codes: Codes, kind: Literal["q4_0", "q4_1", "q8_0"] | str) -> Any:
    """The bytes of a ggml type, (rows, row bytes)."""
    import numpy as np

    from fivefold.techniques._shared.blocks import SUB, Parts, layouts, put_together

    rows, columns = codes.codes.shape
    blocks = columns // BLOCK
    ones = np.ones((rows, columns // SUB), np.float32)
    return put_together(Parts(
        type=kind, codes=codes.codes.numpy(), scale=codes.scale.numpy(), steps=ones, lows=None,
        minimum=None if codes.offset is None else codes.offset.numpy(),
        data=np.zeros((rows, blocks * layouts()[kind].size), np.uint8),
    ))
