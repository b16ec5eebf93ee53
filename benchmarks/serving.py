"""Every way to serve SmolLM2-135M on this machine, side by side: transformers, OpenVINO, llama.cpp's types, ours.

    python benchmarks/serving.py [--study runs/demo] [--rounds 5] [--types q8_0,q4_0] [--ours "R; R"] [--quick]

All arms start from the same float weights (the off-grid parent). Each runs in a process of its own; within a round
every arm has its turn, so ratios are paired. The standard files are what llama.cpp's own quantizer writes without an
importance matrix: one type for the matrices, Q8_0 for the embedding that is also the output head, and its mixtures
(`llama_types`). Ours are recipes (`mixed_precision` at several sizes and once with prompt lookup, unless `--ours` says
otherwise) and what a study recommends. Slow arms get fewer and shorter requests in the same round; speeds are per
token.

Quality is taken on 2,048 evaluation tokens in windows of 512, in the arm's own engine, against the parent in float32.
`--quick` takes one round of a few tokens and writes nothing; with `--types q8_0 --ours 'gguf(type="q4_0")'` it takes
two minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from _common import interval, number, publish, table
from _transformers_worker import Generate

from fivefold import bundled
from fivefold.artifact import Store
from fivefold.engines import default_engine, open_session
from fivefold.errors import StoreError
from fivefold.export import export
from fivefold.machine import Machine
from fivefold.meters.interleaved import Interleaved, Job
from fivefold.model import ExportPlan, Model
from fivefold.quantity import Measurement, Quantity
from fivefold.recipe import Recipe
from fivefold.study.build import opened, served
from fivefold.study.picks import picks
from fivefold.study.study import Study
from fivefold.tasks.fidelity import Reference, fidelity
from fivefold.tasks.text import windows
from fivefold.techniques._shared.gguf_types import matrices
from fivefold.tokenizer import Tokenizer
from fivefold.workload import Workload

PEER = (sys.executable, str(Path(__file__).with_name("_transformers_worker.py")))
TYPES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q4_k_m")
HANDOVER = 'gguf(type="q8_0", embedding="q8_0") + dtype(type="bfloat16") + engine(type="openvino+llama.cpp")'
OURS = "; ".join([
    *(f"mixed_precision(bits={b})" for b in (4.75, 5.5, 6.6)), "mixed_precision(bits=7.2, time=0.85)",
    "mixed_precision(bits=5.5) + prompt_lookup()", HANDOVER,
])
OPENVINO_READS = ("f16", "q8_0", "q4_0")
FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
FP32 = ("transformers generate, fp32", "torch engine, fp32")
Q8 = "llama.cpp q8_0"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`like` names an arm with the same weights in the same engine, whose quality this one shares."""

    name: str
    model: Model
    ours: bool = False
    slow: bool = False
    like: str = ""
    command: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """`against` maps "fp32", "q8_0" (chat decode) and "openvino" (prefill of summarize) to this arm's ratio."""

    arm: Arm
    chat: Measurement
    long: Measurement
    quality: Measurement
    against: Mapping[str, Quantity]

    @property
    def file(self) -> float:
        return self.chat["size"].value or 0.0

    @property
    def memory(self) -> float:
        return self.chat["memory"].value or 0.0


def llama_types(name: str, parent: Model) -> ExportPlan:
    """The types llama.cpp's quantizer (llama-quant.cpp) would choose without an importance matrix."""
    layers, shapes = parent.blueprint.layers, matrices(parent)

    def wanted(tensor: str) -> str:
        if tensor == "token_embd.weight":
            return "f16" if name == "f16" else "q8_0" if name == "q8_0" else "q6_k"
        layer, down = int(tensor.split(".")[1]), "ffn_down" in tensor
        if name == "q4_k_m":
            more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
            return "q6_k" if more and (down or "attn_v" in tensor) else "q4_k"
        return "q5_k" if name == "iq4_nl" and down and layer < layers // 8 else name

    types = {t: wanted(t) for t in shapes}
    return ExportPlan(format="gguf", default="q8_0", types={
        t: FALLBACK[k] if k in FALLBACK and shapes[t][1] % 256 else k for t, k in types.items()
    })


def peers(parent: Model, types: Sequence[str], work: Path) -> list[Arm]:
    half = parent.but(run=replace(parent.run, dtype="bfloat16"))
    arms = [
        Arm(name=FP32[0], model=parent, slow=True, like=FP32[1], command=PEER),
        Arm(name=FP32[1], model=parent, slow=True), Arm(name="torch engine, bf16", model=half, slow=True),
    ]
    files = {t: export(parent.but(export=llama_types(t, parent)), work / t) for t in types}
    arms += [Arm(name=f"llama.cpp {t}", model=file) for t, file in files.items()]
    for kind in (t for t in types if t in OPENVINO_READS):
        run = replace(parent.run, engine="openvino")
        arms.append(Arm(name=f"OpenVINO {kind}", model=files[kind].but(run=run)))
    if "q8_0" in types and {"bf16", "amx"} & set(Machine.probe().isa):
        run = replace(parent.run, engine="openvino", dtype="bfloat16")
        arms.append(Arm(name="OpenVINO q8_0, bf16", model=files["q8_0"].but(run=run)))
    return arms


def ours(parent: Model, recipes: Sequence[str], study: Path | None, work: Path) -> list[Arm]:
    """Recipes that differ at run time only share one file."""
    files = {"parent": parent}
    names: dict[Recipe, str] = {}
    arms: list[Arm] = []
    for text in recipes:
        recipe = Recipe.parse(text)
        build = str(recipe.build)
        if build not in files:
            folder = work / f"ours-{len(files)}"
            files[build] = export(recipe.build.apply(parent.but(work=folder / "work")), folder)
        like = names.get(Recipe(*(t for t in recipe if t.name != "prompt_lookup")), "")
        names[recipe] = text
        arms.append(Arm(name=text, model=served(recipe, files[build]), ours=True, like=like))
    return [*arms, *([recommended(parent, study)] if study else [])]


def recommended(parent: Model, folder: Path) -> Arm:
    """The recommendation of a study, from its store."""
    study = Study.open(folder)
    trial = next(p.trial for p in picks(study.trials, study.goal) if "recommended" in p.role)
    found = Store(folder / "artifacts").get(trial.artifact) if trial.artifact else None
    if trial.artifact and found is None:
        raise StoreError(f"the artifact of trial {trial.number} is gone from the study; run the study again")
    model = served(Recipe.parse(trial.recipe), opened(found, parent) if found else parent)
    return Arm(name=f"recommended: `{trial.recipe}`", model=model, ours=True)


def timed(
    arms: Sequence[Arm], workload: Workload, short: Workload, rounds: int, metric: str, bases: Mapping[str, str]
) -> tuple[list[Measurement], list[dict[str, Quantity]]]:
    """Measurements, and for each arm its ratio of `metric` to the arms that `bases` names."""
    jobs = [Job(model=a.model, workload=short if a.slow else workload, label=a.name, command=a.command) for a in arms]
    names = [a.name for a in arms]
    with Interleaved(jobs) as turns:
        done = turns.run(rounds)
        ratios = [
            {key: turns.ratio(metric, i, names.index(base)) for key, base in bases.items() if base in names}
            for i in range(len(arms))
        ]
    return done, ratios


def qualities(arms: Sequence[Arm], parent: Model, tokens: int, window: int) -> dict[str, Measurement]:
    """Fidelity of every arm that is not like another one, by name."""
    sample = windows(Tokenizer(parent.tokenizer_file), "encyclopedia", "evaluation", tokens, window)
    session = open_session(parent)
    reference = Reference.record(session, sample)
    session.close()
    found = {}
    for arm in arms:
        if not arm.like:
            session = open_session(arm.model)
            found[arm.name] = fidelity(session, reference).measurement
            session.close()
    return {a.name: found[a.like or a.name] for a in arms}


def same_tokens(parent: Model, prompt: Sequence[int], count: int = 32) -> str:
    """Whether the plain `generate` loop draws what our torch engine draws; the two share one row of quality."""
    plain, session = Generate(parent), open_session(parent)
    pairs = list(zip(plain.generate(prompt, count), session.generate(prompt, count), strict=True))
    session.close()
    equal = sum(a == b for a, b in pairs)
    return f"transformers' generate and our torch engine drew the same token at {equal} of {count} places."


def measured(arms: Sequence[Arm], parent: Model, given: argparse.Namespace) -> list[Row]:
    tokenizer = Tokenizer(parent.tokenizer_file)
    chat, long = Workload.load("chat", tokenizer), Workload.load("summarize", tokenizer)
    quick = given.quick
    print(f"{len(arms)} arms; chat", flush=True)
    fp32 = {name: name for name in FP32}
    chats, ratios = timed(
        arms, chat.scaled(1, 8) if quick else chat.scaled(4, 48), chat.scaled(1, 4) if quick else chat.scaled(2, 32),
        given.rounds, "decode", {**fp32, "q8_0": Q8},
    )
    print("summarize", flush=True)
    longs, prefills = timed(
        arms, long.scaled(1, 4) if quick else long.scaled(2, 24), long.scaled(1, 4),
        max(1, given.rounds * 3 // 5), "prefill", {a.name: a.name for a in arms if a.name.startswith("OpenVINO")},
    )
    print("quality", flush=True)
    quality = qualities(arms, parent, *((256, 128) if quick else (2048, 512)))
    speeds = {a.name: m["decode"].value or 0.0 for a, m in zip(arms, chats, strict=True)}
    fastest = max(FP32, key=lambda name: speeds[name])
    fill = {a.name: m["prefill"].value or 0.0 for a, m in zip(arms, longs, strict=True) if "OpenVINO" in a.name}
    rows = []
    for arm, a, b, ratio, filled in zip(arms, chats, longs, ratios, prefills, strict=True):
        against = {"fp32": ratio[fastest]}
        if "q8_0" in ratio:
            against["q8_0"] = ratio["q8_0"]
        if fill:
            against["openvino"] = filled[max(fill, key=lambda name: fill[name])]
        rows.append(Row(arm=arm, chat=a, long=b, quality=quality[arm.name], against=against))
    return rows


def chat_table(rows: Sequence[Row]) -> str:
    heads = ["chat", "file MB", "peak memory MB", "memory / file", "decode tok/s", "x transformers fp32",
             "x llama.cpp Q8_0", "of the read limit", "TTFT ms", "KL", "agreement"]
    return table(heads, [[
        _name(r.arm), number(r.file / 1e6, 1), number(r.memory / 1e6, 0), number(r.memory / r.file),
        interval(r.chat["decode"], 1), interval(r.against["fp32"]), interval(r.against.get("q8_0")),
        interval(r.chat["mbu"]), interval(r.chat["ttft"], 0, 1e3), interval(r.quality["kl"], 4),
        interval(r.quality["agreement"], 3),
    ] for r in rows])


def long_table(rows: Sequence[Row]) -> str:
    heads = ["summarize, 1,024 tokens", "prefill tok/s", "x fastest OpenVINO", "TTFT ms", "decode tok/s",
             "peak memory MB"]
    return table(heads, [[
        _name(r.arm), interval(r.long["prefill"], 0), interval(r.against.get("openvino")),
        interval(r.long["ttft"], 0, 1e3), interval(r.long["decode"], 1), number((r.long["memory"].value or 0) / 1e6, 0),
    ] for r in rows])


def goals(rows: Sequence[Row]) -> str:
    """Each goal with its best row among ours."""
    mine = [r for r in rows if r.arm.ours]
    fp32 = max((r for r in rows if r.arm.name in FP32), key=lambda r: r.chat["decode"].value or 0.0)

    def best(found: Sequence[Row], ratio: str) -> tuple[Row | None, float]:
        known = [(r.against[ratio].value or 0.0, i, r) for i, r in enumerate(found) if ratio in r.against]
        top = max(known, default=None)
        return (top[2], top[0]) if top else (None, 0.0)

    def said(goal: str, row: Row | None, reached: bool, how: str) -> str:
        verdict = "reached" if reached and row else "not reached"
        return f"- {goal}: **{verdict}**" + (f", {how} by {_name(row.arm)}" if row else ", nothing of ours qualifies")

    light, faster = best([r for r in mine if r.memory <= 0.27 * fp32.memory], "fp32")
    close, quicker = best([r for r in mine if (r.quality["agreement"].value or 0.0) >= 0.90], "q8_0")
    filling, share = best(mine, "openvino")
    alone = [r for r in mine if r.chat.context["engine"]["engine"] == "llama.cpp"]
    heavy = max(alone, key=lambda r: r.memory / r.file, default=None)
    over = heavy.memory / heavy.file if heavy else 0.0
    lighter = light.memory / fp32.memory if light else 0.0
    llama = next((r.long["decode"].value or 0.0 for r in rows if r.arm.name == Q8), 0.0)
    kept = (filling.long["decode"].value or 0.0) / llama if filling and llama else 0.0
    return "\n".join([
        said("decode at least 8x transformers fp32 (the faster of its two rows) at no more than 0.27x its memory",
             light, faster >= 8, f"{faster:.1f}x at {lighter:.2f}x"),
        said("chat decode at least 1.3x llama.cpp's Q8_0 at an agreement of 0.90 or more", close, quicker >= 1.3,
             f"{quicker:.2f}x"),
        said("peak memory at most 1.5x the file for each of ours in llama.cpp", heavy, over <= 1.5,
             f"at most {over:.2f}x"),
        said("prefill of OpenVINO's class (at least 0.8x of its fastest row) and decode of llama.cpp's (0.8x of its"
             " Q8_0) from one file, summarize", filling, share >= 0.8 and kept >= 0.8,
             f"{share:.2f}x and {kept:.2f}x"),
    ])


def _listed(text: str, between: str) -> list[str]:
    return [part.strip() for part in text.split(between) if part.strip()]


def _name(arm: Arm) -> str:
    return f"**{arm.name}**" if arm.ours else arm.name


def notes(rows: Sequence[Row]) -> str:
    threads = {default_engine(r.arm.model): r.chat.context["engine"]["threads"] for r in rows}
    disturbed = max(m.context["disturbed_kept"] for r in rows for m in (r.chat, r.long))
    kept = rows[0].chat.context["rounds"], rows[0].long.context["rounds"]
    return (
        f"Ours in bold. {kept[0]} rounds of chat, {kept[1]} of summarize; up to {disturbed} of either were"
        f" disturbed by other work. Threads: {', '.join(f'{name} {n}' for name, n in threads.items())}."
        " Peak memory is that of the whole serving process; the read limit is bytes read per token over the"
        " machine's read bandwidth."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, help="folder of a study whose recommendation is measured too")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp's types")
    parser.add_argument("--ours", default=OURS, help="recipes, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.rounds = 1
    parent = bundled.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        arms = [
            *peers(parent, _listed(given.types, ","), work),
            *ours(parent, _listed(given.ours, ";"), given.study, work),
        ]
        rows = measured(arms, parent, given)
        prompt = Workload.load("chat", Tokenizer(parent.tokenizer_file)).requests[0].prompt
        said = f"{notes(rows)} {same_tokens(parent, prompt)}"
    publish(
        "serving", "Serving SmolLM2-135M", "\n\n".join([goals(rows), chat_table(rows), long_table(rows), said]),
        packages=("torch", "transformers", "xllamacpp", "openvino"), keep=not given.quick,
    )


if __name__ == "__main__":
    main()
