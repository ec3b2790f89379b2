"""From a profile and a cluster to an accepted plan: one function a strategy, one dict of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from planner.arrange import by_links, fewest_hops
from planner.baselines import by_memory, equal_parts
from planner.bounds import lower_bound_s
from planner.cluster import Cluster
from planner.diagnose import infeasible
from planner.errors import Infeasible, InvalidInput
from planner.greedy import is_exact, solve
from planner.megaphone import megaphone, runs
from planner.pipeline import solve_pipeline
from planner.placement import Answer, Found, Ties, Work, build_work
from planner.plan import Plan, PlanOptions, Prediction, plan_id
from planner.problem import SLACK, Ints, Problem, build
from planner.profile import ModelProfile
from planner.reports import gib, node_reports, seconds_text
from planner.shortest import any_order_latency, in_order_latency

Strategy = Callable[[Problem], Answer]


def greedy(problem: Problem) -> Answer:
    """Layers by compute, most first, each to the node with most available compute; any layer anywhere."""
    _need_compute(problem)
    answer = _best(problem, "greedy", _greedy_once)
    if problem.options.objective == "latency":
        return answer
    return dataclasses.replace(answer, nodes=by_links(problem, fewest_hops(problem, answer.nodes)))


def pipeline(problem: Problem) -> Answer:
    """Contiguous stages, node order free."""
    _need_compute(problem)
    answer = _best(problem, "pipeline", _pipeline_once)
    if problem.options.objective == "latency":
        return answer
    return dataclasses.replace(answer, nodes=by_links(problem, answer.nodes))


def equal(problem: Problem) -> Answer:
    """The same number of layers for every node; a baseline."""
    return _baseline(problem, "equal", equal_parts(problem))


def memory(problem: Problem) -> Answer:
    """Layers in proportion to memory; a baseline."""
    return _baseline(problem, "memory", by_memory(problem))


STRATEGIES: Mapping[str, Strategy] = {"greedy": greedy, "pipeline": pipeline, "equal": equal, "memory": memory}


def _need_compute(problem: Problem) -> None:
    if not problem.flop.any():
        raise InvalidInput(
            f"the metadata of {problem.profile.model_name} states 0 FLOP for all {len(problem.flop)} layers; "
            "profile it with compute, or use strategy 'equal' or 'memory'",
            details={"total_compute": 0},
        )


def _greedy_once(problem: Problem, ties: Ties) -> Found:
    work = build_work(problem, ties)
    if work is None:
        return None, math.inf
    budget = problem.options.time_budget_s
    if problem.options.objective == "latency":
        return _greedy_latency(problem, work, ties)
    found = solve(work, problem.rate, budget_s=budget)
    if found is None:
        return None, math.inf if is_exact(work) else lower_bound_s(work)
    return work.layers(found.assignment), found.lower_bound_s


def _greedy_latency(problem: Problem, work: Work, ties: Ties) -> Found:
    """Hops cost time, so contiguous stages are candidates as well as any layer anywhere."""
    budget = problem.options.time_budget_s or math.inf
    nodes, bound = any_order_latency(problem, work, budget)
    staged, _ = _pipeline_once(problem, ties)
    candidates = [found for found in (nodes, staged) if found is not None]
    if not candidates:
        return None, bound
    arranged = [by_links(problem, fewest_hops(problem, found)) for found in candidates] + candidates
    fitting = [found for found in arranged if problem.fits(found)] or arranged
    return min(fitting, key=problem.latency_s), bound


def _pipeline_once(problem: Problem, ties: Ties) -> Found:
    if ties == "together":
        return _whole(problem)
    work = build_work(problem, ties)
    if work is None:
        return None, math.inf
    held = problem.memory + (problem.tied_bytes if ties == "copied" else 0)
    budget = problem.options.time_budget_s
    if problem.options.objective == "latency":
        return in_order_latency(problem, work, held, math.inf if budget is None else budget)
    return solve_pipeline(problem, work, held, budget_s=budget)


def _whole(problem: Problem) -> Found:
    """Everything on the one node that is fastest at it, if any can hold it."""
    best: tuple[float, int] | None = None
    for node in range(len(problem.nodes)):
        nodes = np.full(len(problem.kind), node, dtype=np.int64)
        if problem.fits(nodes):
            seconds = problem.bottleneck_s(nodes)
            if best is None or seconds < best[0]:
                best = (seconds, node)
    return (None, math.inf) if best is None else (np.full(len(problem.kind), best[1], dtype=np.int64), best[0])


def _best(problem: Problem, strategy: str, once: Callable[[Problem, Ties], Found]) -> Answer:
    """The best over the ways to treat tied weights.

    A copy that costs nothing bounds all of them, so a plan of it that fits is the best. Else a layer and the owner
    of its weights are apart, each with a copy, or together: the better of both bounds is valid too.
    """
    budget = problem.options.time_budget_s
    latency = problem.options.objective == "latency"
    tied = np.flatnonzero(problem.tied_to >= 0)
    bounds: dict[Ties, float] = {}
    best: tuple[float, Ints] | None = None
    ways: tuple[Ties, ...] = ("shared", "copied", "together") if len(tied) else ("shared",)
    for way in ways:
        nodes, bounds[way] = once(problem, way)
        if nodes is not None and problem.fits(nodes):
            seconds = problem.bottleneck_s(nodes)
            value = problem.latency_s(nodes) if latency else seconds
            in_time = budget is None or seconds <= budget * (1 + 2 * SLACK)
            if in_time and (best is None or value < best[0] * (1 - SLACK)):
                best = (value, nodes)
            if way == "shared" and in_time:  # nothing can be better
                break
        if way == "shared" and math.isinf(bounds[way]):
            break
    bound = bounds["shared"]
    if len(tied) == 1 and len(bounds) == 3:
        bound = max(bound, min(bounds["copied"], bounds["together"]))
    if best is not None:
        return Answer(nodes=best[1], lower_bound_s=min(bound, best[0]))
    if budget is None:
        raise infeasible(problem, strategy=strategy, proven=math.isinf(bound))
    unlimited = dataclasses.replace(
        problem, options=dataclasses.replace(problem.options, time_budget_s=None, objective="throughput")
    )
    answer = _best(unlimited, strategy, once)
    raise infeasible(
        problem, strategy=strategy, bottleneck_s=problem.bottleneck_s(answer.nodes), proven=math.isinf(bound)
    )


def _baseline(problem: Problem, strategy: str, nodes: Ints) -> Answer:
    if not problem.fits(nodes):
        raise _overfull(problem, strategy, nodes)
    seconds = problem.bottleneck_s(nodes)
    budget = problem.options.time_budget_s
    if budget is not None and seconds > budget * (1 + SLACK):
        raise infeasible(problem, strategy=strategy, bottleneck_s=seconds)
    work = build_work(problem)
    return Answer(nodes=nodes, lower_bound_s=min(seconds, lower_bound_s(work) if work is not None else 0.0))


def _overfull(problem: Problem, strategy: str, nodes: Ints) -> Infeasible:
    used = problem.memory_used(nodes)
    worst = int(np.argmax(used - problem.capacity))
    node_id = problem.nodes[worst].node_id
    over = int(used[worst] - problem.capacity[worst])
    if over <= 0:
        return Infeasible(f"{strategy} gives a node more than its share of the compute", details={"limit": "share"})
    return Infeasible(
        f"{strategy} puts {gib(int(used[worst]))} on {node_id}, which has {gib(int(problem.capacity[worst]))}",
        details={
            "limit": "memory",
            "node_id": node_id,
            "needed_bytes": int(used[worst]),
            "usable_bytes": int(problem.capacity[worst]),
            "missing_bytes": over,
        },
    )


def make_plan(
    profile: ModelProfile,
    cluster: Cluster,
    options: PlanOptions = PlanOptions(),  # noqa: B008  (frozen)
    *,
    generated_at: str | None = None,
) -> Plan:
    """Plan `profile` on `cluster`.

    Args:
        profile: The model at the batch size and sequence length to plan for (`profile.at(...)` gives another).
        cluster: Nodes and links.
        options: What the user asks.
        generated_at: Time stamp to put into the plan; no part of its id.

    Raises:
        InvalidInput: If the request makes no sense (no layers, no nodes, names that do not exist, bad numbers).
        Infeasible: If no plan exists; `details` has the binding limit and its numbers.
    """
    strategy = STRATEGIES.get(options.strategy)
    if strategy is None:
        raise InvalidInput(
            f"strategy must be one of {', '.join(STRATEGIES)}, got {options.strategy!r}",
            details={"field": "strategy", "known": list(STRATEGIES)},
        )
    problem = build(profile, cluster, options)
    return accept(problem, strategy(problem), generated_at=generated_at)


def plan_for(
    profile: ModelProfile,
    cluster: Cluster,
    options: PlanOptions,
    allocation: Mapping[str, tuple[int, ...]],
    *,
    generated_at: str | None = None,
) -> Plan:
    """The plan of a given allocation (imported, edited), if it is valid on this cluster.

    Args:
        profile: The model.
        cluster: Nodes and links.
        options: As for `make_plan`; `strategy` is only the plan's name for where it came from.
        allocation: node_id -> indices of the layers it holds.
        generated_at: As for `make_plan`.

    Raises:
        InvalidInput: If a layer is missing or there twice, or a node is unknown.
        Infeasible: If a node is over its memory, its share or the time budget.
    """
    problem = build(profile, cluster, options)
    nodes = np.full(len(profile.layers), -1, dtype=np.int64)
    for node_id, indices in sorted(allocation.items()):
        if indices and node_id not in problem.index_of:
            why = problem.left_out.get(node_id, ("", "it is not in the cluster"))[1]
            raise InvalidInput(f"node {node_id!r} cannot hold layers: {why}", details={"node_id": node_id})
        for index in indices:
            if not 0 <= index < len(nodes) or nodes[index] >= 0:
                raise InvalidInput(
                    f"layer {index} of {len(nodes)} is on {node_id!r} and on another node, or does not exist",
                    details={"layer": index, "node_id": node_id},
                )
            nodes[index] = problem.index_of[node_id]
    missing = [profile.layers[index].name for index in np.flatnonzero(nodes < 0).tolist()]
    if missing:
        raise InvalidInput(
            f"{len(missing)} layers are on no node: {', '.join(missing[:3])}...", details={"layers": missing[:100]}
        )
    moved = np.flatnonzero((problem.pinned >= 0) & (problem.pinned != nodes))
    if len(moved):
        layer = profile.layers[int(moved[0])].name
        raise InvalidInput(f"layer {layer!r} is pinned to another node", details={"field": "pins", "layer": layer})
    return accept(problem, _baseline(problem, options.strategy, nodes), generated_at=generated_at)


def accept(problem: Problem, answer: Answer, *, generated_at: str | None = None) -> Plan:
    """Check an answer's invariants and state it as a plan, with its prediction, reports and chain."""
    profile, options, nodes = problem.profile, problem.options, answer.nodes
    if len(nodes) != len(profile.layers) or not problem.fits(nodes):
        raise AssertionError("a plan must hold each layer exactly once, no node over its memory or share")
    bottleneck = problem.bottleneck_s(nodes)
    budget = bottleneck if options.time_budget_s is None else options.time_budget_s
    if bottleneck > budget * (1 + 4 * SLACK):
        raise AssertionError(f"a node takes {seconds_text(bottleneck)}, over the budget of {seconds_text(budget)}")
    held = [np.flatnonzero(nodes == node) for node in np.unique(nodes)]
    indices = {problem.nodes[int(nodes[part[0]])].node_id: tuple(part.tolist()) for part in held}
    names = {
        node_id: tuple(profile.layers[index].name for index in part) for node_id, part in sorted(indices.items())
    }
    identity = plan_id(model_name=profile.model_name, revision=profile.revision, unit=profile.unit, allocation=names)
    stages = runs(profile, indices)
    layer_s = problem.seconds[nodes, problem.kind]
    chain = megaphone(
        profile,
        problem.cluster,
        stages,
        plan_id=identity,
        phase=options.phase,
        compute_s=[float(layer_s[stage.start : stage.end].sum()) for stage in stages],
    )
    latency = float(layer_s.sum()) + sum(hop.transfer_s for hop in chain.chain)
    objective = bottleneck if options.objective == "throughput" else latency
    bound = min(answer.lower_bound_s, objective)
    return Plan(
        plan_id=identity,
        model_name=profile.model_name,
        revision=profile.revision,
        model_type=profile.model_type,
        unit=profile.unit,
        strategy=options.strategy,
        objective=options.objective,
        phase=options.phase,
        batch_size=profile.batch_size,
        sequence_length=profile.sequence_length,
        time_budget_s=max(budget, bottleneck),
        total_compute=float(problem.flop.sum()),
        total_layers=len(profile.layers),
        allocation=names,
        stages=stages,
        predicted=Prediction(
            bottleneck_s=bottleneck,
            latency_s=latency,
            lower_bound_s=bound,
            gap=objective / bound - 1 if bound > 0 else 0.0,
            exact=objective <= bound * (1 + 1e-7),
        ),
        nodes=node_reports(problem, nodes, max(budget, bottleneck)),
        megaphone=chain,
        generated_at=generated_at,
    )
