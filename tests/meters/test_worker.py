"""The protocol by itself, and the driver over real processes whose session is a fake."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from meter_fakes import Clock, FakeSession, Request, Traffic

from fivefold.errors import Crashed, ModelError, TimedOut
from fivefold.machine import Machine
from fivefold.meters import interleaved, worker
from fivefold.meters.interleaved import Interleaved, Job, keep
from fivefold.meters.money import Prices
from fivefold.model import Model, load

TRAFFIC = Traffic("test", [Request([1] * 10, 5)])
ARM = '''
import sys
sys.path.insert(0, {tests!r})
from meter_fakes import Clock, FakeSession
from fivefold.meters import bench, worker
from fivefold.errors import ModelError
import time

def open_session(model):
    if model.name == "broken":
        raise ModelError("this model is broken; take another")
    if model.name == "slow":
        time.sleep(60)
    if model.name == "dead":
        print("the engine said something last", file=sys.stderr)
        sys.stderr.flush()
        import os
        os._exit(7)
    clock = Clock()
    bench_clock.append(clock)
    return FakeSession(clock, per_token=0.2 if model.name == "heavy" else 0.1)

bench_clock = []
bench.open_session = open_session
made = bench.Bench.__init__
def init(self, *a, **k):
    made(self, *a, **k)
    self._clock = bench_clock[0]
bench.Bench.__init__ = init
raise SystemExit(worker.main(sys.argv[1:], sys.stdin, sys.stdout))
'''


@pytest.fixture
def arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "arm.py"
    script.write_text(ARM.format(tests=str(Path(__file__).parent)))
    monkeypatch.setattr(interleaved, "COMMAND", [sys.executable, str(script)])


def test_a_job_survives_its_journey(model: Model, machine: Machine, prices: Prices, clock: Clock,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    job = json.loads(json.dumps(worker.job_to_json(model, TRAFFIC, machine, prices, "FRA")))
    monkeypatch.setattr("fivefold.meters.bench.open_session", lambda m: FakeSession(clock))
    bench = worker.open_bench(job)
    assert bench.model == model and bench.machine == machine
    assert bench.workload.requests[0].prompt == [1] * 10 and bench.workload.batch == 1


def test_lines_in_lines_out(model: Model, machine: Machine, prices: Prices, tmp_path: Path, clock: Clock,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fivefold.meters.bench.open_session", lambda m: FakeSession(clock))
    file = tmp_path / "job.json"
    file.write_text(json.dumps(worker.job_to_json(model, TRAFFIC, machine, prices, "world")))
    out = io.StringIO()
    asked = [{"do": "round"}, {"do": "round"}, {"do": "finish", "keep": [1]}]
    assert worker.main([str(file)], map(json.dumps, asked), out) == 0
    ready, first, second, last = map(json.loads, out.getvalue().splitlines())
    assert ready == {"ready": True} and (first["round"], second["round"]) == (0, 1)
    assert last["measurement"]["context"]["rounds_run"] == 2 and last["measurement"]["context"]["rounds"] == 1
    out = io.StringIO()
    assert worker.main([str(file)], [json.dumps({"do": "dance"})], out) == 2
    assert json.loads(out.getvalue().splitlines()[-1])["kind"] == "UserError"


def test_two_processes_take_turns(arms: None, model: Model, machine: Machine, prices: Prices) -> None:
    jobs = [Job(model=model, workload=TRAFFIC), Job(model=model.but(name="heavy"), workload=TRAFFIC)]
    with Interleaved(jobs, machine=machine, prices=prices) as pair:
        light, heavy = pair.run(rounds=2)
        assert pair.ratio("latency", 1, 0).value == pytest.approx(2.0)
        assert pair.ratio("latency", 0, 1).value == pytest.approx(0.5)
        assert pair.ratio("nothing", 1, 0).value is None
    assert 2 <= len(pair.rounds) <= 4 and len(pair.kept) == 2
    assert light.context["workload"] == "test" and heavy.value("size") == 5000


@pytest.mark.parametrize("name, error, says", [
    ("broken", ModelError, "broken: this model is broken; take another"),
    ("dead", Crashed, "code 7 .the engine said something last"), ("slow", TimedOut, "no answer within 5 s"),
])
def test_what_an_arm_meets_is_raised_here(arms: None, model: Model, machine: Machine, prices: Prices, name: str,
                                          error: type[Exception], says: str) -> None:
    jobs = [Job(model=model.but(name=name), workload=TRAFFIC)]
    pair = Interleaved(jobs, machine=machine, prices=prices, timeout=5 if name == "slow" else 120)
    with pytest.raises(error, match=says), pair:
        pass
    assert all(w._process.returncode is not None for w in pair._workers), "no worker may be left behind"


def test_a_turn_is_disturbed_when_one_of_it_is() -> None:
    def turn(*others: float) -> list[dict[str, Any]]:
        return [{"others": o, "disturbed": o > 0.15} for o in others]

    turns = [turn(0.0, 0.9), turn(0.1, 0.0), turn(0.2, 0.3), turn(0.0, 0.0)]
    assert keep(turns, 2) == [1, 3]
    assert keep(turns, 3) == [1, 2, 3]
    assert keep(turns, 9) == [0, 1, 2, 3]


NOT_NEEDED = {"numpy", "psutil", "gguf", "cffi", "pycparser", "hashlib", "email", "tempfile", "subprocess", "logging",
              "concurrent.futures", "asyncio", "yaml", "rich", "typer", "tokenizers", "jinja2", "torch", "openvino"}
MEASURED = '''
import json, sys
from fivefold.meters import memory, worker
closed = memory.PeakMemory.close
def close(window):
    closed(window)
    print(json.dumps({"peak": window.peak.value, "modules": sorted(sys.modules)}), flush=True)
memory.PeakMemory.close = close
raise SystemExit(worker.main(sys.argv[1:], sys.stdin, sys.stdout))
'''


def tiny_llama(path: Path) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    square, row = np.eye(64, dtype=np.float32), np.ones(64, np.float32)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {"token_embd": square, "output_norm": row, "blk.0.attn_norm": row, "blk.0.ffn_norm": row}
    for name, array in {**tensors, **{f"blk.0.{n}": square for n in matrices}}.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_measuring_process_holds_little_but_the_model(machine: Machine, prices: Prices, tmp_path: Path) -> None:
    """What is loaded until the memory window closes counts as the model's: 19 MB when this was written."""
    pytest.importorskip("xllamacpp")
    job = tmp_path / "job.json"
    model = load(tiny_llama(tmp_path / "tiny.gguf"))
    job.write_text(json.dumps(worker.job_to_json(model, TRAFFIC, machine, prices, "FRA")))
    asked = '{"do": "round"}\n{"do": "finish", "keep": [0]}\n'
    done = subprocess.run([sys.executable, "-c", MEASURED, str(job)], input=asked, capture_output=True, text=True)
    bare = subprocess.run([sys.executable, "-c", "import os; print(open('/proc/self/status').read())"],
                          capture_output=True, text=True)
    ready, _, seen, last = map(json.loads, done.stdout.splitlines())
    assert ready["ready"] and last["measurement"]["quantities"]["memory"]["value"] == seen["peak"]
    assert not NOT_NEEDED & set(seen["modules"])
    own = next(int(line.split()[1]) * 1024 for line in bare.stdout.splitlines() if line.startswith("VmHWM"))
    assert seen["peak"] - own < 30e6
