"""A measuring process for what a user of transformers writes: `model.generate(ids, do_sample=False)`, nothing of ours.

It speaks the protocol of `fivefold.meters.worker`, so that it takes its turn in the same rounds; a streamer passes each
token on as it is drawn.
"""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fivefold.meters import bench, worker
from fivefold.model import Model


class Stream:
    """A transformers streamer: the first `put` is the prompt."""

    def __init__(self) -> None:
        self.tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._started = False

    def put(self, value: Any) -> None:
        if self._started:
            for token in value.reshape(-1).tolist():
                self.tokens.put(token)
        self._started = True

    def end(self) -> None:
        self.tokens.put(None)


class Generate:
    """The part of `engines.Session` that a bench uses."""

    def __init__(self, model: Model) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.run, self.blueprint, self.vocab = model.run, model.blueprint, model.blueprint.vocab
        self._model = AutoModelForCausalLM.from_pretrained(
            model.path, dtype=getattr(torch, model.run.dtype), local_files_only=True
        )
        self._model.generation_config.eos_token_id = None  # answers of full length, as in every other arm

    def generate(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        import torch

        ids, stream = torch.tensor([list(prompt)]), Stream()
        wish = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_tokens, "do_sample": False,
                "streamer": stream, "pad_token_id": 0}
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self._model.generate, ids, **wish)
            done.add_done_callback(lambda _: stream.end())
            while (token := stream.tokens.get()) is not None:
                yield token
            done.result()

    def describe(self) -> dict[str, Any]:
        import torch

        return {
            "engine": "transformers", "threads": torch.get_num_threads(), "dtype": self.run.dtype,
            "weight_bytes": sum(p.nbytes for p in self._model.parameters()), "cache_type": self.run.dtype,
            "cache_bytes_per_token": self.blueprint.cache_bytes_per_token(getattr(torch, self.run.dtype).itemsize),
        }

    def close(self) -> None:
        self._model = None


if __name__ == "__main__":
    bench.open_session = Generate  # type: ignore[assignment]
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.exit(worker.main(sys.argv[1:], sys.stdin, replies))
