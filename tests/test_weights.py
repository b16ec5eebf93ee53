import json
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fivefold import weights
from fivefold.errors import ModelError, StoreError
from fivefold.weights import (
    check_safetensors,
    gguf_header,
    read_solved,
    read_tensors,
    to_bfloat16,
    write_safetensors,
    write_safetensors_folder,
    write_solved,
)

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory):
    """A small complete GGUF file written by the gguf package."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_block_count, 2), (writer.add_embedding_length, 32), (writer.add_head_count, 4),
                       (writer.add_head_count_kv, [2, 1]), (writer.add_feed_forward_length, 64),
                       (writer.add_context_length, 128)):
        add(value)
    writer.add_token_list(["a", "b€", "c"])
    writer.add_float32("some.float", 0.5)
    writer.add_bool("some.flag", True)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.normal(size=(3, 32)).astype(np.float32))
    writer.add_tensor("blk.0.ffn_gate.weight", gguf.quantize(rng.normal(size=(64, 32)).astype(np.float32),
                      gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_storage_types_are_those_of_the_gguf_package():
    sizes = gguf.constants.GGML_QUANT_SIZES
    theirs = {int(kind): (kind.name, *sizes[kind]) for kind in gguf.GGMLQuantizationType}
    assert theirs == weights.GGML_TYPES


def test_the_header_agrees_with_the_gguf_package(good_gguf):
    header, reader = gguf_header(good_gguf), gguf.GGUFReader(good_gguf)
    assert [(t.name, t.shape, t.type, t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            ours = header.metadata[name]
            assert (ours.read() if isinstance(ours, weights.GGUFArray) else ours) == field.contents()
    blueprint = header.blueprint()
    assert (blueprint.layers, blueprint.width, blueprint.head_dim, blueprint.kv_heads) == (2, 32, 8, 2)
    assert blueprint.vocab == 3 and blueprint.tied and blueprint.gated


def outcome(check, path: Path) -> str:
    """"ok" or the sentence; any other exception, or much memory, fails the test."""
    tracemalloc.start()
    try:
        check(path)
        said = "ok"
    except ModelError as error:
        said = str(error)
        assert "\n" not in said and len(said) < 600
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100e6
    return said


def read_all(path: Path) -> None:
    header = gguf_header(path)
    for value in header.metadata.values():
        if isinstance(value, weights.GGUFArray):
            value.read()
    header.blueprint()


@FUZZ
@given(data=st.binary(max_size=400), magic=st.booleans())
def test_any_bytes_as_gguf(tmp_path, data, magic):
    path = tmp_path / "x.gguf"
    path.write_bytes((b"GGUF\x03\0\0\0" if magic else b"") + data)
    outcome(read_all, path)


@FUZZ
@given(places=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
       cut=st.none() | st.integers(0, 2000))
def test_a_damaged_gguf(tmp_path, good_gguf, places, cut):
    data = bytearray(good_gguf.read_bytes())
    for place, value in places:
        data[place % len(data)] = value
    path = tmp_path / "x.gguf"
    path.write_bytes(data[:cut])
    outcome(read_all, path)


@FUZZ
@given(place=st.integers(0, 900), value=st.sampled_from([2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1]))
def test_giant_counts_in_a_gguf(tmp_path, good_gguf, place, value):
    data = bytearray(good_gguf.read_bytes())
    struct.pack_into("<Q", data, place, value)
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    outcome(read_all, path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_gguf_is_refused(tmp_path, good_gguf, share):
    data = good_gguf.read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"truncated|ends before|more than the file"):
        gguf_header(path)


def save(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2, 2), span=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.mark.parametrize("header, size", [
    ({"a": entry()}, 15),
    ({"a": entry()}, 17),
    ({"a": entry(), "b": entry()}, 16),
    ({"a": entry(), "b": entry(span=(20, 36))}, 36),
    ({"a": entry(shape=(2, 3))}, 16),
    ({"a": entry(shape=(-1, -4))}, 16),
    ({"a": entry(shape=(2**40, 2**40), span=(0, 2**82))}, 16),
    ({"a": entry(shape=(True, 4))}, 16),
    ({"a": entry(dtype="F31")}, 16),
    ({"a": entry(dtype=["F32"])}, 16),
    ({"a": entry(span=(16, 0))}, 16),
    ({"a": entry(span=(0,))}, 16),
    ({"a": 7}, 16),
    ([], 16), ({}, 0), ({"__metadata__": {}}, 0),
    (b'{"a": {}, "a": {}}', 0), (b"[" * 100_000, 0), (b"\xff\xfe{}", 0), (b"{}" + b"1" * 5000, 0),
    (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 16]}}', 16),
])
def test_safetensors_promises_that_do_not_hold(tmp_path, header, size):
    assert outcome(check_safetensors, save(tmp_path / "x.safetensors", header, bytes(size))) != "ok"


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**64 - 1])
def test_safetensors_header_lengths(tmp_path, length):
    assert outcome(check_safetensors, save(tmp_path / "x.safetensors", {"a": entry()}, bytes(16), length)) != "ok"


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"1.5,", b'"ab",', b"1,", b"[[1.5]],"])
def test_a_large_hostile_safetensors_header_costs_little_memory(tmp_path, unit):
    body = b"[" + unit * ((weights.MAX_JSON_HEADER - 3) // len(unit)) + b"0]"
    assert outcome(check_safetensors, save(tmp_path / "x.safetensors", body)) != "ok"


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize("pairs, item", [
    (2**16, lambda i: text(b"%d" % i) + struct.pack("<IIQ", 9, 4, 0)),
    (200, lambda i: text(b"%d" % i) + struct.pack("<I", 8) + text(b"x" * 2**18)),
    (1, lambda i: text(b"a") + struct.pack("<IIQ", 9, 8, 2**23) + bytes(2**26)),
])
def test_a_large_hostile_gguf_header_costs_little_memory(tmp_path, pairs, item):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, pairs) + b"".join(map(item, range(pairs))))
    outcome(gguf_header, path)


@FUZZ
@given(data=st.binary(max_size=300), framed=st.booleans())
def test_any_bytes_as_safetensors(tmp_path, data, framed):
    path = tmp_path / "x.safetensors"
    if framed:
        save(path, data)
    else:
        path.write_bytes(data)
    outcome(check_safetensors, path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", "dtype", "shape"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["a", "b", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
    ), max_leaves=12,
)


@FUZZ
@given(header=json_values, size=st.integers(0, 64))
def test_any_json_as_safetensors(tmp_path, header, size):
    outcome(check_safetensors, save(tmp_path / "x.safetensors", header, bytes(size)))


@FUZZ
@given(dims=st.lists(st.integers(0, 5), max_size=3), dtype=st.sampled_from(["F32", "BF16", "I64", "U8"]),
       extra=st.integers(-2, 2))
def test_safetensors_accepts_exactly_what_the_library_accepts(tmp_path, dims, dtype, extra):
    from safetensors import SafetensorError, safe_open

    nbytes = int(np.prod(dims)) * weights.DTYPE_BYTES[dtype]
    assume(nbytes + extra >= 0)
    path = save(tmp_path / "x.safetensors", {"a": entry(dtype, dims, (0, nbytes))}, bytes(nbytes + extra))
    try:
        with safe_open(path, "np"):
            theirs = True
    except SafetensorError:
        theirs = False
    assert (outcome(check_safetensors, path) == "ok") == theirs


def test_reading_agrees_with_the_safetensors_library(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"f32": rng.normal(size=(3, 4)).astype(np.float32), "f16": rng.normal(size=5).astype(np.float16),
              "i64": np.arange(3), "empty": np.zeros((0, 4), np.float32), "scalar": np.array(3, np.float32)}
    save_file(arrays, tmp_path / "a.safetensors")
    read = dict(read_tensors(tmp_path))
    assert list(read) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name].numpy(), array)
        assert read[name].numpy().dtype == (array.dtype if array.dtype.kind == "i" else np.float32)


def test_bfloat16_rounds_and_reads_like_torch(tmp_path):
    import torch

    values = torch.randn(1000, generator=torch.manual_seed(0)) * torch.logspace(-30, 30, 1000)
    values[:4] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    write_safetensors(tmp_path / "a.safetensors", {"x": values.bfloat16()})
    np.testing.assert_array_equal(to_bfloat16(values.numpy()), values.bfloat16().view(torch.uint16).numpy())
    stored = check_safetensors(tmp_path / "a.safetensors")["x"]
    np.testing.assert_array_equal(stored.numpy(), values.bfloat16().float().numpy())
    assert torch.equal(stored.torch(), values.bfloat16())
    assert np.isnan((to_bfloat16(np.array([np.nan], np.float32)).astype(np.uint32) << 16).view(np.float32)).all()


def test_writing_is_read_by_the_safetensors_library(tmp_path):
    import torch

    tensors = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.ones((4, 4), np.float32)[:, ::2],
               "c": torch.arange(6.0).reshape(2, 3).T, "d": np.array(True), "e": np.zeros((2, 0), np.float16)}
    folder = write_safetensors_folder(tmp_path / "m", tensors, config={"x": 1}, texts={"tokenizer.json": "{}"})
    back = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], np.asarray(value))
    copy = write_safetensors_folder(tmp_path / "n", dict(read_tensors(folder)), like=folder)
    assert json.loads((copy / "config.json").read_text()) == {"x": 1} and (copy / "tokenizer.json").is_file()
    np.testing.assert_array_equal(load_file(copy / "model.safetensors")["b"], back["b"])


def test_a_failed_write_leaves_nothing(tmp_path):
    class Broken:
        dtype, shape = "F32", (4,)

        def raw(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"):
        write_safetensors_folder(tmp_path / "m", {"a": np.ones(4, np.float32), "b": Broken()})
    assert not list(tmp_path.iterdir())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        write_safetensors_folder(tmp_path / "m", {"a": np.ones(4, np.float32)})


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for shard in "ab":
        save_file({"x": np.ones(2, np.float32)}, tmp_path / f"{shard}.safetensors")
    with pytest.raises(ModelError, match="two files"):
        list(read_tensors(tmp_path))


def test_solved_tensors_come_back_with_their_type(tmp_path):
    packed = np.arange(36, dtype=np.uint8).reshape(2, 18)
    back = read_solved(write_solved(tmp_path, {"blk.0.attn_q.weight": ("q4_0", packed)}))
    kind, tensor = back["blk.0.attn_q.weight"]
    assert kind == "Q4_0"
    np.testing.assert_array_equal(np.array(tensor.raw()).reshape(2, 18), packed)
