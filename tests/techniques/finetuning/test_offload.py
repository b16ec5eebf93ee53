"""Offloading changes where numbers lie and nothing else."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from masked import assert_same, planned, pupil, resumed, trained

from fivefold.errors import Misfit, StoreError
from fivefold.machine import Machine
from fivefold.model import TrainPlan
from fivefold.techniques.finetuning.offload import Offload
from fivefold.training.adamw import AdamW
from fivefold.training.checkpoint import Keeper
from fivefold.training.loop import Group, Hooks, fit
from fivefold.training.memory import needs
from fivefold.training.method import Methods, model_shapes
from fivefold.training.shelf import DiskShelf, HostShelf, Shelf
from fivefold.weights import write_safetensors


@pytest.mark.parametrize("recipe", ["full()", "full() + adamw8bit()", "full() + badam(every=2)", "lora()"])
def test_training_is_the_same_bit_for_bit(tmp_path: Path, recipe: str) -> None:
    model = pupil(tmp_path, dtype="bfloat16")
    plain = trained(model, recipe, tmp_path / "plain")
    away = trained(model, f"{recipe} + offload()", tmp_path / "away")
    assert away.fitted.losses == plain.fitted.losses and away.fitted.state_bytes == plain.fitted.state_bytes > 0
    assert_same(away.model, plain.model)
    assert not list((tmp_path / "away").glob(".offload.*"))


def test_it_resumes_exactly(tmp_path: Path) -> None:
    model = pupil(tmp_path, dtype="bfloat16")
    through = trained(model, "full()", tmp_path / "through")
    again = resumed(model, "full() + offload()", tmp_path / "killed", 4)
    assert again.fitted.losses == through.fitted.losses
    assert_same(again.model, through.model)


def resident() -> int:
    """Bytes of mapped state files that are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
            ours = ".offload." in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_pages_leave_the_process_and_come_back_with_what_was_written(tmp_path: Path) -> None:
    shelf, draw = DiskShelf(tmp_path), torch.Generator().manual_seed(0)
    given = torch.randn(1000, 1000, generator=draw)
    mapped = shelf.place(given.clone())
    assert resident() == 0 and mapped.shape == given.shape
    with shelf.lend({"mean": mapped}) as state:
        state["mean"].mul_(2)
        assert resident() >= mapped.nbytes
    assert resident() == 0
    assert torch.equal(mapped, 2 * given)
    assert not list(tmp_path.iterdir()), "a mapped file has no name"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.uint8])
def test_a_checkpoint_reads_one_tensor_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    shelf = DiskShelf(tmp_path / "shelf")
    given = {name: (100 * torch.rand(64, 2048)).to(dtype) for name in "ab"} | {"small": torch.ones(3, dtype=dtype)}
    placed = {name: shelf.place(tensor.clone()) for name, tensor in given.items()}
    write_safetensors(tmp_path / "x.safetensors", {name: shelf.stored(t) for name, t in placed.items()})
    assert resident() == 0
    back = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], given[name]) for name in given)


def test_a_full_disk_is_met_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="free space"):
        trained(pupil(tmp_path), "full() + offload()", tmp_path / "run")
    assert not list((tmp_path / "run").glob(".offload.*"))


class Counting(HostShelf):
    """A host shelf that sees how much is on the device at a time."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.most = 0

    def lend(self, state: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]
        self.most = max(self.most, sum(t.nbytes for t in state.values()))
        return super().lend(state)


def fitted(shelf: Shelf, keeper: Keeper | None = None) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    parameters = {n: torch.nn.Parameter(torch.randn(64, 64, generator=draw).bfloat16()) for n in "ab"}
    x = torch.randn(8, 64, generator=draw).bfloat16()

    def loss(_: object = None) -> torch.Tensor:
        return ((x @ parameters["a"]).tanh() @ parameters["b"]).float().square().mean()

    done = fit(TrainPlan(steps=5, learning_rate=0.01), [Group(parameters=parameters)], loss,
               lambda step: [(None, 1.0)], lambda: float(loss().detach()), optimizer=AdamW(), held="split",
               hooks=Hooks(shelf=shelf), keeper=keeper)
    return [done.value(name) for name in parameters]


def test_a_host_shelf_copies_there_and_back(tmp_path: Path) -> None:
    """Here the device is the processor: what is lent is a copy all the same."""
    shelf = Counting()
    for keeper in (None, Keeper(tmp_path, "k", every=0.0)):
        for one, other in zip(fitted(shelf, keeper), fitted(Shelf()), strict=True):
            assert torch.equal(one, other)
    assert shelf.most == 2 * 4 * 64 * 64
    kept = shelf.place(torch.zeros(3))
    with shelf.lend({"x": kept}) as there:
        there["x"].fill_(7)
        assert float(kept.sum()) == 0
    assert float(kept.sum()) == 21


def test_main_memory_is_refused_where_the_model_is_trained_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pupil(tmp_path)
    without = replace(Machine.probe(), gpus=())
    monkeypatch.setattr(Machine, "probe", classmethod(lambda cls: without))
    with pytest.raises(Misfit, match='in main memory already; use offload\\(to="disk"\\)'):
        planned(model, 'offload(to="cpu")')
    monkeypatch.setattr(Machine, "probe", classmethod(lambda cls: replace(without, gpus=("some",))))
    with pytest.raises(Misfit, match="in main memory already"):
        trained(model, 'offload(to="cpu")', tmp_path / "run")


def test_the_formula_keeps_one_tensors_state_in_memory(tmp_path: Path) -> None:
    model = pupil(tmp_path)
    given = {"element": 2, "process": 0.0, "optimizer": AdamW(), "fused": True}
    plain = needs(model.blueprint, model.train, Methods(), **given)  # type: ignore[arg-type]
    away = needs(model.blueprint, model.train, Methods(saving=Offload()), **given)  # type: ignore[arg-type]
    sizes = [torch.Size(s).numel() for s in model_shapes(model.blueprint).values()]
    assert (plain.state, plain.beside) == (8 * sum(sizes), 2 * sum(sizes))
    assert (away.state, away.beside) == (8 * max(sizes), 2 * max(sizes))
