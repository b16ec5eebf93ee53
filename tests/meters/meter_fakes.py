from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fivefold.engines import Sampling

GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Traffic:
    name: str
    requests: list[Request]
    batch: int = 1


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeSession:
    """Takes `per_prompt` seconds per prompt token and `per_token` per later token, on a clock of its own."""

    clock: Clock
    per_prompt: float = 0.01
    per_token: float = 0.1
    answer: int = 1000
    vocab: int = 32
    calls: list[str] = field(default_factory=list)

    def generate(self, prompt: list[int], max_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        self.calls.append("generate")
        assert not sampling.stop, "answers must have full length"
        self.clock.now += self.per_prompt * len(prompt)
        for i in range(min(max_tokens, self.answer)):
            if i:
                self.clock.now += self.per_token
            yield i % self.vocab

    def generate_batch(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        self.calls.append(f"batch {len(prompts)}")
        self.clock.now += self.per_token * max_tokens
        return [[1] * max_tokens for _ in prompts]

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake", "threads": 2}

    def close(self) -> None:
        self.calls.append("close")
