"""Weights that live or die together: the dependency groups of a decoder layer, how much each matters, cutting them.

    feed-forward channel c       row c of gate and up (of c_fc), column c of down (of c_proj)
    key-value group g            the rows of k and v of head g, the rows of q and the columns of o of its query heads

A group is removed exactly by a factor 0 on its channel h_c (on its heads' outputs a_g). So to first order its removal
at one token changes a loss by -h_c dL/dh_c: one number from activations and their gradients, no gradient of a weight.

    taylor       mean over tokens of (h_c dL/dh_c)^2, L the log-loss of labels drawn from the model's own answers
    activation   mean over tokens of |h_c W_down[:, c]|^2, the square of what the group adds to the residual stream

With drawn labels the mean square is the Fisher information of the factor: half of it is the KL the removal costs, to
second order, were tokens independent. Taylor needs the activations of one window of all layers; activation one layer's.
Tensors are cut one at a time as they are written.

Sources: LLM-Pruner (Ma et al., arXiv 2305.11627) for the groups; Molchanov et al., arXiv 1906.10771, for the square;
Kunstner et al., arXiv 1905.12558, for drawn labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, blueprint_of, read_config
from fivefold.weights import DTYPE_BYTES, StoredTensor, read_tensors

if TYPE_CHECKING:
    import torch

How = Literal["taylor", "activation"]
WINDOW = 256
_PART = re.compile(
    r"(?:.*\.)?(?:layers|h)\.(\d+)\.(?:mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj)|self_attn\.([qkvo])_proj)"
    r"\.(weight|bias)"
)


@dataclass(frozen=True)
class Place:
    """Where a stored tensor meets the groups: `what` is "channels", "queries" or "keys", on `axis` of the tensor."""

    layer: int
    part: str
    what: str
    axis: int


@dataclass(frozen=True)
class Kept:
    """Of one layer: the channels and the key-value groups that stay, ascending."""

    channels: NDArray[np.int64]
    groups: NDArray[np.int64]


@dataclass(frozen=True)
class Picked:
    """Some slices of a stored tensor, taken when it is written."""

    source: StoredTensor
    axis: int
    kept: NDArray[np.int64]

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.kept) if i == self.axis else n for i, n in enumerate(self.source.shape))

    def raw(self) -> NDArray[np.uint8]:
        bytes_of = self.source.raw().reshape(*self.source.shape, DTYPE_BYTES[self.dtype])
        return np.ascontiguousarray(np.take(bytes_of, self.kept, axis=self.axis)).reshape(-1)


def place(name: str) -> Place | None:
    """None for a tensor no group reaches, such as a norm, an embedding or the bias after the group's last matrix."""
    match = _PART.fullmatch(name)
    if match is None:
        return None
    layer, feed, attention, kind = match.groups()
    reads = feed in ("down_proj", "c_proj") or attention == "o"
    if reads and kind == "bias":
        return None
    turned = feed in ("c_fc", "c_proj")
    axis = int(reads != turned) if kind == "weight" else 0
    what = "channels" if feed else "queries" if attention in "qo" else "keys"
    return Place(int(layer), feed or attention, what, axis)


def check_groups(model: Model, owner: str, what: Literal["channels", "groups"]) -> None:
    """Refuse a family whose layers do not hold these groups in their places. Raises Misfit."""
    depth = blueprint_of(read_config(model.path)).layers
    found: dict[int, set[str]] = {}
    for name, _ in read_tensors(model.path):
        if (at := place(name)) is not None and name.endswith(".weight"):
            found.setdefault(at.layer, set()).add(at.part)
    wanted = [{"q", "k", "v", "o"}] if what == "groups" else [{"up_proj", "down_proj"}, {"c_fc", "c_proj"}]
    if not all(any(parts <= found.get(layer, set()) for parts in wanted) for layer in range(depth)):
        thing = "key-value groups" if what == "groups" else "feed-forward channels"
        other = "groups=0" if what == "groups" else "prune_depth"
        raise Misfit(f"{owner} does not know the {thing} of a model of {model.blueprint.family}; use {other} instead")


def cut(tensors: Mapping[str, StoredTensor], kept: Sequence[Kept], blueprint: Blueprint) -> dict[str, Any]:
    """The tensors with only the `kept` groups, one entry of `kept` per layer."""

    def rows(at: Place) -> NDArray[np.int64]:
        own = kept[at.layer]
        if at.what == "channels":
            return own.channels
        size = blueprint.head_dim * (blueprint.heads // blueprint.kv_heads if at.what == "queries" else 1)
        return (own.groups[:, None] * size + np.arange(size)).reshape(-1)

    return {
        name: tensor if (at := place(name)) is None else Picked(tensor, at.axis, rows(at))
        for name, tensor in tensors.items()
    }


def keep(scores: torch.Tensor, count: int) -> NDArray[np.int64]:
    """The places of the `count` largest scores, ascending; of equals the first stay."""
    order = scores.argsort(descending=True, stable=True)[:count]
    chosen: NDArray[np.int64] = order.sort().values.numpy()
    return chosen


class Scores:
    """Sums per layer, in float64: one number per channel and one per key-value group."""

    def __init__(self, module: Any, kv_heads: int) -> None:
        from fivefold.techniques._shared.modules import layers

        self.readers: list[tuple[int, str, Any]] = []
        self.sums: dict[tuple[int, str], torch.Tensor] = {}
        self.kv_heads, self.depth = kv_heads, len(layers(module))
        for i, layer in enumerate(layers(module)):
            down = getattr(layer.mlp, "down_proj", None) or layer.mlp.c_proj
            self.readers.append((i, "channels", down))
            if attention := getattr(layer, "self_attn", None):
                self.readers.append((i, "groups", attention.o_proj))

    def add(self, key: tuple[int, str], value: torch.Tensor) -> None:
        value = value.detach().double()
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def grouped(self, what: str, x: torch.Tensor) -> torch.Tensor:
        """(..., columns) -> (tokens, groups, columns of a group)."""
        groups = x.shape[-1] if what == "channels" else self.kv_heads
        return x.reshape(-1, groups, x.shape[-1] // groups)

    def found(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        none = torch.zeros(self.kv_heads, dtype=torch.float64)
        return [(self.sums[i, "channels"], self.sums.get((i, "groups"), none)) for i in range(self.depth)]


def importances(
    module: Any, tokens: NDArray[np.int64], how: How, kv_heads: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer (channels,) and (key-value groups,), over `tokens` (windows, length)."""
    scores = Scores(module, kv_heads)
    hook = {"taylor": _taylor, "activation": _activation}[how]
    handles = [part.register_forward_pre_hook(hook(scores, i, what, part)) for i, what, part in scores.readers]
    try:
        for number, row in enumerate(tokens):
            _differentiate(module, row, number) if how == "taylor" else _run(module, row)
    finally:
        for handle in handles:
            handle.remove()
    return scores.found()


def _taylor(scores: Scores, layer: int, what: str, part: Any) -> Callable[[Any, Any], None]:
    def before(_: Any, args: Any) -> None:
        value = args[0].detach()  # the hook must not hold the tensor it hangs on: a cycle would keep the graph

        def backward(gradient: torch.Tensor) -> None:
            product = scores.grouped(what, value.float() * gradient.float())
            scores.add((layer, what), product.sum(2).square().sum(0))

        args[0].register_hook(backward)

    return before


def _activation(scores: Scores, layer: int, what: str, part: Any) -> Callable[[Any, Any], None]:
    import torch

    from fivefold.techniques._shared.modules import matrix

    def before(_: Any, args: Any) -> None:
        x, weight = args[0].detach().float(), matrix(part).float()
        if what == "channels":
            scores.add((layer, what), x.reshape(-1, x.shape[-1]).square().sum(0) * weight.square().sum(0))
            return
        heads = scores.grouped(what, x)
        own = weight.reshape(len(weight), scores.kv_heads, -1)
        added = [(heads[:, g] @ own[:, g].T).square().sum() for g in range(scores.kv_heads)]
        scores.add((layer, what), torch.stack(added))

    return before


def _run(module: Any, row: Any) -> None:
    from fivefold.techniques._shared.modules import forward

    forward(module, row[None])


def _differentiate(module: Any, row: Any, seed: int) -> None:
    """Gradients of the summed log-loss of drawn labels with respect to activations; weights have none."""
    import torch

    tokens = torch.as_tensor(row)[None]
    looked_up = module.get_input_embeddings()(tokens).detach().requires_grad_(True)
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast):
        logp = module(inputs_embeds=looked_up, use_cache=False).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(logp.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
        (-logp.gather(1, drawn).sum()).backward()
