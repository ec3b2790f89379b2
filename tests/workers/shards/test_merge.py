"""Merged shards: written whole or not at all, and nothing left lying about."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.shard_cases import dealt, profile_of
from support.space_cases import disk, model

from planner.errors import Conflict, NodeFailure
from workers.disk.space import used_bytes
from workers.downloader import resolve
from workers.splitter import merge, split
from workers.transfer.journal import open_journal

MIB = 2**20
#: Merges shards; the arguments are the folder for the checkpoint, and theirs.
SCRIPT = """
import sys, time
from pathlib import Path
from workers.splitter import merge
def slowly(done, total, /, *, what=""):
    time.sleep(0.01)
merge([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]), progress=slowly)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The shards of a checkpoint of 32 MiB, and a tokenizer of 4."""
    place = tmp_path_factory.mktemp("shards")
    folder = model(place / "own/model", weights=32 * MIB, tokenizer=4 * MIB)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")  # no part of a shard (docs/shards.md)
    source = resolve(folder)
    profile = profile_of(source)
    plan = dealt(profile, ["a", "b"])
    for node in plan.allocation:
        split(source, profile, plan, node_id=node, output=place / node)
    return [place / node for node in plan.allocation]


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial-*"))


def test_a_merge_that_was_killed_leaves_nothing_after_the_next(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "whole"
    for _ in range(2):
        before = leftovers(tmp_path)
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), *map(str, shards)])
        deadline = time.monotonic() + 60
        while not any((folder / "model.safetensors").exists() for folder in set(leftovers(tmp_path)) - set(before)):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert not out.exists()
    assert leftovers(tmp_path)
    live = open_journal(tmp_path / "whole", key="another merge, still running")
    (tmp_path / ".whole.partial-old").mkdir()
    merge(shards, out)
    assert leftovers(tmp_path) == [live.folder], "and what a live process holds stays"
    live.remove()
    original = shards[0].parent / "own/model"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out / name).read_bytes() == (original / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in original.iterdir() if path.is_file()}


def test_what_will_not_fit_is_refused_before_the_first_byte(shards: list[Path], tmp_path: Path) -> None:
    with disk(tmp_path / "small", 35 * MIB) as place:  # enough for the weights
        with pytest.raises(NodeFailure, match="too few"):
            merge(shards, place / "whole")
        assert used_bytes(place) == 0
        assert not list(place.iterdir())
    with disk(tmp_path / "large", 36 * MIB + 100 * 1024) as place:
        merge(shards, place / "whole")


def test_of_two_merges_to_one_folder_one_is_refused(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "whole"

    def other(_done: int, _total: int | None, /, *, what: str = "") -> None:
        if what == "merge" and not out.exists():
            merge(shards, out, check=False)

    with pytest.raises(Conflict, match="something already"):
        merge(shards, out, progress=other)
    assert (out / "model.safetensors").is_file()
    assert not leftovers(tmp_path)
