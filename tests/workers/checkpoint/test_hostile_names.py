"""Names and sizes from strangers: a Hub's listing, a manifest, a store, a peer. None leads out of its folder."""

from __future__ import annotations

import gzip
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.fernet import Fernet
from hub.server import TestHub
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import checkpoint, copy_of
from support.running import RedisProcess

from planner.errors import FairshardError, IntegrityError, InvalidCheckpoint, InvalidInput, InvalidMetadata, NotFound
from planner.limits import MAX_JSON_BYTES
from planner.plan import PlanOptions
from planner.strategies.make import make_plan
from planner.wire.read import cluster_from_json, plan_from_json, plan_to_json
from workers.disk.paths import is_inner, within
from workers.downloader import download, resolve
from workers.generator import generate
from workers.ledger.steps import StepSpec
from workers.metadata_store.base import check_plan_id, plan_path
from workers.metadata_store.folder import FolderStore
from workers.metadata_store.open import open_store
from workers.network.ranges import RangeReader, RemoteFile, Server
from workers.network.retry import RetryPolicy
from workers.service.services import Services
from workers.service.tokens import Tokens
from workers.settings import QueueSettings, Settings
from workers.shards.manifest import MANIFEST, Manifest, read_manifest
from workers.shards.merge import merge
from workers.shards.peer_server import PeerServer
from workers.shards.peers import find_peers
from workers.splitter import split
from workers.tasks import _checkpoint, delete_shards

HOSTILE = [
    "../x", "../../x", "a/../../x", "/etc/x", "//x", "a//x", "./x", "a/./x", "..", ".", "", "a/", "..\\x", "a\\x",
    "x\0y", "x\ny", "\ud800", "a" * 256, "/".join("a" * 600),
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:20])
def test_what_is_no_plain_path_is_none(name: str, tmp_path: Path) -> None:
    assert not is_inner(name)
    with pytest.raises(InvalidCheckpoint):
        within(tmp_path, name)


@pytest.mark.parametrize("name", ["config.json", ".gitattributes", "a/b.c", "...", "a..b", "Ünï 🤗.md"])
def test_what_repositories_do_have_is_taken(name: str, tmp_path: Path) -> None:
    assert within(tmp_path, name) == tmp_path / name


@given(st.text(max_size=40))
def test_fuzz_no_name_leads_out(name: str) -> None:
    folder = Path("/data/shards")
    if is_inner(name):
        assert within(folder, name).is_relative_to(folder)
        assert ".." not in within(folder, name).parts


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    inner, outer = tmp_path / "in", tmp_path / "out"
    inner.mkdir()
    outer.mkdir()
    (inner / "link").symlink_to(outer)
    (inner / "file").symlink_to(outer / "file")
    for name in ("link/x", "file"):
        with pytest.raises(InvalidCheckpoint, match="leads out of"):
            within(inner, name)
    assert within(inner, "file", replaced=True) == inner / "file"
    with pytest.raises(InvalidCheckpoint):
        within(inner, "link/x", replaced=True)
    (tmp_path / "root").symlink_to(inner)  # the operator may put the folder elsewhere
    assert within(tmp_path / "root", "x") == tmp_path / "root" / "x"


@pytest.mark.parametrize("name", ["../../../escaped.json", "/tmp/escaped.json", "a\0b.json"])
def test_a_hub_that_lists_such_a_file_is_refused(hub: TestHub, tmp_path: Path, name: str) -> None:
    files: dict[str, Any] = {path.name: path for path in checkpoint("llama").iterdir()}
    hub.add_repo("tester/evil", files | {name: b"{}"})
    with pytest.raises(InvalidCheckpoint, match="impossible file"):
        download(resolve("tester/evil"), tmp_path / "deep" / "er" / "here")
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_download_follows_no_link_out_of_its_folder(hub: TestHub, tmp_path: Path) -> None:
    hub.add_repo("tester/nested", {"config.json": b"{}", "sub/file.json": b"{}"})
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidCheckpoint, match="leads out of"):
        download(resolve("tester/nested"), tmp_path / "here")
    assert not list((tmp_path / "elsewhere").iterdir())


def _shard(tmp_path: Path) -> tuple[Path, Manifest]:
    source = resolve(checkpoint("llama"))
    profile = generate(source, compute=False)
    nodes = {"nodes": [{"node_id": "a", "flop_per_s": 1e9, "memory_bytes": 2**30}]}
    plan = make_plan(profile, cluster_from_json(nodes), PlanOptions())
    return tmp_path / "shards" / plan.plan_id, split(
        source, profile, plan, node_id="a", output=tmp_path / "shards" / plan.plan_id
    )


def _spoil_source(obj: dict[str, Any]) -> None:
    obj["source_files"] = {f"../../{name}": file for name, file in obj["source_files"].items()}
    for tensor in obj["tensors"]:
        tensor["source_file"] = f"../../{tensor['source_file']}"


def _spoil_file(obj: dict[str, Any]) -> None:
    obj["files"][0]["name"] = "/etc/passwd"


def _spoil_extra(obj: dict[str, Any]) -> None:
    obj["extras"][0]["name"] = "../config.json"


def _spoil_tensor(obj: dict[str, Any]) -> None:
    obj["tensors"][0]["file"] = "../../../../etc/passwd"


@pytest.mark.parametrize("spoil", [_spoil_source, _spoil_file, _spoil_extra, _spoil_tensor])
def test_a_shard_of_a_stranger_writes_and_reads_nothing_outside(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    folder, _ = _shard(tmp_path)
    obj = json.loads((folder / MANIFEST).read_bytes())
    spoil(obj)
    (folder / MANIFEST).write_text(json.dumps(obj))
    with pytest.raises(IntegrityError, match="outside the shard"):
        read_manifest(folder)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(IntegrityError, match="outside the shard"):
        merge([folder], tmp_path / "deep" / "out", check=False)
    assert set(tmp_path.rglob("*")) == before


def test_a_peer_serves_no_link_that_leads_out(tmp_path: Path) -> None:
    folder, manifest = _shard(tmp_path)
    name = manifest.files[0].name
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * manifest.files[0].size_bytes)
    with PeerServer(tmp_path / "shards", token="t") as server:
        address = f"http://127.0.0.1:{server.port}/{folder.name}/{name}"
        request = urllib.request.Request(address, headers={"Authorization": "Bearer t"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 206
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request, timeout=30)


def test_a_store_follows_no_link_out_of_its_folder(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.write({"a/b.json": b"{}"}, message="first")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.json").write_text("{}")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidInput, match="leads out"):
        store.read("link/x.json")
    with pytest.raises(InvalidInput, match="leads out"):
        store.write({"link/y.json": b"{}"}, message="second")
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["x.json"]


@pytest.mark.parametrize("plan_id", ["../../x", "a/b", "", "x\0", ".x", "x" * 65])
def test_a_plan_names_no_folder_but_its_own(plan_id: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        plan_path(plan_id)
    profile = generate(resolve(checkpoint("llama")), compute=False)
    nodes = {"nodes": [{"node_id": "a", "flop_per_s": 1e9, "memory_bytes": 2**30}]}
    made = plan_to_json(make_plan(profile, cluster_from_json(nodes), PlanOptions()))
    with pytest.raises(InvalidMetadata):
        plan_from_json(made | {"plan_id": plan_id})


def test_a_checkpoints_index_names_no_file_elsewhere(tmp_path: Path) -> None:
    folder = copy_of("llama_files", tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../../x.safetensors", "/etc/x.safetensors", "x\0.safetensors", "a/x.safetensors"):
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)
        path.write_text(json.dumps(index))
        with pytest.raises(InvalidCheckpoint):
            generate(resolve(folder), compute=False)


def test_metadata_that_is_too_large_is_not_fetched(hub: TestHub) -> None:
    hub.add_repo("tester/store", {"profiles/x.json": b"{}"})
    blob = hub.repo("tester/store").resolve("main")
    assert blob is not None
    object.__setattr__(blob.entries["profiles/x.json"].blob, "size", MAX_JSON_BYTES + 1)
    hub.counters.clear()
    with pytest.raises(InvalidInput, match="at most"):
        open_store("tester/store").read("profiles/x.json")
    assert not hub.counters.requests("*/resolve/*")


@pytest.fixture
def packing() -> Iterator[str]:
    """A server that answers every GET with a gzip of 10 MB of zeros, asked for or not."""
    bomb = gzip.compress(bytes(10_000_000))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            self.send_response(206)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Range", f"bytes 0-{len(bomb) - 1}/{len(bomb)}")
            self.send_header("Content-Length", str(len(bomb)))
            self.end_headers()
            self.wfile.write(bomb)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x {len(bomb)}"
    server.shutdown()
    server.server_close()


def test_bytes_that_come_packed_are_refused_and_not_unpacked(packing: str) -> None:
    url, size = packing.split()
    reader = RangeReader(Server(headers={}, policy=RetryPolicy(attempts=1)))
    got = bytearray()
    with pytest.raises(IntegrityError, match="Content-Encoding gzip"):
        reader.read(RemoteFile(url=url, size_bytes=int(size)), 0, int(size), got.extend)
    assert not got


def test_a_peer_sends_nobody_elsewhere() -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://{self.headers['Host']}/inner")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        policy = RetryPolicy(attempts=1)
        urls = [url, "file:///etc/passwd", "gopher://x", "http://", "http://x:y"]
        assert find_peers(urls, token="t", model_name="a/b", revision="c", policy=policy) == ()
        reader = RangeReader(Server(headers={}, policy=policy, redirects=False))
        with pytest.raises(FairshardError):
            reader.read(RemoteFile(url=f"{url}/file", size_bytes=5), 0, 5, lambda _: None)
        server.shutdown()
    assert asked == ["/", "/file"]


@pytest.mark.parametrize(
    "name", ["a/../..", "../a", "a/b/c", "/a/b", "a\0/b", "https://a/b", "a/b?x", "a/b#c", "a@/b"]
)
def test_no_model_name_is_a_path_or_an_address(name: str, tmp_path: Path) -> None:
    with pytest.raises((InvalidInput, NotFound)) as refused:
        resolve(name, models_dir=tmp_path)
    assert isinstance(refused.value, FairshardError)


@pytest.mark.parametrize("name", ["/etc", "../../etc", ".", "~", "a/../../b", "tiny"])
def test_what_the_ledger_says_names_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has Redis' password may have written it."""
    env = {"FAIRSHARD_DATA": str(tmp_path), "NODE_ID": "n", "FAIRSHARD_SECRET": Fernet.generate_key().decode()}
    services = Services(settings=Settings.from_env(env), queue=QueueSettings())
    monkeypatch.setattr(Tokens, "get", lambda *_: None)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    claim: Any = SimpleNamespace(claimed=SimpleNamespace(job_id="j", model_name=name), args={"plan_id": name})
    with pytest.raises(InvalidInput):
        _checkpoint(services, claim, None)
    with pytest.raises(InvalidInput):
        services.store(name)
    if name != "tiny":
        with pytest.raises(InvalidInput):
            check_plan_id(name)


def test_deleting_takes_a_plan_of_this_node_only(tmp_path: Path) -> None:
    folder, _ = _shard(tmp_path)
    with RedisProcess(tmp_path / "redis") as redis:
        env = {"FAIRSHARD_DATA": str(tmp_path / "data"), "NODE_ID": "n", "REDIS_URL": redis.url}
        services = Services(settings=Settings.from_env(env), queue=QueueSettings())
        way = os.path.relpath(folder, services.settings.shards_dir)
        step = StepSpec(name="delete:n", task="workers.delete_shards", queue="node.n", args={"plan_id": way})
        job_id = services.ledger.submit("delete", model_name="a/b", params={}, steps=[step]).job_id
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("workers.queue.step_task.current", lambda: services)
            with pytest.raises(InvalidInput, match="plan_id"):
                delete_shards.run(job_id, "delete:n")
    assert (folder / MANIFEST).is_file()
