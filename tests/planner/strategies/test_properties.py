"""What holds for any input: Hypothesis looks for one where it does not."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import planning
from support.depth import depth

from planner.cluster import Cluster, Link, Node
from planner.errors import Infeasible, InvalidInput
from planner.plan import PlanOptions
from planner.problem.cost import node_memory_bytes
from planner.profile import ModelProfile
from planner.replan.replanner import replan
from planner.strategies.make import STRATEGIES, make_plan

_SETTINGS = settings(max_examples=depth(40, 400), suppress_health_check=[HealthCheck.too_slow])


@st.composite
def models(draw: st.DrawFn) -> ModelProfile:
    """Up to 30 layers, in runs or not, some without any cost."""
    kinds = draw(
        st.lists(st.tuples(st.integers(0, 10**13), st.integers(0, 10**9), st.integers(1, 12)), min_size=1, max_size=6)
    )
    layers = [(flop, size) for flop, size, count in kinds for _ in range(count)][:30]
    return planning.profile([f for f, _ in layers], [b for _, b in layers], tied=draw(st.booleans()))


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Up to 8 nodes with links that differ."""
    count = draw(st.integers(1, 8))
    ids = [f"n{at}" for at in range(count)]
    links = {
        (a, b): Link(latency_s=draw(st.floats(0, 0.1)), bytes_per_s=draw(st.sampled_from([None, 1e6, 1e9])))
        for a in ids
        for b in ids
        if a != b and draw(st.integers(0, 4)) == 0
    }
    return Cluster(
        nodes=tuple(
            Node(
                node_id=node_id,
                flop_per_s=draw(st.floats(1e9, 1e15)),
                memory_bytes=draw(st.integers(0, 4 * 10**9)),
                memory_bytes_per_s=draw(st.sampled_from([None, 1e10, 3e12])),
                load=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
            )
            for node_id in ids
        ),
        default_link=Link(latency_s=draw(st.floats(0, 0.01)), bytes_per_s=draw(st.sampled_from([None, 1e8]))),
        links=links,
    )


@_SETTINGS
@given(
    model=models(),
    machines=clusters(),
    options=st.builds(
        PlanOptions,
        strategy=st.sampled_from(sorted(STRATEGIES)),
        objective=st.sampled_from(["throughput", "latency"]),
        phase=st.sampled_from(["prefill", "decode"]),
        reserve_bytes=st.sampled_from([0, 10**6]),
    ),
)
def test_every_plan_keeps_its_promises(model: ModelProfile, machines: Cluster, options: PlanOptions) -> None:
    plan = planning.outcome(model, machines, options)
    if isinstance(plan, Infeasible):
        assert plan.details["limit"] in {"memory", "compute", "share", "pin"}
        return
    if isinstance(plan, InvalidInput):
        assert model.total_compute == 0 or all(node.load == 1 for node in machines.nodes), plan
        return
    strategy, objective, reserve = options.strategy, options.objective, options.reserve_bytes
    layers = {layer.name: layer for layer in model.layers}
    held = [name for names in plan.allocation.values() for name in names]
    assert sorted(held) == sorted(layers), "each layer exactly once"
    for node_id, names in plan.allocation.items():
        room = max(0, machines.node(node_id).memory_bytes - reserve)
        assert names
        assert node_memory_bytes([layers[name] for name in names]) <= room
    assert [name for stage in plan.stages for name in stage.layer_names] == list(layers)
    if strategy != "greedy":
        assert len(plan.stages) == len(plan.allocation), "contiguous"
    value = plan.predicted.bottleneck_s if objective == "throughput" else plan.predicted.latency_s
    assert math.isfinite(value)
    assert 0 <= plan.predicted.lower_bound_s <= value
    assert plan.predicted.gap >= 0
    assert plan.predicted.bottleneck_s <= plan.predicted.latency_s * (1 + 1e-9)
    reports = {report.node_id: report for report in plan.nodes}
    assert sorted(reports) == sorted(node.node_id for node in machines.nodes)
    for node_id, report in reports.items():
        assert report.used == (node_id in plan.allocation)
        assert 0 <= report.compute_utilization <= 1
        assert report.seconds <= plan.time_budget_s * (1 + 1e-8)
        assert report.memory_used_bytes == node_memory_bytes([layers[n] for n in plan.allocation.get(node_id, ())])


@_SETTINGS
@given(model=models(), machines=clusters(), strategy=st.sampled_from(["greedy", "pipeline"]), seed=st.randoms())
def test_the_order_of_nodes_never_matters(
    model: ModelProfile, machines: Cluster, strategy: str, seed: object
) -> None:
    options = PlanOptions(strategy=strategy)
    shuffled = list(machines.nodes)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    other = Cluster(nodes=tuple(shuffled), default_link=machines.default_link, links=machines.links)
    try:
        plan = make_plan(model, machines, options)
    except (Infeasible, InvalidInput):
        with pytest.raises((Infeasible, InvalidInput)):
            make_plan(model, other, options)
        return
    assert make_plan(model, other, options) == plan


@_SETTINGS
@given(model=models(), machines=clusters(), strategy=st.sampled_from(["greedy", "pipeline"]), data=st.data())
def test_a_replan_is_valid_and_its_moves_are_its_difference(
    model: ModelProfile, machines: Cluster, strategy: str, data: st.DataObject
) -> None:
    options = PlanOptions(strategy=strategy)
    try:
        plan = make_plan(model, machines, options)
    except (Infeasible, InvalidInput):
        return
    gone = data.draw(st.sampled_from(sorted(plan.allocation)))
    left = Cluster(
        nodes=tuple(node for node in machines.nodes if node.node_id != gone),
        default_link=machines.default_link,
        links=machines.links,
    )
    try:
        result = replan(plan, model, left, options)
    except (Infeasible, InvalidInput):
        with pytest.raises((Infeasible, InvalidInput)):
            make_plan(model, left, options)
        return
    before = {name: node_id for node_id, names in plan.allocation.items() for name in names}
    after = {name: node_id for node_id, names in result.plan.allocation.items() for name in names}
    moved = {name for name in after if after[name] != before[name]}
    assert {move.layer_name for move in result.moves} == moved
    assert all(move.source is None for move in result.moves if before[move.layer_name] == gone)
    assert result.moved_bytes == sum(move.size_bytes for move in result.moves)
    assert result.must_move_bytes <= result.moved_bytes
    assert result.objective_s <= result.best_objective_s * 1.05 * (1 + 1e-6)
