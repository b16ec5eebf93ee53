"""PyTorch: runs any causal language model of transformers from a local folder, in float32 or bfloat16.

It is the reference: the weights are computed with as they are stored, so what another engine loses can be measured
against it. It is not the fastest server on a CPU (every token passes through about a thousand small calls from
Python), but the only engine for architectures nobody has ported, and it reads layers stored otherwise (`_layers`) and
adapters beside the weights (`_adapter`).

Only local files and safetensors are read, and no code that comes with a model is run. Prompt lookup checks a draft
with one pass and crops the cache after the first difference. A batch is padded on the left, with positions counted
from each prompt's own first token.

Source: transformers, https://github.com/huggingface/transformers (Apache-2.0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import Sampling
from fivefold.engines._adapter import attach
from fivefold.engines._draft_model import opened
from fivefold.engines._drafting import generated, groups
from fivefold.engines._kivi_type import KiviType
from fivefold.engines._sampling import BROKEN, log_softmax
from fivefold.engines._torch_errors import check_loaded, memory, one_sentence
from fivefold.errors import DataError, NotFinite
from fivefold.model import Model

FORMATS = ("safetensors",)
EXTRA = None
ADAPTERS = True
DRAFTS = True
SCORED = 512
GREEDY = Sampling()


def open(model: Model) -> TorchSession:
    """Load the folder. Raises ModelError in one sentence when it is damaged or of an unknown family."""
    return TorchSession(model)


class TorchSession:
    """See `engines.Session`. The number of threads is PyTorch's and so holds for the whole process."""

    def __init__(self, model: Model) -> None:
        import torch

        if model.run.threads:
            torch.set_num_threads(model.run.threads)
        self.run, self.decode, self.blueprint = model.run, model.decode, model.blueprint
        self.vocab = model.blueprint.vocab
        self.stored = (model.path / "layers.json").is_file()
        self._dtype = getattr(torch, model.run.dtype)
        with one_sentence(model):
            self._model: Any = self._load(model)
            self._prefix, self.adapter = attach(self._model, model.path)
        self._room = min(self.run.context, self._prefix.room() if self._prefix else self.run.context)
        self._before = self._prefix.length if self._prefix else 0
        self._draft = opened(model)
        self._kivi = KiviType.parse(self.run.cache_type)
        if self._kivi:
            from fivefold.engines._kivi import check

            check(self._model.config, self._kivi)

    def _load(self, model: Model) -> Any:
        if self.stored:
            from fivefold.engines._layers import load_layers

            return load_layers(model.path, self._dtype)
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=self._dtype,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )
        check_loaded(model, report)
        return loaded.eval()

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        ids = self._checked(tokens, len(tokens))
        out = np.empty((len(ids), self.vocab), np.float32)
        cache: Any = None
        for first in range(0, len(ids), SCORED):
            part = ids[first : first + SCORED]
            logits, cache = self._as_decoded(part, cache)
            log_softmax(logits, out[first : first + len(part)])
        if np.isnan(out[:, 0]).any():
            raise NotFinite(BROKEN)
        return out

    def _forward(self, rows: Sequence[Sequence[int]], cache: Any, keep: int, **more: Any) -> tuple[Any, Any]:
        """Logits of the last `keep` places, float32 (batch, keep, vocab), and the cache with these tokens in it."""
        import torch

        with torch.inference_mode(), memory():
            fresh, mask = cache is None, more.get("attention_mask")
            if self._prefix is not None:
                cache, more = self._prefix.before(len(rows), cache, more)
            if self._kivi and fresh:
                from fivefold.engines._kivi import KiviCache

                cache = KiviCache(self._kivi, slack=self.decode.drafted, before=cache, mask=mask)
            ids = torch.tensor(rows)
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep, **more)
            return out.logits.float().numpy(), out.past_key_values

    def _as_decoded(self, text: Sequence[int], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """Logits of every token of a text after `cache`: each sees what it would see if they came one at a time."""
        held = self._before if cache is None else cache.get_seq_length()
        logits, first = [], 0
        for size in self._kivi.pieces(held, len(text)) if self._kivi else (len(text),):
            part, cache = self._forward([text[first : first + size]], cache, keep=size)
            logits.append(part[0])
            first += size
        return logits[0] if len(logits) == 1 else np.concatenate(logits), cache

    def generate(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        ids = self._checked(prompt, len(prompt) + max_tokens)
        text = _Text(self._forward, self._as_decoded, ids, self._before)
        most = self.decode.drafted
        drafter = None if self._draft is None else self._draft.text(ids, max_tokens, most, sampling)
        return generated(text, ids, max_tokens, self.decode, sampling, drafter=drafter)

    def generate_batch(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Groups of `run.batch` prompts at once (all of them when that is 1)."""
        ids = [self._checked(prompt, len(prompt) + max_tokens) for prompt in prompts]
        if max_tokens < 1:
            return [[] for _ in ids]
        width = self.run.batch if self.run.batch > 1 else max(1, len(ids))
        return [text for group in groups(ids, width) for text in self._together(group, max_tokens)]

    def _together(self, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        import torch

        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(p)) + p for p in prompts]
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * (len(p) + max_tokens) for p in prompts])
        places = (mask.cumsum(1) - 1).clamp_min(0)
        texts: list[list[int]] = [[] for _ in prompts]
        cache: Any = None
        for step in range(max_tokens):
            end = longest + step
            logits, cache = self._forward(
                rows, cache, keep=1, attention_mask=mask[:, :end], position_ids=places[:, end - len(rows[0]) : end]
            )
            rows = [[int(row.argmax())] for row in logits[:, 0]]
            for text, row in zip(texts, rows, strict=True):
                text.extend(row)
        return texts

    def describe(self) -> dict[str, Any]:
        import torch
        import transformers

        beside = self._prefix.tensors if self._prefix else []
        seen = {t.data_ptr(): t.nbytes for t in (*self._model.parameters(), *self._model.buffers(), *beside)}
        return {
            "engine": "torch",
            "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "threads": torch.get_num_threads(),
            "dtype": self.run.dtype,
            "tensor_types": self._types(),
            "weight_bytes": sum(seen.values()),
            "cache_type": str(self._kivi or self.run.dtype),
            "cache_bytes_per_token": self.blueprint.cache_bytes_per_token(self._cache_element()),
            "lookup_tokens": self.decode.lookup_tokens,
            "draft_tokens": self.decode.draft_tokens,
            **({"adapter": self.adapter} if self.adapter else {}),
        }

    def _cache_element(self) -> float:
        """Bytes per element, on average over a full context."""
        size: int = self._dtype.itemsize
        return self._kivi.mean_bytes(self.run.context, size) if self._kivi else size

    def _types(self) -> dict[str, int]:
        kinds = Counter(m.stored for m in self._model.modules() if isinstance(getattr(m, "stored", None), str))
        return {self.run.dtype: len(list(self._model.parameters())), **dict(sorted(kinds.items()))}

    def close(self) -> None:
        if self._draft is not None:
            self._draft.close()
        self._model = None

    def _checked(self, tokens: Sequence[int], length: int) -> list[int]:
        if self._model is None:
            raise RuntimeError("this session is closed; open the model again")
        ids = [int(token) for token in tokens]
        if not ids or min(ids) < 0 or max(ids) >= self.vocab:
            raise DataError(
                f"a prompt must be one or more token ids from 0 to {self.vocab - 1}; tokenize the text again"
            )
        if length > self._room:
            raise DataError(
                f"{length} tokens do not fit the context of {self._room};"
                " shorten the text or raise the context of the run plan"
            )
        return ids


class _Text:
    """`_drafting.Passes` with a cache of its own, in which `before` places are taken before the text."""

    def __init__(
        self, forward: Callable[..., tuple[Any, Any]], decoded: Callable[..., tuple[Any, Any]], prompt: list[int],
        before: int,
    ) -> None:
        self.forward, self.decoded, self.prompt = forward, decoded, prompt
        self.before, self.filled = before, len(prompt)
        self.cache: Any = None

    def first(self) -> Sequence[NDArray[np.float32]]:
        logits, self.cache = self.forward([self.prompt], None, keep=1)
        rows: Sequence[NDArray[np.float32]] = logits[0]
        return rows

    def next(self, token: int, draft: list[int], kept: int) -> Sequence[NDArray[np.float32]]:
        if kept < self.filled:
            self.cache.crop(self.before + kept)
        self.filled = kept + 1 + len(draft)
        rows: Sequence[NDArray[np.float32]]
        rows, self.cache = self.decoded([token, *draft], self.cache)
        return rows
