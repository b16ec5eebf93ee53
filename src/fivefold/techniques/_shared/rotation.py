"""Rotations that a model does not notice, folded into its weights.

The residual stream x is only read through RMSNorm and written by adding. With the norm's gain moved into the matrices
that read it, norm(Q x) = Q norm(x) for every orthogonal Q, so the whole stream can be turned:

    embedding E -> E Q^T    readers W -> W diag(g) Q^T, g -> 1    writers W -> Q W, b -> Q b    head W -> W diag(g) Q^T

Inside attention the values of one head may be turned on their own: v_proj -> R v_proj, o_proj -> o_proj R^T, the same
R for all query heads that share the values. Nothing else between two linear layers is linear (rotary positions, SiLU),
so a rotation there would have to be computed online, and no serving graph here does.

A head tied to the embedding stays tied when the last norm's gain is one number, for that commutes with Q; else it
becomes a matrix of its own.

Hadamard matrices (entries +-1, H H^T = n I) spread a coordinate evenly over all; with random signs they are the
rotation used here. They are built for n = 1, 2, p + 1 (p prime, 3 mod 4), 2 (p + 1) (p prime, 1 mod 4; both Paley's)
and products; for other widths the largest such factor is combined with a random orthogonal matrix (Kronecker product).

Sources: Ashkboos et al., QuaRot, arXiv 2404.00456, and SliceGPT, arXiv 2401.15024; Paley, J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fivefold.errors import Misfit
from fivefold.model import Blueprint, Model, read_config
from fivefold.techniques._shared.modules import rewritten, stored_tensors
from fivefold.weights import StoredTensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
NORMS = {"q": "input_layernorm", "k": "input_layernorm", "v": "input_layernorm", "gate": "post_attention_layernorm",
         "up": "post_attention_layernorm"}
_INSIDE = re.compile(r"((?:model\.)?layers\.(\d+)\.)(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.(weight|bias)")
_NORM = re.compile(r"(?:model\.)?(?:layers\.\d+\.(?:input|post_attention)_layernorm|norm)\.weight")
_EMBEDDING = re.compile(r"(?:model\.)?embed_tokens\.weight")
HEAD = "lm_head.weight"


@functools.cache
def hadamard(n: int) -> NDArray[np.int8] | None:
    """A Hadamard matrix of order n, or None when none of the constructions above gives one."""
    if n in (1, 2):
        return np.array([[1]] if n == 1 else [[1, 1], [1, -1]], np.int8)
    if n % 4:
        return None
    if _prime(n - 1):
        core = np.ones((n, n), np.int8)
        core[1:, 1:] = _residues(n - 1) + np.eye(n - 1, dtype=np.int8)
        core[1:, 0] = -1
        return core
    if n // 2 % 4 == 2 and _prime(n // 2 - 1):
        core = np.zeros((n // 2, n // 2), np.int8)
        core[0, 1:] = core[1:, 0] = 1
        core[1:, 1:] = _residues(n // 2 - 1)
        plus, minus = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
        return np.kron(core, plus) + np.kron(np.eye(n // 2, dtype=np.int8), minus)
    for part in (p for p in range(2, n // 2 + 1) if n % p == 0):
        left, right = hadamard(part), hadamard(n // part)
        if left is not None and right is not None:
            return np.kron(left, right)
    return None


def _prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))


def _residues(p: int) -> NDArray[np.int8]:
    """The Jacobsthal matrix: chi(i - j), 1 for squares modulo p, -1 for the others, 0 on the diagonal."""
    chi = np.full(p, -1, np.int8)
    chi[[k * k % p for k in range(1, p)]] = 1
    chi[0] = 0
    places = np.arange(p)
    return chi[(places[:, None] - places) % p]


def random_rotation(n: int, draw: torch.Generator) -> torch.Tensor:
    """Orthogonal (n, n) in float64: a Hadamard matrix with random signs, times a random matrix where none exists."""
    order, spread = _largest(n)
    out = torch.from_numpy(spread).double() / order**0.5
    if order < n:
        rest, upper = torch.linalg.qr(torch.randn(n // order, n // order, generator=draw, dtype=torch.float64))
        out = torch.kron(out, (rest * upper.diagonal().sign()).contiguous())
    return out * (torch.randint(0, 2, (n,), generator=draw).double() * 2 - 1)


def _largest(n: int) -> tuple[int, NDArray[np.int8]]:
    """The largest divisor of n with a known Hadamard matrix, and that matrix."""
    return next((m, found) for m in range(n, 0, -1) if n % m == 0 and (found := hadamard(m)) is not None)


def built(n: int) -> str:
    """How `random_rotation` builds that order, in words."""
    order = _largest(n)[0]
    return f"Hadamard of order {n}" if order == n else f"Hadamard of order {order} x random of order {n // order}"


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """`residual` is Q (width, width), x -> Q x; `heads` is R (layers, key-value heads, head_dim, head_dim)."""

    residual: torch.Tensor | None
    heads: torch.Tensor | None

    def turn(self, place: Place, weight: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """The matrix or bias that takes the place of `weight`; `gain` of the norm before it where it reads one."""
        kind, q = place.kind, self.residual
        if kind == "v" and self.heads is not None:
            weight = self._values(weight, self.heads[place.layer])
        if kind == "o" and self.heads is not None and weight.ndim == 2:
            weight = self._outputs(weight, self.heads[place.layer])
        if q is None:
            return weight
        if weight.ndim == 2 and kind in (*NORMS, "head"):
            return (weight if gain is None else weight * gain) @ q.T
        if kind == "embedding":
            return weight @ q.T
        return q @ weight if kind in ("o", "down") else weight

    @staticmethod
    def _values(weight: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        shaped = weight.reshape(*turn.shape[:2], -1)
        return (turn @ shaped).reshape(weight.shape)

    @staticmethod
    def _outputs(weight: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        kv, width = turn.shape[:2]
        shaped = weight.reshape(len(weight), kv, -1, width)
        return torch.einsum("rkgj,kij->rkgi", shaped, turn).reshape(weight.shape)


def random_start(blueprint: Blueprint, seed: int, *, residual: bool) -> Rotation:
    """Random rotations of every head's values and, if wanted, of the residual stream."""
    draw = torch.Generator().manual_seed(seed)
    stream = random_rotation(blueprint.width, draw) if residual else None
    heads = [random_rotation(blueprint.head_dim, draw) for _ in range(blueprint.layers * blueprint.kv_heads)]
    shape = (blueprint.layers, blueprint.kv_heads, blueprint.head_dim, blueprint.head_dim)
    return Rotation(residual=stream, heads=torch.stack(heads).view(shape))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a stored tensor stands: `kind` is q, k, v, o, gate, up, down, embedding, head or norm."""

    kind: str
    layer: int = 0
    norm: str | None = None


def place(name: str, prefix: str) -> Place | None:
    """None for a tensor no rotation touches; `prefix` is "model." where the names have it."""
    if found := _INSIDE.fullmatch(name):
        kind = found[3]
        return Place(kind=kind, layer=int(found[2]), norm=f"{found[1]}{NORMS[kind]}.weight" if kind in NORMS else None)
    if _EMBEDDING.fullmatch(name):
        return Place(kind="embedding")
    if name == HEAD:
        return Place(kind="head", norm=f"{prefix}norm.weight")
    return Place(kind="norm") if _NORM.fullmatch(name) else None


def check(model: Model, owner: str) -> None:
    """Raises Misfit for a family whose parts are not those of the module's table."""
    if model.blueprint.family not in FAMILIES:
        raise Misfit(
            f"{owner} cannot turn {model.blueprint.family}: it folds rotations through plain RMSNorms, as in"
            f" {', '.join(FAMILIES)}; remove it"
        )


def unties(model: Model) -> bool:
    """Whether turning the residual stream makes the head a matrix of its own."""
    if not model.blueprint.tied:
        return False
    stored = stored_tensors(model)
    gain = stored[f"{prefix(stored)}norm.weight"].numpy()
    return bool(gain.min() != gain.max())


def prefix(stored: Mapping[str, Any]) -> str:
    return "model." if "model.norm.weight" in stored else ""


def fold(model: Model, technique: str, rotation: Rotation) -> tuple[Model, int]:
    """The turned model in a new folder, each tensor in its old dtype, one in memory at a time; how many changed."""
    stored = stored_tensors(model)
    untied = rotation.residual is not None and unties(model)
    out: dict[str, Any] = dict(stored)
    if model.blueprint.tied:
        out.pop(HEAD, None)
    source = dict(out)
    if untied:
        source[HEAD] = stored[next(name for name in stored if _EMBEDDING.fullmatch(name))]
    plus = model.blueprint.family == "gemma"
    for name, tensor in source.items():
        where = place(name, prefix(stored))
        if where is None or (where.kind == "norm" and (rotation.residual is None or _stays(name, model, untied))):
            continue
        if rotation.residual is None and where.kind not in ("v", "o"):
            continue
        out[name] = _Turned(tensor, where, rotation, stored[where.norm] if where.norm else None, plus)
    config = dict(read_config(model.path))
    if untied:
        config["tie_word_embeddings"] = False
    changed = sum(isinstance(tensor, _Turned) for tensor in out.values())
    return rewritten(model, technique, out, config), changed


def _stays(name: str, model: Model, untied: bool) -> bool:
    """The last norm keeps its (constant) gain where the head stays tied."""
    return name.endswith("norm.weight") and "layers." not in name and model.blueprint.tied and not untied


class _Turned:
    """A stored tensor that is turned when it is written."""

    def __init__(
        self, source: StoredTensor, where: Place, rotation: Rotation, norm: StoredTensor | None, plus: bool
    ) -> None:
        self.source, self.where, self.rotation, self.norm, self.plus = source, where, rotation, norm, plus
        self.dtype, self.shape = source.dtype, source.shape

    def torch(self) -> torch.Tensor:
        weight = self.source.torch()
        if self.where.kind == "norm":
            return torch.full_like(weight, 0.0 if self.plus else 1.0)
        gain = None if self.norm is None else self.norm.torch().double() + (1.0 if self.plus else 0.0)
        return self.rotation.turn(self.where, weight.double(), gain).to(weight.dtype).contiguous()

    def raw(self) -> NDArray[np.uint8]:
        raw: NDArray[np.uint8] = self.torch().reshape(-1).view(torch.uint8).numpy()
        return raw


def said(before: Model, after: Model, changed: int) -> str:
    """What `fold` did, with the bytes an untied head adds."""
    text = f"{changed} tensors turned, none online"
    if before.blueprint.tied == after.blueprint.tied:
        return text
    weights = after.blueprint.vocab * after.blueprint.width
    size = stored_tensors(after)[HEAD].nbytes
    return (f"{text}; the last norm's gain varies, so the tied head became a matrix of its own: {weights} weights more,"
            f" {size} bytes as stored")
