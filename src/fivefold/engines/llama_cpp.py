"""llama.cpp: the fastest decoder of quantized files on a CPU, called through its C interface.

A session owns the mapped weights and at most one context (cache, compute buffers). The context is made when a call
needs it and only as large as that call needs: llama.cpp touches every page of the cache when it makes it, so a
context of 2,048 tokens costs its full memory even if 300 are used. It is kept for later calls that fit into it.

The tokenizer inside the file is not loaded (tokens are made outside, see `engines`): on a vocabulary of 49,152 that
saves 15 MB and four fifths of the load time, and a file without a tokenizer works as well.

Per token the Python side adds an argmax over the logits, which are read where llama.cpp left them, and a few calls:
tens of microseconds (`benchmarks/engine_overhead.py`). Types with a layout of their own for this CPU (q4_0 and
others) are repacked while loading.

Source: llama.cpp (MIT), https://github.com/ggml-org/llama.cpp, in the wheel of xllamacpp.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.engines import Sampling
from fivefold.engines import _llama_abi as abi
from fivefold.engines._draft_model import opened
from fivefold.engines._drafting import generated, groups
from fivefold.engines._llama_context import Context, Logits, Tokens
from fivefold.engines._quantize import row_bytes, storage_type
from fivefold.engines._sampling import drawer, greedy, log_softmax
from fivefold.errors import DataError, ModelError
from fivefold.model import Model
from fivefold.weights import GGUFHeader, gguf_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMATS = ("gguf",)
EXTRA = None
DRAFTS = True
SCORED = 128
CELLS = 256
MOST_SEQUENCES = 64
GREEDY = Sampling()


def open(model: Model) -> LlamaSession:
    """Map the file and check it. Raises ModelError in one sentence when it is damaged or of an unknown kind."""
    return LlamaSession(model)


def physical_cores() -> int:
    """Cores this process may use, hardware threads of one core counted once; at least 1."""
    if not hasattr(os, "sched_getaffinity"):
        import psutil

        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    topology = (Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed)
    cores = {file.read_text() for file in topology if file.is_file()}
    return len(cores) or len(allowed)


REARRANGED = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL"})
"""Types whose rows llama.cpp interleaves at load for its vector kernels. Beside that copy a mapped file would stay
resident (190 MB against 150 MB for a file of 82 MB), so such a file is read instead of mapped."""


class LlamaSession:
    """See `engines.Session`. Closing frees the weights; a closed session cannot be used again."""

    flash: int | None = None
    """Flash attention: one of `abi.FLASH_*`, or None for `flash_attention`'s choice."""

    def __init__(self, model: Model) -> None:
        self._ffi, self._lib = abi.library()
        self.header = gguf_header(model.path)
        self.run, self.decode, self.blueprint = model.run, model.decode, model.blueprint
        self.threads = self.run.threads or physical_cores()
        self.cache_type = storage_type(self.run.cache_type)
        self.vocab = _vocabulary(self.header)
        self._context: Context | None = None
        self._turn = 0
        abi.give_back()  # what the process freed before must not stand beside the weights (a server's tokenizer: 25 MB)
        self._model = self._load(model.path)
        self._draft = opened(model)
        abi.give_back()

    def _load(self, path: Path) -> Any:
        ffi, lib = self._ffi, self._lib
        overrides = ffi.new("llama_model_kv_override[3]")
        overrides[0] = {"tag": abi.TEXT, "key": b"tokenizer.ggml.model", "val_str": b"no_vocab"}
        family = self.header.metadata["general.architecture"]
        overrides[1] = {"tag": abi.INTEGER, "key": f"{family}.vocab_size".encode(), "val_i64": self.vocab}
        params = lib.llama_model_default_params()
        rearranged = any(t.type in REARRANGED for t in self.header.tensors)
        params.load_mode = abi.LOAD_COPY if rearranged else abi.LOAD_MAP
        params.n_gpu_layers, params.kv_overrides = 0, overrides
        params.check_tensors = True  # activations are rounded to integers, which would hide a NaN in the weights
        abi.forget_errors()
        handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if handle == ffi.NULL:
            why = abi.last_error().replace("has invalid data", "holds NaN or infinity")
            raise ModelError(f"llama.cpp cannot load {path} ({why}); copy or export the file again")
        handle = ffi.gc(handle, lib.llama_model_free)
        if lib.llama_model_has_encoder(handle):
            raise ModelError(f"{path} holds an encoder model ({family}); this engine serves decoders only")
        return handle

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        ids = self._checked(tokens, len(tokens))
        context = self._fitting(len(ids), outputs=SCORED)
        out = np.empty((len(ids), self.vocab), np.float32)
        self._score_from(0, ids, context, out)
        return out

    def _score_from(self, start: int, ids: Tokens, context: Context, out: NDArray[np.float32]) -> None:
        """Fill the rows of `out` from `start` on; the cache of `context` holds what is before."""
        for first in range(start, len(ids), SCORED):
            part = ids[first : first + SCORED]
            context.decode(part, first, every=True)
            log_softmax(context.rows(len(part)), out[first : first + len(part)])

    def _prefill(self, context: Context, prompt: Tokens, sequence: int = 0) -> Logits:
        """Read a prompt into the empty sequence; the logits after its last token."""
        return context.prefill(prompt, sequence)

    def generate(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        ids = self._checked(prompt, len(prompt) + max_tokens)
        drawer(sampling)
        return self._draw(ids, max_tokens, sampling)

    def _draw(self, prompt: Tokens, max_tokens: int, sampling: Sampling) -> Iterator[int]:
        most = self.decode.drafted
        context = self._fitting(len(prompt) + max_tokens, outputs=1 + most)
        turn, ids = self._turn, prompt.tolist()
        drafter = None if self._draft is None else self._draft.text(ids, max_tokens, most, sampling)
        yield from generated(
            _Text(context, prompt, self._prefill), ids, max_tokens, self.decode, sampling, lambda: turn == self._turn,
            drafter,
        )

    def generate_batch(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Groups of `run.batch` prompts at once (all, at most 64, when that is 1)."""
        ids = [self._checked(prompt, len(prompt) + max_tokens) for prompt in prompts]
        if max_tokens < 1:
            return [[] for _ in ids]
        width = self.run.batch if self.run.batch > 1 else MOST_SEQUENCES
        return [text for group in groups(ids, width) for text in self._together(group, max_tokens)]

    def _together(self, prompts: Sequence[Tokens], max_tokens: int) -> list[list[int]]:
        context = self._fitting(max(map(len, prompts)) + max_tokens, sequences=len(prompts), outputs=len(prompts))
        texts = [[greedy(self._prefill(context, prompt, i))] for i, prompt in enumerate(prompts)]
        for step in range(max_tokens - 1):
            places = [len(prompt) + step for prompt in prompts]
            for text, row in zip(texts, context.abreast([text[-1] for text in texts], places), strict=True):
                text.append(greedy(row))
        return texts

    def describe(self) -> dict[str, Any]:
        """`dtype` is the type most bytes are in; `context_tokens` is None until a call makes a context."""
        mix, cache_width = self._mix(), self.blueprint.kv_heads * self.blueprint.head_dim
        return {
            "engine": "llama.cpp",
            "version": f"{abi.PACKAGE} {abi.installed()}",
            "threads": self.threads,
            "dtype": mix.most_common(1)[0][0],
            "tensor_types": dict(Counter(t.type.lower() for t in self.header.tensors)),
            "weight_bytes": int(self._lib.llama_model_size(self._model)),
            "file_bytes": self.header.file.stat().st_size,
            "context_tokens": self._context.length if self._context else None,
            "cache_type": self.cache_type.name,
            "cache_bytes_per_token": 2 * self.blueprint.layers * row_bytes(self.cache_type.name, cache_width),
            "lookup_tokens": self.decode.lookup_tokens,
            "draft_tokens": self.decode.draft_tokens,
        }

    def _mix(self) -> Counter[str]:
        mix: Counter[str] = Counter()
        for tensor in self.header.tensors:
            mix[tensor.type.lower()] += tensor.nbytes
        return mix

    def close(self) -> None:
        self._turn += 1
        if self._context is not None:
            self._context.close()
            self._context = None
        if self._draft is not None:
            self._draft.close()
        if self._model is not None:
            self._ffi.release(self._model)
            self._model = None

    def _checked(self, tokens: Sequence[int], length: int) -> Tokens:
        if self._model is None:
            raise RuntimeError("this session is closed; open the model again")
        try:
            ids = array("i", list(tokens))
        except (TypeError, OverflowError):
            ids = array("i")
        if not ids or min(ids) < 0 or max(ids) >= self.vocab:
            raise DataError(
                f"a prompt must be one or more token ids from 0 to {self.vocab - 1}; tokenize the text again"
            )
        if length > self.run.context:
            raise DataError(
                f"{length} tokens do not fit the context of {self.run.context};"
                " shorten the text or raise the context of the run plan"
            )
        return ids

    def _fitting(self, tokens: int, *, sequences: int = 1, outputs: int = 1) -> Context:
        """An empty context for `sequences` texts of `tokens`: the present one if it is large enough, else a new one."""
        self._turn += 1
        length = -(-tokens // CELLS) * CELLS
        present = self._context
        if present is not None and present.suits(length, sequences, outputs):
            present.clear()
            return present
        if present is not None:
            present.close()
            self._context = None
        self._context = Context(
            self._model, self.vocab, length=length, sequences=sequences, outputs=outputs, threads=self.threads,
            cache_type=self.cache_type, flash=self.flash,
        )
        return self._context


def _vocabulary(header: GGUFHeader) -> int:
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    shape = shapes.get("output.weight") or shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2 or not isinstance(header.metadata.get("general.architecture"), str):
        raise ModelError(f"{header.file} holds no language model (no token embedding); give a GGUF file of a decoder")
    return int(shape[0])


class _Text:
    """`_drafting.Passes` over a context."""

    def __init__(
        self, context: Context, prompt: Tokens, prefill: Callable[[Context, Tokens], Logits]
    ) -> None:
        self.context, self.prompt, self.prefill, self.filled = context, prompt, prefill, len(prompt)

    def first(self) -> Sequence[Logits]:
        return (self.prefill(self.context, self.prompt),)

    def next(self, token: int, draft: list[int], kept: int) -> Sequence[Logits]:
        if kept < self.filled:
            self.context.forget(kept)
        self.filled = kept + 1 + len(draft)
        return self.context.step(token, draft, kept)
