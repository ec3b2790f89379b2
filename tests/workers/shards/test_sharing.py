"""Plans that give a node the same layers share one copy on the disk; each is a shard of its own all the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.shard_cases import dealt, profile_of, raw_tensors

from planner.profile import ModelProfile
from workers.checkpoint.base import Checkpoint
from workers.disk.space import used_bytes
from workers.downloader import resolve
from workers.shards.folder import delete_shard
from workers.shards.manifest import Manifest
from workers.splitter import split, verify

Cut = Callable[..., Manifest]


@pytest.fixture(params=["hub", "folder"])
def source(request: pytest.FixtureRequest, hub: TestHub) -> Checkpoint:
    if request.param == "folder":
        return resolve(checkpoint("llama"))
    hub.add_repo("own/model", checkpoint("llama"))
    return resolve("own/model")


@pytest.fixture
def profile(source: Checkpoint) -> ModelProfile:
    return profile_of(source)


@pytest.fixture
def cut(source: Checkpoint, profile: ModelProfile, tmp_path: Path) -> Cut:
    """Cuts node a's shard of the plan of this id, over these nodes."""

    def cut(plan_id: str, nodes: tuple[str, ...] = ("a", "b"), **options: object) -> Manifest:
        plan = dealt(profile, nodes, plan_id=plan_id)
        return split(source, profile, plan, node_id="a", output=tmp_path / "shards" / plan_id, **options)  # type: ignore[arg-type]

    return cut


def weights(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_ino) for path in folder.glob("*.safetensors")}


def whole(folder: Path) -> bool:
    """Whether it is whole by itself (the other node's shard is not here)."""
    report = verify([folder], rebuild=False)
    report.check()
    return True


def test_the_same_layers_of_two_plans_are_on_the_disk_once(
    cut: Cut, hub: TestHub, tmp_path: Path, source: Checkpoint
) -> None:
    shards, one, two = (tmp_path / "shards" / name for name in ("", "one", "two"))
    first = cut("one")
    alone = used_bytes(shards)
    hub.counters.clear()
    second = cut("two")
    assert hub.counters.body_bytes(where="cdn") < 10_000, "the header, to compare with, and no weights"
    assert weights(one) == weights(two)
    assert used_bytes(shards) - alone < first.total_bytes
    assert (second.plan_id, first.plan_id) == ("two", "one")
    assert (second.files, second.tensors) == (first.files, first.tensors)
    assert raw_tensors(one) == raw_tensors(two)
    assert whole(one)
    assert whole(two)
    # A third that gives the node other layers has bytes of its own.
    cut("three", ("a", "b", "c"))
    assert not weights(shards / "three") & weights(one)

    assert delete_shard(one) < first.total_bytes, "the other plan still needs them"
    assert whole(two)
    assert cut("one").files == first.files
    assert delete_shard(one) < first.total_bytes
    delete_shard(shards / "three")
    assert delete_shard(two) > first.total_bytes
    assert used_bytes(shards) == 0
    assert not os.listdir(shards)  # noqa: PTH208


def test_a_damaged_shard_is_not_shared(cut: Cut, tmp_path: Path) -> None:
    cut("one")
    path = next((tmp_path / "shards/one").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    cut("two")
    assert not weights(tmp_path / "shards/one") & weights(tmp_path / "shards/two")
    assert whole(tmp_path / "shards/two")


def test_bytes_that_were_checked_less_are_not_shared(cut: Cut, tmp_path: Path) -> None:
    cut("one")
    cut("two", paranoid=True)
    assert not weights(tmp_path / "shards/one") & weights(tmp_path / "shards/two")
    cut("three", paranoid=True)
    assert weights(tmp_path / "shards/two") == weights(tmp_path / "shards/three")
    known = dict.fromkeys((t.name for t in cut("three").tensors), "blake3:other")
    with pytest.raises(Exception, match=r"elsewhere (it is|they are)"):
        cut("four", known_digests=known)
