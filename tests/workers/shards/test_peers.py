"""Nodes hand each other what moved; the Hub is asked last, and nothing wrong is taken from anyone."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import free_port
from support.shard_cases import dealt, plan_of, profile_of, raw_tensors

from planner.errors import InvalidInput
from planner.plan import Plan
from planner.profile import ModelProfile
from workers.checkpoint.base import Checkpoint
from workers.downloader import resolve
from workers.shards.peer_server import PeerServer
from workers.shards.peers import PATIENCE, find_peers
from workers.splitter import delete_shard, split, verify

TOKEN = "between nodes"


@dataclass(kw_only=True)
class World:
    """Node "a" holds its half of a model and serves it; node "b" is to take over all of it."""

    hub: TestHub
    source: Checkpoint
    profile: ModelProfile
    plan: Plan
    server: PeerServer
    shards: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    def peers(self, token: str = TOKEN) -> tuple:  # type: ignore[type-arg]
        return find_peers([self.url], token=token, model_name="own/model", revision=self.source.revision)

    def take_over(self, output: Path, token: str = TOKEN) -> int:
        """Make the whole model's shard on "b"; bytes that the Hub sent for it."""
        peers = self.peers(token)
        self.hub.counters.clear()
        whole = dealt(self.profile, ["b"], plan_id="whole")
        split(self.source, self.profile, whole, node_id="b", output=output, peers=peers)
        assert verify(output).ok
        assert raw_tensors(output) == raw_tensors(checkpoint("llama"))
        return self.hub.counters.body_bytes("*.safetensors")


@pytest.fixture
def world(hub: TestHub, tmp_path: Path) -> Iterator[World]:
    hub.add_repo("own/model", checkpoint("llama"))
    source = resolve("own/model")
    profile = profile_of(source)
    plan = dealt(profile, ["a", "c"])
    shards = tmp_path / "a-shards"
    split(source, profile, plan, node_id="a", output=shards / "plan")
    with PeerServer(shards, token=TOKEN) as server:
        yield World(hub=hub, source=source, profile=profile, plan=plan, server=server, shards=shards)


def get(world: World, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", world.server.port, timeout=10)
    connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"} | headers)
    response = connection.getresponse()
    status, body = response.status, response.read()
    connection.close()
    return status, body


def test_what_a_peer_holds_does_not_come_from_the_hub(world: World, tmp_path: Path) -> None:
    everything = sum(layer.weight_bytes for layer in world.profile.layers)
    held = sum(len(data) for _, _, data in raw_tensors(world.shards / "plan").values())
    header = 8192
    assert held > everything / 3
    assert world.take_over(tmp_path / "b") <= everything - held + 2 * header


@pytest.mark.parametrize("trouble", ["wrong token", "gone"])
def test_without_the_peer_the_hub_gives_all(world: World, tmp_path: Path, trouble: str) -> None:
    everything = sum(layer.weight_bytes for layer in world.profile.layers)
    if trouble == "gone":
        peers = world.peers()
        world.server.__exit__(None, None, None)
        whole = dealt(world.profile, ["b"], plan_id="whole")
        split(world.source, world.profile, whole, node_id="b", output=tmp_path / "b", peers=peers)
        assert raw_tensors(tmp_path / "b") == raw_tensors(checkpoint("llama"))
        world.server = PeerServer(world.shards, token=TOKEN).__enter__()
        return
    assert world.peers("wrong") == ()
    assert world.take_over(tmp_path / "b", "wrong") >= everything


def test_a_byte_that_went_bad_on_the_peers_disk_is_taken_from_the_hub(world: World, tmp_path: Path) -> None:
    path = world.shards / "plan/model.safetensors"
    with path.open("rb+") as file:
        file.seek(path.stat().st_size - 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))
    world.take_over(tmp_path / "b")


def test_a_peer_that_is_gone_is_waited_for_once(world: World, tmp_path: Path) -> None:
    names = [layer.name for layer in world.profile.layers]
    everyother = plan_of(world.profile, {"a": names[::2], "c": names[1::2]}, plan_id="everyother")
    split(world.source, world.profile, everyother, node_id="a", output=world.shards / "everyother")
    asked = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            nonlocal asked
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()
                    asked += 1

        threading.Thread(target=hang_up, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        peers = tuple(
            replace(peer, url=f"{url}/x") for peer in world.peers() if peer.manifest.plan_id == "everyother"
        )
        whole = dealt(world.profile, ["b"], plan_id="whole")
        split(world.source, world.profile, whole, node_id="b", output=tmp_path / "b", peers=peers, connections=1)
        listener.shutdown(socket.SHUT_RDWR)
    assert raw_tensors(tmp_path / "b") == raw_tensors(checkpoint("llama"))
    assert 0 < asked <= 2 * PATIENCE.attempts, "not once for each of the runs that it has"


@pytest.mark.parametrize(
    "path",
    ["/plan/../plan/config.json", "/plan/config.json", "/.plan.partial-x/model.safetensors", "/../../etc/passwd",
     "//etc/passwd", "/plan/%2e%2e/%2e%2e/etc/passwd", "/nothing/manifest.json", "/plan",
     "/plan/%00", "/%00/manifest.json", "/plan/model.safetensors%00"],
)  # fmt: skip
def test_only_weights_and_manifests_of_finished_shards_are_served(world: World, path: str) -> None:
    assert get(world, path)[0] == 404
    assert get(world, "/plan/manifest.json")[0] == 200


def test_shards_that_come_and_go_are_seen(world: World) -> None:
    whole = dealt(world.profile, ["a"], plan_id="whole")
    split(world.source, world.profile, whole, node_id="a", output=world.shards / "whole")
    assert get(world, "/whole/manifest.json")[0] == 200
    assert [shard["folder"] for shard in json.loads(get(world, "/")[1])["shards"]] == ["plan", "whole"]
    delete_shard(world.shards / "plan")
    assert get(world, "/plan/manifest.json")[0] == 404
    assert get(world, "/plan/model.safetensors", Range="bytes=0-9")[0] == 404
    # Made anew under the same name, it is served with its own digest.
    split(world.source, world.profile, whole, node_id="a", output=world.shards / "plan")
    data = (world.shards / "plan/model.safetensors").read_bytes()
    assert get(world, "/plan/model.safetensors") == (206, data)
    outside = world.shards.parent / "outside"
    (world.shards / "whole").rename(outside)
    (world.shards / "whole").symlink_to(outside)
    for file in ("manifest.json", "model.safetensors"):
        assert get(world, f"/whole/{file}")[0] == 404, "no link leads out of the folder"


def test_ranges_and_the_token_are_checked(world: World) -> None:
    data = (world.shards / "plan/model.safetensors").read_bytes()
    assert get(world, "/plan/model.safetensors", Range="bytes=10-19") == (206, data[10:20])
    assert get(world, "/plan/model.safetensors", Range=f"bytes=10-{len(data) + 50}") == (206, data[10:])
    assert get(world, "/plan/model.safetensors") == (206, data)
    for bad in (f"bytes={len(data)}-{len(data)}", "bytes=9-3", "bytes=-5", "lines=1-2"):
        assert get(world, "/plan/model.safetensors", Range=bad)[0] == 416
    for token in ("", "Bearer ", f"bearer {TOKEN}", "Bearer x"):
        assert get(world, "/", Authorization=token)[0] == 401
    with pytest.raises(InvalidInput, match="FAIRSHARD_PEER_TOKEN"):
        PeerServer(world.shards, token="")


def test_the_address_decides_who_can_reach_it(world: World) -> None:
    taken = f"http://127.0.0.1:{world.server.port}"
    with pytest.raises(InvalidInput, match=f"port {world.server.port} .* in use"):
        PeerServer.at(world.shards, url=taken, token=TOKEN)
    for url in ("https://node:1", "node:1", "http://", "ftp://x", "http://x:99999"):
        with pytest.raises(InvalidInput, match="must be http"):
            PeerServer.at(world.shards, url=url, token=TOKEN)
    port = free_port()
    with PeerServer.at(world.shards, url=f"http://127.0.0.1:{port}", token=TOKEN):
        assert find_peers([f"http://127.0.0.1:{port}"], token=TOKEN, model_name="own/model", revision="x") == ()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), timeout=5)
    port = free_port()
    with PeerServer.at(world.shards, url=f"http://node-1:{port}", token=TOKEN):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
