"""Nodes hand frames to each other over real connections: the whole model's tokens; and what is wrong is refused."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import checkpoint
from support.stage_cases import contiguous, cut, scattered, whole
from torch import Tensor

from planner.errors import (
    Conflict,
    FairshardError,
    IntegrityError,
    InvalidInput,
    LimitExceeded,
    NotFound,
    Unavailable,
)
from workers.runner import sessions as module
from workers.runner.drive import described
from workers.runner.frame import Head, pack, read_frame
from workers.runner.peer import Peer
from workers.runner.server import RunnerServer
from workers.runner.sessions import Part, Sessions
from workers.runner.stages import Stages
from workers.runtime.generation import Driver
from workers.runtime.payload import Handoff
from workers.settings import RunSettings
from workers.shards.manifest import read_manifest

TOKEN = "between nodes"
SETTINGS = RunSettings(silence_s=1.0, deadline_s=20.0, max_frame_bytes=1 << 20, max_sessions=3)
PROMPT = torch.tensor([[5, 9, 33, 21, 77, 8]])
INPUTS = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}


@dataclass
class Node:
    sessions: Sessions
    server: RunnerServer


class Group:
    """Three nodes of a plan; n0 leads."""

    def __init__(self, folder: Path, name: str, allocation: Any) -> None:
        self.source = checkpoint(name)
        self.nodes: dict[str, Node] = {}
        for shard in cut(self.source, folder / "cut", allocation, 3):
            manifest = read_manifest(shard)
            self.plan_id = manifest.plan_id
            shards = folder / manifest.node_id
            shards.mkdir()
            shard.rename(shards / self.plan_id)
            stages = Stages(shards, memory_bytes=manifest.tensor_bytes + 100_000)
            sessions = Sessions(stages, node_id=manifest.node_id, token=TOKEN, settings=SETTINGS)
            server = RunnerServer(sessions, token=TOKEN, url="http://127.0.0.1:0", settings=SETTINGS)
            self.nodes[manifest.node_id] = Node(sessions, server.__enter__())

    def open(self, run_id: str, *, more: int = 20, urls: Mapping[str, str] | None = None) -> Part:
        asked: dict[str, Any] = {"start": "n0", "batch": 1, "prompt": PROMPT.shape[1], "more": more, "padded": False}
        parts = {name: node.sessions.make(run_id, self.plan_id, **asked) for name, node in self.nodes.items()}
        table = {name: described(part.loaded, self.nodes[name].server.url) for name, part in parts.items()}
        for name, url in (urls or {}).items():
            table[name]["url"] = url
        for part in parts.values():
            part.open(table, token=TOKEN)
        return parts["n0"]

    def generate(self, part: Part, count: int) -> list[int]:
        driver = Driver(part.loaded.stage, lambda handoff: part.run_pass(handoff)[0])
        return driver.generate(INPUTS, max_new_tokens=count).token_ids[0]

    def end(self, run_id: str) -> None:
        for node in self.nodes.values():
            node.sessions.end(run_id)

    def close(self) -> None:
        for node in self.nodes.values():
            node.server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    made = Group(tmp_path_factory.mktemp("group"), "llama", contiguous)
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(group: Group) -> list[int]:
    made = whole(group.source).generate(**INPUTS, do_sample=False, max_new_tokens=8)
    return list(made[0, PROMPT.shape[1] :].tolist())


def test_the_tokens_are_the_whole_models_and_two_runs_take_turns(group: Group, expected: list[int]) -> None:
    runs = {f"{number:016x}": group.open(f"{number:016x}") for number in (1, 2)}
    made: dict[str, list[int]] = {}
    threads = [
        threading.Thread(target=lambda name=name, part=part: made.update({name: group.generate(part, 8)}))
        for name, part in runs.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(made.values()) == [expected, expected]
    for run_id in runs:
        group.end(run_id)
    assert all(node.sessions.count == 0 for node in group.nodes.values())


def test_layers_dealt_like_cards_visit_each_node_again(tmp_path: Path) -> None:
    dealt = Group(tmp_path, "llama", scattered)
    try:
        part = dealt.open("c" * 16)
        expected = whole(dealt.source).generate(**INPUTS, do_sample=False, max_new_tokens=5)
        assert dealt.generate(part, 5) == expected[0, PROMPT.shape[1] :].tolist()
    finally:
        dealt.close()


@dataclass
class Caught:
    """The second frame that n1 got: of a run's second pass, and whole."""

    group: Group
    part: Part
    head: Head
    body: bytes

    def send(self, body: bytes | None = None, *, token: str = TOKEN, **changed: Any) -> Any:
        said = {**self.head.to_json(), **changed}
        del said["tensors"]
        pieces = pack(self.body if body is None else body, **said)
        return self.raw(b"".join(pieces), token=token)

    def raw(self, data: bytes, *, token: str = TOKEN) -> Any:
        peer = Peer("n1", self.group.nodes["n1"].server.url, token=token, silence_s=5.0)
        try:
            return peer.send("POST", "/frames", [data], deadline_s=10.0)
        finally:
            peer.close()

    def handoff(self, change: Callable[[Tensor], Tensor]) -> bytes:
        handoff = Handoff.from_bytes(self.body)
        return replace(handoff, values={name: change(value) for name, value in handoff.values.items()}).to_bytes()


@pytest.fixture
def caught(group: Group, monkeypatch: pytest.MonkeyPatch) -> Iterator[Caught]:
    run_id, taken = "f" * 16, []
    part = group.open(run_id)
    sent = Part._send

    def send(self: Part, body: bytes, target: str, **more: Any) -> Any:
        if self.node_id == "n0" and more["pass_number"] == 1:
            monkeypatch.setattr(Part, "_send", sent)
            self._sequence += 1
            head = {"run_id": run_id, "plan_id": group.plan_id, "revision": self.manifest.revision, "sender": "n0"}
            taken.append((pack(body, **head, **more, receiver="n1", sequence=self._sequence), body))
            raise Conflict("caught")
        return sent(self, body, target, **more)

    monkeypatch.setattr(Part, "_send", send)
    with pytest.raises(Conflict, match="caught"):
        group.generate(part, 5)
    (pieces, body) = taken[0]
    data = b"".join(pieces)
    at = iter([data])
    frame = read_frame(_reader(next(at)), len(data), largest_bytes=1 << 20)
    yield Caught(group, part, frame.head, body)
    group.end(run_id)


def _reader(data: bytes) -> Callable[[int], bytes]:
    import io

    return io.BytesIO(data).read


def test_a_right_frame_passes_once_and_is_refused_when_it_is_replayed(caught: Caught) -> None:
    said = caught.send()
    assert [visit["node_id"] for visit in said["visits"]] == ["n1", "n2"]
    assert [(hop["from"], hop["to"]) for hop in said["hops"]] == [("n1", "n2"), ("n2", "n0")]
    with pytest.raises(Conflict, match="sequence"):
        caught.send()


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"run_id": "e" * 16}, NotFound, "takes no part in run eeee"),
        ({"plan_id": "other"}, Conflict, "plan_id other, expected"),
        ({"revision": "other"}, Conflict, "revision other, expected"),
        ({"receiver": "n2"}, Conflict, "receiver n2, expected n1"),
        ({"sender": "n9"}, Conflict, "sender n9, expected a node of the run"),
        ({"sender": "n2"}, Conflict, "step 2 on n1 expects from n0, got n2"),
        ({"step": 3}, Conflict, "n1 has no step 3 in this pass"),
        ({"pass_number": 7}, Conflict, "pass_number 7, expected 0 or 1"),
        ({"kind": "output"}, Conflict, "kind output, expected hop"),
    ],
)
def test_a_frame_that_belongs_elsewhere_is_refused(
    caught: Caught, changed: dict[str, Any], kind: type[FairshardError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        caught.send(**changed)


def test_values_that_are_not_due_are_refused_and_named(caught: Caught) -> None:
    wrong: list[tuple[Callable[[Tensor], Tensor], type[FairshardError], str]] = [
        (lambda value: value.bfloat16(), Conflict, r"as torch.float32 .* got torch.bfloat16 .* from n0"),
        (lambda value: value[..., :8].repeat(2, 1, 1), Conflict, r"as torch.float32 \(1, 1, 32\), got .*\(2, 1, 8\)"),
        (lambda value: value * float("nan"), InvalidInput, "what n0 handed to n1 is not a number"),
    ]
    for number, (change, kind, says) in enumerate(wrong):
        with pytest.raises(kind, match=says):
            caught.send(caught.handoff(change), sequence=caught.head.sequence + number)
    handoff = Handoff.from_bytes(caught.body)
    more = replace(handoff, values={**handoff.values, "model.norm#0:0": torch.ones(1)}).to_bytes()
    with pytest.raises(Conflict, match=r"expects 1 tensors, n0 sent 2; model\.norm#0:0 is not among them"):
        caught.send(more, sequence=caught.head.sequence + 9)


def test_who_has_no_token_and_what_is_no_frame_gets_nothing(caught: Caught) -> None:
    data = b"".join(pack(caught.body, **{k: v for k, v in caught.head.to_json().items() if k != "tensors"}))
    with pytest.raises(FairshardError, match="token is missing or wrong"):
        caught.raw(data, token="wrong")
    with pytest.raises(IntegrityError, match="changed on its way"):
        caught.raw(data[:-1] + b"x")
    with pytest.raises(InvalidInput, match="does not begin as one"):
        caught.raw(b"x" * 500)
    with pytest.raises(LimitExceeded, match="larger than this node takes"):
        caught.raw(data + bytes(1 << 20))
    # Cut: its sender goes silent, or hangs up, in the middle.
    connection = http.client.HTTPConnection("127.0.0.1", int(caught.group.nodes["n1"].server.url.rsplit(":", 1)[1]))
    connection.putrequest("POST", "/frames")
    connection.putheader("Authorization", f"Bearer {TOKEN}")
    connection.putheader("Content-Length", str(len(data)))
    connection.endheaders(data[:-20])
    began = time.monotonic()
    answer = connection.getresponse().read()
    connection.close()
    assert b"was cut" in answer, answer
    assert time.monotonic() - began < 5
    assert caught.send()["visits"], "and the node goes on serving"


def test_a_node_that_dies_goes_silent_or_is_wrong_ends_the_pass_at_once(group: Group) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        part = group.open("d" * 16, urls={"n2": url})
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"node n2 at .* said nothing for 1 s"):
            group.generate(part, 5)
        assert time.monotonic() - began < 3.5
        group.end("d" * 16)
    part = group.open("b" * 16, urls={"n2": url})  # nobody listens there any more
    with pytest.raises(Unavailable, match=r"node n2 at .* is gone"):
        group.generate(part, 5)
    group.end("b" * 16)


def test_memory_is_refused_and_given_back(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitExceeded, match=r"KV cache takes .* bytes, and of this node's"):
        group.open("a" * 16, more=10_000)
    group.end("a" * 16)
    runs = [f"{number:016x}" for number in range(3)]
    for run_id in runs:
        group.open(run_id)
    with pytest.raises(LimitExceeded, match="FAIRSHARD_MAX_SESSIONS"):
        group.open("9" * 16)
    monkeypatch.setattr(module, "LEASE_S", -1.0)
    for node in group.nodes.values():
        for run_id in runs:
            node.sessions.renew(run_id)
        assert node.sessions.sweep() == 0, "the start node went silent"
        assert node.sessions.stages._used() == sum(x.weight_bytes for x in node.sessions.stages._loaded.values())
        assert not node.sessions.stages.sweep(keep=(), idle_s=-1.0), "and what nobody uses is unloaded"
