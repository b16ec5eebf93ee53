"""One llama.cpp context: the cache, the compute buffers and the arrays a batch is described in.

A batch is five parallel arrays: token ids, positions, sequence ids and the wish for logits. They are numpy arrays
whose memory the C struct points at, so describing one token is three stores. Logits are read where llama.cpp left
them: a view is valid until the next decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import _llama_abi as abi
from fivefold.engines._quantize import StorageType
from fivefold.errors import Crashed, ModelError, OutOfMemory

PREFILL = 256

Logits = NDArray[np.float32]


def flash_attention(cache_type: StorageType) -> int:
    """Its CPU kernel rounds to half precision, so not for an f32 cache; a quantized value cache runs only with it."""
    return abi.FLASH_OFF if cache_type.name == "f32" else abi.FLASH_AUTO if cache_type.block == 1 else abi.FLASH_ON


class Context:
    """One llama_context with its cache, and the arrays a batch is described in."""

    def __init__(
        self, model: Any, vocab: int, *, length: int, sequences: int, outputs: int, threads: int,
        cache_type: StorageType,
    ) -> None:
        self._ffi, self._lib = abi.library()
        self.vocab, self.length, self.sequences, self.outputs = vocab, length, sequences, outputs
        self.batch_size = max(PREFILL, outputs, sequences)
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * sequences, sequences
        params.n_batch = params.n_ubatch = self.batch_size
        params.n_outputs_max, params.n_outputs_max_per_seq = outputs, outputs
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = cache_type.number
        params.flash_attn_type = flash_attention(cache_type)
        abi.forget_errors()
        handle = self._lib.llama_init_from_model(model, params)
        if handle == self._ffi.NULL:
            reason = abi.last_error()
            kind = OutOfMemory if "alloc" in reason else ModelError
            raise kind(
                f"llama.cpp cannot make a context of {sequences} x {length} tokens with a {cache_type.name}"
                f" cache ({reason}); choose a shorter context or another cache type"
            )
        self._handle = self._ffi.gc(handle, self._lib.llama_free)
        self._memory = self._lib.llama_get_memory(self._handle)
        self._model = model  # freed after `_handle`: a context reads its model while it is freed
        self._arrays()

    def _arrays(self) -> None:
        """Numpy views of the C arrays, so that one token is described by three stores."""
        ffi, size = self._ffi, self.batch_size
        self._token, self._position = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._wanted, self._one = np.zeros(size, np.int8), np.ones(size, np.int32)
        self._sequence_ids = ffi.new("int32_t[]", self.sequences)
        for i in range(self.sequences):
            self._sequence_ids[i] = i
        self._sequence = ffi.new("int32_t *[]", [self._sequence_ids] * size)
        batch = self._batch = ffi.new("llama_batch *")
        batch.token, batch.pos = (ffi.from_buffer("int32_t[]", a) for a in (self._token, self._position))
        batch.n_seq_id = ffi.from_buffer("int32_t[]", self._one)
        batch.logits = ffi.from_buffer("int8_t[]", self._wanted)
        batch.seq_id = self._sequence
        self._held = (self._sequence_ids, self._sequence)

    def suits(self, length: int, sequences: int, outputs: int) -> bool:
        return self.length >= length and self.sequences == sequences and self.outputs >= outputs

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        self._ffi.release(self._handle)

    def decode(self, tokens: Any, first: int, *, every: bool, sequence: int = 0) -> None:
        """Run `tokens` of one sequence at positions first, first + 1, ...; logits for every one, or for the last."""
        count = len(tokens)
        self._token[:count] = tokens
        self._position[:count] = np.arange(first, first + count) if count > 1 else first
        self._wanted[:count] = every
        self._wanted[count - 1] = True
        if self.sequences > 1:
            for i in range(count):
                self._sequence[i] = self._sequence_ids + sequence
        self._run(count)

    def _run(self, count: int) -> None:
        self._batch.n_tokens = count
        code = self._lib.llama_decode(self._handle, self._batch[0])
        if code:
            raise Crashed(f"llama.cpp could not decode {count} tokens (code {code}: {abi.last_error()})")

    def row(self, index: int) -> Logits:
        """Logits of the index-th token of the last batch, read in place: valid until the next decode."""
        pointer = self._lib.llama_get_logits_ith(self._handle, index)
        return np.frombuffer(self._ffi.buffer(pointer, 4 * self.vocab), np.float32)

    def rows(self, count: int) -> Logits:
        """Logits (count, vocab) of a batch of one sequence that asked for every row."""
        pointer = self._lib.llama_get_logits_ith(self._handle, 0)
        return np.frombuffer(self._ffi.buffer(pointer, 4 * count * self.vocab), np.float32).reshape(count, self.vocab)

    def prefill(self, prompt: NDArray[np.int32], sequence: int = 0) -> Logits:
        """Read a prompt; the logits after its last token."""
        for first in range(0, len(prompt), PREFILL):
            part = prompt[first : first + PREFILL]
            self.decode(part, first, every=False, sequence=sequence)
        return self.row(len(part) - 1)

    def step(self, token: int, draft: list[int], position: int) -> Sequence[Logits]:
        """One pass over a token and its draft: 1 + len(draft) rows of logits."""
        if not draft:
            self._token[0], self._position[0], self._wanted[0] = token, position, True
            self._run(1)
            return (self.row(0),)
        self.decode([token, *draft], position, every=True)
        return list(self.rows(1 + len(draft)))

    def abreast(self, tokens: Sequence[int], positions: Sequence[int]) -> list[Logits]:
        """One pass over one token of each sequence."""
        count = len(tokens)
        self._token[:count], self._position[:count], self._wanted[:count] = tokens, positions, True
        for i in range(count):
            self._sequence[i] = self._sequence_ids + i
        self._run(count)
        return [self.row(i) for i in range(count)]

    def forget(self, position: int) -> None:
        """Drop what the cache holds from `position` on. Raises ModelError for models that cannot go back."""
        if not self._lib.llama_memory_seq_rm(self._memory, 0, position, -1):
            raise ModelError("this model cannot take tokens back (recurrent state); set lookup_tokens = 0")
