"""One llama.cpp context: the cache, the compute buffers and the arrays a batch is described in.

A batch is five parallel arrays: token ids, positions, sequence ids and the wish for logits. They are C arrays the
struct points at, so describing one token is three stores. Logits are read where llama.cpp left them: a `Row` is valid
until the next decode. Greedy decoding needs no numpy, which would be 16 MB beside weights of 80.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING, Any, TypeAlias

from fivefold.engines import _llama_abi as abi
from fivefold.engines._quantize import StorageType
from fivefold.errors import Crashed, ModelError, OutOfMemory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PREFILL = 256
F32 = 0

Tokens: TypeAlias = "array[int]"
Logits: TypeAlias = "NDArray[np.float32] | Row"
"""Of one token, (vocab,)."""


class Row:
    """Logits (vocab,) of one token where llama.cpp left them: valid until the next decode.

    Asked for its argmax it costs 50 us, by llama.cpp's own greedy sampler; for all else it is a view in numpy.
    """

    __slots__ = ("_context", "_index")

    def __init__(self, context: Context, index: int) -> None:
        self._context, self._index = context, index

    def __len__(self) -> int:
        return self._context.vocab

    def __getitem__(self, token: int) -> float:
        return float(self._context.at(self._index)[token])

    def argmax(self) -> int:
        return self._context.most_probable(self._index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        import numpy as np

        ffi, pointer = self._context.ffi, self._context.at(self._index)
        view = np.frombuffer(ffi.buffer(pointer, 4 * len(self)), np.float32)
        return np.array(view, dtype, copy=copy)


def flash_attention(cache_type: StorageType) -> int:
    """Its CPU kernel rounds to half precision, so not for an f32 cache; a quantized value cache runs only with it."""
    return abi.FLASH_OFF if cache_type.name == "f32" else abi.FLASH_AUTO if cache_type.block == 1 else abi.FLASH_ON


class Context:
    """One llama_context with its cache, and the arrays a batch is described in."""

    def __init__(
        self, model: Any, vocab: int, *, length: int, sequences: int, outputs: int, threads: int,
        cache_type: StorageType, flash: int | None = None,
    ) -> None:
        self.ffi, self._lib = abi.library()
        self.vocab, self.length, self.sequences, self.outputs = vocab, length, sequences, outputs
        self.batch_size = max(PREFILL, outputs, sequences)
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * sequences, sequences
        params.n_batch = params.n_ubatch = self.batch_size
        params.n_outputs_max, params.n_outputs_max_per_seq = outputs, outputs
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = cache_type.number
        params.flash_attn_type = flash_attention(cache_type) if flash is None else flash
        abi.forget_errors()
        handle = self._lib.llama_init_from_model(model, params)
        if handle == self.ffi.NULL:
            reason = abi.last_error()
            kind = OutOfMemory if "alloc" in reason else ModelError
            raise kind(
                f"llama.cpp cannot make a context of {sequences} x {length} tokens with a {cache_type.name}"
                f" cache ({reason}); choose a shorter context or another cache type"
            )
        self._handle = self.ffi.gc(handle, self._lib.llama_free)
        self._memory = self._lib.llama_get_memory(self._handle)
        self._model = model  # freed after `_handle`: a context reads its model while it is freed
        self._greedy = self.ffi.gc(self._lib.llama_sampler_init_greedy(), self._lib.llama_sampler_free)
        self._product = self._lib.ggml_get_type_traits_cpu(F32).vec_dot
        self._sum = self.ffi.new("float *")
        self._arrays()

    def _arrays(self) -> None:
        """C arrays that live as long as the context, so that one token is described by three stores."""
        ffi, size = self.ffi, self.batch_size
        self._token, self._position = ffi.new("int32_t[]", size), ffi.new("int32_t[]", size)
        self._wanted, self._one = ffi.new("int8_t[]", size), ffi.new("int32_t[]", [1] * size)
        self._sequence_ids = ffi.new("int32_t[]", self.sequences)
        for i in range(self.sequences):
            self._sequence_ids[i] = i
        self._sequence = ffi.new("int32_t *[]", [self._sequence_ids] * size)
        batch = self._batch = ffi.new("llama_batch *")
        batch.token, batch.pos, batch.logits = self._token, self._position, self._wanted
        batch.n_seq_id, batch.seq_id = self._one, self._sequence

    def suits(self, length: int, sequences: int, outputs: int) -> bool:
        return self.length >= length and self.sequences == sequences and self.outputs >= outputs

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        self.ffi.release(self._handle)

    def decode(self, tokens: Any, first: int, *, every: bool, sequence: int = 0) -> None:
        """Run `tokens` of one sequence at positions first, first + 1, ...; logits for every one, or for the last."""
        count = len(tokens)
        self._token[0:count] = tokens
        self._position[0:count] = range(first, first + count)
        self._wanted[0:count] = [every] * count
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

    def row(self, index: int) -> Row:
        """Logits of the index-th token of the last batch, read in place: valid until the next decode."""
        return Row(self, index)

    def at(self, index: int) -> Any:
        """Where the logits of that token are: float *."""
        return self._lib.llama_get_logits_ith(self._handle, index)

    def most_probable(self, index: int) -> int:
        """The first of the largest logits of that token; that of the first NaN if there is one, as numpy has it."""
        logits = self.at(index)
        self._product(self.vocab, self._sum, 0, logits, 0, logits, 0, 1)
        if isnan(self._sum[0]):
            return next(token for token in range(self.vocab) if isnan(logits[token]))
        return int(self._lib.llama_sampler_sample(self._greedy, self._handle, index))

    def rows(self, count: int) -> NDArray[np.float32]:
        """Logits (count, vocab) of a batch of one sequence that asked for every row."""
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self._handle, 0)
        return np.frombuffer(self.ffi.buffer(pointer, 4 * count * self.vocab), np.float32).reshape(count, self.vocab)

    def prefill(self, prompt: Tokens, sequence: int = 0) -> Row:
        """Read a prompt; the logits after its last token."""
        for first in range(0, len(prompt), PREFILL):
            part = prompt[first : first + PREFILL]
            self.decode(part, first, every=False, sequence=sequence)
        return self.row(len(part) - 1)

    def step(self, token: int, draft: list[int], position: int) -> Sequence[Row]:
        """One pass over a token and its draft: 1 + len(draft) rows of logits."""
        if not draft:
            self._token[0], self._position[0], self._wanted[0] = token, position, True
            self._run(1)
            return (self.row(0),)
        self.decode([token, *draft], position, every=True)
        return [self.row(i) for i in range(1 + len(draft))]

    def abreast(self, tokens: Sequence[int], positions: Sequence[int]) -> list[Row]:
        """One pass over one token of each sequence."""
        count = len(tokens)
        self._token[0:count], self._position[0:count], self._wanted[0:count] = tokens, positions, [True] * count
        for i in range(count):
            self._sequence[i] = self._sequence_ids + i
        self._run(count)
        return [self.row(i) for i in range(count)]

    def forget(self, position: int) -> None:
        """Drop what the cache holds from `position` on. Raises ModelError for models that cannot go back."""
        if not self._lib.llama_memory_seq_rm(self._memory, 0, position, -1):
            raise ModelError("this model cannot take tokens back (recurrent state); set lookup_tokens = 0")

    def state(self, sequence: int = 0) -> NDArray[np.uint8]:
        """What llama.cpp saves of one text: its cells, keys and values (`_handover` reads it)."""
        import numpy as np

        saved = np.empty(self._lib.llama_state_seq_get_size(self._handle, sequence), np.uint8)
        size = self._lib.llama_state_seq_get_data(
            self._handle, self.ffi.from_buffer("uint8_t[]", saved), saved.size, sequence
        )
        if size != saved.size:
            raise Crashed(f"llama.cpp saved {size} of {saved.size} bytes of its cache ({abi.last_error()})")
        return saved

    def restore(self, saved: NDArray[np.uint8], sequence: int = 0) -> None:
        """Make `saved` the text of this sequence. Raises ModelError when llama.cpp does not take it."""
        abi.forget_errors()
        buffer = self.ffi.from_buffer("uint8_t[]", saved)
        if self._lib.llama_state_seq_set_data(self._handle, buffer, saved.size, sequence) != saved.size:
            raise ModelError(f"llama.cpp refuses a cache filled elsewhere ({abi.last_error()}); use another engine")
