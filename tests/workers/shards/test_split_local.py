"""Shards cut from a folder: every byte, every dtype, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.checkpoints import checkpoint
from support.shard_cases import dealt, profile_of, raw_tensors

from planner.errors import Conflict
from workers.downloader import resolve
from workers.splitter import merge, split, verify


@pytest.mark.parametrize("name", ["llama", "llama_files", "llama_tied", "gpt2_hub", "t5"])
@pytest.mark.parametrize("nodes", [1, 3])
def test_shards_together_are_the_checkpoint_bit_for_bit(tmp_path: Path, name: str, nodes: int) -> None:
    source = resolve(checkpoint(name))
    profile = profile_of(source)
    plan = dealt(profile, [f"n{i}" for i in range(nodes)])
    folders = []
    for node in plan.allocation:
        manifest = split(source, profile, plan, node_id=node, output=tmp_path / node)
        assert manifest.node_id == node
        folders.append(tmp_path / node)
    assert raw_tensors(*folders) == raw_tensors(checkpoint(name))
    report = verify(folders, checkpoint=source)
    assert report.complete, report.problems
    assert set(report.proven) == {t.file for layer in profile.layers for t in layer.tensors}
    merged = merge(folders, tmp_path / "merged")
    for path in checkpoint(name).glob("*.safetensors"):
        assert (merged / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("how", ["written into", "replaced"])
def test_a_checkpoint_that_changes_meanwhile_makes_no_shard(tmp_path: Path, how: str) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "own/model")
    source = resolve(folder)
    profile = profile_of(source)
    plan = dealt(profile, ["a", "b"])
    path = folder / "model.safetensors"

    def change(done: int, _total: int | None, /, *, what: str = "") -> None:
        if done and how == "written into":
            with path.open("rb+") as file:
                file.seek(-5, 2)
                file.write(b"?")
        elif done:
            other = shutil.copyfile(path, folder / "new")
            other.replace(path)

    with pytest.raises(Conflict, match="changed while"):
        split(source, profile, plan, node_id="a", output=tmp_path / "a", progress=change)
    assert not (tmp_path / "a").exists()
