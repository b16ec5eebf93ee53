"""Row norms without the sum, and a gain's gradient from the product that is kept."""

import pytest
import torch

from fivefold.techniques._shared.lean_adapters import norms, scaled


@pytest.mark.parametrize("scale", [0.0, 0.5, 8.0])
def test_norms_are_those_of_the_sum(scale: float) -> None:
    torch.manual_seed(0)
    w, a, b = torch.randn(20, 30), torch.randn(4, 30), torch.randn(20, 4)
    want = (w + scale * b @ a).norm(dim=1)
    torch.testing.assert_close(norms(w.square().sum(1), w, a, b, scale), want, atol=1e-4, rtol=1e-5)


def test_a_gain_of_zero_has_a_finite_gradient() -> None:
    x, gain = torch.randn(3, 4, requires_grad=True), torch.tensor([1.0, 0.0, -2.0, 0.5], requires_grad=True)
    scaled(x, gain).sum().backward()
    torch.testing.assert_close(x.grad, gain.detach().expand(3, 4))
    assert gain.grad is not None and gain.grad.isfinite().all()
    torch.testing.assert_close(gain.grad[[0, 2, 3]], x.detach().sum(0)[[0, 2, 3]])


def test_a_frozen_gain_costs_nothing() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    y = scaled(x, torch.full((4,), 3.0))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and (x.grad == 3).all()
