"""Network: bytes to ship an artifact, bytes of a request, bytes a distributed run exchanges.

    ship       every file of the artifact x devices
    request    the JSON body of a chat request and of its answer, in UTF-8 (headers and TLS are left out: they are the
               same for every model)
    training   collectives are counted where torch dispatches them: numel x itemsize of the full tensor, one side per
               call; the wire then carries, per process of a ring of W,
               2 (W-1)/W of it for all-reduce, (W-1)/W for all-gather and reduce-scatter

CommDebugMode of torch counts calls, not bytes, hence `CollectiveBytes`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fivefold.model import Model
from fivefold.quantity import Quantity

BYTES_PER_TOKEN = 4.0  # English text under a vocabulary of 50,000: 4 to 4.5 bytes per token
_NAMESPACES = ("c10d", "_c10d_functional")
_COLLECTIVE = re.compile(r"reduce|gather|scatter|broadcast|all_?to_?all|send")


def ship_bytes(model: Model, devices: int = 1) -> Quantity:
    """Bytes to send the artifact to so many devices: its folder, or the GGUF file and the tokenizer beside it."""
    if model.path.is_dir():
        files = [f for f in model.path.rglob("*") if f.is_file()]
    else:
        files = [f for f in (model.path, model.tokenizer_file, model.decode.draft) if f and f.is_file()]
    return Quantity(value=devices * sum(f.stat().st_size for f in files), unit="byte", method="counted")


def request_bytes(prompt: str, answer: str, model: str = "model") -> int:
    """Bytes of the two JSON bodies of one non-streamed chat request, as OpenAI's protocol writes them."""
    asked = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 256}
    choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    told = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": model, "choices": [choice],
            "usage": usage}
    return sum(len(json.dumps(body, ensure_ascii=False).encode()) for body in (asked, told))


def workload_bytes(
    model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[Quantity, float]:
    """(bytes per request, answer bytes per output token). Counted with the tokenizer; modelled where there is none."""
    tokens = sum(len(a) for a in answers)
    if not model.tokenizer_file.is_file():
        sizes = [request_bytes("", "") + BYTES_PER_TOKEN * (len(p) + len(a))
                 for p, a in zip(prompts, answers, strict=True)]
        quantity = Quantity(value=sum(sizes) / len(sizes), unit="byte", method="modelled", n=len(sizes),
                            reason=f"no tokenizer.json: {BYTES_PER_TOKEN:g} bytes per token assumed")
        return quantity, BYTES_PER_TOKEN
    from tokenizers import Tokenizer

    decode: Callable[..., str] = Tokenizer.from_file(str(model.tokenizer_file)).decode
    texts = [(decode(list(p)), decode(list(a))) for p, a in zip(prompts, answers, strict=True)]
    sizes = [float(request_bytes(p, a)) for p, a in texts]
    answered = sum(len(a.encode()) for _, a in texts)
    quantity = Quantity(value=sum(sizes) / len(sizes), unit="byte", method="counted", n=len(sizes))
    return quantity, answered / tokens if tokens else 0.0


class CollectiveBytes:
    """`with CollectiveBytes() as window: train_step()`, then `window.payload` (bytes by operation), `window.total`.

    `wire(world)` is what one process of a ring sends. Only this process's calls are seen.
    """

    def __init__(self) -> None:
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.payload.values())

    def wire(self, world: int) -> float:
        share = (world - 1) / world
        return sum(_ring_factor(name) * share * size for name, size in self.payload.items())

    def __enter__(self) -> Self:
        self._mode = _mode(self)
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, trace)


def _mode(window: CollectiveBytes) -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    def sizes(value: Any) -> Iterator[int]:
        if isinstance(value, torch.Tensor):
            yield value.numel() * value.element_size()
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from sizes(item)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            space, _, name = func._schema.name.partition("::")
            if space in _NAMESPACES and _COLLECTIVE.search(name):
                # The full tensor is the largest side: of inputs and outputs, per call.
                sides = [sum(sizes(side)) for side in (*args, result) if not isinstance(side, (str, int, float))]
                window.payload[name.strip("_")] += max(sides, default=0)
                window.calls[name.strip("_")] += 1
            return result

    return Mode()


def _ring_factor(operation: str) -> int:
    return 2 if "reduce" in operation and "scatter" not in operation and operation != "reduce" else 1


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
