"""The server against its bare engine, and under load with bad requests mixed in.

    python benchmarks/serve_load.py MODEL [--tokens 128] [--rounds 9] [--clients 8] [--seconds 60] [--threads N]

1. Overhead: the same greedy answer from a session in this process and streamed from the server (its own process), in
   turns, in both orders. Reported: median of the paired ratios of tokens per second, with its interval, and of
   tokens per CPU second, which other load on the machine disturbs less; and the share of the server's CPU time that
   its event loop took (Linux), which is the part that HTTP can be blamed for.
2. Load: `clients` threads send good, bad and abandoned requests for about `seconds`. Reported: answers by status.
   Exit code 1 when a bad request got anything but its 4xx, a good one anything but 200 or 429, or the server does
   not answer as before afterwards.

On a machine with other load use --threads 1: engines that spin at barriers collapse there, with or without a server.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import httpx
import psutil
from _common import interval, publish, table

from fivefold.engines import Sampling, Session, open_session
from fivefold.model import load
from fivefold.quantity import Quantity

PROGRAM = """
import sys
from dataclasses import replace
from fivefold.model import load
from fivefold.serve import serve
model = load(sys.argv[1])
serve(model.but(run=replace(model.run, threads=int(sys.argv[2]) or None)), port=0, max_queue=4)
"""
BAD: list[tuple[bytes, int]] = [
    (b"{", 400), (b"[]", 400), (b'{"prompt": 3}', 400), (b'{"prompt": "x", "temperature": NaN}', 400),
    (b'{"prompt": "x", "n": 2}', 400), (b'{"prompt": "x", "max_tokens": 1000000000}', 400), (b'{"a":' * 10_000, 400),
    (b'{"prompt": "x", "model": "another"}', 404), (b'{"prompt": "' + b"x" * (2 << 20) + b'"}', 413),
]


Speed = tuple[float, float]
"""Tokens per second, and per CPU second of the process that makes them."""


def bare(session: Session, prompt: list[int], tokens: int) -> Speed:
    """Of the engine alone, prefill included."""
    start, cpu = time.perf_counter(), time.process_time()
    drawn = sum(1 for _ in session.generate(prompt, tokens, Sampling()))
    return drawn / (time.perf_counter() - start), drawn / (time.process_time() - cpu)


def cpu_of(process: int) -> float:
    times = psutil.Process(process).cpu_times()
    return float(times.user + times.system)


def served(client: httpx.Client, process: int, prompt: list[int], tokens: int) -> Speed:
    """As a streaming client sees it; the client's own CPU time is not counted."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}
    start, cpu = time.perf_counter(), cpu_of(process)
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        last = ""
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                last = line
    seconds, cpu = time.perf_counter() - start, cpu_of(process) - cpu
    drawn = int(json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"])
    return drawn / seconds, drawn / cpu


def overhead(
    session: Session, client: httpx.Client, process: int, prompt: list[int], tokens: int, rounds: int
) -> tuple[Quantity, Quantity]:
    """Ratios served / bare: of tokens per second, and per CPU second."""
    bare(session, prompt, 8), served(client, process, prompt, 8)
    ratios: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        if i % 2:
            alone, through = bare(session, prompt, tokens), served(client, process, prompt, tokens)
        else:
            through, alone = served(client, process, prompt, tokens), bare(session, prompt, tokens)
        for ratio, a, b in zip(ratios, through, alone, strict=True):
            ratio.append(a / b)
        print(f"  round {i + 1}: bare {alone[0]:.1f}, served {through[0]:.1f} token/s, ratio {ratios[0][-1]:.3f},"
              f" per CPU second {ratios[1][-1]:.3f}")
    return Quantity.median_of(ratios[0], "x"), Quantity.median_of(ratios[1], "x")


def user(url: str, seed: int, deadline: float, seen: Counter[str], wrong: list[str]) -> None:
    """One client: good, bad and abandoned requests at random until the deadline."""
    rng = random.Random(seed)
    headers = {"Content-Type": "application/json"}
    status: int | str
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < deadline:
            kind = rng.random()
            if kind < 0.4:
                body, expected = rng.choice(BAD)
                try:
                    status = client.post("/v1/completions", content=body, headers=headers).status_code
                except httpx.HTTPError as error:
                    status = type(error).__name__
                seen[f"bad: {status}"] += 1
                if status != expected:
                    wrong.append(f"{body[:40]!r} got {status}, not {expected}")
            elif kind < 0.55:
                try:
                    client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 200}, timeout=0.2)
                except httpx.TimeoutException:
                    seen["abandoned"] += 1
            else:
                status = client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 8}).status_code
                seen[f"good: {status}"] += 1
                if status not in (200, 429):
                    wrong.append(f"a good request got {status}")
                if status == 429:
                    time.sleep(rng.random())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=0, help="of the engine; 0 is its own default")
    parser.add_argument("--quick", action="store_true", help="write no fragment")
    args = parser.parse_args()
    model = load(args.model)
    model = model.but(run=replace(model.run, threads=args.threads or None))
    prompt = [i % min(1000, model.blueprint.vocab) for i in range(64)]
    command = [sys.executable, "-c", PROGRAM, args.model, str(args.threads)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        url = server.stdout.readline().split()[-1].removesuffix("/v1")
        with httpx.Client(base_url=url, timeout=300) as client:
            session = open_session(model)
            print(f"overhead, one stream, {args.tokens} tokens after {len(prompt)}:")
            before = {t.id: t.user_time + t.system_time for t in psutil.Process(server.pid).threads()}[server.pid]
            wall, cpu = overhead(session, client, server.pid, prompt, args.tokens, args.rounds)
            session.close()
            threads = {t.id: t.user_time + t.system_time for t in psutil.Process(server.pid).threads()}
            web = threads[server.pid] - before
            share = web / (sum(threads.values()) - before)
            rows = [[f"tokens per {name}, served / bare", interval(q, 3)]
                    for name, q in (("second", wall), ("CPU second", cpu))]
            rows.append(["HTTP's share of the server's CPU time", f"{share:.3f}"])
            seen: Counter[str] = Counter()
            wrong: list[str] = []
            deadline = time.monotonic() + args.seconds
            users = [threading.Thread(target=user, args=(url, i, deadline, seen, wrong)) for i in range(args.clients)]
            for thread in users:
                thread.start()
            for thread in users:
                thread.join()
            counts = ", ".join(f"{kind} x {n}" for kind, n in sorted(seen.items()))
            under = f"{args.clients} clients for {args.seconds:g} s, good and bad requests mixed: {counts}."
            after = client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 8})
            if after.status_code != 200 or after.json()["usage"]["completion_tokens"] < 1:
                wrong.append(f"afterwards a good request got {after.status_code}")
            print(client.get("/metrics").text)
    finally:
        server.terminate()
        code = server.wait(60)
    if code != 0:
        wrong.append(f"the server stopped with exit code {code}")
    verdict = "Every answer was as it should be." if not wrong else "\n".join(f"- {line}" for line in wrong)
    made = table([f"one stream, {args.tokens} tokens after {len(prompt)}, {args.rounds} rounds", "ratio"], rows)
    publish("serve_load", "The endpoint against its bare engine, and under load", f"{made}\n\n{under} {verdict}",
            packages=("fastapi", "uvicorn"), keep=not args.quick)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
