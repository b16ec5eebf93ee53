"""Compute: operations counted, times taken, and how much of the machine's arithmetic and bandwidth they use.

Words, as the field uses them, for one request of a workload:

    ttft       from the call of generate() to the first token
    latency    (time of the last token - time of the first) / (tokens - 1); decode = 1 / latency
    request    from the call to the end of the answer
    prefill    prompt tokens / ttft
    mfu        prefill's operations per second / the machine's GEMM rate in that dtype
    mbu        bytes per token x decode / the machine's read bandwidth

A round is the whole workload once; its value is pooled over the requests (sum of times over sum of tokens), and a
metric is the median over rounds. Operations are counted on the graph that torch would run for one token after a
full cache, built from the config on the meta device (no weights, no arithmetic) with eager attention, because
FlopCounterMode does not see fused attention on a CPU. They count what the architecture asks for: sparsity,
quantisation and speculative drafts change the time, not this number. A GGUF has no torch graph: the same count comes
from the blueprint's formula, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fivefold.machine import Machine, bytes_per_token, fraction
from fivefold.model import Blueprint, Model
from fivefold.quantity import Quantity


@dataclass(frozen=True, slots=True)
class Timing:
    """One request: prompt and answer lengths in tokens; seconds from the call to first and last token and the end."""

    prompt: int
    tokens: int
    first: float
    last: float
    end: float

    @property
    def latency(self) -> float | None:
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


def time_request(stream: Callable[[], Iterable[int]], prompt: int, clock: Callable[[], float]) -> Timing:
    """Draw a whole answer from `stream()` and note when its tokens came."""
    start = clock()
    first = last = start
    tokens = 0
    for _ in stream():
        last = clock()
        tokens += 1
        if tokens == 1:
            first = last
    return Timing(prompt, tokens, first - start, last - start, clock() - start)


def pooled(timings: Sequence[Timing]) -> dict[str, float]:
    """The round's value of each time metric; what no request can tell (one-token answers) is left out."""
    answered = [t for t in timings if t.tokens]
    out = {"request": sum(t.end for t in timings) / len(timings)}
    if answered:
        out["ttft"] = sum(t.first for t in answered) / len(answered)
        out["prefill"] = sum(t.prompt for t in answered) / sum(t.first for t in answered)
    steps = sum(t.tokens - 1 for t in answered)
    if steps:
        out["latency"] = sum(t.last - t.first for t in answered) / steps
        out["decode"] = 1 / out["latency"]
    return out


def percentiles(timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """p50, p90 and p99 of the single requests, for the context (the metrics themselves are over rounds)."""
    import numpy as np

    columns = {"ttft": [t.first for t in timings if t.tokens], "request": [t.end for t in timings],
               "latency": [t.latency for t in timings if t.latency is not None]}
    return {
        name: {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}
        for name, values in columns.items() if values
    }


def flops(model: Model, position: int) -> Quantity:
    """Operations to generate one token at 0-based `position`."""
    if model.format == "safetensors":
        return count_flops(model, position)
    return _by_formula(model.blueprint, position)


def count_flops(model: Model, position: int) -> Quantity:
    """The same from the torch graph of the model's config, on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"), torch.no_grad():
            graph = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            past = None
            if position:
                past = graph(torch.zeros(1, position, dtype=torch.long), use_cache=True).past_key_values
            with FlopCounterMode(display=False) as counter:
                graph(torch.zeros(1, 1, dtype=torch.long), past_key_values=past, use_cache=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return _by_formula(model.blueprint, position, f"; torch could not trace it: {why}")
    return Quantity(value=counter.get_total_flops(), unit="FLOP/token", method="counted")


def prefill_flops(blueprint: Blueprint, prompt: int) -> int:
    """Operations to read a prompt: the output head is needed at its last position only."""
    head = 2 * blueprint.vocab * blueprint.width
    body = 2 * blueprint.matrix_parameters - head
    attended = prompt * (prompt + 1) // 2
    return prompt * body + head + 4 * blueprint.layers * blueprint.heads * blueprint.head_dim * attended


def mfu(machine: Machine, blueprint: Blueprint, prefill: Quantity, prompt: int, dtype: str) -> Quantity:
    """Share of the GEMM rate that prefill reaches. `prompt`: tokens of a typical prompt."""
    rate = prefill.scaled(prefill_flops(blueprint, prompt) / max(prompt, 1), "FLOP/s")
    return fraction(rate, machine.gemm(dtype))


def mbu(
    machine: Machine, blueprint: Blueprint, decode: Quantity, *, weights: float, position: int, element: float,
    threads: int | None = None,
) -> Quantity:
    """Share of the read bandwidth that decode reaches. `element`: bytes per number in the key-value cache."""
    rate = decode.scaled(bytes_per_token(blueprint, weights, position, element), "byte/s")
    return fraction(rate, machine.bandwidth(threads))


def gemm_dtype(model: Model, described: Mapping[str, object]) -> str:
    """The calibrated dtype an engine's matrix products are compared with. Quantised GGUF types multiply in int8."""
    if model.format == "safetensors":
        return model.run.dtype
    kind = str(described.get("dtype") or model.export.default).lower()
    return {"f32": "float32", "f16": "float32", "bf16": "bfloat16"}.get(kind, "int8")


def _by_formula(blueprint: Blueprint, position: int, why: str = "") -> Quantity:
    return Quantity(value=blueprint.flops_per_token(position), unit="FLOP/token", method="counted",
                    reason=f"by formula from the blueprint{why}")
