"""How many bytes a plan will write, and how many of weights an engine will then read for a token, from shapes alone.

    gguf           every matrix in its type; what is written is what is read
    torch folder   linear layers as they are stored (`ExportPlan.layer_bits`), the rest in the model's own type; read
                   in the type that is computed in

Scales are counted with the bits; norms and other vectors are small and counted as matrices.
"""

from __future__ import annotations

from fivefold.meters import memory
from fivefold.model import Blueprint, ExportPlan, Model
from fivefold.techniques._shared.gguf_types import bits, gguf_bytes

DTYPE_TYPE = {"float32": "f32", "bfloat16": "bf16"}


def folder_bytes(blueprint: Blueprint, plan: ExportPlan, own: float) -> float:
    """Of linear layers as planned, and all else in `own` bits per weight."""
    tables = blueprint.vocab * blueprint.width * (1 if blueprint.tied else 2)
    layers = blueprint.parameters - tables
    outside = bits(plan.embedding) if plan.embedding else own
    return (layers * plan.kept * (own if plan.layer_bits is None else plan.layer_bits) + tables * outside) / 8


def planned_bytes(parent: Model, planned: Model) -> tuple[float, float]:
    """(bytes of the file, bytes of weights read per token) of what `planned` will make of `parent`."""
    plan, shape, draft = planned.export, planned.blueprint, planned.decode.draft_bytes
    if plan.format == "gguf":
        whole = gguf_bytes(shape, plan.default, plan.embedding)
        return whole + draft, whole
    computed = bits(DTYPE_TYPE[planned.run.dtype])
    return folder_bytes(shape, plan, own_bits(parent)) + draft, folder_bytes(shape, plan, computed)


def own_bits(model: Model) -> float:
    """Bits in which the model's folder holds a weight that no technique stores otherwise: 16 or 32."""
    return 32.0 if 8 * size_on_disk(model) > 24 * model.blueprint.parameters else 16.0


def size_on_disk(model: Model) -> float:
    """Bytes of the weights, a drafting model's too."""
    return memory.weight_bytes(model).value or 0.0
