"""Fine-tuning beside peft + transformers.Trainer: seconds per step, peak memory and losses on the same batches.

    python benchmarks/finetune_peers.py [--rounds 8] [--steps 3]

Four processes take turns on one machine, `steps` steps at a time: LoRA (rank 8, all linear layers) and full
fine-tuning, each by peft and the Trainer (bfloat16 autocast, AdamW) and by Fivefold. Every step is the same 4 x 256
tokens of the encyclopedia for all, every token's loss counts, the rate is constant. Needs: pip install peft accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import number, publish, table

ROWS, LENGTH, WARM = 4, 256, 3
RATES = {"lora": 2e-4, "full": 2e-5}
ARMS = ("peer lora", "ours lora", "peer full", "ours full")


def tokens(count: int) -> np.ndarray[Any, Any]:
    """(count, 4, 256), the same for everybody."""
    from fivefold import bundled
    from fivefold.techniques._shared.calibration import windows

    return windows(bundled.load("smollm2-135m"), count * ROWS, LENGTH).reshape(count, ROWS, LENGTH)


def peak() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Turns:
    """Waits for a line on standard input before each group of steps, answers with what they took."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.losses = steps, 0, []
        self.start = 0.0

    def begin(self) -> None:
        if self.done % self.steps == 0 and not sys.stdin.readline():
            os._exit(0)
        if self.done % self.steps == 0:
            self.start = time.perf_counter()

    def end(self, loss: float) -> None:
        self.done += 1
        self.losses.append(loss)
        if self.done % self.steps == 0:
            spent = (time.perf_counter() - self.start) / self.steps
            print(json.dumps({"seconds": spent, "peak": peak(), "losses": self.losses[-self.steps :]}), flush=True)


def peer(mode: str, total: int, turns: Turns) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from fivefold import bundled

    module: Any = AutoModelForCausalLM.from_pretrained(bundled.load("smollm2-135m").path, dtype=torch.float32)
    if mode == "lora":
        from peft import LoraConfig, get_peft_model

        module = get_peft_model(module, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear",
                                                   task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for step in tokens(total) for row in step]

    class Turn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                turns.end(float(logs["loss"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=os.environ["SCRATCH"], per_device_train_batch_size=ROWS, max_steps=total, learning_rate=RATES[mode],
        lr_scheduler_type="constant", bf16=True, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        weight_decay=0.0, adam_beta2=0.98, disable_tqdm=True, logging_strategy="steps", dataloader_pin_memory=False,
    )
    collate = lambda batch: {k: torch.tensor(np.stack([row[k] for row in batch])) for k in batch[0]}  # noqa: E731
    trainer = InOrder(model=module, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Turn()])
    sys.stdout, told = sys.stderr, sys.stdout
    globals()["print"] = lambda text, flush=True: (told.write(text + "\n"), told.flush())
    trainer.train()


def ours(mode: str, total: int, turns: Turns) -> None:
    from fivefold import Recipe, bundled
    from fivefold.training.batching import Batch
    from fivefold.training.checkpoint import Keeper
    from fivefold.training.cross_entropy import IGNORE
    from fivefold.training.loop import Group, Hooks, fit
    from fivefold.training.method import Methods
    from fivefold.training.module import loss_of
    from fivefold.training.run import prepared, stored_value

    model = bundled.load("smollm2-135m")
    plan = replace(model.train, data=model.path / "config.json", tokens_per_step=ROWS * LENGTH)
    model = Recipe.parse({"lora": "lora(rank=8, alpha=16.0)", "full": "full"}[mode]).plan(model.but(train=plan))
    methods = Methods.of(model.train)
    adaptation = methods.adaptation
    assert adaptation is not None
    lesson = prepared(model, adaptation, methods)
    loss = loss_of(lesson.module, adaptation.hidden(lesson))
    steps = tokens(total)

    def stream(number: int) -> list[tuple[Batch, float]]:
        turns.begin()
        rows = steps[number]
        targets = np.concatenate([rows[:, 1:], np.full((ROWS, 1), IGNORE)], 1)
        return [(Batch(rows, targets, np.tile(np.arange(LENGTH), (ROWS, 1))), 1.0)]

    constant = replace(lesson.plan, steps=10**9, learning_rate=RATES[mode], warmup=1e-9)
    hooks = Hooks(listen=lambda step: turns.end(step.loss))
    fit(constant, [Group(parameters=lesson.trained)], loss, stream, lambda: 0.0,
        optimizer=adaptation.default_optimizer(), held=constant.held, fused=adaptation.fused, hooks=hooks,
        keeper=Keeper(Path(os.environ["SCRATCH"]) / mode, every=1e9), exact=lambda name: stored_value(lesson, name))


def worker(arm: str, total: int, steps: int) -> None:
    who, mode = arm.split()
    {"peer": peer, "ours": ours}[who](mode, total, Turns(steps))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--arm", help=argparse.SUPPRESS)
    options.add_argument("--quick", action="store_true", help="write no fragment")
    given = options.parse_args()
    total = (given.rounds + WARM) * given.steps
    if given.arm:
        worker(given.arm, total, given.steps)
        return
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--rounds", str(given.rounds), "--steps", str(given.steps)]
        running = {arm: subprocess.Popen([*command, "--arm", arm], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, text=True, env={**os.environ, "SCRATCH": scratch})
                   for arm in ARMS}
        heard: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for turn in range(given.rounds + WARM):
            for arm, process in running.items():
                assert process.stdin and process.stdout
                process.stdin.write("go\n")
                process.stdin.flush()
                heard[arm].append(told := json.loads(process.stdout.readline()))
                print(turn, arm, round(told["seconds"], 3), f"{told['peak'] / 1e6:.0f} MB", flush=True)
        for process in running.values():
            process.kill()
            process.wait()
    report(heard, given)


def report(heard: dict[str, list[dict[str, Any]]], given: argparse.Namespace) -> None:
    from fivefold import bundled
    from fivefold.machine import Machine

    rate = Machine.load().gemm("bfloat16").value or float("nan")
    matrices = bundled.load("smollm2-135m").blueprint.matrix_parameters
    passes = {"lora": 2, "full": 3}
    rows = []
    for mode in ("lora", "full"):
        both = zip(heard[f"peer {mode}"], heard[f"ours {mode}"], strict=True)
        ratios = [b["seconds"] / a["seconds"] for a, b in both]
        for who in ("peer", "ours"):
            took = heard[f"{who} {mode}"]
            seconds = statistics.median(t["seconds"] for t in took[WARM:])
            share = 2 * matrices * ROWS * LENGTH * passes[mode] / seconds / rate
            high = max(t["peak"] for t in took)
            against = [] if who == "peer" else [
                number(statistics.median(ratios[WARM:])) + f" [{min(ratios[WARM:]):.2f}, {max(ratios[WARM:]):.2f}]",
                number(high / max(t["peak"] for t in heard[f"peer {mode}"])),
            ]
            name = {"peer": "Trainer" + (" + peft" if mode == "lora" else ""), "ours": "Fivefold"}[who]
            rows.append([f"{mode}, {name}", number(seconds), f"{100 * share:.0f} %", number(high / 1e6, 0),
                         *(against or ["1", "1"])])
    heads = ["", "s per step", "share of the bfloat16 GEMM rate", "peak MB", "time ratio [range]", "memory ratio"]
    body = "SmolLM2-135M, 4 x 256 tokens per step, all tokens learned, turns of"
    body += f" {given.steps} steps, {given.rounds} rounds after {WARM} to warm up; the first rounds are left out.\n\n"
    body += table(heads, rows) + "\n\n" + curves(heard)
    publish("finetune_peers", "Fine-tuning beside peft and transformers.Trainer", body, keep=not given.quick,
            packages=("torch", "transformers", "peft", "accelerate"))


def curves(heard: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for mode in ("lora", "full"):
        a, b = (np.array([x for t in heard[f"{who} {mode}"] for x in t["losses"]]) for who in ("peer", "ours"))
        gap = b - a
        lines.append(f"- losses, {mode}: first step {a[0]:.4f} and {b[0]:.4f}, mean of the last third"
                     f" {a[-len(a) // 3 :].mean():.4f} and {b[-len(b) // 3 :].mean():.4f}; difference per step"
                     f" {gap.mean():+.4f} on average, {np.abs(gap).max():.4f} at most.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
