"""OpenVINO: reads the same GGUF file as llama.cpp and is several times faster at prefill on x86 with AMX or AVX-512.

The file is converted once (`_openvino_ir`) and then run through OpenVINO's own runtime, so scoring and generating go
through one compiled model with its cache inside. Weights stay packed; `run.dtype` is what is computed in, and
bfloat16 is what the CPU is fast in. With quantized weights the activations are rounded to 8 bits in groups of 32, as
llama.cpp does too; an F16 file in float32 is computed exactly. The graph is changed in two places: the output head is
applied only to the places whose logits are asked for (a gather in front of it), and the rotary frequencies, which
OpenVINO rounds to float16 when the file is F16, are put back to float32 (in texts of 1,000 tokens that took the
largest error of a tiny model's log-probabilities from 0.008 to 0.0005).

A rejected draft of prompt lookup is not removed from the cache, which would copy it; it is masked out, and positions
are counted without it. The same mask makes a batch of prompts of different lengths, padded on the left.

Q4_1 is read with its offset rounded to whole steps of the scale, so these are other weights than llama.cpp's (values of
SmolLM2-135M's last layer came out 75 % apart): look at the measured quality. The other types are the same. Compiling
takes seconds at every start. Matrices must be F16, Q8_0, Q4_0 or Q4_1, of the llama and qwen families.

Source: OpenVINO, https://github.com/openvinotoolkit/openvino (Apache-2.0).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fivefold.engines import Sampling
from fivefold.engines._drafting import generated, groups
from fivefold.engines._openvino_ir import MATRIX_TYPES as GGUF_TYPES  # noqa: F401
from fivefold.engines._sampling import BROKEN, drawer, log_softmax
from fivefold.errors import DataError, MissingExtra, ModelError, NotFinite
from fivefold.model import Model
from fivefold.weights import gguf_header

FORMATS = ("gguf",)
EXTRA = "openvino"
SCORED = 256
CACHE_TYPES = {"f32": ("f32", 4.0), "f16": ("f16", 2.0), "bf16": ("bf16", 2.0), "q8_0": ("u8", 1.0)}
GREEDY = Sampling()


def open(model: Model, *, shows_cache: bool = False) -> OpenVINOSession:
    """Convert the file if that was not done before, and compile it. Raises MissingExtra, ModelError."""
    for package in ("openvino", "openvino_genai"):
        if find_spec(package) is None:
            raise MissingExtra(package, extra=EXTRA)
    # OpenVINO's wheel brings a telemetry package; None makes its import fail, and OpenVINO then uses its silent stub.
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    return OpenVINOSession(model, shows_cache=shows_cache)


class OpenVINOSession:
    """See `engines.Session`."""

    def __init__(self, model: Model, *, shows_cache: bool = False) -> None:
        from openvino import Core

        from fivefold.engines._openvino_ir import converted

        self.run, self.decode, self.blueprint = model.run, model.decode, model.blueprint
        self.vocab = model.blueprint.vocab
        if model.run.cache_type not in CACHE_TYPES:
            raise ModelError(
                f"openvino has no key-value cache of type {model.run.cache_type};"
                f" choose one of {', '.join(CACHE_TYPES)}, or another engine"
            )
        options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[model.run.dtype],
            "KV_CACHE_PRECISION": CACHE_TYPES[model.run.cache_type][0],
        }
        if model.run.threads:
            options["INFERENCE_NUM_THREADS"] = str(model.run.threads)
        file = converted(model.path)
        self._bytes = file.with_suffix(".bin").stat().st_size
        core = Core()
        graph = _with_exact_rotation(_with_chosen_places(core.read_model(file)), _base(model.path))
        self._shown = _show_cache(graph) if shows_cache else []
        self._compiled: Any = core.compile_model(graph, "CPU", options)
        self._request: Any = self._compiled.create_infer_request()
        self._turn = 0

    def _start(self) -> int:
        self._turn += 1
        self._request.reset_state()
        return self._turn

    def _forward(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64], keep: int
    ) -> NDArray[np.float32]:
        """Logits (batch, keep, vocab) of the last `keep` places of `ids` (batch, n); a view, valid until the next call.

        `mask` (batch, everything in the cache + n) is 0 where a place is not to be seen.
        """
        n = ids.shape[1]
        self._request.infer({
            "input_ids": ids, "attention_mask": mask, "position_ids": positions,
            "beam_idx": np.arange(len(ids), dtype=np.int32), "places": np.arange(n - keep, n),
        }, share_inputs=True)
        logits: NDArray[np.float32] = self._request.get_tensor("logits").data
        return logits

    def read(self, prompt: Sequence[int], first: int = 0, keep: int = 1) -> NDArray[np.float32]:
        """Prefill an empty cache at positions first, first + 1, ...; logits (keep, vocab) of the last ones, a view."""
        ids = self._checked(prompt, first + len(prompt))[None]
        self._start()
        places = np.arange(first, first + ids.shape[1])[None]
        rows: NDArray[np.float32] = self._forward(ids, np.ones_like(ids), places, keep)[0]
        return rows

    def cache(self) -> Iterator[tuple[bool, int, NDArray[np.float32]]]:
        """Keys and values of the tokens that `read` was given, for a session that shows its cache.

        (is it keys, layer, array (key-value heads, tokens, head width) after rotation), in any order; the arrays are
        views, valid until the next call.
        """
        for kind, layer in self._shown:
            yield kind == "key", layer, self._request.get_tensor(f"new.{kind}.{layer}").data[0]

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        ids = self._checked(tokens, len(tokens))
        self._start()
        out = np.empty((len(ids), self.vocab), np.float32)
        for first in range(0, len(ids), SCORED):
            part = ids[None, first : first + SCORED]
            end = first + part.shape[1]
            mask = np.ones((1, end), np.int64)
            log_softmax(self._forward(part, mask, np.arange(first, end)[None], end - first)[0], out[first:end])
        if np.isnan(out[:, 0]).any():
            raise NotFinite(BROKEN)
        return out

    def generate(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY) -> Iterator[int]:
        ids = self._checked(prompt, len(prompt) + max_tokens)
        drawer(sampling)
        return self._draw(ids, max_tokens, sampling)

    def _draw(self, prompt: NDArray[np.int64], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        turn = self._start()
        room = len(prompt) + max(0, max_tokens) * (1 + self.decode.lookup_tokens)
        yield from generated(
            _Text(self._forward, prompt, room), prompt.tolist(), max_tokens, self.decode, sampling,
            lambda: turn == self._turn,
        )

    def generate_batch(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Groups of `run.batch` prompts at once (all of them when that is 1)."""
        ids = [self._checked(prompt, len(prompt) + max_tokens) for prompt in prompts]
        if max_tokens < 1:
            return [[] for _ in ids]
        width = self.run.batch if self.run.batch > 1 else max(1, len(ids))
        return [text for group in groups(ids, width) for text in self._together(group, max_tokens)]

    def _together(self, prompts: Sequence[NDArray[np.int64]], max_tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        mask = np.ones((len(prompts), longest + max_tokens), np.int64)
        ids = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            mask[row, : longest - len(prompt)] = 0
            ids[row, longest - len(prompt) :] = prompt
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        self._start()
        texts: list[list[int]] = [[] for _ in prompts]
        for end in range(longest, longest + max_tokens):
            logits = self._forward(ids, mask[:, :end], positions[:, end - ids.shape[1] : end], 1)
            ids = logits[:, 0].argmax(1)[:, None]
            for text, token in zip(texts, ids[:, 0].tolist(), strict=True):
                text.append(token)
        return texts

    def describe(self) -> dict[str, Any]:
        def setting(name: str) -> Any:
            return self._compiled.get_property(name)

        return {
            "engine": "openvino",
            "version": f"openvino {version('openvino')}",
            "threads": int(setting("INFERENCE_NUM_THREADS")),
            "dtype": self.run.dtype,
            "activation_group": int(setting("DYNAMIC_QUANTIZATION_GROUP_SIZE")),
            "weight_bytes": self._bytes,
            "cache_type": self.run.cache_type,
            "cache_bytes_per_token": self.blueprint.cache_bytes_per_token(CACHE_TYPES[self.run.cache_type][1]),
            "lookup_tokens": self.decode.lookup_tokens,
        }

    def close(self) -> None:
        self._turn += 1
        self._request = self._compiled = None

    def _checked(self, tokens: Sequence[int], length: int) -> NDArray[np.int64]:
        if self._request is None:
            raise RuntimeError("this session is closed; open the model again")
        ids = np.asarray(tokens, np.int64)
        if ids.ndim != 1 or not ids.size or ids.min() < 0 or ids.max() >= self.vocab:
            raise DataError(
                f"a prompt must be one or more token ids from 0 to {self.vocab - 1}; tokenize the text again"
            )
        if length > self.run.context:
            raise DataError(
                f"{length} tokens do not fit the context of {self.run.context};"
                " shorten the text or raise the context of the run plan"
            )
        return ids


def _with_chosen_places(model: Any) -> Any:
    """The graph with an input `places`: the indices of the places whose logits are computed."""
    from openvino import PartialShape, opset13

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    places = opset13.parameter(PartialShape([-1]), np.int64, name="places")
    places.output(0).get_tensor().set_names({"places"})
    node.input(0).replace_source_output(opset13.gather(node.input_value(0), places, np.int64(1)).output(0))
    model.add_parameters([places])
    model.validate_nodes_and_infer_types()
    return model


def _base(file: Path) -> float:
    """The base of the rotary frequencies."""
    metadata = gguf_header(file).metadata
    return float(metadata.get(f"{metadata['general.architecture']}.rope.freq_base", 10000.0))


def _with_exact_rotation(model: Any, base: float) -> Any:
    """The graph with rotary frequencies base^(-i/n) in float32; that of an F16 file has them rounded to float16."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        shape = list(node.get_output_partial_shape(0).to_shape()) if node.get_type_name() == "Constant" else []
        if len(shape) != 3 or shape[::2] != [1, 1] or node.data.dtype != np.float16:
            continue
        exact = (base ** (-np.arange(shape[1]) / shape[1])).astype(np.float32).reshape(shape)
        if np.allclose(node.data, exact, rtol=2**-10, atol=2**-24):
            [convert] = node.output(0).get_target_inputs()
            frequencies = opset13.constant(exact).output(0)
            for reader in convert.get_node().output(0).get_target_inputs():
                reader.replace_source_output(frequencies)
    return model


def _show_cache(model: Any) -> list[tuple[str, int]]:
    """Make what each pass adds to the cache outputs of the graph; their (kind, layer), named "new.<kind>.<layer>".

    The cache itself can be read too (`query_state`), but is converted from its own layout in hundreds of milliseconds.
    """
    shown = []
    for node in [n for n in model.get_ordered_ops() if n.get_type_name() == "ReadValue"]:
        found = re.match(r"past_key_values\.(\d+)\.(key|value)", node.get_attributes()["variable_id"])
        gather = _consumer(node, "Gather")
        concat = gather and _consumer(gather, "Concat")
        if found is None or concat is None:
            raise ModelError(f"openvino {version('openvino')} builds an unknown kind of cache; use another engine")
        shown.append((found[2], int(found[1])))
        [output] = model.add_outputs([concat.input_value(1)])
        output.get_tensor().set_names({f"new.{found[2]}.{found[1]}"})
    return shown


def _consumer(node: Any, kind: str) -> Any:
    consumers = (target.get_node() for target in node.output(0).get_target_inputs())
    return next((consumer for consumer in consumers if consumer.get_type_name() == kind), None)


class _Text:
    """`_drafting.Passes` over a cache that only grows, to `room` at most: what is forgotten is masked out."""

    def __init__(
        self, forward: Callable[..., NDArray[np.float32]], prompt: NDArray[np.int64], room: int
    ) -> None:
        self.forward, self.prompt, self.filled, self.used = forward, prompt, len(prompt), len(prompt)
        self.seen = np.ones((1, room), np.int64)

    def first(self) -> Sequence[NDArray[np.float32]]:
        rows: Sequence[NDArray[np.float32]] = self.forward(
            self.prompt[None], self.seen[:, : self.used], np.arange(self.used)[None], 1
        )[0]
        return rows

    def next(self, token: int, draft: list[int], kept: int) -> Sequence[NDArray[np.float32]]:
        self.seen[:, self.used - (self.filled - kept) : self.used] = 0
        ids = np.array([[token, *draft]], np.int64)
        self.used += ids.shape[1]
        self.filled = kept + ids.shape[1]
        places = np.arange(kept, self.filled)[None]
        rows: Sequence[NDArray[np.float32]] = self.forward(ids, self.seen[:, : self.used], places, ids.shape[1])[0]
        return rows
