"""A plan's id stands for one document: whatever differs, in what was asked or in what came of it, has another."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from support import planning

from planner.cluster import Cluster, Link
from planner.errors import InvalidMetadata
from planner.kv_dtype import with_kv_dtype
from planner.plan import Plan, PlanOptions
from planner.profile import KvTerms, ModelProfile
from planner.strategies.imported import import_plan
from planner.strategies.make import make_plan
from planner.wire import read as wire
from planner.wire.identity import plan_id

CLUSTER = planning.cluster([3, 2, 1])


def model(**changes: Any) -> ModelProfile:
    made = planning.profile([1.0, 2.0, 1.0, 3.0, 1.0, 2.0])
    layers = tuple(
        replace(layer, weight_bytes=1, kv_terms=KvTerms(bytes_per_token=2), kv_cache_bytes=1024)
        for layer in made.layers
    )
    return replace(made, dtype="BF16", layers=layers, **changes)


def plan(profile: ModelProfile | None = None, cluster: Cluster = CLUSTER, **options: Any) -> Plan:
    return make_plan(profile or model(), cluster, PlanOptions(**options), generated_at="2026-01-02T03:04:05Z")


def changed_cluster(**changes: Any) -> Cluster:
    first, *others = CLUSTER.nodes
    return replace(CLUSTER, nodes=(replace(first, **changes), *others))


OTHERS = {
    "revision": lambda: plan(model(revision="other")),
    "name": lambda: plan(model(model_name="own/other")),
    "length": lambda: plan(model().at(batch_size=1, sequence_length=64)),
    "batch": lambda: plan(model().at(batch_size=2, sequence_length=512)),
    "kv dtype": lambda: plan(with_kv_dtype(model(), "F8_E4M3")),
    "a layer's cost": lambda: plan(
        replace(model(), layers=(replace(model().layers[0], num_params=7), *model().layers[1:]))
    ),
    "what it lacks": lambda: plan(model(missing_tensors=("x",)), allow_missing=True),
    "how exact it is": lambda: plan(model(approximate=("by rule",))),
    "a node's load": lambda: plan(cluster=changed_cluster(load=0.01)),
    "a node more": lambda: plan(cluster=planning.cluster([3, 2, 1, 1e-9])),
    "links": lambda: plan(cluster=replace(CLUSTER, default_link=Link(latency_s=1e-3, bytes_per_s=1e9))),
    "strategy": lambda: plan(strategy="pipeline"),
    "objective": lambda: plan(objective="latency"),
    "phase": lambda: plan(phase="decode"),
    "budget": lambda: plan(time_budget_s=1e6),
    "reserve": lambda: plan(reserve_bytes=1),
    "a share that binds nothing": lambda: plan(max_memory_share={"n0": 0.99}),
}  # fmt: skip


def test_equal_requests_have_one_id_whenever_and_wherever_they_are_made() -> None:
    first = plan()
    profile = model(generated_at="2020-01-01T00:00:00Z", node_id="elsewhere")
    assert make_plan(profile, CLUSTER).plan_id == first.plan_id
    read = wire.profile_from_json(json.loads(wire.dumps(wire.profile_to_json(model()))))
    assert make_plan(read, CLUSTER).plan_id == first.plan_id


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_differs_has_another_id(what: str) -> None:
    assert OTHERS[what]().plan_id != plan().plan_id


@pytest.mark.parametrize("strategy", ["greedy", "pipeline", "equal", "memory"])
def test_an_id_can_be_proven_from_the_document_alone(strategy: str) -> None:
    made = plan(strategy=strategy, time_budget_s=1e6, max_memory_share={"n0": 1.0})
    document = json.loads(wire.dumps(wire.plan_to_json(made)))
    assert plan_id(wire.plan_from_json(document)) == made.plan_id
    assert import_plan(document) == made


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("predicted", "bottleneck_s"), 1e-9),
        (("sequence_length",), 64),
        (("nodes", 0, "memory_used_bytes"), 5),
        (("metadata_digest",), "sha256:0"),
        (("megaphone_plan", "chain", 0, "compute_s"), 5),
    ],
)
def test_an_edit_of_any_figure_is_found(place: tuple[Any, ...], value: Any) -> None:
    document = json.loads(wire.dumps(wire.plan_to_json(plan())))
    inner = document
    for name in place[:-1]:
        inner = inner[name]
    assert place[-1] in inner
    inner[place[-1]] = value
    with pytest.raises(InvalidMetadata, match="was edited"):
        import_plan(document)


def test_a_plan_of_an_earlier_version_is_taken_under_the_id_that_it_has() -> None:
    document = json.loads(wire.dumps(wire.plan_to_json(plan())))
    del document["metadata_digest"]
    with pytest.raises(InvalidMetadata, match="has the id") as caught:
        import_plan(document)
    document["plan_id"] = caught.value.details["expected"]
    assert import_plan(document).plan_id == document["plan_id"]
