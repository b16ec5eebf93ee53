"""Predicted damage against the KL divergence that is really there."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fivefold.model import Model
from fivefold.techniques._shared.gguf_types import exported_names, matrices
from fivefold.techniques._shared.modules import is_linear, matrix
from fivefold.techniques._shared.sensitivity import Curvature, curvatures, row_order
from fivefold.training.module import load_module, stored_name

TOKENS = np.random.default_rng(0).integers(0, 256, (48, 24))


def real_kl(module: torch.nn.Module, change: Callable[[], None]) -> float:
    with torch.no_grad():
        before = torch.log_softmax(module(torch.as_tensor(TOKENS)).logits.double(), -1)
        change()
        after = torch.log_softmax(module(torch.as_tensor(TOKENS)).logits.double(), -1)
        return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt2", False)])
def test_prediction_is_near_the_measured_kl(tiny: Callable[..., Model], family: str, tied: bool) -> None:
    model = tiny(family, tied)
    module = load_module(model)
    found = curvatures(model, module, TOKENS)
    assert set(found) == set(matrices(model))
    names = exported_names(model)
    ratios = []
    for name, part in module.named_modules():
        if not is_linear(part):
            continue
        head = part is module.get_output_embeddings()
        exported = "output.weight" if head else names[stored_name(module, names, f"{name}.weight")]
        weight = matrix(part)
        torch.manual_seed(1)
        error = 0.03 * weight.std() * torch.randn_like(weight)
        predicted = found[exported].damage(error[row_order(model, exported, len(error))])
        measured = real_kl(module, lambda w=weight, e=error: w.add_(e))
        weight.sub_(error)
        ratios.append(predicted / measured)
    assert 0.6 < np.median(ratios) < 1.6
    assert max(ratios) < 5 and min(ratios) > 0.2


def test_a_tied_embedding_pays_at_both_ends(tiny: Callable[..., Model]) -> None:
    model = tiny("llama", True)
    module = load_module(model)
    curvature = curvatures(model, module, TOKENS)["token_embd.weight"]
    weight = module.get_input_embeddings().weight.data
    torch.manual_seed(1)
    error = 0.03 * weight.std() * torch.randn_like(weight)
    predicted = curvature.damage(error)
    measured = real_kl(module, lambda: weight.add_(error))
    assert 0.5 < predicted / measured < 2
    curvature.lookup_rows = None
    assert curvature.damage(error) < predicted


def test_query_rows_follow_the_exported_order(tiny: Callable[..., Model]) -> None:
    from fivefold.export.gguf_ import exported_tensors

    model = tiny("llama", True)
    tensor = exported_tensors(model.path)["blk.0.attn_q.weight"]
    rows = tensor.source.numpy()
    np.testing.assert_array_equal(rows[row_order(model, tensor.name, len(rows)).numpy()], tensor.numpy())


def test_a_hessian_from_few_tokens_is_drawn_towards_its_diagonal() -> None:
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=draw) / 48**0.5 + torch.eye(48)

    def known(count: int) -> Curvature:
        x = torch.randn(count, 48, generator=draw) @ mixing
        return Curvature(inputs=x.T @ x / count, rows=torch.ones(4) / 4)

    few, truth = known(100), mixing.T @ mixing
    drawn = few.shrunk(4096)  # an element off the diagonal is worth half
    torch.testing.assert_close(drawn.inputs.diagonal(), few.inputs.diagonal())
    torch.testing.assert_close(drawn.inputs[0, 1], few.inputs[0, 1] / 2)
    assert (few.shrunk(4096).inputs - truth).norm() < (few.inputs - truth).norm()
    many = known(200_000)
    torch.testing.assert_close(many.shrunk(10**9).inputs, many.inputs, rtol=1e-4, atol=1e-4)
