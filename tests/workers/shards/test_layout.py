"""What a shard holds, and how it is laid out: every dtype, ties, unused tensors, sizes, metadata from elsewhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from support.checkpoints import checkpoint
from support.shard_cases import dealt, plan_of, profile_of, raw_tensors

from planner.errors import Conflict, IntegrityError, InvalidCheckpoint, InvalidMetadata, NotFound
from planner.profile import Layer, ModelProfile
from workers.downloader import resolve
from workers.shards.manifest import read_manifest
from workers.splitter import merge, split, verify

#: dtype -> bits; all that the format knows but the sub-byte ones, which `SUB_BYTE` has.
DTYPES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
SUB_BYTE = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}


def write_file(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file with its tensors in just this order."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(data for _, _, data in tensors.values()))


def folder_of(tmp_path: Path, *files: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    folder = tmp_path / "own" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    names = ["model.safetensors"] if len(files) == 1 else [f"part{i}.safetensors" for i in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        write_file(folder / name, tensors, {"format": "pt", "made": "here"})
    return folder


def tensor(dtype: str, *shape: int, seed: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    bits = (DTYPES | SUB_BYTE)[dtype]
    count = bits
    for size in shape:
        count *= size
    return dtype, shape, bytes((seed * 37 + i) % 251 for i in range(count // 8))


def test_every_dtype_and_odd_sizes_come_through(tmp_path: Path) -> None:
    tensors = {f"l.{i}.w": tensor(name, 3, 7, seed=i) for i, name in enumerate(DTYPES)}
    tensors |= {f"m.{i}.w": tensor(name, 4, 6, seed=i) for i, name in enumerate(SUB_BYTE)}
    tensors |= {"e.0.scalar": tensor("F32"), "e.0.empty": tensor("F16", 0, 4), "e.1.one": tensor("I8", 1)}
    source = resolve(folder_of(tmp_path, tensors))
    profile = profile_of(source)
    plan = dealt(profile, ["a", "b", "c"])
    folders = [tmp_path / node for node in plan.allocation]
    for node in plan.allocation:
        manifest = split(source, profile, plan, node_id=node, output=tmp_path / node)
        for held in manifest.tensors:
            width = max(1, (DTYPES | SUB_BYTE)[held.dtype] // 8)
            data_begin = min(t.begin for t in manifest.tensors if t.file == held.file)
            assert (held.begin - data_begin) % width == 0, f"{held.name} cannot be viewed in place"
            assert data_begin % 8 == 0
    # The order that is written aligns what may lie askew in the checkpoint, which the format allows.
    assert raw_tensors(*folders) == {name: (d, s, b) for name, (d, s, b) in tensors.items()}
    assert verify(folders, checkpoint=source).complete


def test_torch_reads_a_shard_whose_source_order_is_askew(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"a.0.w": tensor("U8", 3), "a.1.w": tensor("F32", 2), "a.2.w": tensor("U8", 1)}
    source = resolve(folder_of(tmp_path, tensors))
    profile = profile_of(source)
    plan = plan_of(profile, {"x": ["a.0", "a.1"], "y": ["a.2"]})
    split(source, profile, plan, node_id="x", output=tmp_path / "x")
    loaded = load_file(tmp_path / "x/model.safetensors")
    assert loaded["a.1.w"].numpy().tobytes() == tensor("F32", 2)[2]
    assert loaded["a.0.w"].numpy().tobytes() == tensor("U8", 3)[2]


def test_shards_split_at_a_size_with_an_index_that_transformers_follows(tmp_path: Path) -> None:
    source = resolve(checkpoint("llama"))
    profile = profile_of(source)
    plan = dealt(profile, ["a", "b"])
    largest = max(t.size_bytes for layer in profile.layers for t in layer.tensors)
    manifest = split(source, profile, plan, node_id="a", output=tmp_path / "a", max_shard_bytes=2 * largest)
    assert len(manifest.files) > 2
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in manifest.files}
    assert index["metadata"]["total_size"] == manifest.tensor_bytes
    for file in manifest.files:
        assert sum(t.end - t.begin for t in manifest.tensors if t.file == file.name) <= 2 * largest
        header = (tmp_path / "a" / file.name).read_bytes()
        (length,) = struct.unpack("<Q", header[:8])
        assert json.loads(header[8 : 8 + length])["__metadata__"]["format"] == "pt"
    everything = raw_tensors(checkpoint("llama"))
    assert raw_tensors(tmp_path / "a") == {name: everything[name] for name in index["weight_map"]}


@pytest.mark.parametrize("link", [True, False])
def test_sha256_of_each_file_where_it_is_asked_for(tmp_path: Path, link: bool) -> None:
    source = resolve(checkpoint("llama_files"))
    profile = profile_of(source)
    plan = dealt(profile, ["a", "b"])
    folder = tmp_path / "a"
    split(source, profile, plan, node_id="a", output=folder, link=link)
    assert {file.sha256 for file in read_manifest(folder).files} == {None}
    manifest = split(source, profile, plan, node_id="a", output=folder, link=link, sha256=True)
    assert manifest == read_manifest(folder)
    copied = [file for file in manifest.files if file.how == "copy"]
    assert copied
    for file in copied:
        data = (folder / file.name).read_bytes()
        assert (file.sha256, file.digest) == (sha256(data).hexdigest(), f"blake3:{blake3(data).hexdigest()}")
    made = (folder / "manifest.json").stat().st_ino
    split(source, profile, plan, node_id="a", output=folder, link=link, sha256=True)
    assert (folder / "manifest.json").stat().st_ino == made, "what was linked has none, and is not made again for it"


def test_a_tied_head_is_stored_once_on_each_node_that_needs_it(tmp_path: Path) -> None:
    source = resolve(checkpoint("llama_tied"))
    profile = profile_of(source, tied="model.embed_tokens")
    names = [layer.name for layer in profile.layers]
    first, last = names[: len(names) // 2], names[len(names) // 2 :]
    plan = plan_of(profile, {"first": first, "last": last})
    ours = split(source, profile, plan, node_id="first", output=tmp_path / "first")
    theirs = split(source, profile, plan, node_id="last", output=tmp_path / "last")
    assert ours.duplicated == ()
    assert theirs.duplicated == ("model.embed_tokens.weight",)
    assert theirs.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" in raw_tensors(tmp_path / "last")
    assert verify([tmp_path / "first", tmp_path / "last"], checkpoint=source).complete
    one = split(source, profile, plan_of(profile, {"n": names}, plan_id="one"), node_id="n", output=tmp_path / "one")
    assert one.duplicated == ()
    assert one.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_unused_tensors_travel_with_the_first_stage_and_are_listed(tmp_path: Path) -> None:
    source = resolve(checkpoint("gpt2_hub"))
    masks = [f"h.{i}.attn.bias" for i in range(4)]
    profile = profile_of(source, unused=masks)
    plan = dealt(profile, ["z", "a"])
    first = split(source, profile, plan, node_id="z", output=tmp_path / "z")
    second = split(source, profile, plan, node_id="a", output=tmp_path / "a")
    assert sorted(first.unused) == masks
    assert second.unused == ()
    assert raw_tensors(tmp_path / "z", tmp_path / "a") == raw_tensors(checkpoint("gpt2_hub"))


def test_config_goes_to_all_and_the_tokenizer_where_the_text_enters(tmp_path: Path) -> None:
    source = resolve(folder_of(tmp_path, {"a.0.w": tensor("F32", 2), "a.1.w": tensor("F32", 2)}))
    profile = profile_of(source)
    plan = plan_of(profile, {"n1": ["a.1"], "n0": ["a.0"]})
    for node in ("n0", "n1"):
        split(source, profile, plan, node_id=node, output=tmp_path / node)
        assert (tmp_path / node / "config.json").read_text() == "{}"
    assert (tmp_path / "n0/tokenizer.json").exists()
    assert not (tmp_path / "n1/tokenizer.json").exists()
    merged = merge([tmp_path / "n0", tmp_path / "n1"], tmp_path / "merged")
    assert (merged / "tokenizer.json").read_text() == '{"a": 1}'
    assert (merged / "model.safetensors").read_bytes() == (tmp_path / "own/model/model.safetensors").read_bytes()


def test_metadata_without_tensors_is_looked_up_by_name(tmp_path: Path) -> None:
    """The williw form's layers are tensors by name, as the bare model has them, and its head may be missing."""
    source = resolve(checkpoint("llama"))
    names = [t.name for layer in profile_of(source).layers for t in layer.tensors]
    bare = [name.removeprefix("model.") for name in names if not name.startswith("lm_head")]
    williw = ModelProfile(
        model_name="own/model",
        unit="tensor",
        layers=tuple(Layer(name=name, index=i, layer_type="x", compute_required=1) for i, name in enumerate(bare)),
    )
    plan = plan_of(williw, {"a": bare[::2], "b": bare[1::2]})
    for node in ("a", "b"):
        split(source, williw, plan, node_id=node, output=tmp_path / node)
    assert raw_tensors(tmp_path / "a", tmp_path / "b") == raw_tensors(checkpoint("llama"))
    assert read_manifest(tmp_path / "a").unused == ("lm_head.weight",)


def test_metadata_that_lies_about_the_file_never_becomes_a_shard(tmp_path: Path) -> None:
    source = resolve(checkpoint("llama"))
    profile = profile_of(source)
    plan = dealt(profile, ["a"])
    layer = profile.layers[1]
    moved = replace(layer.tensors[0], begin=layer.tensors[0].begin + 4, end=layer.tensors[0].end + 4)
    lying = replace(layer, tensors=(moved, *layer.tensors[1:]))
    outside = replace(layer, tensors=(replace(moved, file="../x"),))
    for bad, error in (
        (replace(profile, layers=(profile.layers[0], lying, *profile.layers[2:])), InvalidMetadata),
        (replace(profile, layers=(profile.layers[0], outside, *profile.layers[2:])), InvalidMetadata),
        (replace(profile, layers=profile.layers[:2]), InvalidMetadata),
        (replace(profile, revision="0" * 40), Conflict),
    ):
        with pytest.raises(error):
            split(source, bad, plan, node_id="a", output=tmp_path / "a")
    with pytest.raises(Conflict, match="revision"):
        split(source, profile, replace(plan, revision="0" * 40), node_id="a", output=tmp_path / "a")
    with pytest.raises(NotFound, match="nothing"):
        split(source, profile, plan, node_id="b", output=tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_short_after_it_was_profiled_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.0.w": tensor("F32", 20), "a.1.w": tensor("F32", 20)})
    source = resolve(folder)
    profile = profile_of(source)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    again = resolve(folder)
    assert again.revision != source.revision
    unpinned = replace(profile, revision=None)
    with pytest.raises(InvalidCheckpoint):
        split(again, unpinned, plan_of(unpinned, {"a": ["a.1"]}), node_id="a", output=tmp_path / "a")


def test_a_checkpoint_of_pickled_weights_becomes_safetensors(tmp_path: Path) -> None:
    import torch

    weight = torch.randn(6, 4)
    tensors = {"a.0.w": weight, "a.1.tied": weight, "a.1.w": torch.arange(5), "a.2.w": torch.ones(3).bfloat16()}
    folder = tmp_path / "own/model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    torch.save(tensors, folder / "pytorch_model.bin")
    source = resolve(folder)
    profile = profile_of(source)
    plan = plan_of(profile, {"x": ["a.0", "a.1"], "y": ["a.2"]})
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=tmp_path / node)
    found = raw_tensors(tmp_path / "x", tmp_path / "y")
    assert {name: data for name, (_, _, data) in found.items()} == {
        "a.0.w": weight.numpy().tobytes(),
        "a.1.w": tensors["a.1.w"].numpy().tobytes(),
        "a.2.w": tensors["a.2.w"].view(torch.int16).numpy().tobytes(),
    }
    assert read_manifest(tmp_path / "x").aliases == {"a.1.tied": "a.0.w"}
    assert read_manifest(tmp_path / "y").aliases == {}
    assert verify([tmp_path / "x", tmp_path / "y"], checkpoint=source).complete
    merged = merge([tmp_path / "x", tmp_path / "y"], tmp_path / "merged")
    assert raw_tensors(merged) == found | {"a.1.tied": found["a.0.w"]}


@pytest.mark.parametrize("name", ["llama_tied", "llama_files", "t5"])
def test_merged_shards_load_as_the_original_did(tmp_path: Path, name: str) -> None:
    import torch
    from transformers import AutoModel

    source = resolve(checkpoint(name))
    profile = profile_of(source)
    plan = dealt(profile, ["a", "b", "c"])
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=tmp_path / node, max_shard_bytes=20_000)
    merged = merge([tmp_path / node for node in plan.allocation], tmp_path / "merged")
    original = AutoModel.from_pretrained(checkpoint(name)).state_dict()
    again = AutoModel.from_pretrained(merged).state_dict()
    assert original.keys() == again.keys()
    assert all(torch.equal(original[key], again[key]) for key in original)


def test_merging_refuses_what_is_incomplete_damaged_or_mixed(tmp_path: Path) -> None:
    source = resolve(checkpoint("llama"))
    profile = profile_of(source)
    plan = dealt(profile, ["a", "b"])
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=tmp_path / node)
    split(source, profile, dealt(profile, ["a", "b", "c"], plan_id="other"), node_id="b", output=tmp_path / "other")
    with pytest.raises(IntegrityError, match="b is missing"):
        merge(tmp_path / "a", tmp_path / "merged")
    with pytest.raises(Conflict, match="2 plans"):
        merge([tmp_path / "a", tmp_path / "other"], tmp_path / "merged")
    with pytest.raises(Conflict, match="something already"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path)
    assert verify(tmp_path / "a").missing_nodes == ("b",)
    assert verify(tmp_path / "a").ok
    assert not verify(tmp_path / "a").complete
    held = read_manifest(tmp_path / "b").tensors[0]
    with (tmp_path / "b" / held.file).open("rb+") as file:
        file.seek(held.begin)
        byte = file.read(1)
        file.seek(held.begin)
        file.write(bytes([byte[0] ^ 1]))
    report = verify([tmp_path / "a", tmp_path / "b"], checkpoint=source)
    assert {problem.what for problem in report.problems} == {held.name, held.file}
    with pytest.raises(IntegrityError, match=held.file):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_extents_are_shared_where_the_filesystem_can(tmp_path: Path, kind: str) -> None:
    if shutil.which(f"mkfs.{kind}") is None or os.geteuid():
        pytest.skip(f"{kind} is mounted from a file: needs mkfs.{kind} and root")
    image, place = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(400 * 2**20)
    place.mkdir()
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, capture_output=True)
    command = ["mount", "-o", "loop", str(image), str(place)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"{kind} is mounted from a file, and here: {mounted.stderr.strip()}")
    try:
        rng = random.Random(0)
        sizes = (100_003, 70_000, 5, 90_000)
        tensors: dict[str, tuple[str, tuple[int, ...], bytes]]
        tensors = {f"l.{i}.w": ("U8", (size,), rng.randbytes(size)) for i, size in enumerate(sizes)}
        source = resolve(folder_of(place, tensors))
        profile = profile_of(source)
        plan = plan_of(profile, {"a": ["l.0", "l.2"], "b": ["l.1", "l.3"]})
        for node in plan.allocation:
            manifest = split(source, profile, plan, node_id=node, output=place / node)
            assert any(file.how == "reflink" for file in manifest.files)
        folders = [place / node for node in plan.allocation]
        assert raw_tensors(*folders) == tensors
        assert verify(folders, checkpoint=source).complete
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_node_whose_layers_have_no_weights_still_gets_a_shard(tmp_path: Path) -> None:
    source = resolve(folder_of(tmp_path, {"a.0.w": tensor("F32", 2), "a.1.w": tensor("F32", 2)}))
    profile = profile_of(source)
    pool = Layer(name="pool", index=2, layer_type="pooler", compute_required=1)
    profile = replace(profile, layers=(*profile.layers, pool))
    plan = plan_of(profile, {"n0": ["a.0", "a.1"], "n1": ["pool"]})
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=tmp_path / node)
    assert read_manifest(tmp_path / "n1").tensors == ()
    assert raw_tensors(tmp_path / "n1") == {}
    assert verify([tmp_path / "n0", tmp_path / "n1"], checkpoint=source).complete


def test_a_tensor_without_a_name_is_one(tmp_path: Path) -> None:
    tensors = {"a.0.w": tensor("F32", 5, seed=1), "": tensor("F32", 3), "a.1.w": tensor("F32", 2)}
    source = resolve(folder_of(tmp_path, tensors))
    profile = profile_of(source)
    plan = plan_of(profile, {"x": ["a.0", ""], "y": ["a.1"]})
    folders = [tmp_path / node for node in plan.allocation]
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=tmp_path / node)
    assert verify(folders, checkpoint=source).complete
    assert raw_tensors(*folders) == tensors
    split(source, profile, plan_of(profile, {"n": ["a.0", "", "a.1"]}), node_id="n", output=tmp_path / "n")
    assert verify(tmp_path / "n").ok, "linked, it is digested now"
    assert verify(tmp_path / "n", checkpoint=source).complete


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_name_that_is_no_text_is_refused(tmp_path: Path, kind: str) -> None:
    """Half a surrogate pair: JSON and pickles can say it, UTF-8 cannot."""
    folder = folder_of(tmp_path, {"a.0.\ud800": tensor("F32", 2), "a.0.\U0001f600": tensor("F32", 2)})
    if kind == "bin":
        import torch

        (folder / "model.safetensors").unlink()
        torch.save({"a.0.\ud800": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match="surrogate"):
        profile_of(resolve(folder))
    shutil.rmtree(tmp_path / "own")
    source = resolve(folder_of(tmp_path, {"a.0.\U0001f600": tensor("F32", 2), "a.1.w": tensor("F32", 2)}))
    profile = profile_of(source)
    split(source, profile, dealt(profile, ["n", "m"]), node_id="n", output=tmp_path / "n")
    assert raw_tensors(tmp_path / "n").keys() == {"a.0.\U0001f600"}
