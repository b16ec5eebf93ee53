"""Predictor: what a recipe will cost, before anything is built.

The physics first. One decoded token reads every weight it passes through and the cache once; a prompt token costs two
operations per matrix parameter:

    time per token = max(bytes / bandwidth(threads), FLOPs / GEMM rate) / efficiency(engine, storage type)
    time to first  = prompt tokens * FLOPs / GEMM rate / efficiency
    size           = sum over tensors of parameters * bits(type) / 8            (`planned_size`)

Efficiencies are a rough table. For llama.cpp there is a better one, once the seconds per weight of its types have been
measured on this machine (`engines._type_speed`; it is read here, never made here):

    time per token = fixed + layers * (layer + attention * position) + sum over types of weights * seconds per weight

Then the evidence: trials correct the physics by their ratio measured / physics, each recipe by those that resemble it
(`evidence`). Energy, carbon and money follow the predicted time, times the ratio to their own physics that trials show.
Quality is not predicted here; samplers learn it.

A prediction is stored in its trial before the measurement, so `errors` judges it honestly. What a technique will change
in plans and blueprint it says itself (`Technique.plan`); what it does to speed beyond that (a draft from the prompt,
say) is learnt from its trials.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fivefold.engines import default_engine
from fivefold.engines._kivi_type import KiviType
from fivefold.engines._type_speed import ROUGH as NOISY
from fivefold.engines._type_speed import TypeSpeeds, known
from fivefold.machine import Machine
from fivefold.meters.energy import PowerModel
from fivefold.metrics import METRICS
from fivefold.model import Blueprint, DecodePlan, Model
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe, Technique
from fivefold.study import evidence
from fivefold.study.evidence import Evidence, Traits
from fivefold.study.pareto import Goal
from fivefold.study.planned_size import DTYPE_TYPE, planned_bytes, size_on_disk
from fivefold.study.trial import Outcome, Trial
from fivefold.study.type_work import Work, base_work, layer_shape, planned_work, spread_work, stored_work
from fivefold.techniques._shared.gguf_types import bits

_EFFICIENCY = {"f32": 0.55, "f16": 0.6, "bf16": 0.6, "q8_0": 0.34}
_TORCH_EFFICIENCY, _OTHER_EFFICIENCY, _PREFILL_EFFICIENCY = 0.22, 0.3, 0.5
_BASE_MEMORY = {"torch": 450e6, "llama.cpp": 40e6, "openvino": 370e6, "openvino+llama.cpp": 700e6}
_USD_PER_SECOND = 1e-5
PHASES = ("build", "screen", "measure", "quality", "overhead")
RESOURCES = ("flops", "latency", "ttft", "request", "decode", "prefill", "memory", "size", "kv", "energy", "carbon",
             "money", "network")
CLOCKED = ("latency", "ttft", "request", "decode", "prefill")
FOLLOW = ("energy", "carbon", "money")
"""Metrics that are a price times the request's time."""
TIMED = {"latency", "decode", "request", "throughput", "energy", "money", "carbon"}
MARGIN = 0.1
SLOW_RATE = 5e10
"""Arithmetic rate assumed of a machine that was never calibrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What the physics needs to know of a recipe's result."""

    engine: str
    storage: str
    file_bytes: float
    weight_bytes: float
    """Of weights, read for each token."""
    draft_bytes: float
    blueprint: Blueprint
    threads: int | None
    batch: int
    cache_bytes: float
    dtype: str
    traits: Traits
    work: Work | None = None
    """Weights by type, where the table of measured times applies."""


@dataclass(frozen=True)
class Predictor:
    """`prompt` and `output` are tokens of the workload's typical request, `requests` how many a round has."""

    machine: Machine
    model: Model
    prompt: int = 128
    output: int = 64
    requests: int = 8
    _memo: dict[Recipe, tuple[Outline, dict[str, float]]] = field(default_factory=dict, repr=False, compare=False)

    def outline(self, recipe: Recipe) -> Outline:
        return self._known(recipe)[0]

    def physics(self, recipe: Recipe) -> dict[str, float]:
        """Metric -> value by physics and the rough table, without evidence."""
        return self._known(recipe)[1]

    def bits_per_weight(self, recipe: Recipe) -> float:
        """Of the artifact the recipe makes, on average, by its planned bytes; a pruned model's own weights count."""
        o = self.outline(recipe)
        return 8 * o.weight_bytes / o.blueprint.parameters

    def _known(self, recipe: Recipe) -> tuple[Outline, dict[str, float]]:
        if recipe not in self._memo:
            outline = self._outline(recipe)
            self._memo[recipe] = outline, self._physics(outline)
        return self._memo[recipe]

    def _outline(self, recipe: Recipe) -> Outline:
        model = recipe.plan(self.model)
        engine = planned_engine(model)
        average = average_bits(recipe)
        storage = model.export.default if model.export.format == "gguf" else DTYPE_TYPE[model.run.dtype]
        if average is not None:
            storage = f"{average:.0f} bits"
        kivi = KiviType.parse(model.run.cache_type)
        cache = model.run.cache_type if kivi or engine != "torch" else DTYPE_TYPE[model.run.dtype]
        exact = bits(DTYPE_TYPE[model.run.dtype] if kivi else cache) / 8
        file_bytes, weight_bytes = self._bytes(recipe, model)
        traits = Traits(
            engine=engine, storage=storage, threads=_spelled(model.run.threads), cache="" if cache == "f16" else cache,
            batch=_spelled(model.run.batch - 1), lookup=_drafted(model.decode),
        )
        return Outline(
            engine=engine, storage=storage, file_bytes=file_bytes, weight_bytes=weight_bytes,
            draft_bytes=model.decode.draft_bytes,
            blueprint=model.blueprint, threads=model.run.threads, batch=model.run.batch,
            cache_bytes=kivi.mean_bytes(model.run.context, exact) if kivi else exact,
            dtype=model.run.dtype if engine == "torch" else "float32", traits=traits,
            work=self._work(recipe, model) if engine == "llama.cpp" and self.speeds else None,
        )

    @property
    def speeds(self) -> TypeSpeeds | None:
        """The table of this model's widths on this machine; None where there is none or it was taken in noise."""
        found = known(self.model.blueprint, self.machine.id)
        return found if found and found.others <= NOISY else None

    def _work(self, recipe: Recipe, planned: Model) -> Work:
        if not recipe.build.techniques:
            return stored_work(planned)
        average = average_bits(recipe)
        if average is None:
            return planned_work(planned)
        from fivefold.techniques.inference.mixed_precision import candidates

        b = planned.blueprint
        widths = {b.width, b.ffn, b.heads * b.head_dim}
        work = spread_work(b, average, {width: candidates(width) for width in widths})
        most = next((t.time for t in recipe if getattr(t, "time", 0.0)), None)  # type: ignore[attr-defined]
        if most is None or self.speeds is None:
            return work
        wanted, base = (_matrix_seconds(self.speeds, w) for w in (work, base_work(b)))
        return work.scaled(min(1.0, most * base / wanted))

    def _bytes(self, recipe: Recipe, planned: Model) -> tuple[float, float]:
        """(of the file, of weights read per token); of the file there is when nothing builds."""
        average = average_bits(recipe)
        if average is not None:
            held = average * planned.blueprint.parameters / 8
            return held + planned.decode.draft_bytes, held
        written, read = planned_bytes(self.model, planned)
        if not recipe.build.techniques:
            there = size_on_disk(self.model)
            own = there - planned.decode.draft_bytes
            return there, own if planned.format == "gguf" else read * min(1.0, there / written)
        return written, read

    def _physics(self, o: Outline) -> dict[str, float]:
        position = self.prompt + self.output // 2
        limits = self.machine.limits(
            o.blueprint, o.weight_bytes, o.dtype, position, cache_element_bytes=o.cache_bytes, threads=o.threads
        )
        efficiency = _TORCH_EFFICIENCY if o.engine == "torch" else _EFFICIENCY.get(o.storage, _OTHER_EFFICIENCY)
        decode = min(limits.decode.value or 50.0, limits.prefill.value or math.inf) * efficiency
        cores = self.machine.cores
        share = min(1.0, (o.threads or cores) / cores)
        prefill = (limits.prefill.value or 1000.0) * _PREFILL_EFFICIENCY * share
        latency, ttft = 1 / decode, self.prompt / prefill
        if o.work is not None and (speeds := self.speeds) is not None:
            latency, ttft = self._by_type(speeds, o, o.work, position)
            decode, prefill = 1 / latency, self.prompt / ttft
        request = ttft + latency * max(1, self.output - 1)
        cache = o.blueprint.cache_bytes_per_token(o.cache_bytes)
        per_token = request / max(1, self.output)
        watts = _watts(self.machine, share * cores)
        return {
            "flops": limits.flops_per_token, "latency": latency, "ttft": ttft, "request": request, "decode": decode,
            "prefill": prefill, "size": o.file_bytes, "network": o.file_bytes, "kv": cache,
            "memory": (o.weight_bytes + o.draft_bytes + cache * (self.prompt + self.output)
                       + _BASE_MEMORY.get(o.engine, 400e6)),
            "energy": per_token * watts, "carbon": per_token * watts / 3.6e6 * 450 * 1e6,
            "money": per_token * _USD_PER_SECOND * 1e6,
        }

    def _by_type(self, speeds: TypeSpeeds, o: Outline, work: Work, position: int) -> tuple[float, float]:
        """Seconds per token, and to the first token, by the measured table."""
        b = o.blueprint
        shared: dict[str, Any] = {"weights": work.layers, "head": work.head, "threads": o.threads}
        return (
            speeds.token_seconds(layers=b.layers, position=position, units=b.heads * b.head_dim, **shared),
            speeds.prompt_seconds(layers=b.layers, tail=layer_shape(b).tail, prompt=self.prompt, **shared),
        )

    def after(self, history: Sequence[Trial]) -> Forecast:
        """The predictor as these trials have taught it."""
        return Forecast(self, tuple(history))


class Forecast:
    """Physics corrected by the trials measured so far. Cheap to ask many times for one history."""

    def __init__(self, predictor: Predictor, history: Sequence[Trial]) -> None:
        self.predictor, self.history = predictor, history
        self.errors = errors(history)
        """Median |predicted / measured - 1| per metric."""
        self._evidence = self._compare()
        self._memo: dict[Recipe, Measurement] = {}
        self._built = built_prefixes(history)
        self._steps: dict[str, list[float]] = {}
        for trial in history:
            for key, seconds in trial.spent.items():
                self._steps.setdefault(key, []).append(seconds)
        self._pace: dict[str, list[float]] = {}
        self._begun: set[tuple[str, str]] = set()
        for trial in history:
            recipe = Recipe.parse(trial.recipe)
            for i, technique in enumerate(recipe.build.techniques):
                if taken := trial.spent.get(f"step.{technique.name}"):
                    expected = self._effort(technique, self._first(recipe, i))
                    self._pace.setdefault(technique.name, []).append(taken / expected)
                    self._begun.add((technique.name, prefix_text(recipe, i)))
        self.parent = next((t for t in history if t.recipe == "parent" and t.outcome is Outcome.MEASURED), None)
        self._similar = [t for t in history if t.spent.get("measure") and t.recipe != "parent"]

    def _compare(self) -> dict[str, dict[bool, Evidence]]:
        """Metric -> physics by table or not -> the log ratios measured / physics of the measured trials made so."""
        found: dict[tuple[str, bool], list[evidence.Record]] = {}
        for trial in self.history:
            if trial.outcome is not Outcome.MEASURED:
                continue
            recipe = Recipe.parse(trial.recipe)
            o, raw = self.predictor.outline(recipe), self.predictor.physics(recipe)
            ratios = {metric: math.log(measured / value) for metric, value in raw.items()
                      if value > 0 and (measured := trial.value(metric) or 0.0) > 0}
            for metric, ratio in ratios.items():
                own = ratio - ratios.get("request", 0.0) if metric in FOLLOW else ratio
                found.setdefault((metric, _by_table(metric, o)), []).append((o.traits, own))
        out: dict[str, dict[bool, Evidence]] = {}
        for (metric, table), records in found.items():
            variance = evidence.PRICE if metric in FOLLOW else evidence.TABLE if table else evidence.ROUGH
            out.setdefault(metric, {})[table] = Evidence(records, variance)
        return out

    def _correction(self, metric: str, o: Outline) -> tuple[float, int]:
        """Log of the factor, and the number of trials it comes from."""
        known = self._evidence.get(metric, {}).get(_by_table(metric, o))
        log, n = (known.log_factor(o.traits), known.count(o.traits)) if known else (0.0, 0)
        return (log + self._correction("request", o)[0], n) if metric in FOLLOW else (log, n)

    def predict(self, recipe: Recipe) -> Measurement:
        """Every metric of `RESOURCES`, modelled; `context` says from how many trials it was calibrated."""
        if recipe not in self._memo:
            self._memo[recipe] = self._predict(recipe)
        return self._memo[recipe]

    def _predict(self, recipe: Recipe) -> Measurement:
        o = self.predictor.outline(recipe)
        quantities = {}
        for metric, value in self.predictor.physics(recipe).items():
            log, n = self._correction(metric, o)
            quantities[metric] = Quantity(
                value=value * math.exp(log), unit=METRICS[metric].unit, method="modelled", n=max(1, n),
                reason="" if n else "not calibrated by a trial yet",
            )
        calibrated = sum(len(e.records) for e in self._evidence.get("latency", {}).values())
        return Measurement(quantities, {"calibrated_on": calibrated})

    def seconds(self, recipe: Recipe) -> dict[str, float]:
        """Expected seconds of a trial by phase, from this study's own trials where there are any."""
        build = 0.0
        for i, technique in enumerate(recipe.build.techniques):
            if prefix_text(recipe, i + 1) not in self._built:
                build += self._step(technique, self._first(recipe, i))
        if str(recipe.build) not in self._built:
            build += median(self._steps.get("step.export") or [self._base()])
        rough = self.predictor.physics(recipe)
        if self._similar:
            rest = {k: median(t.spent.get(k, 0.0) for t in self._similar) for k in ("screen", "measure", "quality")}
        elif self.parent is not None:
            base = self.predictor.physics(Recipe())
            ratio = min(1.5, max(0.15, rough["request"] / base["request"]))
            rest = {k: self.parent.spent.get(k, 3.0) * ratio for k in ("screen", "measure", "quality")}
        else:
            measure = 2 * self.predictor.requests * rough["request"] + 2
            rest = {"screen": 5.0, "measure": measure, "quality": 2200 / rough["prefill"] + 2}
        overhead = self._steps.get("overhead")
        return {"build": build, **rest, "overhead": median(overhead) if overhead else 2.0}

    def _first(self, recipe: Recipe, i: int) -> bool:
        """Whether this would be the technique's first setting after those before it: what settings share is due."""
        return (recipe.build.techniques[i].name, prefix_text(recipe, i)) not in self._begun

    def _step(self, technique: Technique, first: bool) -> float:
        """Seconds to apply: by its declared effort, times what this technique took against that in earlier trials."""
        return self._effort(technique, first) * median(self._pace.get(technique.name) or [1.0])

    def _effort(self, technique: Technique, first: bool) -> float:
        rate = self.predictor.machine.gemm("float32").value or SLOW_RATE
        model = self.predictor.model
        work = technique.effort(model) + (technique.effort_once(model) if first else 0.0)
        return self._base() + work / rate

    def _base(self) -> float:
        """Seconds to read and write the model once."""
        return 3.0 + 6e-8 * self.predictor.model.blueprint.parameters

    def objection(
        self, recipe: Recipe, prediction: Measurement, goal: Goal, parent: Mapping[str, float | None]
    ) -> str | None:
        """Why the recipe is not worth building, as a sentence, or None.

        A limit on a resource counts when missed by more than the margin and the predictor's own error; being slower
        than the parent counts when time, energy or money is an objective.
        """
        for limit in goal.budget:
            guess = prediction.value(limit.metric)
            excess = limit.excess({limit.metric: guess}, parent)
            if guess is not None and excess is not None and excess > max(MARGIN, self._doubt(limit.metric)):
                return f"predicted {limit.metric} of {guess:.4g} {METRICS[limit.metric].unit} misses the limit {limit}"
        slow, base = prediction.value("request"), parent.get("request")
        if slow is not None and base and TIMED & set(goal.objectives):
            ratio = slow / base
            if ratio > (1 + MARGIN) * (1 + self._doubt("request")):
                return f"predicted to take {ratio:.2g} times as long per request as the parent"
        return None

    def _doubt(self, metric: str) -> float:
        """The error to allow for, as a fraction: what was seen, else a guess; never more than one half."""
        error = self.errors[metric].value if metric in self.errors else None
        return min(0.5, _UNPROVEN.get(metric, 0.5) if error is None else error)


def errors(history: Sequence[Trial]) -> dict[str, Quantity]:
    """Median |predicted / measured - 1| per metric over measured trials other than the parent."""
    found: dict[str, list[float]] = {}
    for trial in history:
        for metric in trial.predicted if trial.recipe != "parent" else ():
            guess, truth = trial.predicted.value(metric), trial.value(metric)
            if guess is not None and truth:
                found.setdefault(metric, []).append(abs(guess / truth - 1))
    return {metric: Quantity.median_of(values, "fraction") for metric, values in found.items()}


_UNPROVEN = {"size": 0.1, "network": 0.1, "kv": 0.05, "flops": 0.05, "memory": 0.3}


@functools.lru_cache(maxsize=64)
def _watts(machine: Machine, busy: float) -> float:
    """Power with that many cores busy."""
    return PowerModel.of(machine).joules(wall=1.0, cpu=busy, cores=machine.cores).value or 0.0


def average_bits(recipe: Recipe) -> float | None:
    """Bits per weight of a recipe that spreads them over the matrices (a technique with a field `bits`)."""
    given: list[Any] = [getattr(t, "bits", None) for t in recipe]
    return next((b for b in given if isinstance(b, float)), None)


def planned_engine(model: Model) -> str:
    """The engine the plan ends in: the chosen one, else that of the planned file."""
    planned = "gguf" if model.format == "gguf" or model.export.format == "gguf" else "safetensors"
    return default_engine(model.but(format=planned))


def _by_table(metric: str, o: Outline) -> bool:
    return metric in CLOCKED and o.work is not None


def _matrix_seconds(speeds: TypeSpeeds, work: Work) -> float:
    return sum(speeds.matrix_seconds(t, n) for t, n in work.layers.items()) + sum(
        speeds.matrix_seconds(t, n, head=True) for t, n in work.head.items())


def _drafted(plan: DecodePlan) -> str:
    return f"{plan.draft_tokens} by a model" if plan.draft_tokens else _spelled(plan.lookup_tokens)


def _spelled(number: int | None) -> str:
    return str(number) if number else ""


def prefix_text(recipe: Recipe, length: int) -> str:
    """The first `length` building techniques, spelled: two recipes that agree in it share that work."""
    return " + ".join(map(str, recipe.build.techniques[:length])) or "parent"


def built_prefixes(history: Sequence[Trial]) -> set[str]:
    """Every prefix that some trial has built already; the parent needs no building."""
    done = {"parent"}
    for trial in history:
        if trial.artifact is not None:
            recipe = Recipe.parse(trial.recipe)
            done |= {prefix_text(recipe, n) for n in range(1, len(recipe.build) + 1)}
    return done

