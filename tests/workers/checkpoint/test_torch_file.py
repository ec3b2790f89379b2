"""`.bin` checkpoints are read without running them, and converted bit for bit."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import checkpoints
from support.depth import depth
from support.models.memory import Memory
from support.space_cases import disk

from planner.errors import Cancelled, Conflict, FairshardError, InvalidCheckpoint, InvalidInput, NodeFailure
from workers.checkpoint.folder import open_folder
from workers.checkpoint.headers import read_headers
from workers.checkpoint.torch_file import read_bin
from workers.checkpoint.unpickler import Storage, _view
from workers.converter import convert
from workers.generator import generate


def save(state: Any, folder: Path, *, legacy: bool = False, name: str = "pytorch_model.bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name, _use_new_zipfile_serialization=not legacy)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text("{}")
    return folder


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoints.checkpoint(name) / "model.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["llama_bf16", "bert", "mamba2"])
def test_every_range_holds_its_tensors_bytes(name: str, legacy: bool, tmp_path: Path) -> None:
    state = tensors_of(name)
    folder = save(state, tmp_path, legacy=legacy)
    data = (folder / "pytorch_model.bin").read_bytes()
    found = {t.name: t for t in read_headers(open_folder(folder)).tensors}
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].shape == tuple(tensor.shape)
        assert data[found[key].begin : found[key].end] == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_profile_is_its_safetensors_profile(legacy: bool, tmp_path: Path) -> None:
    state = tensors_of("llama_tied")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    folder = save(state, tmp_path / "x" / "y", legacy=legacy)
    source = checkpoints.checkpoint("llama_tied")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    mine, its = generate(open_folder(folder)), generate(open_folder(source))
    assert [
        (a.name, a.num_params, a.weight_bytes, a.compute_required, a.tied_to, a.tied_bytes) for a in mine.layers
    ] == [(b.name, b.num_params, b.weight_bytes, b.compute_required, b.tied_to, b.tied_bytes) for b in its.layers]


@pytest.mark.parametrize("legacy", [False, True])
def test_conversion_is_bit_identical(legacy: bool, tmp_path: Path) -> None:
    state = tensors_of("llama_bf16")
    strided = torch.arange(12.0).view(3, 4).t()
    extra = {
        "strided": strided,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "wide": torch.rand(2, 2, dtype=torch.float64),
    }
    folder = save({**state, **extra, "twin": state["lm_head.weight"]}, tmp_path / "in", legacy=legacy)
    out = convert(open_folder(folder), tmp_path / "out")
    converted = load_file(out / "model.safetensors")
    every = {**state, **extra, "twin": state["lm_head.weight"]}
    assert converted.keys() == every.keys()
    for name, tensor in every.items():
        assert converted[name].dtype == tensor.dtype
        assert torch.equal(converted[name], tensor), name
    read_headers(open_folder(out))
    assert sorted(each.name for each in out.iterdir()) == ["config.json", "model.safetensors"]


def test_several_files_become_several_with_an_index(tmp_path: Path) -> None:
    state = tensors_of("llama_bf16")
    names = sorted(state)
    save({n: state[n] for n in names[:9]}, tmp_path / "in", name="pytorch_model-00001-of-00002.bin")
    save({n: state[n] for n in names[9:]}, tmp_path / "in", name="pytorch_model-00002-of-00002.bin")
    out = convert(open_folder(tmp_path / "in"), tmp_path / "out")
    headers = read_headers(open_folder(out))
    assert set(headers.files) == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert sorted(t.name for t in headers.tensors) == names


def test_what_is_safetensors_is_not_converted_and_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="safetensors already"):
        convert(open_folder(checkpoints.checkpoint("llama")), tmp_path / "out")
    folder = save({"a": torch.zeros(1)}, tmp_path / "in")
    with pytest.raises(Conflict, match="holds something"):
        convert(open_folder(folder), folder)


@pytest.mark.parametrize(
    "state",
    [
        {"w": torch.zeros(1).expand(1_000_000, 1_000_000)},  # 4 TB in one piece
        {f"w{n}": torch.zeros(1).expand(5_000, 1_000 + n) for n in range(10)},  # each within bounds, not all
    ],
)
def test_tensors_far_larger_than_their_files_are_not_written_out(state: Any, tmp_path: Path) -> None:
    folder = save(state, tmp_path / "in")
    with pytest.raises(InvalidCheckpoint, match="written out, the files hold"):
        convert(open_folder(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_conversion_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = save(tensors_of("llama_bf16"), tmp_path / "in")
    source, out = open_folder(folder), tmp_path / "out"

    def stop(done: int, _total: int | None, /, *, what: str = "") -> None:
        if done > 50_000:
            raise Cancelled

    with pytest.raises(Cancelled):
        convert(source, out, progress=stop)
    assert not out.exists()
    (tmp_path / ".out.partial-killed").mkdir()
    convert(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_conversion_that_will_not_fit_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    folder = save({"w": torch.zeros(2 << 20)}, tmp_path / "in")
    with disk(tmp_path / "disk", 8 << 20) as place:
        with pytest.raises(NodeFailure, match="too few"):
            convert(open_folder(folder), place / "out")
        assert not list(place.iterdir())


def test_an_expanded_tensor_is_written_out(tmp_path: Path) -> None:
    folder = save({"w": torch.arange(3.0).view(3, 1).expand(3, 1_000)}, tmp_path / "in")
    out = convert(open_folder(folder), tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["w"], torch.arange(3.0).view(3, 1).expand(3, 1_000))


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "argument", "says"),
    [
        (os.system, "touch {}", "calls posix.system"),
        (eval, "open('{}', 'w')", "calls __builtin__.eval"),
        (exec, "open('{}', 'w')", "calls __builtin__.exec"),
        (open, "{}", "calls io.open"),
        (torch.load, "{}", "calls torch.serialization.load"),
    ],
)
def test_a_pickle_that_calls_anything_else_is_refused_by_name_and_not_run(
    function: Any, argument: str, says: str, legacy: bool, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    folder = save({"a": _Call(function, argument.format(victim))}, tmp_path / "in", legacy=legacy)
    with pytest.raises(InvalidCheckpoint) as error:
        generate(open_folder(folder), compute=False)
    assert says in str(error.value)
    assert not victim.exists()


def test_strided_and_overlapping_tensors_are_refused_with_the_remedy(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    folder = save({"t": whole.view(3, 4).t()}, tmp_path / "a")
    with pytest.raises(InvalidCheckpoint, match="fairshard convert"):
        read_headers(open_folder(folder))
    folder = save({"a": whole[:8], "b": whole[4:]}, tmp_path / "b")
    with pytest.raises(InvalidCheckpoint, match="overlap in part"):
        read_headers(open_folder(folder))


@pytest.mark.parametrize(
    ("state", "says"),
    [([1, 2], "holds a list"), ({"a": 1}, "'a' is a int"), ({1: torch.zeros(1)}, "'1' is a View"),
     ({"epoch": 3, "state_dict": {}}, "'epoch' is a int")],
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(state: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint) as error:
        read_headers(open_folder(save(state, tmp_path)))
    assert says in str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_is_refused_at_any_length(legacy: bool, tmp_path: Path) -> None:
    folder = save({"a": torch.arange(40.0), "b": torch.arange(5)}, tmp_path, legacy=legacy)
    data = (folder / "pytorch_model.bin").read_bytes()
    for length in {0, 1, 3, 8, 40, len(data) // 3, len(data) // 2, len(data) - 30, len(data) - 1}:
        (folder / "pytorch_model.bin").write_bytes(data[:length])
        with pytest.raises(InvalidCheckpoint):
            read_headers(open_folder(folder))


def test_a_compressed_archive_and_a_git_lfs_pointer_are_refused(tmp_path: Path) -> None:
    save({"a": torch.zeros(100)}, tmp_path)
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(InvalidCheckpoint, match="compressed"):
        read_headers(open_folder(tmp_path))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(InvalidCheckpoint, match=r"torch\.save"):
        read_headers(open_folder(tmp_path))


@settings(max_examples=depth(75, 1500), deadline=None)
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4), st.booleans())
def test_fuzz_a_damaged_file_is_read_or_refused(at: int, patch: bytes, legacy: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.arange(3)}, buffer, _use_new_zipfile_serialization=not legacy)
    data = bytearray(buffer.getvalue())
    at %= len(data)
    data[at : at + len(patch)] = patch
    try:
        tensors = read_bin(Memory({"pytorch_model.bin": bytes(data)}), "pytorch_model.bin")
    except FairshardError:
        return
    assert all(0 <= t.begin <= t.end <= len(data) for t in tensors)


@settings(max_examples=depth(100, 2000), deadline=None)
@given(st.binary(max_size=120))
def test_fuzz_any_bytes_are_refused(data: bytes) -> None:
    for prefix in (b"", b"PK\x03\x04", b"\x80\x02", struct.pack("<BB", 0x80, 4)):
        with pytest.raises(InvalidCheckpoint):
            read_bin(Memory({"pytorch_model.bin": prefix + data}), "pytorch_model.bin")


def test_a_remote_archive_costs_its_directory_and_its_pickle(tmp_path: Path) -> None:
    state = {f"layer.{n}.weight": torch.zeros(1000) for n in range(300)}
    data = (save(state, tmp_path) / "pytorch_model.bin").read_bytes()
    remote = Memory({"pytorch_model.bin": data}, remote=True)
    local = Memory({"pytorch_model.bin": data})
    assert read_bin(remote, "pytorch_model.bin") == read_bin(local, "pytorch_model.bin")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickled = archive.getinfo("pytorch_model/data.pkl").file_size
    assert remote.read_bytes["pytorch_model.bin"] <= (pickled + 300 * 100) * 1.1 + 64 * 1024


def write_pickle(program: bytes, folder: Path) -> Path:
    """A `.bin` file whose pickle is `program`."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3")
    return folder


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        # As keys, values within values are hashed level by level, and twice as many of them at each level.
        (b"\x80\x02}K\x01" + b"\x85" * 200_000 + b"K\x01s.", "a tuple as a key"),
        (b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 40 + b"K\x01s.", "a tuple as a key"),
        (b"\x80\x02(" + b"K\x01" + b"q\x00h\x00\x86" * 40 + b"K\x01d.", "a tuple as a key"),
        (b"\x80\x02ccollections\nOrderedDict\n(((K\x01tK\x01tltR.", "as a key|malformed"),
        (b"\x80\x04K\x01" + b"q\x00h\x00\x86" * 40 + b"\x8c\x01x\x93.", "a tuple where a str is needed"),
        (b"\x80\x02" + b"N" * 300_000 + b".", "piles up"),
        (b"\x80\x02" + b"N" * 150_000 + b"(t" * 100_000 + b".", "piles up|holds a"),
        (b"\x80\x02]" + b"}a" * 5_000_000 + b".", "steps: refused"),
        # What is named once is given again and again: each call would copy it.
        (b"\x80\x02(NNlq\x00ctorch\nSize\nh\x00\x85R.", "a list where a tuple is needed"),
        (
            b"\x80\x02(" + b"K\x01K\x01\x86q\x02" + b"h\x02" * 2_000 + b"lq\x00"
            b"ccollections\nOrderedDict\nq\x01]" + b"h\x01h\x00\x85Ra" * 200 + b".",
            "gives dicts .* pairs: refused",
        ),
    ],
)
def test_a_pickle_that_would_fill_memory_or_time_is_refused(program: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=reason):
        read_bin(open_folder(write_pickle(program, tmp_path / "m")), "pytorch_model.bin")


def test_names_of_the_same_long_strings_are_not_copied(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
    folder = write_pickle(b"\x80\x04" + text + b"q\x00]" + b"h\x00h\x00\x93a" * 100 + b".", tmp_path / "m")
    tracemalloc.start()
    try:
        with pytest.raises(InvalidCheckpoint, match="holds a list"):
            read_bin(open_folder(folder), "pytorch_model.bin")
        assert tracemalloc.get_traced_memory()[1] < 20 << 20  # 200 MiB where each name is joined
    finally:
        tracemalloc.stop()


def test_lists_as_shapes_are_refused() -> None:
    with pytest.raises(TypeError, match="tuple is needed"):
        _view(Storage("0", "F32", 4), None, 0, [4], [1])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("view", [torch._neg_view, lambda t: torch.view_as_complex(t).conj()])
def test_a_tensor_that_is_another_s_negative_or_conjugate_is_refused(view: Any, legacy: bool, tmp_path: Path) -> None:
    folder = save({"w": view(torch.randn(3, 2))}, tmp_path / "m", legacy=legacy)
    with pytest.raises(InvalidCheckpoint, match=r"resolved|refers to"):
        read_bin(open_folder(folder), "pytorch_model.bin")


def test_a_list_of_storages_that_is_not_the_pickle_s_is_refused(tmp_path: Path) -> None:
    folder = save({"w": torch.zeros(3)}, tmp_path / "m", legacy=True)
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    at = data.rindex(b"]q\x00X")
    for other in (b"].", b"]K\x01a.", b"]X\x01\x00\x00\x00xa."):
        path.write_bytes(data[:at] + other)
        with pytest.raises(InvalidCheckpoint, match=r"list of storages|cut short"):
            read_bin(open_folder(folder), "pytorch_model.bin")


@pytest.mark.parametrize(("offset", "shape"), [(2**64, (1,)), (0, (2**64,)), (0, (1,) * 100)])
def test_impossible_places_of_tensors_are_refused(offset: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(TypeError):
        _view(Storage("0", "F32", 4), None, offset, shape, (0,) * len(shape))
