"""What does calling llama.cpp through `Session.generate` cost, against a bare C loop and xllamacpp's own server?

    python benchmarks/engine_overhead.py FILE.gguf [--tokens 128] [--rounds 9] [--threads 2]

All three decode greedily from the same prompt, with the same threads, cache and library, in interleaved rounds, so
that a disturbance of the machine hits all alike. The bare loop calls `llama_decode`, reads the logits and takes
their argmax, and nothing else; its own context is made with the same parameters. The server (xllamacpp.Server, in
process, without HTTP) samples in C++ and turns tokens into text; it needs a file with a tokenizer. Each time runs
from the first token to the last, so that prefill does not count. "time x" is the median over the rounds of a loop's
time divided by the bare loop's, with its distribution-free 95 % interval.

`--cpu-time` is for a machine that is busy with other work: one thread, its processor time instead of the clock, and
no server (whose work is done in threads of its own).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import interval, number, publish, table

from fivefold.engines import llama_cpp
from fivefold.engines._llama_abi import library
from fivefold.model import load
from fivefold.quantity import Quantity

Clock = Callable[[], float]
Loop = Callable[[list[int], int], float]


def ours(session: llama_cpp.LlamaSession, clock: Clock) -> Loop:
    def loop(prompt: list[int], count: int) -> float:
        text = session.generate(prompt, count)
        next(text)
        start = clock()
        for _ in text:
            pass
        return clock() - start

    return loop


def bare(handle: Any, vocab: int, context: int, threads: int, clock: Clock) -> Loop:
    """The smallest loop: pointers and buffers made once."""
    ffi, lib = library()
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = context, 256, 256, 1
    params.n_threads = params.n_threads_batch = threads
    made = ffi.gc(lib.llama_init_from_model(handle, params), lib.llama_free)
    tokens, places = ffi.new("int32_t[256]"), ffi.new("int32_t[256]")
    ones, wanted = ffi.new("int32_t[256]", [1] * 256), ffi.new("int8_t[256]")
    zero = ffi.new("int32_t[1]")
    sequences = ffi.new("int32_t *[256]", [zero] * 256)
    batch = ffi.new("llama_batch *", {"token": tokens, "pos": places, "n_seq_id": ones, "seq_id": sequences})
    batch.logits = wanted

    def loop(prompt: list[int], count: int, held: Any = (ones, zero, sequences)) -> float:
        lib.llama_memory_clear(lib.llama_get_memory(made), False)
        for i, token in enumerate(prompt):
            tokens[i], places[i], wanted[i] = token, i, i == len(prompt) - 1
        batch.n_tokens = len(prompt)
        assert lib.llama_decode(made, batch[0]) == 0
        logits = np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(made, -1), 4 * vocab), np.float32)
        batch.n_tokens, wanted[0] = 1, True
        start = clock()
        for place in range(len(prompt), len(prompt) + count - 1):
            tokens[0], places[0] = logits.argmax(), place
            assert lib.llama_decode(made, batch[0]) == 0
            lib.llama_get_logits_ith(made, -1)
        logits.argmax()
        return clock() - start

    return loop


def server(path: Path, threads: int, context: int) -> Loop:
    """xllamacpp's server in this process; the time is its own `predicted_ms`."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = context, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    opened = xllamacpp.Server(params)

    def loop(prompt: list[int], count: int) -> float:
        wish = {"prompt": prompt, "n_predict": count, "temperature": 0, "top_k": 1, "ignore_eos": True,
                "cache_prompt": False}
        timings = opened.handle_completions(wish)["timings"]
        return timings["predicted_ms"] / 1000 * (count - 1) / timings["predicted_n"]

    return loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=llama_cpp.physical_cores())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--quick", action="store_true", help="write no fragment")
    asked = parser.parse_args()
    threads, clock = (1, time.thread_time) if asked.cpu_time else (asked.threads, time.perf_counter)
    model = load(asked.file)
    session = llama_cpp.open(model.but(run=replace(model.run, threads=threads)))
    prompt = np.random.default_rng(0).integers(0, session.vocab, 128).tolist()
    context = -(-(len(prompt) + asked.tokens) // 256) * 256
    plain = bare(session._model, session.vocab, context, threads, clock)
    loops = {"bare C loop": plain, "Session.generate": ours(session, clock)}
    if not asked.cpu_time:
        loops["xllamacpp.Server"] = server(asked.file, threads, context)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(asked.rounds + 1):
        for name in sorted(loops, reverse=round_ % 2 == 0):
            took = loops[name](prompt, asked.tokens)
            if round_:
                seconds[name].append(took)
    rows = []
    for name, times in seconds.items():
        ratio = Quantity.median_of([a / b for a, b in zip(times, seconds["bare C loop"], strict=True)], "x")
        speed = (asked.tokens - 1) / float(np.median(times))
        extra = 1e6 * float(np.median(np.subtract(times, seconds["bare C loop"]))) / (asked.tokens - 1)
        rows.append([name, number(speed, 1), f"{extra:+.0f}", interval(ratio, 4)])
    clocks = f"{threads} thread{'s' * (threads > 1)}, {'processor time' if asked.cpu_time else 'wall clock'}"
    made = table(["decoding loop", "token/s", "us per token more", "time x bare loop"], rows)
    what = f"{asked.file.name}: {asked.tokens} tokens, {asked.rounds} rounds, {clocks}."
    publish("engine_overhead", "What a call through Session.generate costs", f"{what}\n\n{made}",
            packages=("xllamacpp",), keep=not asked.quick)


if __name__ == "__main__":
    main()
