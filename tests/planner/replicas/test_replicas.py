"""Several chains from one cluster: against every division of small clusters, and what must hold on large ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from support import planning
from support.depth import some

from planner.cluster import Cluster, Node
from planner.errors import Infeasible, InvalidInput
from planner.plan import Plan, PlanOptions
from planner.problem.arrays import build
from planner.problem.cost import node_memory_bytes
from planner.problem.items import build_work
from planner.profile import ModelProfile
from planner.replicas.bounds import replica_bound
from planner.replicas.make import Replicas, make_replicas
from planner.strategies.make import make_plan

Parts = Literal["auto"] | int


def divisions(count: int) -> Iterator[list[list[int]]]:
    """Every way to divide `count` nodes into groups."""
    if count == 0:
        yield []
        return
    for rest in divisions(count - 1):
        for at in range(len(rest)):
            yield [*rest[:at], [*rest[at], count - 1], *rest[at + 1 :]]
        yield [*rest, [count - 1]]


def small_case(seed: int) -> tuple[ModelProfile, Cluster]:
    """Up to 6 nodes with memory for one or several models; layers in runs, some tied."""
    draw = random.Random(seed)
    model, _ = planning.random_case(seed, layers=7, runs=True)
    total = max(1, sum(layer.weight_bytes for layer in model.layers))
    count = draw.randint(2, 6)
    classes = [
        (
            draw.randint(1, 9),
            draw.randint(0, round(total * draw.choice([0.7, 1.2, 2.0]))),
            draw.choice([None, 2.0, 9.0]),
        )
        for _ in range(draw.randint(1, count))
    ]
    chosen = [draw.choice(classes) for _ in range(count)]
    machines = planning.cluster(
        [rate for rate, _, _ in chosen], [room for _, room, _ in chosen], bandwidth=[speed for _, _, speed in chosen]
    )
    return model, machines


def best_divisions(model: ModelProfile, machines: Cluster, options: PlanOptions) -> dict[Parts, float]:
    """The most passes a second of any division into so many groups, each chain by trying every allocation."""
    rates: dict[frozenset[int], float] = {}
    for size in range(1, len(machines.nodes) + 1):
        for group in itertools.combinations(range(len(machines.nodes)), size):
            mine = dataclasses.replace(machines, nodes=tuple(machines.nodes[at] for at in group))
            plan = planning.outcome(model, mine, options)
            rates[frozenset(group)] = 1 / plan.predicted.bottleneck_s if isinstance(plan, Plan) else 0.0
    found: dict[Parts, float] = {"auto": 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
    for division in divisions(len(machines.nodes)):
        # Nodes may be left out: a group that can't hold the model makes nothing.
        values = [value for group in division if (value := rates[frozenset(group)]) > 0]
        for parts in ("auto", len(values)):
            found[parts] = max(found.get(parts, 0.0), sum(values))
    return found


def check(found: Replicas, model: ModelProfile, machines: Cluster, options: PlanOptions) -> None:
    """What holds for all replicas: chains valid, on disjoint nodes, and adding up."""
    layers = {layer.name: layer for layer in model.layers}
    used = [node_id for plan in found.plans for node_id in plan.allocation]
    assert len(used) == len(set(used)), "a node is in two chains"
    assert sorted([*used, *(node_id for node_id, _ in found.idle)]) == sorted(n.node_id for n in machines.nodes)
    assert not options.exclude & set(used)
    for plan in found.plans:
        assert sorted(name for names in plan.allocation.values() for name in names) == sorted(layers)
        for node_id, names in plan.allocation.items():
            share = options.max_memory_share.get(node_id, 1.0)
            room = max(0, math.floor(machines.node(node_id).memory_bytes * share) - options.reserve_bytes)
            assert node_memory_bytes([layers[name] for name in names]) <= room
        if options.time_budget_s is not None:
            assert plan.predicted.bottleneck_s <= options.time_budget_s * (1 + 1e-8)
    total = sum(1 / plan.predicted.bottleneck_s for plan in found.plans)
    assert found.throughput_per_s == pytest.approx(total)
    assert found.throughput_per_s <= found.upper_bound_per_s
    assert found.gap == pytest.approx(found.upper_bound_per_s / total - 1)
    assert found.ratio == pytest.approx(total * found.one_chain.predicted.bottleneck_s)


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("block", some(range(3), shallow=range(1)))
def test_no_division_of_a_small_cluster_makes_more(strategy: str, block: int) -> None:
    options, divided = PlanOptions(strategy=strategy), 0
    for seed in range(block * 10, (block + 1) * 10):
        model, machines = small_case(seed)
        truth = best_divisions(model, machines, options)["auto"]
        try:
            found = make_replicas(model, machines, options)
        except Infeasible:
            assert truth == 0
            continue
        check(found, model, machines, options)
        # A plan may give up a two-thousandth of its speed for fewer hops.
        assert truth * (1 - 6e-4) <= found.throughput_per_s <= truth * (1 + 1e-9)
        assert found.upper_bound_per_s >= truth * (1 - 1e-9), "the bound does not hold"
        assert found.throughput_per_s >= 1 / found.one_chain.predicted.bottleneck_s
        divided += len(found.plans) > 1
        assert make_replicas(model, machines, options) == found
    assert divided >= 3


@pytest.mark.parametrize("block", some(range(2), shallow=range(1)))
def test_as_many_chains_as_are_asked_for_or_none(block: int) -> None:
    options, outcomes = PlanOptions(), set()
    for seed in range(block * 10, (block + 1) * 10):
        model, machines = small_case(seed)
        best = best_divisions(model, machines, options)
        for parts in (1, 2, 3):
            truth = best[parts]
            if truth == 0:
                with pytest.raises(Infeasible) as error:
                    make_replicas(model, machines, options, replicas=parts)
                assert parts == 1 or error.value.details["proven"]
                outcomes.add("none")
                continue
            found = make_replicas(model, machines, options, replicas=parts)
            check(found, model, machines, options)
            assert len(found.plans) == parts
            assert truth * (1 - 6e-4) <= found.throughput_per_s <= truth * (1 + 1e-9)
            assert found.upper_bound_per_s >= truth * (1 - 1e-9)
            outcomes.add("found")
    assert outcomes == {"none", "found"}


def test_the_bound_of_prices_holds_for_every_division() -> None:
    tight = 0
    for seed in range(100, 140):
        model, machines = small_case(seed)
        problem = build(model, machines, PlanOptions())
        one = planning.outcome(model, machines, PlanOptions())
        work = build_work(problem)
        if not isinstance(one, Plan) or work is None:
            continue
        bound = replica_bound(problem, work, one.predicted.lower_bound_s)
        for parts, truth in best_divisions(model, machines, PlanOptions()).items():
            count = None if parts == "auto" else parts
            assert bound.per_s(count) >= truth * (1 - 1e-7), (seed, parts)
            assert truth == 0 or count is None or count <= bound.most_replicas
            tight += truth > 0 and bound.per_s(count) <= truth * 1.05
    assert tight > 20, "the bound is often near"


def many(count: int, seed: int, *, layers: int = 30) -> tuple[ModelProfile, Cluster]:
    """A transformer with a large head, and small unequal nodes that each hold a few layers."""
    draw = random.Random(seed)
    model = planning.profile([0.0, *[10.0] * (layers - 2), 30.0], [40, *[10] * (layers - 2), 40])
    nodes = [(draw.uniform(1, 6), draw.choice([40, 60, 90, 150, 400])) for _ in range(count)]
    return model, planning.cluster([rate for rate, _ in nodes], [room for _, room in nodes])


def test_many_small_nodes_make_several_times_as_much_in_several_chains() -> None:
    model, machines = many(64, 1)
    found = make_replicas(model, machines)
    check(found, model, machines, PlanOptions())
    assert len(found.plans) > 8
    # 28 layers and the head on 64 nodes: no chain is faster than 3 layers' worth of head on the fastest node.
    assert found.ratio > 2.5
    assert found.gap < 0.1
    shuffled = dataclasses.replace(machines, nodes=tuple(random.Random(2).sample(machines.nodes, 64)))
    assert make_replicas(model, shuffled) == found, "the order of the nodes matters"
    six = make_replicas(model, machines, replicas=6)
    check(six, model, machines, PlanOptions())
    assert len(six.plans) == 6
    assert found.one_chain.predicted.bottleneck_s * six.throughput_per_s > 2
    assert six.throughput_per_s <= found.throughput_per_s * 1.02


def test_layers_that_are_all_different_are_divided_as_well() -> None:
    draw = random.Random(4)
    model = planning.profile([draw.uniform(1, 9) for _ in range(24)], [draw.randint(1, 9) for _ in range(24)])
    machines = planning.cluster([draw.uniform(1, 5) for _ in range(14)], [draw.randint(40, 130) for _ in range(14)])
    for strategy in ("greedy", "pipeline"):
        options = PlanOptions(strategy=strategy)
        found = make_replicas(model, machines, options)
        check(found, model, machines, options)
        assert len(found.plans) > 2
        assert found.ratio > 1
        assert found.gap < 0.1
        assert not found.exact


def test_options_hold_in_every_chain() -> None:
    model, machines = many(20, 3)
    free = make_replicas(model, machines)
    slowest = free.plans[-1].predicted.bottleneck_s
    options = PlanOptions(
        time_budget_s=slowest * 0.6,
        exclude=frozenset({"n0", "n7"}),
        max_memory_share={"n1": 0.5, "n2": 0.0},
        max_compute_share={"n3": 0.1},
        reserve_bytes=5,
    )
    found = make_replicas(model, machines, options)
    check(found, model, machines, options)
    assert len(found.plans) > 1
    idle = dict(found.idle)
    assert idle["n0"] == "excluded by the request"
    assert "capped" in idle["n2"]
    for plan in found.plans:
        if "n3" in plan.allocation:
            (report,) = [report for report in plan.nodes if report.node_id == "n3"]
            assert report.flop <= 0.1 * plan.total_compute * (1 + 1e-9)
    with pytest.raises(Infeasible, match="time budget"):
        make_replicas(model, machines, dataclasses.replace(options, time_budget_s=1e-6))


def test_too_many_replicas_are_refused_with_the_bytes_that_are_missing() -> None:
    model, machines = planning.profile([1.0] * 10, [10] * 10), planning.cluster([1, 2, 3, 4], [60, 60, 60, 65])
    assert len(make_replicas(model, machines, replicas=2).plans) == 2  # 100 bytes each, and 245 in all
    tiny = dataclasses.replace(machines, nodes=(*machines.nodes, Node(node_id="n4", flop_per_s=9, memory_bytes=9)))
    assert make_replicas(model, tiny, replicas=2).idle == (("n4", "9 B hold no layer"),)
    with pytest.raises(
        Infeasible, match=r"3 replicas of test/model need 300 B .* have 245 B: 55 B are missing"
    ) as error:
        make_replicas(model, machines, replicas=3)
    expected = {"limit": "memory", "replicas": 3, "most_replicas": 2, "missing_bytes": 55, "proven": True}
    assert {name: error.value.details[name] for name in expected} == expected
    # 10 layers of 10 bytes are 19 whole layers on nodes of 95 and 105 bytes: enough bytes, not enough layers.
    with pytest.raises(Infeasible, match="in whole layers they hold 1 at most"):
        make_replicas(model, planning.cluster([1, 1], [95, 105]), replicas=2)
    # Three nodes of 6 layers hold 18: one chain, though the layers of one and a half more are left over.
    with pytest.raises(Infeasible, match="there is no way to divide them into 2 groups") as error:
        make_replicas(model, planning.cluster([1, 1, 1], [70, 70, 70]), replicas=2)
    assert error.value.details["proven"]


@pytest.mark.parametrize(
    ("options", "replicas", "says"),
    [
        ({"objective": "latency"}, "auto", "one request's time"),
        ({"strategy": "equal"}, 2, "a rule to compare with"),
        ({"pins": {"layers.0": "n0"}}, 2, "each chain holds every layer"),
        ({"pins": {"layers.0": "n0"}}, "auto", "each chain holds every layer"),
        ({}, 0, "at least 1, got 0"),
        ({}, True, "at least 1, got True"),
        ({}, "many", "auto or a whole number"),
        ({"exclude": frozenset({"nobody"})}, "auto", "nobody"),
    ],
)
def test_what_makes_no_sense_with_replicas_is_refused(options: dict[str, Any], replicas: Any, says: str) -> None:
    model, machines = planning.profile([1.0] * 4), planning.cluster([1, 1])
    with pytest.raises(InvalidInput, match=says):
        make_replicas(model, machines, PlanOptions(**options), replicas=replicas)


def test_one_replica_is_the_ordinary_plan_pins_and_all() -> None:
    model, machines = planning.profile([1.0] * 4), planning.cluster([1, 1])
    options = PlanOptions(pins={"layers.0": "n1", "layers.3": "n1"})
    found = make_replicas(model, machines, options, replicas=1)
    assert found.plans == (make_plan(model, machines, options),)
    assert found.ratio == 1
    assert found.exact


def test_nodes_that_are_alike_are_divided_exactly_however_many() -> None:
    # 24 nodes of 2 classes: 13 x 13 sets. A fast node holds 6 of 8 layers, a slow one 4: each chain needs two.
    nodes = [Node(node_id=f"{name}{at}", flop_per_s=rate, memory_bytes=room) for at in range(12)
             for name, rate, room in (("fast", 3.0, 6), ("slow", 1.0, 4))]  # fmt: skip
    found = make_replicas(planning.profile([1.0] * 8, [1] * 8), Cluster(nodes=tuple(nodes)))
    assert found.exact
    assert len(found.plans) == 12
    # Fast with slow: 6 / 3 and 2 / 1, 2 s each chain and nobody idle; any other way somebody waits.
    assert found.throughput_per_s == pytest.approx(12 / 2)
    assert found.upper_bound_per_s == pytest.approx(6)
