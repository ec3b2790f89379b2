"""Shards fetched by range from a Hub that misbehaves: every byte right, and no byte too many."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.shard_cases import dealt, profile_of, raw_tensors

from planner.errors import AccessDenied, IntegrityError, NotFound, Unavailable
from planner.plan import Plan
from planner.profile import ModelProfile
from workers.checkpoint.base import Checkpoint
from workers.checkpoint.hub import HubCheckpoint, open_hub
from workers.network.ranges import RangeReader
from workers.network.retry import RetryPolicy
from workers.settings import HubSettings
from workers.shards.manifest import read_manifest
from workers.shards.peer_server import PeerServer
from workers.shards.peers import find_peers
from workers.splitter import merge, split, verify
from workers.transfer import fetch, segments

FAST = RetryPolicy(first_s=0.01, longest_s=0.05, stall_s=0.5, stall_bytes=1000)
Opened = tuple[Checkpoint, ModelProfile, Plan]


@pytest.fixture
def opened(hub: TestHub) -> Callable[..., Opened]:
    """Puts a checkpoint on the Hub, and opens it there with a plan for three nodes."""

    def opened(name: str = "llama_files", **settings: Any) -> Opened:
        hub.add_repo("own/model", checkpoint(name), **settings)
        hub_settings = HubSettings.from_env()
        profile = profile_of(open_hub("own/model", token=hub.token, hub=hub_settings, policy=FAST))
        # Another process splits: it knows no redirect yet.
        source = open_hub("own/model", token=hub.token, hub=hub_settings, policy=FAST)
        hub.counters.clear()
        return source, profile, dealt(profile, ["a", "b", "c"])

    return opened


def test_each_node_fetches_its_own_bytes_and_no_others(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path
) -> None:
    source, profile, plan = opened()
    assert isinstance(source, HubCheckpoint)
    everything = 0
    for node in plan.allocation:
        hub.counters.clear()
        manifest = split(source, profile, plan, node_id=node, output=tmp_path / node)
        fetched = hub.counters.body_bytes("*.safetensors", where="cdn")
        everything += fetched
        assert fetched <= manifest.tensor_bytes * 1.01 + 2**20
        assert all(file.how == "fetch" for file in manifest.files)
    folders = [tmp_path / node for node in plan.allocation]
    assert raw_tensors(*folders) == raw_tensors(checkpoint("llama_files"))
    # The shared headers are read by each node that has a part of the file, the data once.
    headers = sum(s.header_bytes for f in folders for s in _sources(f))
    assert everything <= sum(t.size_bytes for layer in profile.layers for t in layer.tensors) + 2 * headers
    assert not [r for r in hub.counters.log(where="cdn") if r.authorization]
    report = verify(folders)
    assert report.complete
    assert report.proven, "with every tensor there the Hub's sha256 is met, and no network needed"
    merged = merge(folders, tmp_path / "merged")
    for path in checkpoint("llama_files").glob("*.safetensors"):
        assert (merged / path.name).read_bytes() == path.read_bytes()
    assert not hub.errors


def test_neighbours_are_fetched_in_one_request(hub: TestHub, opened: Callable[..., Opened], tmp_path: Path) -> None:
    source, profile, plan = opened("llama")
    manifest = split(source, profile, plan, node_id="b", output=tmp_path / "b")
    places = sorted((t.source_begin, t.source_begin + t.end - t.begin) for t in manifest.tensors)
    runs = 1 + sum(end != begin for (_, end), (begin, _) in itertools.pairwise(places))
    assert runs < len(places) / 4
    # The header's request beside them.
    assert hub.counters.requests("*.safetensors", where="cdn") == runs + 1


def _sources(folder: Path) -> list[Any]:
    from workers.shards.manifest import read_manifest

    return list(read_manifest(folder).source_files.values())


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "code": 429, "retry_after": 0, "times": 3},
        {"kind": "status", "code": 503, "times": 3},
        {"kind": "status", "code": 502, "times": 3, "where": "hub"},
        {"kind": "cut", "after_bytes": 2000, "times": 4},
        {"kind": "reset", "after_bytes": 2000, "times": 4},
        {"kind": "reset", "times": 3},
        {"kind": "trickle", "bytes_per_s": 300, "times": 1},
        {"kind": "ignore_range", "times": 3},
        {"kind": "wrong_range", "times": 3},
        {"kind": "expired", "times": 3},
        {"kind": "hang", "seconds": 1, "times": 1},
    ],
    ids=lambda fault: f"{fault['kind']}{fault.get('code', '')}",
)
def test_a_mood_of_the_server_passes(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path, fault: dict[str, Any]
) -> None:
    source, profile, plan = opened("llama")
    injected = hub.fault(path="*/model.safetensors", ranged=True, **({"where": "cdn"} | fault))
    split(source, profile, plan, node_id="b", output=tmp_path / "b", connections=2)
    assert injected.hits, "or nothing was tested"
    everything = raw_tensors(checkpoint("llama"))
    mine = raw_tensors(tmp_path / "b")
    assert mine == {name: everything[name] for name in mine}
    assert len(mine) == sum(len(layer.tensors) for layer in profile.layers if layer.name in plan.allocation["b"])


def test_a_slow_server_is_asked_over_as_many_connections_as_allowed(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_SMALLEST_BYTES", 1000)
    together = threading.Barrier(8)

    class Slow(RangeReader):
        """Answers none of the first 8 before the last of them has asked."""

        def read(self, *args: Any, **settings: Any) -> None:
            if not together.broken and together.n_waiting < together.parties:
                with contextlib.suppress(threading.BrokenBarrierError):
                    together.wait(20)
                    passed.append(1)
                    together.abort()
            super().read(*args, **settings)

    passed: list[int] = []
    monkeypatch.setattr(fetch, "RangeReader", Slow)
    source, profile, plan = opened()
    split(source, profile, plan, node_id="b", output=tmp_path / "b", connections=8)
    assert passed, "no 8 were ever asked at once"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"kind": "status", "code": 503, "where": "cdn"}, (Unavailable, "tried 5 times")),
        ({"kind": "status", "code": 429, "retry_after": 3600, "where": "cdn"}, (Unavailable, "asks to wait")),
        ({"kind": "reset", "where": "cdn"}, (Unavailable, "tried 5 times")),
        ({"kind": "etag", "where": "hub"}, (IntegrityError, "it was replaced")),
        ({"kind": "status", "code": 401, "where": "hub"}, (AccessDenied, "token")),
        ({"kind": "status", "code": 404, "where": "hub"}, (NotFound, "model.safetensors")),
    ],
    ids=["503", "429", "reset", "etag", "401", "404"],
)
def test_patience_has_limits_and_says_so(
    hub: TestHub,
    opened: Callable[..., Opened],
    tmp_path: Path,
    fault: dict[str, Any],
    expected: tuple[type[Exception], str],
) -> None:
    source, profile, plan = opened("llama")
    hub.fault(path="*/model.safetensors", times=None, **fault)
    with pytest.raises(expected[0], match=expected[1]):
        split(source, profile, plan, node_id="b", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_etag_that_changes_in_the_middle_is_refused(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path
) -> None:
    source, profile, plan = opened("llama")
    hub.fault("etag", path="*/model.safetensors", where="cdn", times=None, skip=1)
    with pytest.raises(IntegrityError, match="replaced"):
        split(source, profile, plan, node_id="b", output=tmp_path / "b", connections=1)


def test_addresses_that_ended_are_asked_for_again(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path
) -> None:
    source, profile, plan = opened("llama")
    split(source, profile, plan, node_id="a", output=tmp_path / "a")
    hub.expire_urls()
    split(source, profile, plan, node_id="b", output=tmp_path / "b")
    assert verify([tmp_path / "a", tmp_path / "b"], checkpoint=source).ok


def test_a_wrong_byte_of_a_whole_file_is_found_by_the_hubs_sha256_and_fetched_again(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path
) -> None:
    source, profile, _ = opened("llama")
    plan = dealt(profile, ["a"])
    flipped = hub.fault("flip", path="*/model.safetensors", where="cdn", offset=20_000, skip=1)
    manifest = split(source, profile, plan, node_id="a", output=tmp_path / "a")
    assert flipped.hits == 1
    assert manifest.files[0].sha256 == source.files["model.safetensors"].sha256
    assert (tmp_path / "a/model.safetensors").read_bytes() == (checkpoint("llama") / "model.safetensors").read_bytes()


def test_a_byte_that_stays_wrong_ends_in_an_error_not_in_a_shard(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path
) -> None:
    source, profile, _ = opened("llama")
    hub.fault("flip", path="*/model.safetensors", where="cdn", offset=20_000, times=None)
    with pytest.raises(IntegrityError, match="sha256"):
        split(source, profile, dealt(profile, ["a"]), node_id="a", output=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("how", ["known", "paranoid"])
def test_a_wrong_byte_in_a_part_is_found(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path, how: str
) -> None:
    source, profile, plan = opened("llama")
    tensor = next(t for layer in profile.layers if layer.name in plan.allocation["b"] for t in layer.tensors)
    flipped = hub.fault("flip", path="*/model.safetensors", where="cdn", offset=tensor.begin + 5, skip=1)
    truth = (checkpoint("llama") / "model.safetensors").read_bytes()[tensor.begin : tensor.end]
    known = {tensor.name: f"blake3:{blake3(truth).hexdigest()}"} if how == "known" else {}
    split(source, profile, plan, node_id="b", output=tmp_path / "b", known_digests=known, paranoid=how == "paranoid")
    assert flipped.hits == 1
    assert raw_tensors(tmp_path / "b")[tensor.name][2] == truth


def test_a_replan_takes_what_the_node_holds_and_fetches_the_rest(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path
) -> None:
    source, profile, plan = opened("llama")
    split(source, profile, plan, node_id="b", output=tmp_path / "plan")
    wider = dealt(profile, ["a", "b"], plan_id="wider")
    held = set(raw_tensors(tmp_path / "plan"))
    needed = {
        t.name: t.size_bytes for layer in profile.layers if layer.name in wider.allocation["b"] for t in layer.tensors
    }
    missing = sum(size for name, size in needed.items() if name not in held)
    assert 0 < missing < sum(needed.values())
    hub.counters.clear()
    manifest = split(source, profile, wider, node_id="b", output=tmp_path / "wider")
    headers = sum(item.header_bytes for item in manifest.source_files.values())
    assert hub.counters.body_bytes("*.safetensors", where="cdn") <= missing + max(64 * 1024, headers)
    everything = raw_tensors(checkpoint("llama"))
    assert raw_tensors(tmp_path / "wider") == {name: everything[name] for name in needed}


def test_paranoid_reads_a_finished_shard_again(hub: TestHub, opened: Callable[..., Opened], tmp_path: Path) -> None:
    source, profile, plan = opened("llama")
    tensor = next(t for layer in profile.layers if layer.name in plan.allocation["b"] for t in layer.tensors)
    hub.fault("flip", path="*/model.safetensors", where="cdn", offset=tensor.begin + 5, skip=1)
    truth = raw_tensors(checkpoint("llama"))[tensor.name]
    folder = tmp_path / "b"

    def cut(**settings: Any) -> bool:
        """Whether the tensor is right."""
        split(source, profile, plan, node_id="b", output=folder, **settings)
        return raw_tensors(folder)[tensor.name] == truth

    assert not cut(), "a part has no sha256 of the Hub"
    hub.counters.clear()
    assert cut(paranoid=True), "what was fetched once is fetched again and compared"
    first = hub.counters.body_bytes("*.safetensors", where="cdn")
    held = read_manifest(folder)
    assert first > held.tensor_bytes
    hub.counters.clear()
    assert cut(paranoid=True)
    assert not hub.counters.body_bytes("*.safetensors", where="cdn"), "it is proven"
    # A byte that went bad on the disk, of which the time tells nothing.
    path = folder / read_manifest(folder).files[0].name
    stat = path.stat()
    with path.open("rb+") as file:
        file.seek(next(t.begin for t in held.tensors if t.name == tensor.name))
        file.write(bytes([truth[2][0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not cut()
    assert cut(paranoid=True)


def test_paranoid_compares_another_nodes_bytes_with_the_hubs(
    hub: TestHub, opened: Callable[..., Opened], tmp_path: Path
) -> None:
    source, profile, plan = opened("llama")
    tensor = next(t for layer in profile.layers if layer.name in plan.allocation["b"] for t in layer.tensors)
    hub.fault("flip", path="*/model.safetensors", where="cdn", offset=tensor.begin + 5, skip=1)
    split(source, profile, plan, node_id="b", output=tmp_path / "peer/plan")
    truth = raw_tensors(checkpoint("llama"))[tensor.name]
    assert raw_tensors(tmp_path / "peer/plan")[tensor.name] != truth
    with PeerServer(tmp_path / "peer", token="x") as server:
        url = f"http://127.0.0.1:{server.port}"
        peers = find_peers([url], token="x", model_name="own/model", revision=source.revision)
        whole = dealt(profile, ["c", "d"], plan_id="whole")
        node = next(node for node, names in whole.allocation.items() if plan.allocation["b"][0] in names)
        with pytest.raises(IntegrityError, match="elsewhere it is"):
            split(source, profile, whole, node_id=node, output=tmp_path / "c", peers=peers, paranoid=True)
    split(source, profile, whole, node_id=node, output=tmp_path / "c", paranoid=True)
    assert raw_tensors(tmp_path / "c")[tensor.name] == truth
