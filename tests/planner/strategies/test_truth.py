"""Plans against the truth: every way tried on thousands of small cases, an independent MILP on larger ones."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from support import planning
from support.depth import some

from planner.cluster import Cluster, Link
from planner.errors import Infeasible
from planner.plan import Objective, Phase, Plan, PlanOptions
from planner.problem.arrays import Floats, Ints
from planner.profile import ModelProfile
from planner.replan.replanner import replan
from planner.strategies.make import make_plan

_BLOCK = 25


def _objective(plan: Plan) -> float:
    return plan.predicted.bottleneck_s if plan.objective == "throughput" else plan.predicted.latency_s


def _check(model: ModelProfile, machines: Cluster, options: PlanOptions) -> None:
    truth = planning.best(model, machines, options, contiguous=options.strategy == "pipeline")
    plan = planning.outcome(model, machines, options)
    if not isinstance(plan, Plan):
        assert isinstance(plan, Infeasible), plan
        assert truth == math.inf, f"refused what fits with {truth}: {plan}"
        return
    value = _objective(plan)
    assert plan.predicted.lower_bound_s <= truth * (1 + 1e-9), "the bound does not hold"
    assert value >= truth * (1 - 1e-9), "better than the best: the prediction is wrong"
    assert value <= truth * (1 + 1e-6), "not the best"
    if plan.predicted.exact:
        assert value <= truth * (1 + 1e-6), "called exact and is not"
    ids = {name: node_id for node_id, names in plan.allocation.items() for name in names}
    at = {node.node_id: position for position, node in enumerate(machines.nodes)}
    nodes = [at[ids[layer.name]] for layer in model.layers]
    assert planning.is_valid(model, machines, options, nodes)
    seconds = planning.layer_seconds(model, machines, options)
    assert math.isclose(plan.predicted.bottleneck_s, planning.bottleneck_s(seconds, nodes), rel_tol=1e-9)
    latency = planning.latency_s(model, machines, options, seconds, nodes)
    if options.phase == "prefill":  # a decode hop's bytes are rounded up to whole ones in the chain
        assert math.isclose(plan.predicted.latency_s, latency, rel_tol=1e-9)


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("runs", [True, False], ids=["runs", "different"])
@pytest.mark.parametrize("block", some(range(10), shallow=range(3)))
def test_the_bottleneck_is_the_smallest_there_is(strategy: str, phase: Phase, runs: bool, block: int) -> None:
    for seed in range(block * _BLOCK, (block + 1) * _BLOCK):
        model, machines = planning.random_case(seed, runs=runs)
        _check(model, machines, PlanOptions(strategy=strategy, phase=phase))


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("runs", [True, False], ids=["runs", "different"])
@pytest.mark.parametrize("block", some(range(10), shallow=range(3)))
def test_one_request_takes_the_least_time_there_is(strategy: str, runs: bool, block: int) -> None:
    objective: Objective = "latency"
    for seed in range(block * _BLOCK, (block + 1) * _BLOCK):
        model, machines = planning.random_case(seed, runs=runs)
        _check(model, machines, PlanOptions(strategy=strategy, objective=objective))


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("block", some(range(6), shallow=range(2)))
def test_one_request_takes_the_least_time_within_a_budget_links_pins_and_shares(strategy: str, block: int) -> None:
    for seed in range(block * _BLOCK, (block + 1) * _BLOCK):
        model, machines = planning.random_case(seed, layers=7, runs=seed % 2 == 0)
        draw = random.Random(seed)
        ids = [node.node_id for node in machines.nodes]
        machines = dataclasses.replace(
            machines,
            links={
                (a, b): Link(latency_s=draw.choice([0.0, 0.1, 3.0]), bytes_per_s=draw.choice([None, 8.0, 80.0]))
                for a in ids
                for b in ids
                if a != b and draw.random() < 0.5
            },
        )
        options = PlanOptions(
            strategy=strategy,
            pins={draw.choice(model.layers).name: draw.choice(ids)} if draw.random() < 0.4 else {},
            max_compute_share={draw.choice(ids): draw.choice([0.3, 0.6])} if draw.random() < 0.3 else {},
        )
        fastest = planning.best(model, machines, options, contiguous=strategy == "pipeline")
        if math.isinf(fastest):
            continue
        budget = fastest * draw.choice([1.0, 1.1, 1.5, 3.0])
        _check(model, machines, dataclasses.replace(options, objective="latency", time_budget_s=budget))


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("block", some(range(6), shallow=range(2)))
def test_constraints_of_the_user_do_not_cost_more_than_they_must(strategy: str, block: int) -> None:
    for seed in range(block * _BLOCK, (block + 1) * _BLOCK):
        model, machines = planning.random_case(seed, runs=seed % 2 == 0)
        draw = random.Random(seed)
        ids = [node.node_id for node in machines.nodes]
        pins = {}
        if draw.random() < 0.6:
            pins = {draw.choice(model.layers).name: draw.choice(ids) for _ in range(draw.randint(1, 2))}
        others = [node_id for node_id in ids if node_id not in pins.values()]
        options = PlanOptions(
            strategy=strategy,
            pins=pins,
            exclude=frozenset(others[:1]) if len(ids) > 1 and draw.random() < 0.3 else frozenset(),
            max_memory_share={draw.choice(ids): draw.choice([0.5, 0.9])} if draw.random() < 0.5 else {},
            max_compute_share={draw.choice(ids): draw.choice([0.2, 0.5, 0.8])} if draw.random() < 0.5 else {},
            reserve_bytes=draw.choice([0, 0, 1]),
        )
        _check(model, machines, options)


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("seed", some(range(40), shallow=range(16)))
def test_a_time_budget_is_met_with_the_fewest_nodes(strategy: str, seed: int) -> None:
    model, machines = planning.random_case(seed, runs=True)
    draw = random.Random(seed)
    least = planning.best(model, machines, PlanOptions(), contiguous=strategy == "pipeline")
    if math.isinf(least):
        return
    budget = least * draw.choice([1.0, 1.3, 2.0, 5.0])
    options = PlanOptions(strategy=strategy, time_budget_s=budget)
    seconds = planning.layer_seconds(model, machines, options)
    fewest = min(
        len(set(nodes))
        for nodes in planning.assignments(model, machines, contiguous=strategy == "pipeline")
        if planning.is_valid(model, machines, options, nodes)
        and planning.bottleneck_s(seconds, nodes) <= budget * (1 + 1e-9)
    )
    plan = make_plan(model, machines, options)
    assert plan.predicted.bottleneck_s <= budget * (1 + 1e-8)
    assert plan.time_budget_s == pytest.approx(budget)
    assert len(plan.allocation) == fewest


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("block", some(range(6), shallow=range(2)))
def test_an_encoder_and_decoder_that_share_weights_are_planned_exactly(
    strategy: str, objective: Objective, block: int
) -> None:
    for seed in range(block * _BLOCK, (block + 1) * _BLOCK):
        model, machines = planning.encoder_decoder_case(seed)
        options = PlanOptions(strategy=strategy, objective=objective)
        _check(model, machines, options)


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
@pytest.mark.parametrize("block", some(range(4), shallow=range(2)))
def test_what_fits_in_a_time_budget_is_never_refused(strategy: str, block: int) -> None:
    for seed in range(block * _BLOCK, (block + 1) * _BLOCK):
        model, machines = planning.encoder_decoder_case(seed)
        least = planning.best(model, machines, PlanOptions(), contiguous=strategy == "pipeline")
        draw = random.Random(seed)
        for budget in (least * draw.choice([1.0, 1.0 + 1e-12]), least * draw.uniform(1.0, 3.0), least * 0.99):
            if math.isinf(budget):
                continue
            options = PlanOptions(strategy=strategy, time_budget_s=budget)
            plan = planning.outcome(model, machines, options)
            if budget < least:
                assert isinstance(plan, Infeasible)
                assert plan.details["needed_time_budget_s"] == pytest.approx(least)
                continue
            seconds = planning.layer_seconds(model, machines, options)
            assert isinstance(plan, Plan), plan
            assert len(plan.allocation) == min(
                len(set(nodes))
                for nodes in planning.assignments(model, machines, contiguous=strategy == "pipeline")
                if planning.is_valid(model, machines, options, nodes)
                and planning.bottleneck_s(seconds, nodes) <= budget * (1 + 1e-9)
            )


@pytest.mark.parametrize("strategy", ["greedy", "pipeline"])
def test_no_plan_within_the_tolerance_moves_less_than_what_must_move(strategy: str) -> None:
    tried, least_found = 0, 0
    for seed in range(300):
        model, machines = planning.random_case(seed, runs=seed % 2 == 0)
        options = PlanOptions(strategy=strategy)
        if len(machines.nodes) < 3:
            continue
        plan = planning.outcome(model, machines, options)
        if not isinstance(plan, Plan):
            continue
        gone = min(plan.allocation)
        left = dataclasses.replace(machines, nodes=tuple(n for n in machines.nodes if n.node_id != gone))
        try:
            result = replan(plan, model, left, options, tolerance=0.2)
        except Infeasible:
            continue
        ids = [node.node_id for node in left.nodes]
        holder = {name: node_id for node_id, names in plan.allocation.items() for name in names}
        seconds = planning.layer_seconds(model, left, options)
        moved = [
            planning.moved_bytes(
                model, holder, {layer.name: ids[at] for layer, at in zip(model.layers, nodes, strict=True)}
            )
            for nodes in planning.assignments(model, left, contiguous=strategy == "pipeline")
            if planning.is_valid(model, left, options, nodes)
            and planning.bottleneck_s(seconds, nodes) <= result.best_objective_s * 1.2 * (1 + 1e-9)
        ]
        tried += 1
        taken = {name: node_id for node_id, names in result.plan.allocation.items() for name in names}
        assert result.moved_bytes == planning.moved_bytes(model, holder, taken)
        least_found += result.moved_bytes <= min(moved)
        assert result.must_move_bytes <= min(moved) <= result.moved_bytes
    assert tried > 20
    assert least_found > 0.8 * tried, "the fewest bytes are nearly always found on small cases"


def _milp_fewest(seconds: Floats, sizes: Ints, room: Ints, budget_s: float) -> int:
    """The fewest nodes within a budget by HiGHS: least sum u, sum x = 1, loads <= budget * u, bytes <= room * u."""
    nodes, layers = seconds.shape
    cost = np.append(np.zeros(nodes * layers), np.ones(nodes))
    once = np.hstack([np.tile(np.eye(layers), nodes), np.zeros((layers, nodes))])
    load = np.hstack([np.kron(np.eye(nodes), np.ones(layers)) * seconds.ravel(), -budget_s * np.eye(nodes)])
    held = np.hstack([np.kron(np.eye(nodes), sizes), -np.diag(room)])
    result = milp(
        cost,
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(load, -np.inf, 0),
            LinearConstraint(held, -np.inf, 0),
        ],
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"time_limit": 60},
    )
    assert result.status == 0, result.message
    return round(float(result.fun))


@pytest.mark.parametrize("seed", some(range(24), shallow=range(10)))
def test_a_time_budget_takes_as_few_nodes_as_an_independent_milp_where_layers_are_all_different(seed: int) -> None:
    draw = random.Random(seed)
    count, machines_count = draw.randint(10, 20), draw.randint(3, 7)
    flop = [draw.randint(20, 500) for _ in range(count)]
    sizes = [draw.randint(1, 100) for _ in range(count)]
    room = [int(sum(sizes) * draw.choice([0.15, 0.2, 0.3, 0.5, 0.7, 1.0])) for _ in range(machines_count)]
    model = planning.profile(flop, sizes)
    machines = planning.cluster([draw.choice([100, 200, 400, 50 * draw.randint(1, 16)]) for _ in room], room)
    try:
        fastest = make_plan(model, machines).predicted.bottleneck_s
    except Infeasible:
        return
    budget = fastest * draw.choice([1.05, 1.2, 1.5, 2.0, 4.0])
    plan = make_plan(model, machines, PlanOptions(time_budget_s=budget))
    seconds = np.array(planning.layer_seconds(model, machines, PlanOptions()))
    assert plan.predicted.bottleneck_s <= budget * (1 + 1e-8)
    assert len(plan.allocation) == _milp_fewest(seconds, np.array(sizes), np.array(room), budget * (1 + 1e-9))


def _milp_bottleneck(seconds: Floats, sizes: Ints, room: Ints) -> float:
    """The smallest bottleneck of any layer anywhere by HiGHS: minimise T, sum x = 1, loads <= T, bytes <= room."""
    nodes, layers = seconds.shape
    variables = nodes * layers + 1
    cost = np.zeros(variables)
    cost[-1] = 1.0
    once = np.zeros((layers, variables))
    load = np.zeros((nodes, variables))
    held = np.zeros((nodes, variables))
    for node in range(nodes):
        for layer in range(layers):
            once[layer, node * layers + layer] = 1
            load[node, node * layers + layer] = seconds[node, layer]
            held[node, node * layers + layer] = sizes[layer]
        load[node, -1] = -1
    result = milp(
        cost,
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(load, -np.inf, 0),
            LinearConstraint(held, -np.inf, room),
        ],
        integrality=np.append(np.ones(variables - 1), 0),
        bounds=Bounds(0, np.append(np.ones(variables - 1), np.inf)),
        options={"mip_rel_gap": 1e-9, "time_limit": 60},
    )
    assert result.status in (0, 2), result.message
    return float(result.fun) if result.status == 0 else math.inf


@pytest.mark.parametrize("seed", some(range(14), shallow=range(6)))
def test_greedy_equals_an_independent_milp(seed: int) -> None:
    draw = random.Random(1000 + seed)
    count, machines_count = draw.randint(8, 14), draw.randint(3, 4)
    common = (draw.randint(4, 9), draw.randint(2, 5))
    costs = [(2, 9), *[common] * (count - 2), (draw.randint(8, 25), 9)]
    room = [draw.randint(4, 40) for _ in range(machines_count)]
    model = planning.profile([f for f, _ in costs], [b for _, b in costs])
    machines = planning.cluster([draw.randint(1, 20) for _ in range(machines_count)], room)
    seconds = np.array(planning.layer_seconds(model, machines, PlanOptions()))
    truth = _milp_bottleneck(seconds, np.array([b for _, b in costs]), np.array(room))
    try:
        plan = make_plan(model, machines)
    except Infeasible:
        assert math.isinf(truth)
        return
    assert plan.predicted.bottleneck_s == pytest.approx(truth, rel=1e-6)
    assert plan.predicted.lower_bound_s <= truth * (1 + 1e-6)
    assert plan.predicted.exact
