"""Activations near zero: where a model has them, which threshold drops a wanted share, and how such layers are stored.

The threshold of a site is a quantile of |x| over calibration tokens, so on other text about the same share is dropped.
Sites are calibrated in the order in which they compute, in one pass: what a site drops is already missing from the
inputs of all later ones, as it will be when the model is served. Linear layers that read the same tensor (queries,
keys and values; gate and up) have one threshold. The memory is the model and one layer's activations of all tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fivefold.errors import Misfit
from fivefold.model import Model, read_config
from fivefold.weights import DTYPE_BYTES, read_tensors

if TYPE_CHECKING:
    import torch

PARTS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu",
    "relu": "relu",
}
"""transformers' name -> the kernel's."""
_PART = re.compile(r"((?:.*\.)?layers\.\d+\.mlp)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
_INSIDE = re.compile(r"(?:.*\.)?(?:layers|h)\.\d+\..+\.weight")


def compiled(owner: str) -> None:
    """Refuse where the kernel cannot be compiled. Raises Misfit."""
    from fivefold.engines._native import available

    if (why := available("gather")) is not None:
        raise Misfit(f"{owner} computes with a kernel of its own, but {why}")


def linear_count(model: Model, owner: str) -> int:
    """How many matrices lie inside the layers, by the names on disk. Raises Misfit when there are none."""
    count = sum(len(t.shape) == 2 and bool(_INSIDE.fullmatch(name)) for name, t in read_tensors(model.path))
    if not count:
        raise Misfit(f"{owner} finds no linear layers in a model of {model.blueprint.family}; leave it out")
    return count


def gated(model: Model) -> tuple[list[str], str | None]:
    """Names of the feed-forwards act(gate x) * up x -> down without biases, and their activation, by names on disk."""
    parts: dict[str, set[str]] = {}
    for name, _ in read_tensors(model.path):
        if found := _PART.fullmatch(name):
            parts.setdefault(found[1], set()).add(found[2] if found[3] == "weight" else "bias")
    config = read_config(model.path)
    kind = ACTIVATIONS.get(str(config.get("hidden_activation") or config.get("hidden_act")))
    return [name for name, found in parts.items() if found == set(PARTS)], kind


def feed_forwards(model: Model, owner: str) -> tuple[list[str], str]:
    """`gated` of a model in which every layer has one. Raises Misfit."""
    found, kind = gated(model)
    if len(found) != model.blueprint.layers:
        raise Misfit(
            f"{owner} treats gated feed-forwards (gate, up and down without biases), and {model.name} has {len(found)}"
            f" in {model.blueprint.layers} layers; use teal instead"
        )
    if kind is None:
        raise Misfit(f"{owner} knows the activations {', '.join(ACTIVATIONS)}, not that of {model.name}; use teal")
    return found, kind


def planned(model: Model, parts: Iterable[str] = PARTS, more: int = 0) -> Model:
    """The model as planned when the matrices named `parts` are stored in bfloat16, and `more` numbers beside them."""
    chosen, held, whole = set(parts), 16.0 * more, 0
    for name, tensor in read_tensors(model.path):
        if len(tensor.shape) == 2 and _INSIDE.fullmatch(name):
            numbers = math.prod(tensor.shape)
            whole += numbers
            held += numbers * (16 if name.split(".")[-2] in chosen else 8 * DTYPE_BYTES[tensor.dtype])
    return model.but(export=model.export.storing(held / whole)) if whole else model


def computes_as_named(mlp: Any) -> bool:
    """Whether a feed-forward with these names computes act(gate x) * up x -> down and nothing else."""
    import torch

    x = torch.linspace(-1, 1, 2 * mlp.gate_proj.in_features, dtype=mlp.gate_proj.weight.dtype).view(1, 2, -1)
    with torch.no_grad():
        want = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return torch.equal(mlp(x), want)


def treated(module: Any, names: list[str], owner: str) -> dict[str, Any]:
    """The feed-forwards by name. Raises Misfit when one computes something else than its parts say."""
    found = {name: module.get_submodule(name) for name in names}
    for name, mlp in found.items():
        if not computes_as_named(mlp):
            raise Misfit(f"{owner} cannot treat {name}: it is no plain gated feed-forward; use teal instead")
    return found


def threshold(values: torch.Tensor, share: float) -> float:
    """The value that at most a fraction `share` of `values` do not exceed; 0 for a share of 0 drops exact zeros."""
    count = int(share * values.numel())
    return float(values.flatten().float().kthvalue(count).values) if count else 0.0


@contextmanager
def thresholding(parts: Mapping[str, Any], share: Callable[[str], float]) -> Iterator[dict[str, float]]:
    """While open, each of `parts` finds its threshold at its first pass and drops inputs by it at every pass.

    `share(name)` is the fraction to drop; yields name -> threshold. Parts that read one tensor get one threshold.
    """
    from fivefold.engines._layers._gather import cut as leave_out

    found: dict[str, float] = {}
    last: list[Any] = [None, None]

    def before(name: str, args: Any) -> Any:
        x = args[0]
        if last[0] is not x:
            cut = found.get(name)
            cut = threshold(x.abs(), share(name)) if cut is None else cut
            last[:] = [x, (cut, leave_out(x, cut))]
        found[name], kept = last[1]
        return (kept, *args[1:])

    handles = [
        part.register_forward_pre_hook(lambda _, args, name=name: before(name, args)) for name, part in parts.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def stored(
    model: Model, technique: str, layers: Mapping[str, dict[str, Any]], replaced: Mapping[str, Mapping[str, Any]]
) -> Model:
    """A model with `layers` (module -> kind and settings) in a new folder.

    `replaced` maps each of them to its tensors by suffix; the weights of these modules' own linear layers go.
    """
    from fivefold.engines._layers import MANIFEST, manifest
    from fivefold.techniques._shared.modules import workspace
    from fivefold.weights import write_safetensors_folder

    gone = {f"{name}.weight" for name in layers} | {f"{name}.{part}.weight" for name in layers for part in PARTS}
    tensors: dict[str, Any] = {name: tensor for name, tensor in read_tensors(model.path) if name not in gone}
    for name, own in replaced.items():
        tensors.update({f"{name}.{suffix}": tensor for suffix, tensor in own.items()})
    folder = write_safetensors_folder(
        workspace(model, technique), tensors, like=model.path, texts={MANIFEST: manifest(model.path, layers)}
    )
    return model.but(path=folder, origin=model.parent)


def bfloat16(*weights: Any, turn: bool = False) -> Any:
    """Matrices (outputs, inputs) above one another in bfloat16, turned to (inputs, outputs); made when written."""
    import torch

    from fivefold.training.module import Made

    rows, columns = sum(w.shape[0] for w in weights), weights[0].shape[1]

    def whole() -> torch.Tensor:
        return torch.cat([w.float() for w in weights])

    if turn:
        return Made("BF16", (columns, rows), lambda: whole().T.contiguous())
    return Made("BF16", (rows, columns), whole)


def neurons(mlp: Any) -> dict[str, Any]:
    """The matrices of a gated feed-forward by neuron: what the kind `selected_ffn` stores."""
    return {
        "gate": bfloat16(mlp.gate_proj.weight), "up": bfloat16(mlp.up_proj.weight),
        "down": bfloat16(mlp.down_proj.weight, turn=True),
    }


@contextmanager
def wrapped(parts: Iterable[Any], around: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While open, `around(module, its own forward)` is what each of the modules computes."""
    before = [(part, part.forward) for part in parts]
    for part, forward in before:
        part.forward = around(part, forward)
    try:
        yield
    finally:
        for part, forward in before:
            part.forward = forward
