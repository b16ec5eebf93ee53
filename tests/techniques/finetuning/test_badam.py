"""BAdam: which block is trained when, that the others rest, and that it is AdamW on the active one."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch
from masked import planned, pupil, resumed, tensors, trained
from optimizing import both_orders_agree, learns, matrices, optimizer_of, resumes_exactly, run_state_is_the_formula

from fivefold.model import TrainPlan
from fivefold.training.adamw import AdamW
from fivefold.training.loop import Group, fit, rate_at
from fivefold.training.method import Methods, model_shapes
from fivefold.training.optimizers.badam import OUTSIDE, BAdam, block_of
from fivefold.training.precision import carry, read, write

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.10.self_attn.q_proj.weight",
         "transformer.h.3.attn.c_attn.bias", "model.norm.weight", "layer7.q",
         "model.layers.2.self_attn.q_proj.lora_A.default.weight")


def made(every: int = 3, order: str = "random", **more: bool) -> BAdam:
    return BAdam(every=every, order=order, seed=5, **more)  # type: ignore[arg-type]


def test_a_block_is_a_layer_or_what_lies_outside() -> None:
    assert [block_of(name) for name in NAMES] == [OUTSIDE, 0, 10, 3, OUTSIDE, 7, 2]


@pytest.mark.parametrize("order", ["random", "ascending"])
def test_a_cycle_visits_every_block_once(order: str) -> None:
    badam = made(3, order)
    visited = [badam.active(step, NAMES) for step in range(1, 6 * 3 * 4 + 1)]
    for cycle in range(4):
        part = visited[cycle * 18 : (cycle + 1) * 18]
        assert Counter(part) == dict.fromkeys((OUTSIDE, 0, 2, 3, 7, 10), 3)
        assert all(len(set(part[i : i + 3])) == 1 for i in range(0, 18, 3))
    cycles = {tuple(visited[i : i + 18]) for i in range(0, 72, 18)}
    assert len(cycles) == (1 if order == "ascending" else 4)
    assert visited == [made(3, order).active(step, NAMES) for step in range(1, 73)], "a function of the step"


def test_only_the_active_block_moves_and_has_state_and_gradient() -> None:
    parameters, badam, seen = matrices(), made(), []

    class Watched(BAdam):
        def begin(self, step: int, named: object, states: dict) -> None:  # type: ignore[override,type-arg]
            super().begin(step, named, states)  # type: ignore[arg-type]
            seen.append((step, states, {n: p.detach().clone() for n, p in parameters.items()}))

    watched = Watched(every=3, order="random", seed=5)
    first, second, third = parameters.values()
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    fit(TrainPlan(steps=12, learning_rate=0.01), [Group(parameters=parameters)],
        lambda _: ((x @ first.T).tanh() * third @ second.T).square().mean(), lambda step: [(None, 1.0)],
        lambda: 1.0, optimizer=watched)
    for (step, _, before), (_, _, after) in itertools.pairwise(seen):
        active = badam.active(step, parameters)
        moved = {name for name in parameters if not torch.equal(before[name], after[name])}
        assert moved == {name for name in parameters if block_of(name) == active}
    assert set(seen[-1][1]) == {name for name in parameters if block_of(name) == badam.active(12, parameters)}


def test_a_visit_is_torchs_adam_from_fresh_averages() -> None:
    parameter = {"layers.0.w": torch.nn.Parameter(torch.ones(40))}
    p, at = parameter["layers.0.w"], 0
    gradients = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.Parameter(torch.ones(40))

    def loss(_: object) -> torch.Tensor:
        nonlocal at
        at += 1
        return (0.1 * gradients[at - 1] * p).sum()

    plan = TrainPlan(steps=6, learning_rate=0.01, warmup=0.0)
    fit(plan, [Group(parameters=parameter)], loss, lambda step: [(None, 1.0)], lambda: -float(at), optimizer=made(3))
    for visit in range(2):
        reference = torch.optim.Adam([theirs], betas=(0.9, 0.98))
        for step in range(3 * visit, 3 * visit + 3):
            reference.param_groups[0]["lr"] = 0.01 * rate_at(step, plan)
            theirs.grad = 0.1 * gradients[step]
            reference.step()
    torch.testing.assert_close(p.detach(), theirs.detach(), rtol=1e-5, atol=1e-7)


def test_halves_make_a_visit_exact_and_its_end_right_on_average() -> None:
    start = torch.full((50_000,), 0.1)
    narrow, badam, wide = start.bfloat16(), made(4, halves=True), start.bfloat16().float()
    parameters, states = {"layers.0.w": torch.nn.Parameter(narrow)}, {}
    data = parameters["layers.0.w"].data
    badam.begin(1, parameters, states)
    states["layers.0.w"] = badam.state(data)
    reference, state = AdamW(), AdamW().state(wide)
    for step in range(1, 5):
        gradient = torch.ones_like(start)
        badam.update(data, gradient.bfloat16(), states["layers.0.w"], {}, 1e-5, step, None)
        reference.update(wide, gradient, state, {}, 1e-5, step, None)
    exact = read(data, {"lower": states["layers.0.w"]["lower"]})
    assert torch.equal(exact, wide) and float(data.float().mean()) != pytest.approx(float(wide.mean()), rel=1e-5)
    badam.begin(5, parameters, states)
    assert not states and len(set(data.tolist())) == 2
    assert float(data.float().mean()) == pytest.approx(float(wide.mean()), abs=5 * 2.0**-13 / 50_000**0.5 * 2)


def test_split_weights_keep_every_half() -> None:
    weight, badam = torch.zeros(100, dtype=torch.bfloat16), made()
    near, state = carry(weight, "split"), badam.state(weight)
    write(weight, torch.full((100,), 0.1), near, None)
    badam.update(weight, torch.ones(100), state, near, 1e-5, 1, None)
    torch.testing.assert_close(read(weight, near), torch.full((100,), 0.1 - 1e-5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ["random", "ascending"])
def test_a_short_run_needs_what_its_own_blocks_need(order: Literal["random", "ascending"]) -> None:
    shapes = {"embedding": (900, 8), "layer0.q": (8, 8), "layer1.q": (8, 16), "layer2.q": (8, 32)}
    badam = BAdam(every=2, order=order, seed=3)
    for steps in range(1, 9):
        reached = {badam.active(step, shapes) for step in range(1, steps + 1)}
        wanted = max((n for n in shapes if block_of(n) in reached), key=lambda n: badam.state_bytes(shapes[n]))
        assert list(badam.at_once(shapes, steps)) == [wanted]
    assert list(badam.at_once(shapes)) == list(badam.at_once(shapes, 100)) == ["embedding"]


def test_state_is_the_formula_of_the_largest_block(tmp_path: Path) -> None:
    model = pupil(tmp_path, dtype="bfloat16", steps=1)
    shapes = model_shapes(model.blueprint)
    for recipe, bytes_each in (("full() + badam()", 10), ('full() + badam(held="split")', 8)):
        badam = optimizer_of(recipe, model)
        layer = sum(torch.Size(s).numel() for n, s in shapes.items() if n.startswith("layer0."))
        assert sum(badam.state_bytes(s) for s in badam.at_once(shapes).values()) == bytes_each * layer
    float32 = optimizer_of("badam()", pupil(tmp_path / "w"))
    assert float32.state_bytes((3, 5)) == 8 * 15, "float32 weights have no other half"
    seeds = [s for s in range(20) if BAdam(every=10, order="random", seed=s).active(1, shapes) != OUTSIDE]
    run_state_is_the_formula(pupil(tmp_path / "r", dtype="bfloat16", steps=2, seed=seeds[0]), "full() + badam()",
                             tmp_path / "run")


def test_both_orders_agree() -> None:
    both_orders_agree(made, 0.01)


def test_it_learns_with_layers_resting_in_bfloat16_as_well_as_with_every_half(tmp_path: Path) -> None:
    model = pupil(tmp_path, steps=45, dtype="bfloat16")
    learns(model, "badam(every=3, rate=1e-3)", tmp_path / "fast", by=0.2)
    found = [trained(model, f'badam(every=3, rate=5e-5, held="{held}")', tmp_path / held).fitted
             for held in ("block", "split")]
    gains = [fitted.before - fitted.after for fitted in found]
    assert gains[0] == pytest.approx(gains[1], rel=0.1)


@pytest.mark.parametrize("stop", [4, 5])
def test_it_resumes_exactly_within_and_at_the_end_of_a_visit(tmp_path: Path, stop: int) -> None:
    resumes_exactly(pupil(tmp_path, dtype="bfloat16"), "full() + badam(every=2)", tmp_path / "resumed", stop=stop)


def test_a_layer_that_was_never_visited_is_the_parents(tmp_path: Path) -> None:
    model = pupil(tmp_path, steps=2)
    done = trained(model, 'badam(every=2, order="ascending")', tmp_path / "run").model
    before, after = tensors(model), tensors(done)
    for name in before:
        assert torch.equal(before[name], after[name]) == (block_of(name) != OUTSIDE), name


def test_with_an_adapter_its_weights_are_float32(tmp_path: Path) -> None:
    model = pupil(tmp_path, dtype="bfloat16", steps=5)
    assert Methods.of(planned(model, "lora() + badam()").train).update is not None
    assert optimizer_of("lora() + badam()", model).state_bytes((2, 3)) == 8 * 6
    assert resumed(model, "lora() + badam(every=2)", tmp_path / "run", 3).fitted.state_bytes > 0
