"""The two damaged models that can be taught: one whose weights are rounded in the file, one whose weights are float.

Either is the module with some parameters computed anew at every step (`weights()`), so any family of transformers can
be trained through it without a change to its code:

    rounded   W = the value of the packed bytes (`rounded.Rounded`); trained are scales, minima and, if wanted, codes
    float     W = (W0 + A B) * mask with A (rows, rank), B (rank, columns); merged afterwards, zeros of Wanda stay zero

In both, the vectors (norm gains, biases) are trained too: every file keeps them in 32 bits, so they cost nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from fivefold.errors import Misfit
from fivefold.export.gguf_ import Exported, exported_tensors
from fivefold.model import Model, Trait
from fivefold.techniques._shared import gguf_types
from fivefold.techniques._shared.blocks import layouts
from fivefold.techniques._shared.modules import linears, matrix, rewritten, stored_tensors, workspace
from fivefold.techniques._shared.rounded import Rounded
from fivefold.techniques._shared.sensitivity import row_order
from fivefold.training.loop import Group
from fivefold.training.module import stored_name
from fivefold.weights import read_solved, write_solved


class Student:
    """`module` is the damaged model as loaded; trained copies replace its vectors, `weights()` its matrices."""

    def __init__(self, model: Model, module: nn.Module) -> None:
        self.model, self.module = model, module
        self.vectors = {name: nn.Parameter(p.detach().float().clone())
                        for name, p in module.named_parameters() if p.ndim == 1}

    def weights(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def groups(self) -> list[Group]:
        raise NotImplementedError

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        given = {**self.vectors, **self.weights()}
        logits: torch.Tensor = functional_call(self.module, given, (tokens,), {"use_cache": False}).logits
        return logits

    def _vectors_on_disk(self) -> dict[str, Any]:
        tensors: dict[str, Any] = dict(stored_tensors(self.model))
        for name, vector in self.vectors.items():
            tensors[stored_name(self.module, tensors, name)] = vector.detach()
        return tensors


class RoundedStudent(Student):
    """Trains through the storage types of a GGUF plan."""

    def __init__(self, model: Model, module: nn.Module, *, codes: bool) -> None:
        super().__init__(model, module)
        plan = model.export
        solved = read_solved(plan.solved) if plan.solved else {}
        importance = _importance(model)
        stored = gguf_types.exported_names(model)
        tensors = exported_tensors(model.path)
        self.parts = nn.ModuleDict()
        self.orders: dict[str, tuple[str, torch.Tensor, bool]] = {}
        self.fixed: dict[str, torch.Tensor] = {}
        self.exact: list[str] = []
        for parameter_name, parameter in module.named_parameters():
            if parameter.ndim != 2 or not any(n == parameter_name or f"{module.base_model_prefix}.{n}" == parameter_name
                                              for n in stored):
                continue
            name = stored[stored_name(module, stored, parameter_name)]
            original = tensors[name].numpy()
            kind = plan.types.get(name) or (plan.embedding if name == gguf_types.EMBEDDING else None) or plan.default
            if name in solved:
                kind, data = solved[name][0].lower(), np.array(solved[name][1].numpy())
            else:
                data = _pack(original, kind.lower(), importance.get(name))
            turned = tensors[name].family.conv1d and name.startswith("blk.")
            self.orders[name] = (parameter_name, _inverse(model, tensors[name], original, parameter), turned)
            if kind.lower() in layouts():
                key = name.replace(".", "/")
                self.parts[key] = Rounded(data.reshape(len(original), -1), kind.lower(), original if codes else None)
            else:
                self.exact.append(name)
                self.fixed[name] = torch.from_numpy(_unpack(data, kind.lower(), original.shape))

    def weights(self) -> dict[str, torch.Tensor]:
        out = {}
        for name, (parameter, order, turned) in self.orders.items():
            key = name.replace(".", "/")
            value = self.parts[key]() if key in self.parts else self.fixed[name]
            value = value[order]
            out[parameter] = value.T if turned else value
        return out

    def groups(self) -> list[Group]:
        found = [(name, dict(part.named_parameters())) for name, part in self.parts.items()]
        scales = {f"{name}.{key}": p for name, own in found for key, p in own.items() if key != "u"}
        codes = {f"{name}.u": own["u"] for name, own in found if "u" in own}
        return [Group(parameters={**self.vectors, **scales}), Group(parameters=codes, rate=CODE_RATE)]

    def result(self) -> Model:
        solved = {key.replace("/", "."): (part.parts.type, part.packed()) for key, part in self.parts.items()}
        old = read_solved(self.model.export.solved) if self.model.export.solved else {}
        for name in self.exact:
            if name in old:
                solved[name] = (old[name][0], np.array(old[name][1].numpy()))
        folder = write_solved(workspace(self.model, "repair"), solved)
        done = rewritten(self.model, "repair", self._vectors_on_disk())
        return done.but(export=replace(self.model.export, solved=folder))


CODE_RATE = 1.0
"""Codes move in units of one step, scales in units of themselves. At 8e-3 a step every code moving at once did harm."""


class FloatStudent(Student):
    """Low-rank changes to every linear layer of a pruned model, merged at the end."""

    def __init__(self, model: Model, module: nn.Module, *, rank: int, seed: int) -> None:
        super().__init__(model, module)
        draw = torch.Generator().manual_seed(seed)
        self.sparse = Trait.DENSE_WEIGHTS not in model.traits
        self.layers = dict(linears(module))
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in self.layers.items():
            rows, columns = matrix(layer).shape
            key = name.replace(".", "/")
            start = torch.randn(rank, columns, generator=draw) / columns**0.5
            self.down[key], self.up[key] = nn.Parameter(start), nn.Parameter(torch.zeros(rows, rank))

    def weights(self) -> dict[str, torch.Tensor]:
        from torch.nn import Linear

        out = {}
        for name, layer in self.layers.items():
            key, weight = name.replace(".", "/"), matrix(layer).float()
            value = weight + self.up[key] @ self.down[key]
            if self.sparse:
                value = value * (weight != 0)
            out[f"{name}.weight"] = value if isinstance(layer, Linear) else value.T
        return out

    def groups(self) -> list[Group]:
        both = {"down": self.down, "up": self.up}
        changes = {f"{kind}.{name}": p for kind, part in both.items() for name, p in part.items()}
        return [Group(parameters={**self.vectors, **changes})]

    def result(self) -> Model:
        tensors = self._vectors_on_disk()
        with torch.no_grad():
            for name, weight in self.weights().items():
                tensors[stored_name(self.module, tensors, name)] = weight.contiguous()
        return rewritten(self.model, "repair", tensors)


def _importance(model: Model) -> dict[str, Any]:
    from fivefold.weights import check_safetensors

    return dict(check_safetensors(model.export.importance)) if model.export.importance else {}


def _pack(original: Any, kind: str, importance: Any) -> Any:
    from fivefold.engines._quantize import quantize

    return quantize(original, kind, None if importance is None else importance.numpy().reshape(-1))


def _unpack(data: Any, kind: str, shape: tuple[int, ...]) -> Any:
    from fivefold.engines._quantize import dequantize

    return dequantize(data, kind, (shape[0], shape[1]))


def _inverse(model: Model, tensor: Exported, exported: Any, parameter: torch.Tensor) -> torch.Tensor:
    """Rows of the exported matrix in the order of the module's. Raises Misfit when it is more than another order."""
    order = torch.argsort(row_order(model, tensor.name, len(exported)))
    turned = parameter.detach().float()
    if tensor.family.conv1d and tensor.name.startswith("blk."):
        turned = turned.T
    if not torch.allclose(torch.from_numpy(exported)[order], turned, rtol=1e-5, atol=1e-6):
        raise Misfit(f"repair cannot train {tensor.name}, which the exported file scales; remove repair")
    return order
