"""All stores: what is published can be read back, by commit, whatever the Hub does meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub.server import TestHub
from support.running import RedisProcess

from planner.errors import AccessDenied, IntegrityError, InvalidInput, NodeFailure, NotFound, Unavailable
from workers.metadata_store.base import MetadataStore, check_path, plan_path, profile_path, williw_path
from workers.metadata_store.folder import FolderStore
from workers.metadata_store.open import open_store
from workers.metadata_store.shared import SharedStore
from workers.network.retry import RetryPolicy

QUICK = RetryPolicy(attempts=4, first_s=0.01, longest_s=0.05, connect_s=5, stall_s=5)
REPO = "own/meta"


@pytest.fixture(params=["folder", "hub", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, hub: TestHub, server: RedisProcess) -> MetadataStore:
    if request.param == "folder":
        return open_store(tmp_path / "store")
    if request.param == "redis":
        client = server.client()
        client.flushall()
        return SharedStore(client, folder=FolderStore(tmp_path / "store"))
    return open_store(REPO, token=hub.token, policy=QUICK)


def hub_store(hub: TestHub, token: str | None = None) -> MetadataStore:
    return open_store(REPO, token=token or hub.token, policy=QUICK)


def test_what_is_written_is_read_back_now_and_by_commit(store: MetadataStore) -> None:
    one = store.write({"a/x.json": b"1", "y.json": b"y"}, message="one")
    two = store.write({"a/x.json": b"2"}, message="two")
    assert one != two
    assert store.read("a/x.json") == b"2"
    assert [store.read("a/x.json", revision=commit) for commit in (one, two)] == [b"1", b"2"]
    assert store.read("y.json", revision=two) == b"y", "a commit holds what earlier ones published"
    assert store.list() == ["a/x.json", "y.json"]
    assert store.list("a") == store.list("a/") == ["a/x.json"]
    assert store.list("nothing/here") == []
    assert store.spec == "redis" or open_store(store.spec, policy=QUICK).spec == store.spec


def test_writing_the_same_again_makes_no_commit(store: MetadataStore) -> None:
    one = store.write({"x": b"1", "y": b""}, message="one")
    assert store.write({"x": b"1", "y": b""}, message="again") == one
    assert store.write({"y": b""}, message="part of it") == one
    two = store.write({"x": b"2"}, message="two")
    back = store.write({"x": b"1"}, message="back")
    assert len({one, two, back}) == 3
    assert store.read("x", revision=back) == store.read("x") == b"1"


def test_what_is_removed_is_gone_and_its_history_stays(store: MetadataStore) -> None:
    one = store.write({"a/x": b"1", "a/y": b"y"}, message="one")
    two = store.write({"a/x": None, "a/z": b"z"}, message="two")
    with pytest.raises(NotFound):
        store.read("a/x")
    with pytest.raises(NotFound):
        store.read("a/x", revision=two)
    assert store.read("a/x", revision=one) == b"1"
    assert store.list() == ["a/y", "a/z"]
    assert store.write({"a/x": None, "none/such": None}, message="again") == two
    back = store.write({"a/x": b"1", "none/such": None}, message="back")
    assert store.read("a/x") == store.read("a/x", revision=back) == b"1"


def test_what_is_not_there_is_not_found(store: MetadataStore) -> None:
    with pytest.raises(NotFound):
        store.read("x")
    commit = store.write({"x": b"1"}, message="m")
    later = store.write({"y": b"1"}, message="m")
    for path, revision in (("z", None), ("z", later), ("y", commit), ("x", "0" * 40), ("x/y", None)):
        with pytest.raises(NotFound):
            store.read(path, revision=revision)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b", "", ".history/head", "a\\b", "a\nb"])
def test_no_path_leads_out(path: str, store: MetadataStore) -> None:
    with pytest.raises(InvalidInput):
        store.write({path: b"x"}, message="m")
    with pytest.raises(InvalidInput):
        store.read(path)


def test_paths_are_as_designed() -> None:
    assert profile_path("own/model", "abc", 2, 64) == "profiles/own/model/abc/b2-s64.json"
    assert williw_path("own/model") == "own_model_metadata.json"
    assert plan_path("0f3a") == "plans/0f3a.json"
    for bad in ("../x", "", "a/b", "x" * 65):
        with pytest.raises(InvalidInput):
            plan_path(bad)
    with pytest.raises(InvalidInput):
        profile_path("own/model", "abc", 0, 64)
    assert check_path("ä b/c.json") == "ä b/c.json"


def test_a_name_is_a_repository_and_a_path_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "meta").mkdir(parents=True)
    assert open_store("own/meta").spec == "own/meta"
    assert open_store("datasets/own/meta").spec == "datasets/own/meta"
    assert open_store("./own/meta").spec == str(tmp_path / "own/meta")
    assert open_store(Path("own/meta")).spec == str(tmp_path / "own/meta")
    with pytest.raises(InvalidInput):
        open_store(" ")


# -- folder ---------------------------------------------------------------------------------------------------------


def test_a_file_put_there_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "own_model_metadata.json").write_bytes(b"{}")
    store = open_store(tmp_path)
    assert store.read("own_model_metadata.json") == b"{}"
    assert store.list() == ["own_model_metadata.json"]


def _write_many(root: Path, worker: int) -> None:
    store = FolderStore(root)
    for n in range(10):
        store.write({f"w{worker}/{n}": b"x" * n, "shared": f"{worker}-{n}".encode()}, message="m")


def test_processes_write_to_one_folder_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path, worker)) for worker in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    store = FolderStore(tmp_path)
    assert len(store.list()) == 31
    head = (tmp_path / ".history" / "head").read_text()
    # The chain of commits is whole: every file of every writer can be read at the last one.
    assert all(store.read(f"w{w}/{n}", revision=head) == b"x" * n for w in range(3) for n in range(10))


def test_a_writer_killed_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    script = (
        "import sys; from workers.metadata_store.folder import FolderStore\n"
        "store, n = FolderStore(__import__('pathlib').Path(sys.argv[1])), 0\n"
        "while True:\n"
        "    n += 1; store.write({'a': b'%d' % n * 5000, 'b': b'%d' % n * 5000}, message='m'); print(n, flush=True)\n"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                assert writer.stdout.readline()
            os.kill(writer.pid, signal.SIGKILL)
        store = FolderStore(tmp_path)
        head = (tmp_path / ".history" / "head").read_text()
        assert store.read("a", revision=head) == store.read("b", revision=head)
        for name in ("a", "b"):
            content = store.read(name)
            assert content == content[: len(content) // 5000] * 5000
        assert store.list() == ["a", "b"]


def test_a_damaged_history_is_noticed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    commit = store.write({"a": b"one"}, message="m")
    (objects,) = [p for p in (tmp_path / ".history" / "objects").rglob("*") if p.is_file()]
    objects.write_bytes(b"two")
    with pytest.raises(IntegrityError):
        store.read("a", revision=commit)
    (tmp_path / ".history" / "commits" / f"{commit}.json").write_bytes(b"{")
    with pytest.raises(IntegrityError):
        store.read("a", revision=commit)


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NodeFailure, match="cannot be written"):
        FolderStore(tmp_path / "file").write({"a": b"1"}, message="m")


# -- Hub ------------------------------------------------------------------------------------------------------------


def test_the_repository_is_made_private_unless_told_otherwise(hub: TestHub) -> None:
    hub_store(hub).write({"x": b"1"}, message="m")
    assert hub.repo(REPO).private
    open_store("own/open", token=hub.token, private=False, policy=QUICK).write({"x": b"1"}, message="m")
    assert not hub.repo("own/open").private
    open_store("datasets/own/data", token=hub.token, policy=QUICK).write({"x": b"1"}, message="m")
    assert hub.repo("own/data", "dataset").private


def test_several_files_are_one_commit(hub: TestHub) -> None:
    store = hub_store(hub)
    commit = store.write({"profiles/own/m/c/b1-s8.json": b"{}", "own_m_metadata.json": b"{}"}, message="both")
    history = hub.repo(REPO).history("main")
    assert [c.title for c in history] == ["both", "initial commit"]
    assert history[0].oid == commit


def test_only_what_changed_is_sent(hub: TestHub) -> None:
    store = hub_store(hub)
    store.write({"large": b"x" * 500_000, "small": b"1"}, message="one")
    hub.counters.clear()
    store.write({"large": b"x" * 500_000, "small": b"2"}, message="two")
    assert hub.read(REPO, "small") == b"2"
    assert [r.method for r in hub.counters.log("*/commit/*")] == ["POST"]
    changed = hub.repo(REPO).history("main")[0].entries
    assert changed["large"] is hub.repo(REPO).history("main")[1].entries["large"]


@pytest.mark.parametrize(
    ("code", "where"),
    [
        *((code, "*/commit/*") for code in (409, 412)),
        *(
            (code, where)
            for code in (500, 503, 429)
            for where in ("*/commit/*", "*/paths-info/*", "*/api/models/own/meta", "*/api/repos/create")
        ),
    ],
)
def test_a_refusal_that_passes_is_waited_for(hub: TestHub, code: int, where: str) -> None:
    fault = hub.fault("status", path=where, code=code, retry_after=0 if code == 429 else None, times=2)
    commit = hub_store(hub).write({"x": b"1"}, message="m")
    assert fault.hits == 2
    assert hub.read(REPO, "x", revision=commit) == b"1"
    assert len(hub.repo(REPO).history("main")) == 2


@pytest.mark.parametrize("kind", ["lost_reply", "reset", "cut"])
def test_a_commit_whose_reply_is_lost_is_not_made_twice(hub: TestHub, kind: str) -> None:
    store = hub_store(hub)
    store.write({"x": b"1"}, message="one")
    fault = hub.fault(kind, path="*/commit/*", after_bytes=1 if kind != "lost_reply" else 0)  # type: ignore[arg-type]
    commit = store.write({"x": b"2"}, message="two")
    assert fault.hits == 1
    assert [c.title for c in hub.repo(REPO).history("main")] == ["two", "one", "initial commit"]
    assert hub.repo(REPO).branches["main"] == commit


def test_a_removal_whose_reply_is_lost_is_not_made_twice(hub: TestHub) -> None:
    store = hub_store(hub)
    store.write({"x": b"1", "y": b"1"}, message="one")
    fault = hub.fault("lost_reply", path="*/commit/*")
    store.write({"x": None}, message="two")
    assert fault.hits == 1
    assert [c.title for c in hub.repo(REPO).history("main")] == ["two", "one", "initial commit"]
    assert store.list() == ["y"]


@pytest.mark.parametrize("kind", ["cut", "reset", "flip", "status"])
def test_a_read_that_fails_or_lies_is_read_again(hub: TestHub, kind: str) -> None:
    store = hub_store(hub)
    content = bytes(range(256)) * 40
    commit = store.write({"x": content}, message="m")
    fault = hub.fault(kind, path="*/resolve/*/x", after_bytes=1000, offset=77, times=2)  # type: ignore[arg-type]
    assert store.read("x", revision=commit) == content
    assert fault.hits == 2


def test_a_server_that_keeps_lying_is_not_believed(hub: TestHub) -> None:
    store = hub_store(hub)
    store.write({"x": b"content"}, message="m")
    hub.fault("flip", path="*/resolve/*/x", offset=1, times=None)
    with pytest.raises(IntegrityError):
        store.read("x")


def test_large_files_come_back_from_the_cdn_without_the_token(hub: TestHub) -> None:
    store = hub_store(hub)
    store.write({"small": b"1"}, message="m")
    hub.add_repo(REPO, {"plan.bin": bytes(300_000)}, private=True)
    assert store.read("plan.bin") == bytes(300_000)
    assert hub.counters.requests(where="cdn") == 1
    assert not any(r.authorization for r in hub.counters.log(where="cdn"))


def test_a_hub_that_stays_away_is_unavailable(hub: TestHub) -> None:
    store = hub_store(hub)
    store.write({"x": b"1"}, message="m")
    hub.fault("status", path="*", code=503, times=None)
    with pytest.raises(Unavailable, match="503"):
        store.read("x")
    with pytest.raises(Unavailable):
        store.list()


def test_nobody_listening_is_unavailable() -> None:
    from workers.settings import HubSettings

    nowhere = HubSettings(endpoint="http://127.0.0.1:9", token="hf_x", offline=False, cache_dir=Path())
    store = open_store(REPO, hub=nowhere, policy=QUICK)
    with pytest.raises(Unavailable):
        store.read("x")
    with pytest.raises(Unavailable):
        store.write({"x": b"1"}, message="m")


def test_a_wait_that_is_too_long_is_not_waited(hub: TestHub) -> None:
    hub_store(hub).write({"x": b"1"}, message="m")
    hub.fault("status", path="*/paths-info/*", code=429, retry_after=3600, times=None)
    with pytest.raises(Unavailable):
        hub_store(hub).read("x")


def test_a_silent_hub_is_given_up(hub: TestHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    from workers.metadata_store import hub as module

    store = hub_store(hub)
    store.write({"x": b"1"}, message="m")
    close_session()
    monkeypatch.setattr(module, "_IDLE_S", 0.3)
    fault = hub.fault("hang", path="*/commit/*", times=1, seconds=30)
    try:
        store.write({"x": b"2"}, message="m")
    finally:
        close_session()
    assert fault.hits == 1
    assert hub.read(REPO, "x") == b"2"


def test_refusals_name_the_remedy(hub: TestHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_store(hub).write({"x": b"1"}, message="m")
    bob = hub.add_user("bob")
    with pytest.raises(AccessDenied, match="HF_TOKEN"):
        open_store(REPO, policy=QUICK).write({"x": b"2"}, message="m")
    with pytest.raises(NotFound, match="HF_TOKEN"):
        open_store(REPO, policy=QUICK).read("x")
    with pytest.raises(AccessDenied, match="give one with write access"):
        hub_store(hub, bob).write({"x": b"2"}, message="m")
    with pytest.raises(AccessDenied):
        hub_store(hub, "hf_nonsense").read("x")
    hub.repo(REPO).private = False
    assert hub_store(hub, bob).read("x") == b"1"
    with pytest.raises(AccessDenied) as refused:
        hub_store(hub, bob).write({"x": b"2"}, message="m")
    assert "hf_bob" not in f"{refused.value!r}{refused.value.details}{hub_store(hub, bob)!r}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE"):
        hub_store(hub).read("x")


def test_many_nodes_publish_at_the_same_time(hub: TestHub) -> None:
    start = threading.Barrier(6)

    def publish(node: int) -> str:
        start.wait()
        return hub_store(hub).write({f"plans/{node}.json": b"%d" % node, "same": b"same"}, message=f"node {node}")

    with ThreadPoolExecutor(6) as pool:
        commits = list(pool.map(publish, range(6)))
    store = hub_store(hub)
    assert len(set(commits)) == 6
    assert len(hub.repo(REPO).history("main")) == 7
    assert all(store.read(f"plans/{n}.json", revision=commits[n]) == b"%d" % n for n in range(6))


def test_the_same_published_by_many_is_one_commit(hub: TestHub) -> None:
    start = threading.Barrier(4)

    def publish(_: int) -> str:
        start.wait()
        return hub_store(hub).write({"same": b"same"}, message="m")

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(publish, range(4)))) == 1
    assert len(hub.repo(REPO).history("main")) == 2


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own use of httpx2
def test_metadata_beyond_ten_megabytes_goes_through_lfs(hub: TestHub) -> None:
    hub.lfs_uploads = True
    store = hub_store(hub)
    large = b'{"a": "' + b"x" * (10 * 2**20) + b'"}'
    commit = store.write({"large.json": large, "small.json": b"{}"}, message="m")
    assert hub.repo(REPO).history("main")[0].entries["large.json"].lfs
    assert store.write({"large.json": large, "small.json": b"{}"}, message="again") == commit
    assert store.read("large.json", revision=commit) == large
