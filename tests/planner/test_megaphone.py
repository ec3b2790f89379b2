"""The chain: executable as written, with what each hop costs and what each receiver checks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from planner.cluster import Cluster, Link, Node
from planner.errors import Conflict
from planner.megaphone import check_arrival, digest, megaphone, runs
from planner.plan import Megaphone, PlanOptions
from planner.profile import Layer, ModelProfile
from planner.strategies.make import plan_for
from planner.wire import read as wire

MODEL = ModelProfile(
    model_name="owner/name",
    revision="0123abc",
    batch_size=2,
    sequence_length=100,
    layers=(
        *(
            Layer(name=f"l{index}", index=index, layer_type="decoder", activation_bytes=1000 + index)
            for index in range(6)
        ),
        Layer(name="(unused)", index=6, layer_type="unused", weight_bytes=9),
    ),
)
CLUSTER = Cluster(
    nodes=tuple(Node(node_id=name, flop_per_s=1, memory_bytes=1) for name in "abc"),
    default_link=Link(latency_s=0.5, bytes_per_s=1000),
    links={("a", "b"): Link(latency_s=0.25, bytes_per_s=None)},
)
ROOMY = Cluster(
    nodes=tuple(Node(node_id=name, flop_per_s=1, memory_bytes=1) for name in "abcd"),
    default_link=Link(latency_s=0.5, bytes_per_s=1024),
)
#: a holds two runs, and c the unused tensors alone.
ALLOCATION = {"a": (0, 1, 4), "b": (2, 3, 5), "c": (6,)}


def made(phase: Any = "prefill", allocation: dict[str, tuple[int, ...]] = ALLOCATION) -> Megaphone:
    stages = runs(MODEL, allocation)
    seconds = [float(stage.rank + 1) for stage in stages]
    return megaphone(MODEL, CLUSTER, stages, plan_id="p1", phase=phase, compute_s=seconds)


def test_runs_are_the_neighbouring_layers_of_one_node_in_execution_order() -> None:
    found = [(stage.rank, stage.node_id, stage.start, stage.end) for stage in runs(MODEL, ALLOCATION)]
    assert found == [(0, "a", 0, 2), (1, "b", 2, 4), (2, "a", 4, 5), (3, "b", 5, 6), (4, "c", 6, 7)]
    assert [name for stage in runs(MODEL, ALLOCATION) for name in stage.layer_names] == [
        layer.name for layer in MODEL.layers
    ]


def test_the_chain_runs_every_layer_once_in_order_and_skips_what_nobody_executes() -> None:
    chain = made().chain
    assert [name for hop in chain for name in hop.layer_names] == [f"l{index}" for index in range(6)]
    assert [hop.step for hop in chain] == [1, 2, 3, 4]
    assert [hop.node_id for hop in chain] == ["a", "b", "a", "b"]
    assert made().start_node == "a"
    for hop, following in pairwise(chain):
        assert hop.next_nodes == (following.node_id,)
    assert chain[-1].next_nodes == ()


def test_each_hop_has_its_bytes_link_and_time() -> None:
    chain = made().chain
    # What crosses is what the last layer of the run puts out: l1, l3, l4.
    assert [hop.payload_bytes for hop in chain] == [1001, 1003, 1004, 0]
    assert [hop.link for hop in chain] == [
        Link(latency_s=0.25, bytes_per_s=None),
        Link(latency_s=0.5, bytes_per_s=1000),
        Link(latency_s=0.25, bytes_per_s=None),
        None,
    ]
    assert [hop.transfer_s for hop in chain] == pytest.approx([0.25, 0.5 + 1.003, 0.25, 0])
    assert [hop.compute_s for hop in chain] == [1, 2, 3, 4]


def test_while_decoding_one_token_of_each_sequence_crosses() -> None:
    # 1001 bytes for 100 tokens: 10.01, rounded up.
    assert [hop.payload_bytes for hop in made("decode").chain] == [11, 11, 11, 0]


def test_everyone_is_told_what_is_theirs_and_whom_they_hear_from() -> None:
    announcement = made().announcement
    assert announcement["from"] == "a"
    assert announcement["to"] == ["b", "c"]  # c holds tensors, though it runs nothing
    assert announcement["plan_id"] == "p1"
    assert announcement["revision"] == "0123abc"
    assert announcement["parts"]["b"] == [
        {
            "step": 2, "layer_names": ["l2", "l3"], "from": "a", "next_nodes": ["a"],
            "receives_bytes": 1001, "sends_bytes": 1003,
        },
        {"step": 4, "layer_names": ["l5"], "from": "a", "next_nodes": [], "receives_bytes": 1004, "sends_bytes": 0},
    ]  # fmt: skip
    body = {name: value for name, value in announcement.items() if name != "digest"}
    assert announcement["digest"] == digest(body)
    assert digest(body | {"plan_id": "p2"}) != announcement["digest"]


RIGHT: dict[str, Any] = {
    "plan_id": "p1", "revision": "0123abc", "sender": "a", "payload": 1001, "layer_names": ("l2", "l3"),
}  # fmt: skip


def test_a_receiver_accepts_what_the_plan_says() -> None:
    chain = made().chain
    check_arrival(chain[1], **RIGHT)
    check_arrival(chain[0], **RIGHT | {"sender": None, "payload": 0, "layer_names": ["l0", "l1"]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"plan_id": "p2"}, "step 2 on b expects plan_id p1, got p2"),
        ({"revision": "fff"}, "expects revision 0123abc, got fff"),
        ({"sender": "c"}, "expects from a, got c"),
        ({"payload": 1000}, "expects payload_bytes 1001, got 1000"),
        ({"layer_names": ("l2",)}, "expects layers_digest"),
        ({"layer_names": ("l3", "l2")}, "expects layers_digest"),
    ],
)
def test_a_receiver_refuses_anything_else(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(Conflict, match=message):
        check_arrival(made().chain[1], **RIGHT | changed)


def test_one_node_is_a_chain_of_one_step() -> None:
    chain = made(allocation={"b": tuple(range(7))}).chain
    assert len(chain) == 1
    assert chain[0].layer_names == tuple(f"l{index}" for index in range(6))
    assert chain[0].payload_bytes == 0
    assert made(allocation={"b": tuple(range(7))}).announcement["to"] == []


def test_what_a_pass_does_not_run_has_a_holder_and_no_step_and_text_takes_its_own_way() -> None:
    kinds = {1: "text", 2: "text", 5: "profile"}
    layers = tuple(replace(layer, idle_in=kinds.get(layer.index, "")) for layer in MODEL.layers[:6])
    profile = replace(MODEL, layers=layers)

    def chains(allocation: dict[str, tuple[int, ...]]) -> tuple[list[str], tuple[str, ...]]:
        found = plan_for(profile, ROOMY, PlanOptions(objective="latency"), allocation)
        assert found.predicted.latency_s == sum(hop.compute_s + hop.transfer_s for hop in found.megaphone.chain)
        assert wire.plan_from_json(wire.plan_to_json(found)) == found
        return [hop.node_id for hop in found.megaphone.chain], found.megaphone.text_chain

    assert chains({"a": (0,), "b": (1, 2), "c": (3, 4), "d": (5,)}) == (["a", "b", "c"], ("a", "c"))
    assert chains({"a": (0, 3, 4), "b": (1, 2, 5)}) == (["a", "b", "a"], ("a",))
    assert chains({"a": (0, 1), "b": (2, 3, 4, 5)}) == (["a", "b"], ())


def test_hops_say_what_shared_keys_and_values_cost() -> None:
    shares = {"shared_kv_bytes_per_token": 7, "activation_bytes": 9001}
    layers = tuple(replace(layer, **(shares if layer.index == 1 else {})) for layer in MODEL.layers)  # type: ignore[arg-type]
    profile = replace(MODEL, layers=layers)
    stages = runs(profile, {"a": (0, 1), "b": (2, 3, 4, 5, 6)})
    for phase in ("prefill", "decode"):
        found = megaphone(profile, CLUSTER, stages, plan_id="p1", phase=phase, compute_s=[1, 1])
        # A generated token's layers read those of the whole context.
        assert [hop.shared_kv_bytes for hop in found.chain] == [7 * 200, 0]
        assert found.chain[0].payload_bytes == (9001 if phase == "prefill" else 1400 + -(-(9001 - 1400) // 100))
