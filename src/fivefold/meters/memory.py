"""Memory: how much a serving process needs at its worst, and how much the artifact and its cache take.

Peak resident memory is the kernel's own high-water mark (VmHWM), so no spike between samples is missed. It is a mark
of the process's whole life: the window resets it by writing 5 to /proc/self/clear_refs. (`ru_maxrss` is no
substitute: on Linux a child inherits its parent's mark through fork and exec.) Where the mark cannot be reset, the
window samples instead, and says so. Pages of a memory-mapped weight file count as soon as they are touched.

`bytes per token` of the cache is 2 (keys and values) x layers x kv heads x head dim x bytes per element.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from fivefold.engines._kivi_type import KiviType
from fivefold.model import Model
from fivefold.quantity import Quantity

SAMPLE_SECONDS = 0.02
_CACHE_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
                "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32}


class PeakMemory:
    """A window over this process: `with PeakMemory() as window: ...`, then `window.peak` and `window.gpu_peak`.

    Windows may be nested: the mark an inner one resets is first noted by the outer ones.
    """

    _open: ClassVar[list[PeakMemory]] = []

    def __init__(self) -> None:
        self.peak = Quantity.missing("byte", "the window is still open")
        self.gpu_peak = Quantity.missing("byte", "the window is still open")
        self._sampled = self._noted = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        before = _high_water()
        self._reset = _reset_high_water()
        if self._reset:
            for outer in self._open:
                outer._noted = max(outer._noted, before)
            self._open.append(self)
        else:
            self._sampled = _resident()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        if (torch := _torch_with_cuda()) is not None:
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the window; a second call changes nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._thread:
            self._thread.join()
            self._sampled = max(self._sampled, _resident())
            self.peak = Quantity(value=self._sampled, unit="byte", method="measured",
                                 reason=f"largest of samples every {SAMPLE_SECONDS:g} s")
        else:
            self._open.remove(self)
            self.peak = Quantity(value=max(self._noted, _high_water()), unit="byte", method="measured")
        torch = _torch_with_cuda()
        self.gpu_peak = (
            Quantity.missing("byte", "no accelerator was used") if torch is None
            else Quantity(value=torch.cuda.max_memory_allocated(), unit="byte", method="measured")
        )

    def so_far(self) -> int:
        """Peak resident bytes since the window opened."""
        return max(self._noted, _high_water() if self._reset else max(self._sampled, _resident()))

    def _sample(self) -> None:
        while not self._closed.wait(SAMPLE_SECONDS):
            self._sampled = max(self._sampled, _resident())


def weight_bytes(model: Model) -> Quantity:
    """Bytes of the weights on disk: a GGUF file, or every safetensors file of a folder, and a drafting model's."""
    files = [model.path] if model.path.is_file() else sorted(model.path.glob("*.safetensors"))
    if files and model.decode.draft is not None:
        files.append(model.decode.draft)
    if not files:
        return Quantity.missing("byte", f"there are no weights at {model.path.name}", "counted")
    return Quantity(value=sum(f.stat().st_size for f in files), unit="byte", method="counted")


def cache_bytes(model: Model, described: dict[str, Any]) -> Quantity:
    """Key-value cache per token of context: the engine's word, else the blueprint and the run plan."""
    told = described.get("cache_bytes_per_token")
    if told is not None:
        return Quantity(value=float(told), unit="byte/token", method="counted")
    if model.format == "safetensors":
        element: float | None = 2.0 if model.run.dtype == "bfloat16" else 4.0
        if element and (kivi := KiviType.parse(model.run.cache_type)):
            element = kivi.mean_bytes(model.run.context, element)
    else:
        element = _CACHE_BYTES.get(model.run.cache_type)
    if element is None:
        return Quantity.missing("byte/token", f"the size of cache type {model.run.cache_type} is not known", "counted")
    value = model.blueprint.cache_bytes_per_token(element)
    return Quantity(value=value, unit="byte/token", method="counted", reason="by formula from the blueprint")


def _high_water() -> int:
    """The process's peak resident bytes since the last reset, where the kernel tells (Linux); else 0."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _resident() -> int:
    """Resident bytes of this process now."""
    import psutil  # only where the kernel keeps no mark: it is 4 MB of the process that is measured

    return int(psutil.Process().memory_info().rss)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water() > 0


def _torch_with_cuda() -> Any | None:
    """torch, if this process already uses it on an accelerator."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None
