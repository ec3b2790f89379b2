"""What would make a request fit: the smallest change, against every change tried."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from support import planning
from support.depth import some

import planner.explain.remedies
from planner.cluster import Cluster
from planner.errors import Infeasible
from planner.plan import Objective, Plan, PlanOptions
from planner.problem.cost import node_memory_bytes
from planner.profile import KvTerms, ModelProfile

_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def _case(seed: int) -> tuple[ModelProfile, Cluster, PlanOptions]:
    """A small request, often too large for its nodes, with everything that a user may ask on some."""
    draw = random.Random(seed)
    model, machines = planning.random_case(seed, layers=5, runs=seed % 2 == 0)
    unit = draw.choice([1, 1, 1000, 777_777])
    tokens = draw.choice([0, 0, 1, 2])
    layers = tuple(
        dataclasses.replace(
            layer,
            weight_bytes=layer.weight_bytes * unit,
            tied_bytes=layer.tied_bytes * unit,
            kv_cache_bytes=model.sequence_length * tokens * unit,
            kv_terms=KvTerms(bytes_per_token=tokens * unit),
        )
        for layer in model.layers
    )
    scale = draw.choice([0.4, 0.7, 1.0])
    nodes = tuple(
        dataclasses.replace(node, memory_bytes=int(node.memory_bytes * unit * scale)) for node in machines.nodes
    )
    ids = [node.node_id for node in nodes]
    options = PlanOptions(
        pins={layer.name: draw.choice(ids) for layer in layers if draw.random() < 0.2} if draw.random() < 0.5 else {},
        max_memory_share={draw.choice(ids): draw.choice([0.3, 0.5, 0.9])} if draw.random() < 0.3 else {},
        max_compute_share={draw.choice(ids): draw.choice([0.3, 0.6])} if draw.random() < 0.3 else {},
        reserve_bytes=draw.choice([0, 0, unit]),
    )
    free = [node_id for node_id in ids if node_id not in options.pins.values()]
    if len(ids) > 1 and free and draw.random() < 0.3:
        options = dataclasses.replace(options, exclude=frozenset([draw.choice(free)]))
    return dataclasses.replace(model, layers=layers), dataclasses.replace(machines, nodes=nodes), options


def _with_bytes(machines: Cluster, node_id: str, extra: int) -> Cluster:
    return dataclasses.replace(
        machines,
        nodes=tuple(
            dataclasses.replace(node, memory_bytes=node.memory_bytes + extra) if node.node_id == node_id else node
            for node in machines.nodes
        ),
    )


def _fits(model: ModelProfile, machines: Cluster, options: PlanOptions) -> bool:
    return isinstance(planning.outcome(model, machines, options), Plan)


def _least_bytes(model: ModelProfile, machines: Cluster, options: PlanOptions) -> tuple[dict[str, float], float]:
    """The fewest bytes more with which any allocation is valid: on each node alone, and over all together."""
    alone, in_all = {node.node_id: math.inf for node in machines.nodes}, math.inf
    roomy = machines
    for node in machines.nodes:
        roomy = _with_bytes(roomy, node.node_id, 10**12)
    seconds = planning.layer_seconds(model, machines, options)
    longest = math.inf if options.time_budget_s is None else options.time_budget_s * (1 + 1e-9)
    for nodes in planning.assignments(model, machines, contiguous=options.strategy == "pipeline"):
        if not planning.is_valid(model, roomy, options, nodes) or planning.bottleneck_s(seconds, nodes) > longest:
            continue
        extra = {}
        for at, node in enumerate(machines.nodes):
            held = node_memory_bytes([layer for layer, home in zip(model.layers, nodes, strict=True) if home == at])
            share = options.max_memory_share.get(node.node_id, 1.0)
            if held and math.floor(node.memory_bytes * share) - options.reserve_bytes < held:
                size = math.floor((held + options.reserve_bytes) / share)
                while math.floor(size * share) < held + options.reserve_bytes:
                    size += 1
                extra[node.node_id] = size - node.memory_bytes
        in_all = min(in_all, sum(extra.values()))
        for node_id in alone if not extra else extra if len(extra) == 1 else ():
            alone[node_id] = min(alone[node_id], extra.get(node_id, 0))
    return alone, in_all


def _stated(text: str) -> int:
    number, unit = text.split()
    return math.ceil(float(number.replace(",", "")) * _UNITS[unit])


def _remedies(error: Infeasible) -> dict[str, dict[str, object]]:
    return {str(remedy["change"]): remedy for remedy in error.details.get("remedies", [])}


def _faults(model: ModelProfile, machines: Cluster, options: PlanOptions, error: Infeasible) -> list[str]:
    """What is wrong with what an error says would help."""
    faults, remedies = [], _remedies(error)
    by_node = next((r["extra_bytes_by_node"] for r in error.details["remedies"] if "extra_bytes_by_node" in r), None)
    if any("time_budget_s" in remedy for remedy in remedies.values()):
        if _least_bytes(model, machines, options)[1] < math.inf:
            faults.append("memory would help within the budget as well")
        options = dataclasses.replace(options, time_budget_s=None)
    least, in_all = _least_bytes(model, machines, options)
    if by_node is not None:
        wider = machines
        for node_id, extra in by_node.items():
            wider = _with_bytes(wider, node_id, extra)
        text = re.search(r"([\d.,]+ (?:[KMG]i)?B) more memory in all", str(error))
        if not _fits(model, wider, options) or text is None or _stated(text[1]) < sum(by_node.values()):
            faults.append(f"{by_node} do not help, or the sentence says less: {text and text[1]}")
    offered = [sum(by_node.values())] if by_node is not None else []
    offered += [int(r["extra_bytes"]) for r in error.details["remedies"] if "extra_bytes" in r]
    if min(offered, default=math.inf) != in_all:
        faults.append(f"{offered} bytes in all where {in_all} do")
    if "memory" not in remedies and min(least.values()) < math.inf:
        faults.append(f"memory would help, and is not offered: {least}")
    if "memory" in remedies and "node_id" in remedies["memory"]:
        node_id, extra = str(remedies["memory"]["node_id"]), int(str(remedies["memory"]["extra_bytes"]))
        if extra != least[node_id]:
            faults.append(f"{extra} bytes on {node_id} where {least[node_id]} do")
        if extra > min(least.values()):
            faults.append(f"{extra} bytes on {node_id} where another needs fewer: {least}")
        if not _fits(model, _with_bytes(machines, node_id, extra), options):
            faults.append("the bytes do not help")
        text = re.search(rf"([\d.,]+ (?:[KMG]i)?B) more memory on {node_id}", str(error))
        if text is None or _stated(text[1]) < extra:
            faults.append(f"the sentence says {text and text[1]}, {extra} B are needed")
    if "node" in remedies:
        like = next(node for node in machines.nodes if node.node_id == remedies["node"]["like"])
        more = dataclasses.replace(machines, nodes=(*machines.nodes, dataclasses.replace(like, node_id="another")))
        if not _fits(model, more, options):
            faults.append("the node more does not help")
    if "sequence_length" in remedies:
        tokens = int(str(remedies["sequence_length"]["sequence_length"]))
        for length, fits in ((tokens, True), (tokens + 1, False)):
            at = model.at(batch_size=model.batch_size, sequence_length=length)
            if _fits(at, machines, options) != fits:
                faults.append(f"a context of {length} should {'' if fits else 'not '}fit")
    for limit, key in (("pins", "layers"), ("max_compute_share", "node_ids")):
        if limit in remedies:
            lifted = remedies[limit][key]
            assert isinstance(lifted, list)
            asked = getattr(options, limit)
            kept = {name: value for name, value in asked.items() if name not in lifted}
            without: dict[str, Any] = {limit: kept}
            if not _fits(model, machines, dataclasses.replace(options, **without)):
                faults.append(f"without these {limit} it does not fit either")
            for name in lifted:
                with_one: dict[str, Any] = {limit: {**kept, name: asked[name]}}
                if _fits(model, machines, dataclasses.replace(options, **with_one)):
                    faults.append(f"{limit} of {name} may stay")
    if "max_compute_share" not in remedies and _fits(
        model, machines, dataclasses.replace(options, max_compute_share={})
    ):
        faults.append("without shares it would fit, and that is not offered")
    return faults


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("block", some(range(4), shallow=range(1)))
def test_the_change_that_is_stated_is_the_smallest_and_does_help(strategy: str, block: int) -> None:
    tried = 0
    for seed in range(block * 100, block * 100 + 100):
        model, machines, options = _case(seed)
        options = dataclasses.replace(options, strategy=strategy)
        error = planning.outcome(model, machines, options)
        if isinstance(error, Infeasible):
            tried += 1
            assert _faults(model, machines, options, error) == [], (seed, str(error))
    assert tried > 20


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
def test_the_change_that_is_stated_keeps_the_time_budget(strategy: str) -> None:
    tried, longer = 0, 0
    for seed in range(1000, 1200):
        model, machines, options = _case(seed)
        seconds = planning.layer_seconds(model, machines, options)
        budget = random.Random(seed).uniform(0.1, 1.0) * max(sum(row) for row in seconds)
        options = dataclasses.replace(options, strategy=strategy, time_budget_s=budget)
        error = planning.outcome(model, machines, options)
        if isinstance(error, Infeasible) and error.details["limit"] != "compute":
            tried += 1
            longer += "no time budget" in str(error)
            assert _faults(model, machines, options, error) == [], (seed, str(error))
    assert tried > 40
    assert longer > 5


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_the_smallest_time_budget_that_fits_is_stated(strategy: str, objective: Objective) -> None:
    tried = 0
    for seed in range(200):
        model, machines, options = _case(seed)
        free = dataclasses.replace(options, strategy=strategy)
        truth = planning.best(model, machines, free, contiguous=strategy == "pipeline")
        if truth in (0.0, math.inf):
            continue
        tried += 1
        short = dataclasses.replace(free, objective=objective, time_budget_s=truth * 0.9)
        error = planning.outcome(model, machines, short)
        assert isinstance(error, Infeasible)
        assert error.details["needed_time_budget_s"] == pytest.approx(truth, rel=1e-6)
        text = re.search(r"found is ([\d.e+-]+) (s|ms|µs)$", str(error))
        assert text is not None
        stated = float(text[1]) / {"s": 1, "ms": 1e3, "µs": 1e6}[text[2]]
        for enough in (stated, error.details["remedies"][0]["time_budget_s"]):
            assert _fits(model, machines, dataclasses.replace(short, time_budget_s=enough))
    assert tried > 10


def test_what_is_pinned_to_several_nodes_names_the_bytes_of_each_and_the_pins() -> None:
    model, machines = planning.profile([1.0] * 4, [10] * 4), planning.cluster([1, 1, 1], [5, 7, 100])
    options = PlanOptions(pins={"layers.0": "n0", "layers.3": "n1"})
    error = planning.outcome(model, machines, options)
    assert isinstance(error, Infeasible)
    assert error.details["node_id"] == "n0"
    assert _remedies(error) == {
        "memory": {"change": "memory", "extra_bytes_by_node": {"n0": 5, "n1": 3}},
        "pins": {"change": "pins", "layers": ["layers.0", "layers.3"]},
    }
    assert "8 B more memory in all (5 B on n0, 3 B on n1)" in str(error)
    assert "layers.0 on n0, layers.3 on n1 not pinned" in str(error)


def test_a_request_that_only_the_shares_of_compute_refuse_names_those_to_raise() -> None:
    model, machines = planning.profile([1.0] * 4, [10] * 4), planning.cluster([1, 2, 3], [100] * 3)
    options = PlanOptions(max_compute_share={"n0": 0.25, "n1": 0.25, "n2": 0.25})
    error = planning.outcome(model, machines, options)
    assert isinstance(error, Infeasible)
    assert error.details["limit"] == "share"
    assert set(_remedies(error)) == {"node", "max_compute_share"}
    assert _remedies(error)["max_compute_share"] == {"change": "max_compute_share", "node_ids": ["n2"]}
    assert "or with no limit to the compute of n2" in str(error)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5, 8])
def test_a_refusal_that_would_take_long_offers_what_it_found(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(planner.explain.remedies, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(planner.explain.remedies, "_LONGEST_S", calls)
    # All different, so that the bytes are searched for in many steps.
    model, machines = (
        planning.profile([1.0] * 5, [10**9, 10**8, 10**6, 10**7, 7]),
        planning.cluster([1, 1], [500] * 2),
    )
    error = planning.outcome(model, machines, PlanOptions())
    assert isinstance(error, Infeasible)
    found = _remedies(error)
    assert (found == {}) == (calls == 0)
    for remedy in error.details["remedies"]:
        extra = remedy.get("extra_bytes_by_node") or {remedy.get("node_id"): remedy.get("extra_bytes")}
        wider = machines
        for node_id, size in extra.items() if remedy["change"] == "memory" else ():
            wider = _with_bytes(wider, node_id, size)
        assert wider == machines or _fits(model, wider, PlanOptions())


def test_a_pinned_node_among_many_is_looked_at() -> None:
    model = planning.profile([1.0] * 65, [10] * 64 + [12])
    machines = planning.cluster([*range(2, 66), 1], [10] * 65)
    error = planning.outcome(model, machines, PlanOptions(pins={"layers.64": "n64"}))
    assert isinstance(error, Infeasible)
    assert _remedies(error)["memory"] == {"change": "memory", "node_id": "n64", "extra_bytes": 2}


def test_a_node_more_takes_no_id_that_is_there() -> None:
    model, machines = planning.profile([1.0] * 3, [10] * 3), planning.cluster([1, 1], [10, 10])
    names = ("a", "a+1")
    nodes = tuple(dataclasses.replace(node, node_id=name) for node, name in zip(machines.nodes, names, strict=True))
    error = planning.outcome(model, Cluster(nodes=nodes), PlanOptions())
    assert isinstance(error, Infeasible)
    assert _remedies(error)["node"]["like"] == "a"


def test_a_pin_that_no_stage_can_hold_among_many_different_nodes_is_refused_without_a_warning() -> None:
    model = planning.profile([1.0] * 20, [10] * 20)
    machines = planning.cluster([*range(1, 19)], [5, *range(21, 38)])
    options = PlanOptions(strategy="pipeline", pins={"layers.3": "n0", "layers.4": "n0"})
    error = planning.outcome(model, machines, options)
    assert isinstance(error, Infeasible)
    assert _remedies(error)["memory"] == {"change": "memory", "node_id": "n0", "extra_bytes": 15}
    assert _remedies(error)["pins"] == {"change": "pins", "layers": ["layers.3", "layers.4"]}


def test_several_small_additions_are_stated_beside_the_single_one() -> None:
    model, machines = planning.profile([1.0] * 10, [5] + [100] * 8 + [50]), planning.cluster([1] * 8, [90] * 8)
    error = planning.outcome(model, machines, PlanOptions(strategy="pipeline"))
    assert isinstance(error, Infeasible)
    first, second, *_ = error.details["remedies"]
    assert sum(first["extra_bytes_by_node"].values()) == 135
    assert second["extra_bytes"] == 710
    assert "It would fit with 135 B more memory in all (" in str(error)
    assert ", or with 710 B more memory on n0" in str(error)


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
def test_the_addition_over_many_nodes_that_all_differ_is_found_in_time(strategy: str) -> None:
    draw = random.Random(1)
    sizes = [draw.randrange(10**8, 10**9) for _ in range(60)]
    machines = planning.cluster([1] * 50, [draw.randrange(4 * 10**8, 6 * 10**8) for _ in range(50)])
    began = time.monotonic()
    error = planning.outcome(planning.profile([1.0] * 60, sizes), machines, PlanOptions(strategy=strategy))
    assert isinstance(error, Infeasible)
    assert time.monotonic() - began < 10
    lacks = sum(sizes) - sum(node.memory_bytes for node in machines.nodes)
    assert error.details["remedies"], str(error)
    extra = next(r["extra_bytes_by_node"] for r in error.details["remedies"] if "extra_bytes_by_node" in r)
    assert max(1, lacks) <= sum(extra.values())
    assert f" and {len(extra) - 3} others" in str(error)
