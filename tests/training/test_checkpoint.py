"""A run that was stopped, killed, or met a full disk goes on as if nothing had happened; another run's is refused."""

from __future__ import annotations

import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Net, asked, plan

from fivefold.errors import StoreError
from fivefold.testing.contract import sentence
from fivefold.training.checkpoint import BEST, STATE, Keeper
from fivefold.training.loop import Fitted, Hooks, Step

KINDS = [(torch.float32, "float32"), (torch.bfloat16, "split"), (torch.bfloat16, "kahan"),
         (torch.bfloat16, "stochastic")]


class Noisy(Net):
    """Its loss draws random numbers, and a technique keeps a running number that its penalty needs."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype=dtype)
        self.seen = torch.zeros(1)

    def loss(self, rows: Any) -> torch.Tensor:
        noise = 0.1 * torch.randn(()) if torch.is_grad_enabled() else 0.0
        return super().loss(rows) * (1 + noise)

    def fit(self, folder: Path | None = None, stop: int = 0, every: float = 0.0, **more: Any) -> Fitted:  # type: ignore[override]
        def listen(step: Step) -> None:
            if step.step == stop:
                raise KeyboardInterrupt

        def penalty(step: int) -> torch.Tensor:
            return 1e-3 * (1 + self.seen[0]) * self.first.float().square().sum()

        torch.manual_seed(5)
        hooks = more.pop("hooks", Hooks(penalty=penalty, stepped=lambda step: self.seen.add_(0.5 * step),
                                        buffers=lambda: {"seen": self.seen}, listen=listen))
        keeper = Keeper(folder, "the key", every) if folder else None
        at_once = 16 if more.get("fused") else 3
        return super().fit(more.pop("told", plan()), at_once, held=more.pop("held", "float32"), keeper=keeper,
                           hooks=hooks, **more)


def ends(net: Net, done: Fitted) -> tuple[Any, ...]:
    return done.losses, done.history, done.after, done.best_step, *(done.value(n).tolist() for n in ("first", "second"))


@pytest.mark.parametrize(("dtype", "held"), KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype, held: str, fused: bool) -> None:
    net = Noisy(dtype)
    whole = ends(net, net.fit(held=held, fused=fused))
    for stop in (1, 2, 6, 12):
        with pytest.raises(KeyboardInterrupt):
            Noisy(dtype).fit(tmp_path / str(stop), stop, held=held, fused=fused)
        torch.manual_seed(77)
        again = Noisy(dtype)
        assert ends(again, again.fit(tmp_path / str(stop), held=held, fused=fused)) == whole
        assert torch.equal(again.seen, net.seen)


def test_it_may_be_stopped_again_and_again(tmp_path: Path) -> None:
    net = Noisy()
    whole = ends(net, net.fit())
    for stop in (2, 3, 4, 7, 11):
        with pytest.raises(KeyboardInterrupt):
            Noisy().fit(tmp_path, stop)
        meta = Keeper(tmp_path, "the key").meta()
        assert meta is not None and meta["step"] == stop - 1
    last = Noisy()
    assert ends(last, last.fit(tmp_path)) == whole
    finished = Noisy()
    assert ends(finished, finished.fit(tmp_path)) == whole, "and once more after its end"


def test_it_stops_for_the_same_reason_after_the_same_step(tmp_path: Path) -> None:
    scores = [5.0, 4.0, 4.0, 4.0, 3.0]
    for folder in (None, tmp_path):
        asked = iter(scores)
        done = Noisy().fit(folder, score=lambda asked=asked: next(asked), patience=1)
        assert (done.steps, done.best_step, done.history[-1]) == (6, 3, (6, 4.0))
    again = Noisy().fit(tmp_path, score=lambda: pytest.fail("there is nothing to judge"), patience=1)
    assert (again.steps, again.best_step, again.stopped) == (6, 3, done.stopped)


def test_every_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Noisy().fit(tmp_path, 9, every=1000.0)
    assert (tmp_path / BEST).is_file() and not (tmp_path / STATE).is_file()
    Noisy().fit(tmp_path, every=1000.0)
    meta = Keeper(tmp_path, "the key").meta()
    assert meta is not None and meta["step"] == 12, "the last step is always kept"


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Noisy().fit()
    assert not list(tmp_path.iterdir()) and Keeper().meta() is None and not Keeper().due(1e9)


def test_the_best_state_of_a_killed_process_is_not_lost(tmp_path: Path) -> None:
    scores = iter([5.0, 4.0, 1.0])
    first = Noisy()
    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path, 6, score=lambda: next(scores))
    meta = Keeper(tmp_path, "the key").meta()
    assert meta is not None and meta["history"] == [[0, 5.0], [3, 4.0]]
    again = Noisy()
    done = again.fit(tmp_path, score=lambda: 4.5, told=plan(seconds=1e-6))
    assert done.history == ((0, 5.0), (3, 4.0), (5, 4.5)) and (done.best_step, done.after) == (6, 1.0)
    assert torch.equal(again.first, first.first)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full_at", [5, 6])
def test_a_disk_that_fills_leaves_the_checkpoint_before(tmp_path: Path, full_at: int) -> None:
    net = Noisy()
    whole = ends(net, net.fit())
    with pytest.raises(KeyboardInterrupt):
        Noisy().fit(tmp_path, full_at)
    before = (tmp_path / STATE).read_bytes()
    with no_file_above(1000), pytest.raises(StoreError) as caught:
        Noisy().fit(tmp_path)
    assert "free space" in sentence(caught.value) and str(tmp_path) in str(caught.value)
    assert (tmp_path / STATE).read_bytes() == before and not list(tmp_path.glob(".*"))
    again = Noisy()
    assert ends(again, again.fit(tmp_path)) == whole


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".checkpoint.safetensors.0123.partial"
    left.write_bytes(b"half")
    Noisy().fit(tmp_path)
    assert not left.exists()


def test_another_run_is_refused(tmp_path: Path) -> None:
    Noisy().fit(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(StoreError) as caught:
        Net().fit(plan(), keeper=Keeper(tmp_path, "another key"))
    assert "other data, model or settings" in sentence(caught.value)
    with pytest.raises(StoreError) as caught:
        Noisy().fit(tmp_path, told=plan(steps=20))
    assert "begun with 12 steps, not 20" in sentence(caught.value)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", [STATE, BEST])
@pytest.mark.parametrize("damage", ["cut", "scrawled", "gone"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        Noisy().fit(tmp_path, 8)
    data = (tmp_path / name).read_bytes()
    if damage == "gone":
        (tmp_path / name).unlink()
        if name == STATE:
            assert Noisy().fit(tmp_path).steps == 12
            return
    else:
        (tmp_path / name).write_bytes(data[: len(data) // 2] if damage == "cut" else data[:8] + b"\xff" + data[9:])
    with pytest.raises(StoreError) as caught:
        Noisy().fit(tmp_path)
    assert f"{name} is missing or damaged" in sentence(caught.value) and STATE in str(caught.value).split(";")[1]


def test_the_header_does_not_grow_with_the_run(tmp_path: Path) -> None:
    sizes = []
    for steps in (100, 600):
        Net().fit(plan(steps=steps), keeper=Keeper(tmp_path / str(steps), "k"))
        data = (tmp_path / str(steps) / STATE).read_bytes()
        sizes.append(struct.unpack("<Q", data[:8])[0])
    assert sizes[1] - sizes[0] < 100


KILLED = """
import sys
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from fivefold.model import load
from fivefold.training.checkpoint import Keeper
from fivefold.training.run import run, run_key
from small import asked
model = asked(load({model!r}), Path({data!r}))
run(model, Path({out!r}), keeper=Keeper(Path({out!r}), run_key(model), 0.0), listen=lambda s: print(s.step, flush=True))
"""


def test_a_killed_process_loses_one_step(tiny_llama: Any, tmp_path: Path) -> None:

    from fivefold.testing.tiny import tiny_examples
    from fivefold.training.run import run, run_key

    data = tiny_examples(tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    code = KILLED.format(tests=str(Path(__file__).parent), model=str(tiny_llama.path), data=str(data), out=str(out))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 5:
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    model = asked(tiny_llama, data)
    meta = Keeper(out, run_key(model)).meta()
    assert meta is not None and 4 <= meta["step"] <= 8
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = run(model, out, keeper=Keeper(out, run_key(model), 0.0))
        whole = run(model, tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    assert again.fitted.losses == whole.fitted.losses and again.fitted.history == whole.fitted.history
    for name in ("trained/model.safetensors", "delta/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
