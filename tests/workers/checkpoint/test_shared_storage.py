"""`.bin` checkpoints in which names share storage: every name comes back with its bytes, wherever its layer is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import checkpoint
from support.shard_cases import plan_of, profile_of, raw_tensors
from support.stage_cases import assert_equal, chain, contiguous, cut, example, scattered, whole

from workers.checkpoint.headers import read_headers
from workers.checkpoint.shared_storage import with_twins
from workers.downloader import resolve
from workers.generator import generate
from workers.shards.manifest import read_manifest
from workers.splitter import load_stage, merge, split, verify


def saved(folder: Path, state: dict[str, Any], *, config: Path | None = None, files: int = 1) -> Path:
    """A checkpoint of one pickle, or of several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(config.read_bytes() if config else b"{}")
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map: dict[str, str] = {}
    for number in range(files):
        name = f"pytorch_model-{number + 1:05d}-of-{files:05d}.bin"
        part = dict(list(state.items())[number::files])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def llama(folder: Path, name: str = "llama") -> tuple[Path, dict[str, torch.Tensor]]:
    """A model whose head and embedding, and two layers' matrices, share storage."""
    source = checkpoint(name)
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.3.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"]
    return saved(folder, state, config=source / "config.json"), state


def assert_same(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("allocation", [contiguous, scattered], ids=["contiguous", "scattered"])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("parts", [1, 3])
def test_untied_names_of_one_storage_run_and_merge_as_the_original(
    name: str, parts: int, allocation: Any, tmp_path: Path
) -> None:
    folder, state = llama(tmp_path / "own/model", name)
    shards = cut(folder, tmp_path / "shards", allocation, parts, exact=True)
    assert verify(shards, checkpoint=resolve(folder)).complete
    merged = merge(shards, tmp_path / "merged")
    assert_same(load_file(merged / "model.safetensors"), state)
    model = whole(folder)
    inputs = example(model)
    output, _ = chain([load_stage(shard) for shard in shards], inputs)
    with torch.no_grad():
        assert_equal(output, model(**inputs))
        assert_equal(output, whole(merged)(**inputs))


def test_a_layer_counts_the_weights_that_it_loads(tmp_path: Path) -> None:
    folder, state = llama(tmp_path / "own/model")
    ours, plain = generate(resolve(folder)), generate(resolve(checkpoint("llama")))
    assert [(a.name, a.num_params, a.weight_bytes, a.tied_to) for a in ours.layers] == [
        (b.name, b.num_params, b.weight_bytes, b.tied_to) for b in plain.layers
    ]
    assert sorted(tensor.name for layer in ours.layers for tensor in layer.tensors) == sorted(state)


def test_views_of_one_storage_in_other_shapes_keep_them(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    state = {
        "a.0.w": weight,
        "a.0.flat": weight.view(-1),
        "a.1.long": weight.view(4, 6),
        "a.1.w": weight,
        "a.2.w": torch.ones(3),
    }
    state["a.1.own"] = torch.ones(2)
    source = resolve(saved(tmp_path / "own/model", state))
    profile = profile_of(source)
    profile = replace(profile, layers=tuple(with_twins(profile.layers, read_headers(source).twins)))
    plan = plan_of(profile, {"x": ["a.0", "a.2"], "y": ["a.1"]})
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=tmp_path / node)
    assert raw_tensors(tmp_path / "x").keys() == {"a.0.w", "a.0.flat", "a.2.w"}
    assert raw_tensors(tmp_path / "y").keys() == {"a.1.long", "a.1.w", "a.1.own"}
    assert verify([tmp_path / "x", tmp_path / "y"], checkpoint=source).complete
    assert_same(load_file(merge([tmp_path / "x", tmp_path / "y"], tmp_path / "out") / "model.safetensors"), state)


def test_an_index_names_both(tmp_path: Path) -> None:
    source = checkpoint("llama_tied")
    state = load_file(source / "model.safetensors")
    state = {"lm_head.weight": state["model.embed_tokens.weight"], "x": torch.zeros(1)} | state
    order = sorted(state, key=lambda name: (name not in {"lm_head.weight", "model.embed_tokens.weight"}, name))
    shared = {name: state[name] for name in order}
    items = list(shared.items())
    state = dict([items[0], items[2], items[1], *items[3:]])  # both in the first of two files
    del state["x"]
    folder = saved(tmp_path / "own/model", state, config=source / "config.json", files=2)
    headers = read_headers(resolve(folder))
    assert len(headers.tensors) == len(state) - 1
    shards = cut(folder, tmp_path / "shards", contiguous, 2, exact=True)
    merged = merge(shards, tmp_path / "merged")
    assert_same(load_file(merged / "model.safetensors"), state)


def test_a_name_that_no_profile_has_travels_with_its_bytes(tmp_path: Path) -> None:
    """As in profiles that were made before both were kept."""
    weight = torch.randn(6, 4)
    state = {"a.0.w": weight, "elsewhere": weight, "a.1.w": torch.ones(3)}
    source = resolve(saved(tmp_path / "own/model", state))
    profile = profile_of(source)
    assert "elsewhere" not in {tensor.name for layer in profile.layers for tensor in layer.tensors}
    plan = plan_of(profile, {"x": ["a.0"], "y": ["a.1"]})
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=tmp_path / node)
    manifest = read_manifest(tmp_path / "x")
    assert manifest.aliases == {"elsewhere": "a.0.w"}
    assert manifest.twins == ("elsewhere",)
    merged = merge([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    assert_same(load_file(merged / "model.safetensors"), state)
