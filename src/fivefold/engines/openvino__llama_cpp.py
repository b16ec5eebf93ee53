"""OpenVINO reads the prompt, llama.cpp writes the answer, from one GGUF file.

Reading a prompt is limited by arithmetic, where OpenVINO is faster; decoding by memory and kernel overhead, where
llama.cpp is. All that has to cross is the key-value cache: 2 x layers x key-value heads x head width elements per
token, 23 KB in half precision for SmolLM2-135M. OpenVINO also gives the logits after the last token, so llama.cpp never
sees the prompt. `_handover` knows the bytes; crossing takes 2 ms for 32 tokens and 33 ms for 1,024.

llama.cpp's flash attention helps reading and hurts decoding, so it is off here unless the cache is quantized: after
1,024 tokens (Q8_0, one thread) a token took 11 ms of processor time without it, 19 with it, 15 in OpenVINO.

A prompt shorter than SHORT is read by llama.cpp. Measured with one thread, both engines took equally long for about 4
tokens (Q4_0; OpenVINO 1.8 times faster at 16, 3 at 64); with two threads llama.cpp is nearer.

`score` works as serving does: OpenVINO reads the first half of the tokens, llama.cpp scores the second over its cache.
So quality measured here includes whatever is lost on the way.

It costs OpenVINO's copy of the weights, the prompt's keys and values in float32 beside the cache, and seconds of
compiling at every start: for long prompts, not for small memory. OpenVINO reads over a cache of half precision when the
planned one is quantized; keys and values are rounded once, as they cross. `run.dtype` is what OpenVINO computes in.

At start both engines read a few tokens at the far end of the context and must agree on every key and value. Files must
hold F16, Q8_0 or Q4_0 matrices of the llama and qwen families: what both read alike. OpenVINO rounds the offsets of
Q4_1: on SmolLM2-135M the values of the last layer came out 75 % apart.

Source: prefill and decode apart: Splitwise, arXiv 2311.18677; DistServe, arXiv 2401.09670.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import _handover as handover
from fivefold.engines import _llama_abi as abi
from fivefold.engines import llama_cpp, openvino
from fivefold.engines._llama_context import Context, Logits, Tokens
from fivefold.engines._sampling import log_softmax
from fivefold.engines.openvino import EXTRA as EXTRA
from fivefold.engines.openvino import FORMATS as FORMATS
from fivefold.errors import ModelError
from fivefold.model import Model
from fivefold.weights import gguf_header

GGUF_TYPES = ("F16", "Q8_0", "Q4_0")
SHORT = 16
PROBE = 4


def open(model: Model) -> HandoverSession:
    """Load the file into both engines and compare them. Raises MissingExtra, ModelError."""
    bad = sorted({t.type for t in gguf_header(model.path).tensors if len(t.shape) > 1 and t.type not in GGUF_TYPES})
    if bad:
        raise ModelError(
            f"openvino+llama.cpp reads GGUF matrices of {', '.join(GGUF_TYPES)}, which both engines read alike, and"
            f" {model.path.name} holds {', '.join(bad)}; choose another type or another engine"
        )
    cache_type = model.run.cache_type if model.run.cache_type in ("f32", "bf16") else "f16"
    reader = openvino.open(model.but(run=replace(model.run, cache_type=cache_type)), shows_cache=True)
    return HandoverSession(model, reader)


class HandoverSession(llama_cpp.LlamaSession):
    """See `engines.Session`."""

    def __init__(self, model: Model, reader: openvino.OpenVINOSession) -> None:
        super().__init__(model)
        self._reader = reader
        if self.cache_type.block == 1:
            self.flash = abi.FLASH_OFF
        self._layout = self._compared()
        abi.give_back()

    def _compared(self) -> handover.Layout:
        """The layout of a saved state, after both engines read the same tokens at the far end of the context."""
        count = min(PROBE, self.run.context)
        ids = [i * self.vocab // (count + 1) for i in range(1, count + 1)]
        first = self.run.context - count
        context = self._fitting(count)
        context.decode(ids, first, every=False)
        saved = context.state()
        layout = handover.layout_of(
            saved, count, layers=self.blueprint.layers, width=self.blueprint.kv_heads * self.blueprint.head_dim,
            kind=self.cache_type, paired=self.header.metadata["general.architecture"] == "llama",
        )
        self._reader.read(ids, first)
        ours = layout.packed(self._reader.cache(), count, first=first)
        handover.check(layout, saved, ours, count, first)
        return layout

    def _prefill(self, context: Context, prompt: Tokens, sequence: int = 0) -> Logits:
        if len(prompt) < SHORT:
            return super()._prefill(context, prompt, sequence)
        [row] = self._reader.read(prompt)
        self._hand_over(context, len(prompt), sequence)
        return row

    def _hand_over(self, context: Context, cells: int, sequence: int = 0) -> None:
        cache = self._reader.cache()
        context.restore(self._layout.packed(cache, cells, sequence=sequence, streams=context.sequences), sequence)

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        cut = len(tokens) // 2
        if cut < SHORT:
            return super().score(tokens)
        ids = self._checked(tokens, len(tokens))
        context = self._fitting(len(ids), outputs=llama_cpp.SCORED)
        out = np.empty((len(ids), self.vocab), np.float32)
        early = max(0, cut - openvino.SCORED)
        if early:
            out[:early] = self._reader.score(tokens[:early])
        log_softmax(self._reader.read(ids[:cut], keep=cut - early), out[early:cut])
        self._hand_over(context, cut)
        self._score_from(cut, ids, context, out)
        return out

    def describe(self) -> dict[str, Any]:
        """llama.cpp's; `weight_bytes` are those it reads per token, `prefill` is OpenVINO, with its own weights."""
        said, reader = super().describe(), self._reader.describe()
        return {
            **said, "engine": "openvino+llama.cpp", "version": f"{reader['version']}, {said['version']}",
            "prefill": reader, "prefill_from_tokens": SHORT,
        }

    def close(self) -> None:
        super().close()
        self._reader.close()
