"""The names of everything that is measured: one row each, and nothing else knows a metric by another name.

`unit` is the base unit a value is stored in; `better` is the direction; `resource` is one of the survey's five
(compute, memory, energy, money, network) or "quality". Budgets, meters, tasks, search and report read this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    unit: str
    better: Literal["lower", "higher"]
    resource: str
    label: str


_TABLE = [
    Metric("flops", "FLOP/token", "lower", "compute", "operations per generated token"),
    Metric("latency", "s/token", "lower", "compute", "time per output token after the first"),
    Metric("ttft", "s", "lower", "compute", "time to first token"),
    Metric("request", "s", "lower", "compute", "time of one whole request"),
    Metric("decode", "token/s", "higher", "compute", "decode speed of one stream"),
    Metric("prefill", "token/s", "higher", "compute", "prompt speed"),
    Metric("throughput", "token/s", "higher", "compute", "output tokens per second at the workload's batch"),
    Metric("mfu", "fraction", "higher", "compute", "share of the machine's arithmetic rate reached in prefill"),
    Metric("mbu", "fraction", "higher", "memory", "share of the machine's read bandwidth reached in decode"),
    Metric("memory", "byte", "lower", "memory", "peak resident memory of the serving process"),
    Metric("gpu_memory", "byte", "lower", "memory", "peak memory allocated on the accelerator"),
    Metric("size", "byte", "lower", "memory", "bytes of the weights on disk"),
    Metric("kv", "byte/token", "lower", "memory", "key-value cache per token of context"),
    Metric("energy", "J/token", "lower", "energy", "energy per output token, prompts included"),
    Metric("carbon", "gCO2e/Mtoken", "lower", "energy", "emissions per million output tokens"),
    Metric("money", "USD/Mtoken", "lower", "money", "cost per million output tokens"),
    Metric("money_per_parameter", "USD/parameter", "lower", "money", "cost to make, per parameter"),
    Metric("network", "byte", "lower", "network", "bytes to ship the artifact to one device"),
    Metric("request_bytes", "byte", "lower", "network", "bytes on the wire of one request and its answer"),
    Metric("agreement", "fraction", "higher", "quality", "tokens on which the top choice equals the parent's"),
    Metric("kl", "nat/token", "lower", "quality", "mean KL divergence from the parent"),
    Metric("kl_p99", "nat/token", "lower", "quality", "99th percentile of the KL divergence"),
    Metric("loss", "nat/token", "lower", "quality", "mean log-loss on held-out text"),
    Metric("perplexity", "1", "lower", "quality", "exp of the log-loss"),
    Metric("ece", "fraction", "lower", "quality", "calibration error of next-token prediction"),
    Metric("worst_group_kl", "nat/token", "lower", "quality", "KL divergence in the group of tokens hurt most"),
    Metric("accuracy", "fraction", "higher", "quality", "multiple-choice accuracy"),
    Metric("label_loyalty", "fraction", "higher", "quality", "answers equal to the parent's"),
    Metric("probability_loyalty", "fraction", "higher", "quality", "1 - Jensen-Shannon distance, base 2"),
    Metric("flips", "fraction", "lower", "quality", "items that turned from right to wrong or back"),
    Metric("choice_ece", "fraction", "lower", "quality", "calibration error of the chosen answer"),
    Metric("after_attack", "fraction", "higher", "quality", "accuracy after an attack on the question"),
    Metric("attack_queries", "1", "higher", "quality", "times an attack asks about one item"),
]

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}
RESOURCES = ("compute", "memory", "energy", "money", "network")

_SCALES: dict[str, list[tuple[float, str]]] = {
    "byte": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")],
    "s": [(1, "s"), (1e-3, "ms"), (1e-6, "µs")],
    "J": [(3.6e6, "kWh"), (3600, "Wh"), (1, "J"), (1e-3, "mJ")],
    "FLOP": [(1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP")],
}


def scale(value: float, unit: str) -> tuple[float, str]:
    """(factor, unit) to show values around `value` in: `scale(2.6e8, "byte")` is (1e6, "MB")."""
    base, _, per = unit.partition("/")
    if base == "fraction":
        return 0.01, "%"
    fits = [(factor, name) for factor, name in _SCALES.get(base, []) if abs(value) >= factor * 0.9995]
    factor, name = fits[0] if fits else (1.0, "" if base == "1" else base)
    return factor, f"{name}/{per}" if per else name


def show(value: float | None, unit: str) -> str:
    """A value in the unit a person would say: `show(2.6e8, "byte")` is "260 MB"; None is "-"."""
    if value is None:
        return "-"
    base, _, per = unit.partition("/")
    tail = f"/{per}" if per else ""
    if base == "fraction":
        return f"{100 * value:.1f} %"
    if base == "USD":
        return f"${value:.3g}{tail}"
    for factor, name in _SCALES.get(base, []):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g} {name}{tail}"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return number if unit == "1" else f"{number} {unit}"
