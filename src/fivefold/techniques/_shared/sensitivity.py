"""How much a rounded matrix will hurt the model's answers, for every matrix from one set of backward passes.

To second order, the KL divergence between a model and its copy with weights W + D is 1/2 E[(g . D)^2], where g is the
gradient of log p(y) for labels y drawn from the model itself (the Fisher information). For a linear layer a token with
input x and output gradient b has g = b x^T, and rounding errors of different rows are unrelated, so

    KL  ~=  1/2  sum_r  s_r  D_r H D_r^T,    H = E[|b|^2 x x^T],    s_r = E[b_r^2] / E[|b|^2]

H weighs every token by how much the answer hangs on that layer there, which a plain mean of x x^T does not; s_r does
the same for rows. A matrix is thus described by one (columns x columns) matrix and one vector, and the damage of every
storage type follows without running the model again. A looked-up embedding has x = a unit vector: its damage is
1/2 sum_v f_v sum_j G_j D_vj^2 with f the frequency of token v and G_j = E[b_j^2]; a tied embedding suffers both.

Outputs are not weighed apart either: with B = E[|x|^2 b b^T] / tr H in the place of s, the KL is 1/2 tr(H D^T B D)
(`outputs=True`), for matrices of at most COUPLED rows.

H from few tokens is noisy, and whatever is fitted to it fits the noise: rounding with feedback (`feedback`) then gains
much on the tokens it was fitted to and little on others. So H is drawn towards its diagonal (`shrunk`), the less the
more tokens there are.

On SmolLM2-135M the prediction and the directly measured KL of single matrices correlate at 0.98 in their logarithms
(34 cases from q3_k to q5_0, spearman 0.97); single cases are off by up to a factor of two. It needs float32 room for H:
columns^2 per matrix. The sum over matrices assumes that damages add, which holds while each is small.

Sources: Kronecker-factored curvature (Martens, Grosse, arXiv 1503.05671); the sampled-label Fisher (Kunstner et al.,
arXiv 1905.12558); both sides of it for rounding: YAQA (Tseng et al., arXiv 2505.22988).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fivefold.model import Model, read_config
from fivefold.techniques._shared.gguf_types import EMBEDDING, exported_names
from fivefold.techniques._shared.modules import is_linear
from fivefold.training.module import stored_name
from fivefold.weights import StoredTensor, check_safetensors, write_safetensors

if TYPE_CHECKING:
    import torch

Tokens = NDArray[np.int64]
HEAD = "head"
FILE = "curvatures.safetensors"
JITTER = 1e-4
COUPLED = 2048
"""Most rows of a matrix whose B is kept."""
UNCERTAIN = 4096
"""Tokens at which an element of H off the diagonal is worth half."""


@dataclass(kw_only=True)
class Curvature:
    """`inputs` is H (columns, columns); `rows` is s, summing to 1; `outputs` is B (rows, rows) of trace 1, where kept.

    The lookup part is None but for embeddings.
    """

    inputs: torch.Tensor
    rows: torch.Tensor
    lookup_columns: torch.Tensor | None = None
    lookup_rows: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def damage(self, error: torch.Tensor) -> float:
        """Predicted KL, nats per token, of adding `error` (rows, columns) to the matrix."""
        import torch

        if self.outputs is None:
            return float(self.row_damage(error, torch.arange(len(error))).sum())
        seen = error @ self.root
        return float((seen * (self.outputs @ seen)).sum()) / 2

    def row_damage(self, error: torch.Tensor, rows: Any) -> torch.Tensor:
        """The part of each row (n,) in the damage, for errors (n, columns) of the rows numbered `rows`."""
        total = self.rows[rows] * (error @ self.root).square().sum(1)
        if self.lookup_rows is not None:
            total = total + self.lookup_rows[rows] * (error.square() @ self.lookup_columns)
        return total / 2

    def row_weights(self, matrix: NDArray[np.float32]) -> NDArray[np.float64]:
        """How much an error in proportion to the weights would count in each row, (rows,)."""
        import torch

        squares = torch.from_numpy(matrix).square()
        found = self.rows * (squares @ self.inputs.diagonal())
        if self.lookup_rows is not None:
            found = found + self.lookup_rows * (squares @ self.lookup_columns)
        weights: NDArray[np.float64] = found.double().numpy()
        return weights

    def shrunk(self, tokens: int) -> Curvature:
        """The same with H drawn towards its diagonal, as far as `tokens` tokens leave its other elements uncertain."""
        import torch

        share = UNCERTAIN / (UNCERTAIN + tokens)

        def drawn(whole: torch.Tensor) -> torch.Tensor:
            return (1 - share) * whole + share * torch.diag(whole.diagonal())

        outputs = None if self.outputs is None else drawn(self.outputs)
        return replace(self, inputs=drawn(self.inputs), outputs=outputs)

    @functools.cached_property
    def upper(self) -> torch.Tensor:
        """`feedback.factor` of `hessian()`."""
        from fivefold.techniques._shared.feedback import factor

        return factor(self.hessian())

    @functools.cached_property
    def root(self) -> torch.Tensor:
        """L with L L^T = H + JITTER mean(diag H): |D L|^2 is never negative, while D H D^T in float32 can be."""
        import torch

        mean = self.inputs.diagonal().mean().double()
        if mean <= 0:
            return torch.zeros_like(self.inputs)
        jitter = JITTER * torch.eye(len(self.inputs), dtype=torch.float64)
        return (torch.linalg.cholesky(self.inputs.double() / mean + jitter) * mean.sqrt()).float()

    def hessian(self) -> torch.Tensor:
        """What all rows share: the (columns, columns) weight of an error, averaged over rows."""
        if self.lookup_rows is None:
            return self.inputs
        import torch

        return self.inputs * self.rows.sum() + torch.diag(self.lookup_columns * self.lookup_rows.sum())


PARTS = ("inputs", "rows", "lookup_columns", "lookup_rows", "outputs")


def save_curvatures(folder: Path, found: Mapping[str, Curvature]) -> None:
    """One file of all parts, so that each matrix can be read alone."""
    parts = {f"{name}/{part}": value for name, c in found.items() for part in PARTS
             if (value := getattr(c, part)) is not None}
    write_safetensors(folder / FILE, parts)


def load_curvature(folder: Path, name: str) -> Curvature:
    stored = _stored(folder / FILE)
    return Curvature(**{p: stored[f"{name}/{p}"].torch() for p in PARTS if f"{name}/{p}" in stored})


@functools.lru_cache(maxsize=1)
def _stored(file: Path) -> dict[str, StoredTensor]:
    return check_safetensors(file)


def curvatures(
    model: Model, module: Any, tokens: Tokens, seed: int = 0, *, outputs: bool = False
) -> dict[str, Curvature]:
    """Exported tensor name -> Curvature for every linear layer, the head and the embedding.

    `tokens` is (windows, length). One forward and backward pass each. `outputs` also asks for B.
    """
    import torch

    sums, gradient = _collect(module, tokens, seed, outputs)
    names = exported_names(model)
    head = EMBEDDING if model.blueprint.tied else "output.weight"
    found = {}
    for name, (inputs, rows) in sums.items():
        exported = head if name == HEAD else names[stored_name(module, names, f"{name}.weight")]
        order = row_order(model, exported, len(rows))
        coupled = None
        if rows.ndim == 2:
            coupled = (rows / rows.trace().clamp_min(1e-30))[order][:, order]
        shares = rows / rows.sum().clamp_min(1e-30)
        found[exported] = Curvature(
            inputs=inputs / tokens.size, rows=shares[order] if coupled is None else coupled.diagonal().clone(),
            outputs=coupled,
        )
    vocab, width = module.get_input_embeddings().weight.shape
    if EMBEDDING not in found:
        found[EMBEDDING] = Curvature(inputs=torch.zeros(width, width), rows=torch.zeros(vocab))
    found[EMBEDDING].lookup_columns = gradient / tokens.size
    found[EMBEDDING].lookup_rows = torch.bincount(torch.as_tensor(tokens).reshape(-1), minlength=vocab) / tokens.size
    return found


def _collect(
    module: Any, tokens: Tokens, seed: int, outputs: bool
) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor]:
    """Module name -> [sum of |b|^2 x x^T, sum of b^2 or, with `outputs`, of |x|^2 b b^T], the head under HEAD; and the
    embedding's sum of b^2."""
    import torch

    sums: dict[str, list[torch.Tensor]] = {}
    draw = torch.Generator().manual_seed(seed)

    def add(name: str, x: torch.Tensor, b: torch.Tensor) -> None:
        x, b = x.reshape(-1, x.shape[-1]).float(), b.reshape(-1, b.shape[-1]).float()
        squares, rows = b.square(), b.shape[1]
        coupled = outputs and rows <= COUPLED
        if name not in sums:
            sums[name] = [torch.zeros(x.shape[1], x.shape[1]), torch.zeros((rows, rows) if coupled else (rows,))]
        kept = sums[name]
        kept[0].addmm_(x.T * squares.sum(1), x)
        if coupled:
            kept[1].addmm_(b.T * x.square().sum(1), b)
        else:
            kept[1] += squares.sum(0)

    def hook(name: str) -> Any:
        def forward(_: Any, args: Any, out: torch.Tensor) -> None:
            x = args[0].detach()
            out.register_hook(lambda b: add(name, x, b))

        return forward

    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    handles = [part.register_forward_hook(hook(HEAD if part is head else name))
               for name, part in module.named_modules() if is_linear(part)]
    gradient = torch.zeros(embedding.weight.shape[1])
    try:
        for row in tokens:
            looked_up = embedding(torch.as_tensor(row)[None]).detach().requires_grad_(True)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = module(inputs_embeds=looked_up, use_cache=False).logits
            logp = torch.log_softmax(logits[0].float(), -1)
            drawn = torch.multinomial(logp.detach().exp(), 1, generator=draw)
            logp.gather(1, drawn).sum().backward()
            gradient += looked_up.grad[0].float().square().sum(0)
    finally:
        for handle in handles:
            handle.remove()
    return sums, gradient


def row_order(model: Model, exported: str, rows: int) -> torch.Tensor:
    """The rows of the module's matrix in the order of the exported file (llama.cpp interleaves those of q and k)."""
    import torch

    from fivefold.export.families import family_of, permute

    order = np.arange(rows, dtype=np.float32)
    part = exported.split(".")[2] if exported.startswith("blk.") else ""
    if family_of(read_config(model.path)).permuted and part in ("attn_q", "attn_k"):
        order = permute(order, model.blueprint.heads if part == "attn_q" else model.blueprint.kv_heads)
    return torch.as_tensor(order).long()
