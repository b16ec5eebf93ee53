"""Offloading: the optimiser's state, and the lower halves of split weights, are kept outside the training memory.

    resident     all parameters' state  ->  that of the largest parameter, while it is updated

to="disk" keeps them in mapped files in the run's folder. An update reads and writes the pages of one parameter and
hands them back to the kernel, which writes them when it likes and holds them only while memory is free. Per step every
byte of state is read and written once: for AdamW up to 20 bytes per weight, so the disk's rate, or the memory left for
its cache, decides what a step costs. to="cpu" keeps them in main memory for a model trained on an accelerator, and
copies them there and back.

The numbers are those of training without it, bit for bit. It does not help where the state is small (adapters, LOMO,
BAdam), nor in a folder that itself lies in memory (tmpfs).

Source: Ren et al. (ZeRO-Offload), arXiv 2101.06840; Rajbhandari et al. (ZeRO-Infinity), arXiv 2104.07857.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fivefold.errors import Misfit
from fivefold.machine import Machine
from fivefold.model import Model
from fivefold.space import Fixed
from fivefold.training.method import Lesson, Saving

if TYPE_CHECKING:
    from fivefold.training.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Offload(Saving):
    may_raise = ("compute", "energy", "money")
    headline = "ZeRO-Infinity: 32 trillion parameters trained"

    to: Annotated[Literal["disk", "cpu"], Fixed()] = "disk"
    """Where the state is kept: in files of the run's folder, or in main memory beside an accelerator."""

    def check(self, model: Model) -> None:
        super().check(model)
        if self.to == "cpu" and not Machine.probe().gpus:
            raise Misfit('the model is trained in main memory already; use offload(to="disk")')

    def resident(self, sizes: Sequence[float]) -> float:
        return float(max(sizes, default=0.0))

    def shelf(self, lesson: Lesson, folder: Path) -> Shelf:
        from fivefold.training.shelf import DiskShelf, HostShelf

        if self.to == "disk":
            return DiskShelf(folder)
        device = lesson.module.device
        if device.type == "cpu":
            raise Misfit('the model is trained in main memory already; use offload(to="disk")')
        return HostShelf(device)
