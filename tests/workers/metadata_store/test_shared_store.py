"""The service's own store: through Redis to every role, and on its keepers' disks when Redis or a disk is wiped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import redis

from planner.errors import NodeFailure, NotFound, Unavailable
from workers.metadata_store.folder import FolderStore
from workers.metadata_store.shared import SharedStore


class Keeper(SharedStore):
    """A keeper with its disk at hand."""

    def __init__(self, client: redis.Redis, root: Path) -> None:
        self.root = root
        self.client = client
        super().__init__(client, folder=FolderStore(root))
        self.keep()

    def lose_disk(self) -> Keeper:
        """The same role on a new disk."""
        shutil.rmtree(self.root)
        return Keeper(self.client, self.root)


def on_disk(root: Path) -> dict[str, bytes]:
    store = FolderStore(root)
    return {path: store.read(path) for path in store.list()}


FILES = {"plans/a.json": b"{1}", "profiles/own/m/c/b1-s8.json": b"{2}" * 1000}


def test_what_a_node_publishes_is_read_by_every_role_and_lies_on_every_keepers_disk(
    client: redis.Redis, tmp_path: Path
) -> None:
    api, planner, node = Keeper(client, tmp_path / "api"), Keeper(client, tmp_path / "planner"), SharedStore(client)
    node.write(FILES, message="published")
    assert planner.read("plans/a.json") == b"{1}"
    assert SharedStore(client).read("profiles/own/m/c/b1-s8.json") == b"{2}" * 1000
    planner.write({"plans/b.json": b"{3}"}, message="a plan")
    assert on_disk(planner.root) == FILES | {"plans/b.json": b"{3}"}, "its own and those before it"
    for keeper in (api, planner):
        keeper.keep()
        assert on_disk(keeper.root) == FILES | {"plans/b.json": b"{3}"}
    node.write({"plans/a.json": None}, message="deleted")
    api.keep()
    assert "plans/a.json" not in on_disk(api.root)
    assert api.list("plans") == node.list("plans") == ["plans/b.json"]
    with pytest.raises(NotFound):
        planner.read("plans/a.json")  # whose disk has it still
    assert int(client.memory_usage("fairshard:store:file:profiles/own/m/c/b1-s8.json") or 0) < 500


@pytest.mark.parametrize("lost", ["api", "planner"])
def test_a_wiped_redis_and_then_a_lost_disk_cost_nothing(client: redis.Redis, tmp_path: Path, lost: str) -> None:
    keepers = {name: Keeper(client, tmp_path / name) for name in ("api", "planner")}
    node = SharedStore(client)
    node.write(FILES | {"plans/gone.json": b"{}"}, message="published")
    node.write({"plans/gone.json": None}, message="deleted")
    for keeper in keepers.values():
        keeper.keep()

    client.flushall()
    with pytest.raises(Unavailable, match="was wiped"):  # not that there is none
        node.read("plans/a.json")
    keepers[lost].keep()
    assert {path: node.read(path) for path in node.list()} == FILES
    keepers[lost] = keepers[lost].lose_disk()
    assert on_disk(tmp_path / lost) == FILES

    # And now that Redis goes before anybody but the one with the new disk looks.
    client.flushall()
    assert keepers[lost].read("plans/a.json") == b"{1}", "asked, it does not wait for its turn"
    assert keepers[lost].list() == sorted(FILES)
    keepers[lost].keep()
    with pytest.raises(NotFound):
        node.read("plans/gone.json")


def test_only_what_changed_passes_and_nothing_where_nothing_did(client: redis.Redis, tmp_path: Path) -> None:
    keeper, node = Keeper(client, tmp_path / "api"), SharedStore(client)
    node.write({f"plans/{n}.json": b"%d" % n for n in range(120)}, message="many")
    keeper.keep()
    assert len(on_disk(keeper.root)) == 120

    def commands() -> int:
        return int(client.info("stats")["total_commands_processed"])

    before = commands()
    keeper.keep()
    assert commands() - before <= 2, "one MGET, and our own INFO"
    node.write({"plans/7.json": b"new"}, message="one")
    before = commands()
    keeper.keep()
    assert commands() - before < 12
    assert on_disk(keeper.root)["plans/7.json"] == b"new"


def test_an_older_content_is_read_by_its_commit_and_not_for_ever(client: redis.Redis) -> None:
    store = SharedStore(client)
    commits = [store.write({"a": b"%d" % n}, message="m") for n in range(8)]
    assert commits == sorted(commits, key=int)
    assert [store.read("a", revision=commit) for commit in commits[-4:]] == [b"4", b"5", b"6", b"7"]
    client.set("fairshard:store:whole", "1")
    for revision in (commits[0], "no-commit"):
        with pytest.raises(NotFound):
            store.read("a", revision=revision)
    assert store.write({"a": None}, message="m") > commits[-1]
    assert 86000 < client.ttl("fairshard:store:file:a") <= 86400


def test_what_redis_evicted_comes_back_and_is_no_deletion(client: redis.Redis, tmp_path: Path) -> None:
    keeper = Keeper(client, tmp_path / "api")
    keeper.write(FILES, message="published")
    client.delete("fairshard:store:file:plans/a.json")
    SharedStore(client).write({"plans/b.json": b"{}"}, message="another")
    keeper.keep()
    assert on_disk(keeper.root)["plans/a.json"] == b"{1}"
    assert keeper.read("plans/a.json") == b"{1}"
    assert SharedStore(client).read("plans/a.json") == b"{1}"


def test_a_file_that_was_put_into_a_keepers_folder_is_published(client: redis.Redis, tmp_path: Path) -> None:
    keeper = Keeper(client, tmp_path / "api")
    FolderStore(keeper.root).write({"plans/by-hand.json": b"{}"}, message="fairshard publish")
    assert keeper.read("plans/by-hand.json") == b"{}"
    assert SharedStore(client).read("plans/by-hand.json") == b"{}"


def test_a_redis_that_is_wiped_while_it_is_told_is_told_again(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(client, tmp_path / "api")
    keeper.write(FILES, message="published")
    client.flushall()
    give = SharedStore._give

    def wiped(self: SharedStore, paths: list[str]) -> int:
        count = give(self, paths)
        client.flushall()
        return count

    monkeypatch.setattr(SharedStore, "_give", wiped)
    keeper.keep()
    monkeypatch.undo()
    with pytest.raises(Unavailable):
        SharedStore(client).read("plans/a.json")
    keeper.keep()
    assert SharedStore(client).read("plans/a.json") == b"{1}"


def test_a_keeper_whose_disk_refuses_says_so(client: redis.Redis, tmp_path: Path) -> None:
    keeper = Keeper(client, tmp_path / "api")
    shutil.rmtree(tmp_path / "api", ignore_errors=True)
    (tmp_path / "api").write_bytes(b"")
    SharedStore(client).write(FILES, message="published")
    with pytest.raises(NodeFailure, match="cannot be written"):
        keeper.keep()
    assert SharedStore(client).read("plans/a.json") == b"{1}"
