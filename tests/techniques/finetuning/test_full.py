"""Full fine-tuning against the plainest loop of torch, and its formulas against what is allocated."""

import math
from pathlib import Path

import pytest
import torch
from masked import module, plain_loss, plain_training, planned, pupil, resumed, stream, tensors, trained
from optimizing import learns

from fivefold.model import Model
from fivefold.techniques.finetuning.full import Full
from fivefold.testing import tiny_model
from fivefold.training.adamw import AdamW
from fivefold.training.checkpoint import Keeper
from fivefold.training.loop import rate_at
from fivefold.training.memory import needs
from fivefold.training.method import Methods
from fivefold.training.module import load_module, loss_of
from fivefold.training.run import _seconds_per_step, prepared


def by_torch(model: Model, rate: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """torch's AdamW on every weight, gradients scaled by the norm of the step before, or a tensor's own if larger."""
    reference, source, losses, norm = module(model), stream(model), [], 0.0
    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    for step in range(model.train.steps):
        optimizer.param_groups[0]["lr"] = rate * rate_at(step, model.train)
        loss = plain_loss(reference, source.step(step))
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in reference.parameters()]
        now = float(torch.stack([g.norm() for g in gradients]).norm())
        norm = norm or now
        for gradient in gradients:
            gradient /= max(1.0, norm, float(gradient.norm()))
        norm = now
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in reference.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_is_torchs_adamw_on_every_weight(tmp_path: Path, family: str) -> None:
    model = pupil(tmp_path, family, steps=5)
    done = trained(model, 'full(averages="float32", rate=1e-3)', tmp_path / "run")
    losses, theirs = by_torch(model, 1e-3)
    assert done.fitted.losses == pytest.approx(losses, rel=1e-4)
    for name, start in tensors(model).items():
        ours, expected = tensors(done.model)[name] - start, theirs[name] - start
        assert float((ours - expected).norm()) < 0.01 * float(expected.norm()), name


def test_clipping_by_the_step_before_learns_as_clipping_by_the_step_does(tmp_path: Path) -> None:
    model = pupil(tmp_path, steps=20)
    done = trained(model, 'full(averages="float32", rate=1e-3)', tmp_path / "run")
    reference = module(model)
    losses = plain_training(model, reference, [name for name, _ in reference.named_parameters()], range(20), 1e-3)
    assert losses[0] > 1.2 * losses[-1]
    assert done.fitted.losses == pytest.approx(losses, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_counts_every_weight(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(tmp_path / "m", family, tied=tied)
    held = sum(p.numel() for p in load_module(model).parameters())
    assert sum(math.prod(shape) for shape in Full().shapes(model.blueprint).values()) == held


@pytest.mark.parametrize(("averages", "width"), [("float32", 8), ("bfloat16", 4)])
def test_state_gradients_and_halves_are_the_formula(tmp_path: Path, averages: str, width: int) -> None:
    model = planned(pupil(tmp_path, dtype="bfloat16", steps=2), f'full(averages="{averages}")')
    methods = Methods.of(model.train)
    assert methods.adaptation is not None
    lesson = prepared(model, methods.adaptation, methods)
    sizes = [p.numel() for p in lesson.trained.values()]
    found = needs(model.blueprint, model.train, methods, element=2, process=0.0, fused=True,
                  optimizer=methods.adaptation.default_optimizer(), shapes=methods.adaptation.shapes(model.blueprint))
    assert (found.state, found.beside, found.gradients) == (width * sum(sizes), 2 * sum(sizes), 2 * max(sizes))
    assert {p.dtype for p in lesson.trained.values()} == {torch.bfloat16}
    done = trained(pupil(tmp_path / "r", dtype="bfloat16", steps=2), f'full(averages="{averages}")', tmp_path / "run")
    assert done.fitted.state_bytes == found.state and done.numbers == sum(sizes)


def moved(model: Model, recipe: str, folder: Path) -> float:
    """Of all weights, how far they went from where they began."""
    done = trained(model, recipe, folder).model
    before, after = tensors(model), tensors(done)
    return math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))


def test_updates_that_bfloat16_cannot_hold_are_kept(tmp_path: Path) -> None:
    """Weights of about 0.1 at a rate of 1e-6: in bfloat16 alone next to nothing moves."""
    wide = moved(pupil(tmp_path / "w"), "full(rate=1e-6)", tmp_path / "wide")
    model = pupil(tmp_path, dtype="bfloat16")
    for held in ("split", "kahan"):
        assert moved(model, f'full(rate=1e-6, held="{held}")', tmp_path / held) == pytest.approx(wide, rel=0.1), held
    # What is written of "nearest" are the rounded weights, so the distance is that of the rounding.
    start = math.sqrt(sum(float((t.bfloat16().float() - t).square().sum()) for t in tensors(model).values()))
    nearest = moved(model, 'full(rate=1e-6, held="nearest")', tmp_path / "nearest")
    assert nearest == pytest.approx(start, rel=0.02)


def test_what_is_written_starts_from_the_stored_float32_weights(tmp_path: Path) -> None:
    model = pupil(tmp_path, dtype="bfloat16", steps=1)
    before, after = tensors(model), tensors(trained(model, "full(rate=1e-7)", tmp_path / "run").model)
    for name, start in before.items():
        assert float((after[name] - start).abs().max()) <= 2e-7 + 1e-7 * float(start.abs().max()), name


def test_it_learns_and_resumes_exactly(tmp_path: Path) -> None:
    learns(pupil(tmp_path, steps=30, dtype="bfloat16"), "full(rate=1e-3)", tmp_path / "run", by=0.2)
    for held in ("split", "kahan", "stochastic"):
        model, recipe = pupil(tmp_path / held, dtype="bfloat16"), f'full(held="{held}")'
        through = trained(model, recipe, tmp_path / held / "through", keeper=Keeper(tmp_path / held / "t", "k"))
        again = resumed(model, recipe, tmp_path / held / "again", 4)
        assert again.fitted.losses == through.fitted.losses, held


@pytest.mark.parametrize(("recipe", "gradients"), [("full()", 3 * 20), ("full() + badam(every=1)", 20),
                                                   ("full() + mezo()", 0)])
def test_a_pilot_for_the_time_limit_holds_no_gradients_and_changes_nothing(
    tmp_path: Path, recipe: str, gradients: int
) -> None:
    model = planned(pupil(tmp_path), recipe)
    methods = Methods.of(model.train)
    assert methods.adaptation is not None
    lesson = prepared(model, methods.adaptation, methods)
    before = {name: p.detach().clone() for name, p in lesson.trained.items()}
    optimizer = methods.update.optimizer(model.train) if methods.update else AdamW()
    alive: list[int] = []
    for p in lesson.trained.values():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in lesson.trained.values()))
        )
    assert _seconds_per_step(lesson, stream(model), loss_of(lesson.module), optimizer) > 0
    assert alive == [1] * gradients, "three steps of 20 tensors, or of one block each"
    assert all(p.grad is None and p.requires_grad for p in lesson.trained.values())
    assert all(torch.equal(p, before[name]) for name, p in lesson.trained.items())


def test_the_coverage_says_what_was_trained(tmp_path: Path) -> None:
    model = pupil(tmp_path, steps=1)
    done = trained(model, "full()", tmp_path / "run")
    assert f"full: {done.numbers:,} numbers trained" in done.model.coverage[-1]
    assert done.delta_bytes >= sum(t.numel() * 4 for t in tensors(model).values())
