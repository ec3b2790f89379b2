"""Room is checked before the first byte, against what will really be written: no more, no less."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import until
from support.shard_cases import dealt, profile_of
from support.space_cases import disk, model, mounted

from planner.errors import Cancelled, Conflict, NodeFailure
from workers.disk.copying import clone_range
from workers.disk.space import used_bytes
from workers.downloader import download, resolve
from workers.splitter import delete_shard, merge, split, verify

MIB = 2**20
PAGE = 4096


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A filesystem that shares extents."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("needs mkfs.xfs")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, capture_output=True)
    with mounted(tmp_path / "xfs", "-o", "loop", str(image)) as place:
        yield place


def test_a_tokenizer_that_will_not_fit_is_known_before_the_first_byte(tmp_path: Path) -> None:
    source = resolve(model(tmp_path / "own/model", weights=4 * MIB, tokenizer=12 * MIB))
    profile = profile_of(source)
    with disk(tmp_path / "disk", 14 * MIB) as place:
        with pytest.raises(NodeFailure, match="too few"):
            split(source, profile, dealt(profile, ["a", "b"]), node_id="a", output=place / "a")
        assert used_bytes(place) < 2 * PAGE
        split(source, profile, dealt(profile, ["a", "b"]), node_id="b", output=place / "b")  # has no tokenizer


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_disk_just_large_enough_is_taken_and_one_a_little_smaller_refused(
    hub: TestHub, tmp_path: Path, where: str
) -> None:
    folder = model(tmp_path / "own/model")
    hub.add_repo("own/model", folder)
    source = resolve(folder) if where == "folder" else resolve("own/model")
    profile = profile_of(source)
    plan = dealt(profile, ["a"])
    split(source, profile, plan, node_id="a", output=tmp_path / "a", link=False)
    really = sum(-(-path.stat().st_size // PAGE) * PAGE for path in (tmp_path / "a").rglob("*") if path.is_file())
    with disk(tmp_path / "small", really - PAGE) as place:
        with pytest.raises(NodeFailure, match="too few"):
            split(source, profile, plan, node_id="a", output=place / "a")
        assert used_bytes(place) < 2 * PAGE
    with disk(tmp_path / "large", really + 100 * 1024) as place:
        split(source, profile, plan, node_id="a", output=place / "a", quota_bytes=really + 100 * 1024)
        assert verify(place / "a").ok


def test_what_is_linked_takes_no_room(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 24 * MIB) as place:
        source = resolve(model(place / "own/model"))
        profile = profile_of(source)
        plan = dealt(profile, ["a"])
        for name in ("one", "two"):
            split(source, profile, plan, node_id="a", output=place / "shards" / name, quota_bytes=MIB)
        assert verify(place / "shards/one").ok
        assert used_bytes(place / "shards") < MIB
        shutil.rmtree(place / "own")
        assert 16 * MIB < used_bytes(place / "shards") < 17 * MIB, "both names are of one file, now of theirs alone"


def test_what_is_reflinked_takes_no_room(xfs: Path) -> None:
    source = resolve(model(xfs / "own/model"))
    profile = profile_of(source)
    for number in range(3):
        plan = dealt(profile, ["a", "b"], plan_id=f"plan{number}")
        manifest = split(source, profile, plan, node_id="a", output=xfs / "shards" / plan.plan_id, quota_bytes=MIB)
        assert {file.how for file in manifest.files} == {"reflink"}
    assert used_bytes(xfs / "shards") < MIB
    assert delete_shard(xfs / "shards/plan0") < MIB
    with pytest.raises(NodeFailure, match="FAIRSHARD_DISK_QUOTA"):
        split(source, profile, plan, node_id="b", output=xfs / "shards/b", quota_bytes=MIB, link=False)


def test_a_file_in_very_many_pieces_is_counted_to_its_end(xfs: Path) -> None:
    (xfs / "shards").mkdir()
    source, target = xfs / "source", xfs / "shards/target"
    with source.open("wb") as file:
        for number in range(1500):  # every second block is a hole
            os.pwrite(file.fileno(), os.urandom(PAGE), 2 * number * PAGE)
    assert clone_range(source, target, 0, source.stat().st_size, 0, whole=True)
    assert used_bytes(xfs / "shards") < 100 * PAGE
    with target.open("rb+") as file:
        os.pwrite(file.fileno(), bytes(PAGE), 2 * 1400 * PAGE)
        os.fsync(file.fileno())
    assert used_bytes(xfs / "shards") >= PAGE
    source.unlink()
    until(lambda: used_bytes(xfs / "shards") >= 1500 * PAGE, what="XFS has let go of the other file's share")


def test_what_an_interrupted_call_wrote_needs_no_second_room(hub: TestHub, tmp_path: Path) -> None:
    folder = model(tmp_path / "own/model")
    hub.add_repo("own/model", folder)
    source = resolve("own/model")
    profile = profile_of(source)

    def cancel(done: int, _total: int | None, /, *, what: str = "") -> None:
        if done > 2 * MIB:
            raise Cancelled

    with disk(tmp_path / "disk", 20 * MIB) as place:
        hub.bytes_per_s = 3e6
        with pytest.raises(Cancelled):
            split(source, profile, dealt(profile, ["a"]), node_id="a", output=place / "a", progress=cancel)
        hub.bytes_per_s = None
        split(source, profile, dealt(profile, ["a"]), node_id="a", output=place / "a")
    with disk(tmp_path / "other", 20 * MIB) as place:
        hub.bytes_per_s = 3e6
        with pytest.raises(Cancelled):
            download(source, place / "model", progress=cancel)
        hub.bytes_per_s = None
        download(source, place / "model")
        assert (place / "model/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_tiny_checkpoints_fit_into_tiny_quotas(tmp_path: Path) -> None:
    source = resolve(checkpoint("llama"))
    profile = profile_of(source)
    plan = dealt(profile, ["a", "b"])
    split(source, profile, plan, node_id="a", output=tmp_path / "a", quota_bytes=MIB)


def test_a_disk_of_its_own_and_a_link_to_one_are_written_to(hub: TestHub, tmp_path: Path) -> None:
    folder = model(tmp_path / "own/model", weights=MIB)
    hub.add_repo("own/model", folder)
    source, local = resolve("own/model"), resolve(folder)
    weights = (folder / "model.safetensors").read_bytes()
    profile = profile_of(local)
    split(local, profile, dealt(profile, ["a"]), node_id="a", output=tmp_path / "a")
    with disk(tmp_path / "disk", 8 * MIB) as place:
        assert download(source, place) == place
        assert (place / "model.safetensors").read_bytes() == weights
        assert resolve(place).revision == source.revision
        assert not list(place.glob(".*.partial-*"))
    with disk(tmp_path / "other", 8 * MIB) as place:
        with pytest.raises(Conflict, match="mounted"):
            merge(tmp_path / "a", place)
        for name in ("whole", "copy"):
            (place / name).mkdir()
            (tmp_path / name).symlink_to(place / name)
            merge(tmp_path / "a", tmp_path / name) if name == "whole" else download(source, tmp_path / name)
            assert (place / name / "model.safetensors").read_bytes() == weights
        assert not list(place.glob(".*.partial-*"))
