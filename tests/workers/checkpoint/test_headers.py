"""The header reader refuses every way in which a header can lie, and reads the rest as safetensors does."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from support import checkpoints
from support.depth import depth
from support.models.memory import Memory

from planner.errors import InvalidCheckpoint
from planner.profile import Tensor
from workers.checkpoint.folder import open_folder
from workers.checkpoint.headers import read_headers
from workers.checkpoint.safetensors import parse_header


def packed(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [3], 16, 22)}


def read(data: bytes) -> tuple[Tensor, ...]:
    return read_headers(Memory({"model.safetensors": data})).tensors


def test_offsets_become_places_in_the_file() -> None:
    data = packed(GOOD, bytes(22))
    begin = len(data) - 22
    assert [(t.name, t.dtype, t.shape, t.begin, t.end) for t in read(data)] == [
        ("a", "F32", (2, 2), begin, begin + 16),
        ("b", "BF16", (3,), begin + 16, begin + 22),
    ]


def test_scalars_empty_tensors_and_metadata_are_read() -> None:
    header = {"__metadata__": {"format": "pt"}, "e": entry("F32", [0, 4], 0, 0), "s": entry("I64", [], 0, 8)}
    headers = read_headers(Memory({"model.safetensors": packed(header, bytes(8))}))
    assert {t.name: t.size_bytes for t in headers.tensors} == {"e": 0, "s": 8}
    assert headers.metadata == {"format": "pt"}
    assert headers.total_bytes == 8


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "at least 8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "over the format's"),
        (struct.pack("<Q", 100) + b"{}", "goes beyond the file's 10 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "over the format's 100,000,000"),
        (struct.pack("<Q", 2**63) + b"{}", "over the format's"),
        (packed(b"[]"), "must begin with"),
        (packed(b" {}"), "must begin with"),
        (packed(b"{"), "not valid JSON"),
        (packed(b'{"a": \xff}'), "not valid JSON"),
        (packed(b"{" + b'"a":[' * 50_000), "not valid JSON"),
        (packed(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), "not valid JSON"),
        (packed({"a": 1}), "must be a JSON object"),
        (packed({"a": {"dtype": "F32"}}), "must have dtype, shape and data_offsets"),
        (packed({"a": entry("F32", [1], 0, 4) | {"x": 1}}, bytes(4)), "must have dtype, shape and data_offsets"),
        (packed({"a": entry("X9", [1], 0, 4)}, bytes(4)), "unknown dtype 'X9'"),
        (packed({"a": entry("float32", [1], 0, 4)}, bytes(4)), "unknown dtype 'float32'"),
        (packed({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "impossible shape"),
        (packed({"a": entry("F32", [2**60, 2**60], 0, 4)}, bytes(4)), "impossible shape"),
        (packed({"a": {**entry("F32", [1], 0, 4), "shape": [True]}}, bytes(4)), "impossible shape"),
        (packed({"a": {**entry("F32", [1], 0, 4), "shape": [1.0]}}, bytes(4)), "impossible shape"),
        (packed({"a": entry("F32", [1], 4, 0)}, bytes(4)), "impossible data_offsets"),
        (packed({"a": entry("F32", [1], -4, 0)}, bytes(4)), "impossible data_offsets"),
        (packed({"a": {**entry("F32", [1], 0, 4), "data_offsets": [0, 4, 8]}}, bytes(4)), "impossible data_offsets"),
        (packed({"a": entry("F32", [2], 0, 4)}, bytes(4)), "takes 8 bytes, but its data_offsets [0, 4] span 4"),
        (packed({"a": entry("F4", [3], 0, 2)}, bytes(2)), "takes 1.5 bytes"),
        (packed({"a": entry("F32", [2], 0, 8)}, bytes(4)), "4 bytes are missing"),
        (packed({"a": entry("F32", [1], 0, 4)}, bytes(9)), "5 bytes after the last tensor belong to none"),
        (packed({"a": entry("F32", [1], 4, 8)}, bytes(8)), "a hole of 4 bytes before tensor 'a'"),
        (packed({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, bytes(6)), "overlaps 'a'"),
        (packed({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4)), "overlaps 'a'"),
        (
            packed(b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {"dtype":"F32","shape":[1],'
                   b'"data_offsets":[0,4]}}', bytes(4)),
            "key written twice: 'a'",
        ),
        (packed(b'{"a": {"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)), "written twice"),
        (packed({"__metadata__": {"a": 1}}), "may hold only text"),
        (packed({}), "hold no tensor"),
    ],
)  # fmt: skip
def test_a_lying_header_is_refused_with_its_numbers(data: bytes, says: str) -> None:
    with pytest.raises(InvalidCheckpoint) as error:
        read(data)
    assert says in str(error.value)


def test_an_index_must_name_files_that_are_there() -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": packed({"a": entry("U8", [1], 0, 1)}, b"x"),
    }
    with pytest.raises(InvalidCheckpoint, match=r"1 are missing: 'model-00002-of-00002.safetensors'"):
        read_headers(Memory(files))
    files["model-00002-of-00002.safetensors"] = packed({"c": entry("U8", [1], 0, 1)}, b"x")
    # What the index says of tensors is not believed: the loader takes what the files hold.
    assert [t.name for t in read_headers(Memory(files)).tensors] == ["a", "c"]
    files["model-00002-of-00002.safetensors"] = packed({"a": entry("U8", [1], 0, 1)}, b"x")
    with pytest.raises(InvalidCheckpoint, match="tensor 'a' is in both"):
        read_headers(Memory(files))
    files["model-00002-of-00002.safetensors"] = packed({"b": entry("U8", [1], 0, 1)}, b"x")
    assert [t.name for t in read_headers(Memory(files)).tensors] == ["a", "b"]


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (b"{}", "weight_map must be a JSON object"),
        (b'{"weight_map": {}}', "names no tensor"),
        (b'{"weight_map": {"a": "../../etc/passwd"}}', "which is no file name"),
        (b'{"weight_map": {"a": 3}}', "which is no file name"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "written twice"),
        (b"nonsense", "not valid JSON"),
    ],
)
def test_a_bad_index_is_refused(index: bytes, says: str) -> None:
    with pytest.raises(InvalidCheckpoint) as error:
        read_headers(Memory({"model.safetensors.index.json": index}))
    assert says in str(error.value)


def test_numbered_files_without_an_index_must_be_complete() -> None:
    one = packed({"a": entry("U8", [1], 0, 1)}, b"x")
    with pytest.raises(InvalidCheckpoint, match="2 are missing"):
        read_headers(Memory({"model-00002-of-00003.safetensors": one}))


def test_no_weights_is_an_error_that_says_what_was_expected() -> None:
    with pytest.raises(InvalidCheckpoint, match=r"expected model.safetensors"):
        read_headers(Memory({"config.json": b"{}"}))


@pytest.mark.parametrize("tensors", [1, 3_000])
def test_a_remote_file_costs_its_header_and_little_more(tensors: int) -> None:
    header = {f"layer.{n}.weight": entry("U8", [100], n * 100, n * 100 + 100) for n in range(tensors)}
    data = packed(header, bytes(100 * tensors))
    checkpoint = Memory({"model.safetensors": data}, remote=True)
    assert len(read_headers(checkpoint).tensors) == tensors
    header_bytes = len(data) - 100 * tensors
    assert checkpoint.read_bytes["model.safetensors"] <= header_bytes * 1.1 + 64 * 1024


def test_two_hundred_remote_files_are_all_read() -> None:
    files = {f"model-{n:05d}-of-00200.safetensors": packed({f"t{n}": entry("U8", [1], 0, 1)}, b"x")
             for n in range(1, 201)}  # fmt: skip
    index = {"weight_map": {f"t{n}": f"model-{n:05d}-of-00200.safetensors" for n in range(1, 201)}}
    checkpoint = Memory({**files, "model.safetensors.index.json": json.dumps(index).encode()}, remote=True)
    assert len(read_headers(checkpoint).tensors) == 200


@pytest.mark.parametrize("name", ["llama", "llama_files", "mamba2"])
def test_real_files_are_read_as_safetensors_reads_them(name: str) -> None:
    folder = checkpoints.checkpoint(name)
    found = {t.name: t for t in read_headers(open_folder(folder)).tensors}
    expected = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        for tensor, values in deserialize(data):  # type: ignore[no-untyped-call]
            expected[tensor] = (file.name, values["dtype"], tuple(values["shape"]))
            assert data[found[tensor].begin : found[tensor].end] == bytes(values["data"])
    assert {n: (t.file, t.dtype, t.shape) for n, t in found.items()} == expected


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "?"]) | _JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | _JSON,
    }
)


def accepted_by_safetensors(data: bytes) -> bool:
    try:
        deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return False
    return True


@settings(max_examples=depth(150, 3000), deadline=None)
@given(st.binary(max_size=200))
def test_fuzz_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read(data)
    except InvalidCheckpoint:
        return
    assert accepted_by_safetensors(data)


@settings(max_examples=depth(300, 6000), deadline=None)
@given(st.dictionaries(st.text(max_size=5), _ENTRY | _JSON, max_size=4), st.integers(0, 64))
def test_fuzz_what_is_accepted_safetensors_accepts_too(header: dict[str, Any], length: int) -> None:
    data = packed(json.dumps(header).encode(), bytes(length))
    try:
        tensors = read(data)
    except InvalidCheckpoint:
        return
    assert accepted_by_safetensors(data)
    assert sum(t.size_bytes for t in tensors) == length


@settings(max_examples=depth(150, 3000), deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["F32", "BF16", "U8", "F64"]), st.lists(st.integers(0, 4), max_size=3)),
                min_size=1, max_size=6), st.data())  # fmt: skip
def test_fuzz_a_true_header_is_read_and_one_changed_number_refused(
    shapes: list[tuple[str, list[int]]], data: st.DataObject
) -> None:
    width = {"F32": 4, "BF16": 2, "U8": 1, "F64": 8}
    header, end = {}, 0
    for number, (dtype, shape) in enumerate(shapes):
        size = width[dtype]
        for each in shape:
            size *= each
        header[f"t{number}"] = entry(dtype, shape, end, end + size)
        end += size
    raw = json.dumps(header).encode()
    tensors, _ = parse_header(raw, file="f", file_bytes=8 + len(raw) + end)
    assert sum(t.size_bytes for t in tensors) == end
    name = data.draw(st.sampled_from(sorted(header)))
    side = data.draw(st.sampled_from([0, 1]))
    header[name]["data_offsets"][side] += data.draw(st.sampled_from([-1, 1]))
    raw = json.dumps(header).encode()
    with pytest.raises(InvalidCheckpoint):
        parse_header(raw, file="f", file_bytes=8 + len(raw) + end)
