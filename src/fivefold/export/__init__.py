"""Export: writes the file a serving engine reads, as the model's export plan says.

What lives here: converters from a Hugging Face folder to a file format (GGUF, safetensors), one file per format. They
decide nothing: storage types are chosen by techniques, and a type that does not fit a tensor is refused, never
swapped. What may not live here: techniques, engines' sessions, measuring.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fivefold.errors import ModelError
from fivefold.files import atomic_file, storage
from fivefold.model import Model

DRAFT = "draft.gguf"


def export(model: Model, folder: Path) -> Model:
    """Write `model.export` into `folder` (made if need be) and return the Model that points at the result.

    A GGUF model that no technique changed is already in its final form and is returned as it is. Raises ModelError
    when the plan cannot be written, StoreError when the disk refuses, NotFinite when a weight is NaN or infinite. The
    file of a drafting model is copied beside it as `DRAFT`.
    """
    done = _written(model, folder)
    if model.decode.draft is None:
        return done
    import shutil

    with storage(model.decode.draft), model.decode.draft.open("rb") as source:
        target = atomic_file(folder / DRAFT, lambda file: shutil.copyfileobj(source, file))
    return done.but(decode=replace(done.decode, draft=target))


def _written(model: Model, folder: Path) -> Model:
    if model.format == "gguf":
        if model.export.format != "gguf":
            raise ModelError(f"{model.path.name} is a GGUF file and cannot become safetensors; start from its folder")
        return model
    if model.export.format == "gguf":
        from fivefold.export.gguf_ import write_gguf

        return write_gguf(model, folder)
    from fivefold.export.safetensors_ import write_folder

    return write_folder(model, folder)
