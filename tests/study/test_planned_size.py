"""Planned bytes against counting tensor by tensor."""

from __future__ import annotations

import pytest

from fivefold.model import ExportPlan, Model
from fivefold.recipe import Recipe
from fivefold.study.planned_size import own_bits, planned_bytes, size_on_disk
from fivefold.testing.tiny import tiny_model
from fivefold.weights import read_tensors


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "parent")


def counted(model: Model, layers: float, rest: float) -> float:
    """Bytes with so many bits for matrices inside layers and for everything else."""
    bits = 0.0
    for name, tensor in read_tensors(model.path):
        numbers = 1
        for side in tensor.shape:
            numbers *= side
        bits += numbers * (layers if ".layers." in name and len(tensor.shape) == 2 else rest)
    return bits / 8


def test_the_parent_is_as_large_as_its_tensors(parent: Model) -> None:
    assert size_on_disk(parent) == pytest.approx(counted(parent, own_bits(parent), own_bits(parent)), rel=0.05)


@pytest.mark.parametrize(("text", "layers", "read"), [
    ('int8 + dtype(type="bfloat16")', 8.0, 16.0),
    ('rtn(bits=4, group=32) + dtype(type="bfloat16")', 5.0, 16.0),
    ('rtn(bits=2, group=32, symmetric=True) + dtype(type="float32")', 2.5, 32.0),
    ('wanda(sparsity=0.5) + dtype(type="bfloat16")', None, 16.0),
])
def test_linear_layers_take_what_they_store_and_the_rest_its_own(
    parent: Model, text: str, layers: float | None, read: float
) -> None:
    own = own_bits(parent)
    written, per_token = planned_bytes(parent, Recipe.parse(text).plan(parent))
    assert written == pytest.approx(counted(parent, own if layers is None else layers, own), rel=0.02)
    assert per_token == pytest.approx(counted(parent, read if layers is None else layers, read), rel=0.02)


def test_zeros_that_are_left_out_cost_a_bit_each(parent: Model) -> None:
    planned = ExportPlan(density=0.25).storing(16 * 0.25 + 1)
    written, _ = planned_bytes(parent, parent.but(export=planned))
    assert written == pytest.approx(counted(parent, 5.0, own_bits(parent)), rel=0.02)


def test_an_embedding_in_eight_bits_is_counted_so(parent: Model) -> None:
    keep, packed = (planned_bytes(parent, Recipe.parse(f'int8(head="{h}")').plan(parent))[0] for h in ("keep", "int8"))
    table = parent.blueprint.vocab * parent.blueprint.width * (1 if parent.blueprint.tied else 2)
    assert (keep - packed) * 8 == pytest.approx(table * (own_bits(parent) - 8.5), rel=1e-6)
