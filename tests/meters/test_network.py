"""Bytes against file sizes, JSON written here, and the formulas of collectives (two real gloo processes)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fivefold.meters.network import (
    BYTES_PER_TOKEN,
    CollectiveBytes,
    folder_bytes,
    request_bytes,
    ship_bytes,
    workload_bytes,
)
from fivefold.model import Model

RANK = '''
import json, sys, torch, torch.distributed as dist
from fivefold.meters.network import CollectiveBytes
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
out = {}

def count(name, work):
    with CollectiveBytes() as window:
        work()
    out[name] = [window.total, window.wire(2), sum(window.calls.values())]

full, half = torch.ones(1000), torch.ones(500)
count("all_reduce", lambda: dist.all_reduce(full))
count("all_gather", lambda: dist.all_gather([torch.empty(500), torch.empty(500)], half))
count("all_gather_into", lambda: dist.all_gather_into_tensor(full, half))
count("reduce_scatter", lambda: dist.reduce_scatter_tensor(half, full))
count("broadcast", lambda: dist.broadcast(half, 0))
count("barrier", dist.barrier)
from torch.distributed import _functional_collectives as functional
count("functional", lambda: functional.wait_tensor(functional.all_reduce(full, "sum", dist.group.WORLD)))
net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(30, 20))
inputs = torch.ones(4, 30)
count("ddp", lambda: net(inputs).sum().backward())
if rank == 0:
    print(json.dumps(out))
dist.destroy_process_group()
'''


def test_collectives_are_counted_in_bytes(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(i), str(tmp_path / "store")], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    told = [r.communicate(timeout=300) for r in ranks]
    assert all(r.returncode == 0 for r in ranks), told
    out = json.loads(told[0][0].splitlines()[-1])
    assert out["all_reduce"] == [4000, 4000.0, 1]  # 2 (W-1)/W = 1 of 4,000 bytes at W = 2
    assert out["all_gather"] == out["all_gather_into"] == out["reduce_scatter"] == [4000, 2000.0, 1]
    assert out["broadcast"][0] == 2000
    assert out["barrier"][0] == 0
    assert out["functional"] == [4000, 4000.0, 1]
    assert out["ddp"][0] == (30 * 20 + 20) * 4


def test_the_wire_of_a_ring() -> None:
    window = CollectiveBytes()
    window.payload.update({"allreduce": 800, "reduce_scatter": 80, "allgather": 8})
    assert window.wire(4) == pytest.approx(2 * 0.75 * 800 + 0.75 * 88)
    assert window.wire(1) == 0 and window.total == 888


def test_an_artifact_is_shipped_with_its_tokenizer(model: Model) -> None:
    assert ship_bytes(model).value == 5000
    (model.path.parent / "tokenizer.json").write_text("{}" * 50)
    assert ship_bytes(model).value == 5100
    assert ship_bytes(model, devices=3).value == 15300
    (model.path.parent / "more").mkdir()
    (model.path.parent / "more" / "x").write_bytes(b"y" * 7)
    assert ship_bytes(model.but(path=model.path.parent)).value == folder_bytes(model.path.parent) == 5107


def test_a_request_grows_with_its_text_in_utf8() -> None:
    empty = request_bytes("", "")
    assert request_bytes("abc", "ä") == empty + 3 + 2
    assert request_bytes('"', "") == empty + 2


def test_without_a_tokenizer_the_size_is_modelled(model: Model) -> None:
    wire, per_token = workload_bytes(model, [[1] * 10, [1] * 30], [[2] * 5, [2] * 5])
    assert wire.method == "modelled" and wire.value == request_bytes("", "") + BYTES_PER_TOKEN * 25
    assert per_token == BYTES_PER_TOKEN


def test_with_a_tokenizer_it_is_counted(model: Model) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "bcd": 1}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(model.tokenizer_file))
    wire, per_token = workload_bytes(model, [[0, 0]], [[1, 0, 1, 1]])
    assert wire.method == "counted" and wire.value == request_bytes("aa", "bcdabcdbcd")
    assert per_token == 10 / 4
