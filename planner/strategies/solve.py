"""How each strategy answers a problem: the nodes of all layers with a proven bound, or why there are none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from planner.errors import Infeasible, InvalidInput
from planner.explain.infeasible import infeasible
from planner.explain.reports import gib, seconds_text
from planner.greedy.hops import by_links, fewest_hops, hops
from planner.greedy.repair import repair
from planner.greedy.solver import solve
from planner.latency.detours import fastest
from planner.latency.solver import any_order_latency, in_order_latency, least_layers_s
from planner.pipeline.solver import in_order, solve_pipeline
from planner.problem.arrays import SLACK, Ints, Problem, build
from planner.problem.bounds import lower_bound_s
from planner.problem.counting import is_exact
from planner.problem.items import Answer, Found, Work, build_work
from planner.problem.ties import ways_to_tie

#: What a chain without detours may be slower than the best allocation, as a fraction.
NEARLY = 0.0005
#: One strategy's attempt.
Once = Callable[[Problem], Found]


def need_compute(problem: Problem) -> None:
    """Refuse a profile that says nothing of compute.

    Raises:
        InvalidInput: If no layer has any FLOP.
    """
    if not problem.flop.any():
        raise InvalidInput(
            f"the metadata of {problem.profile.model_name} states 0 FLOP for all {len(problem.flop)} layers; "
            "profile it with compute, or use strategy 'equal' or 'memory'",
            details={"total_compute": 0},
        )


def greedy_once(problem: Problem) -> Found:
    """Any layer anywhere."""
    if problem.options.objective == "latency":
        return _greedy_latency(problem)

    def solve_way(work: Work) -> Found:
        found = solve(work, problem.rate, budget_s=problem.options.time_budget_s)
        if found is None:
            thorough = problem.options.time_budget_s != math.inf
            return None, math.inf if is_exact(work) else lower_bound_s(work, thorough=thorough)
        return work.layers(found.assignment), found.lower_bound_s

    return _best_way(problem, solve_way)


def _best_way(problem: Problem, solve_way: Callable[[Work], Found]) -> Found:
    """The best over the ways to treat tied weights.

    A copy that costs nothing bounds all of them, so a plan of it that fits is the best. Else the least of the bounds
    of all ways holds; ways whose bound alone is no better than what is found are not solved.
    """
    nodes, bound = solve_way(build_work(problem))
    if not (problem.tied_to >= 0).any() or math.isinf(bound) or (nodes is not None and problem.fits(nodes)):
        return nodes, bound
    ways, complete = ways_to_tie(problem)
    works = [work for way in ways if (work := build_work(problem, way)) is not None]
    floors = [lower_bound_s(work, thorough=False) for work in works]
    best: Ints | None = None
    least, rank = math.inf, (math.inf, math.inf)
    for at in sorted(range(len(works)), key=lambda at: (floors[at], at)):
        if floors[at] >= rank[0]:
            least = min(least, floors[at])
            break
        nodes, way_bound = solve_way(works[at])
        least = min(least, max(floors[at], way_bound))
        if nodes is not None and problem.fits(nodes) and _rank(problem, nodes) < rank:
            best, rank = nodes, _rank(problem, nodes)
    return best, max(bound, least) if complete else bound


def _rank(problem: Problem, nodes: Ints) -> tuple[float, float]:
    """What is better is less: the objective, or nodes used where there is a time budget."""
    if problem.options.objective == "latency":
        return problem.latency_s(nodes), 0.0
    seconds = problem.bottleneck_s(nodes)
    return (seconds, 0.0) if problem.options.time_budget_s is None else (float(len(np.unique(nodes))), seconds)


def shortest_chain(problem: Problem, nodes: Ints) -> Ints:
    """Nodes as fast as `nodes` with fewer hops: equal layers exchanged, or contiguous stages that are nearly as fast.

    Layers of several kinds leave little to exchange; then a chain that loses less than `NEARLY` is the better plan.
    """
    best = fewest_hops(problem, nodes)
    used = len(np.unique(best))
    if hops(best) < used:
        return best
    seconds = problem.bottleneck_s(nodes)
    work = build_work(problem, "copied")
    assert work is not None
    if in_order(problem, work) is None and len(problem.nodes) * len(problem.kind) > 10_000:
        return best  # contiguous stages would take longer to find than all the rest
    several = hops(best) > 1.5 * (used - 1)
    slowest = min(seconds * (1 + NEARLY), max(seconds, problem.options.time_budget_s or math.inf))
    most = len(problem.nodes) if problem.options.time_budget_s is None else used
    for limit in (seconds, slowest) if several else (seconds,):
        staged, _ = solve_pipeline(problem, budget_s=limit * (1 + SLACK))
        if staged is not None and problem.fits(staged) and problem.bottleneck_s(staged) <= limit * (1 + 2 * SLACK):
            return staged if hops(staged) < hops(best) and len(np.unique(staged)) <= most else best
    alike = len(np.unique(problem.kind)) <= len(problem.kind) / 2
    if not several or not alike or len(work.kind) != len(work.layer) or work.followers:
        return best
    # The best contiguous stages, with as few layers moved as bring the slowest nodes down to the same time.
    staged, _ = solve_pipeline(problem)
    if staged is None:
        return best
    repaired = repair(work, staged[work.layer], seconds, steps=400)
    if repaired is None:
        return best
    repaired = fewest_hops(problem, work.layers(repaired))
    if problem.fits(repaired) and problem.bottleneck_s(repaired) <= seconds * (1 + 2 * SLACK):
        return repaired if hops(repaired) < hops(best) and len(np.unique(repaired)) <= most else best
    return best


def _greedy_latency(problem: Problem) -> Found:
    """Hops cost time, so contiguous stages are candidates as well as any layer anywhere."""
    budget = problem.options.time_budget_s or math.inf
    nodes, bound = _best_way(problem, lambda work: any_order_latency(problem, work, budget))
    if math.isinf(bound):
        return None, bound
    staged, _ = pipeline_once(problem)
    packed, packed_bound = (None, 0.0) if nodes is not None else _on_the_fastest(problem)
    if math.isinf(packed_bound):
        return None, packed_bound
    candidates = [found for found in (nodes, staged, packed) if found is not None]
    arranged = [by_links(problem, fewest_hops(problem, found)) for found in candidates] + candidates
    return fastest(problem, arranged, bound)


def _on_the_fastest(problem: Problem) -> Found:
    """The best for throughput on as few of the fastest nodes as hold the model with a tenth to spare, or on all."""
    order = np.argsort(-problem.rate, kind="stable")
    held = np.cumsum(problem.capacity[order])
    many = int(np.searchsorted(held, 1.1 * float(problem.memory.sum()))) + 1
    needed = set(problem.pinned.tolist())
    slow = {problem.nodes[node].node_id for node in order[many:].tolist() if node not in needed}
    options = dataclasses.replace(problem.options, objective="throughput")
    if slow:
        inner = dataclasses.replace(options, exclude=options.exclude | slow)
        few = build(problem.profile, problem.cluster, inner)
        nodes, _ = greedy_once(few)
        if nodes is not None and few.fits(nodes):
            return np.array([problem.index_of[node_id] for node_id in few.node_ids], dtype=np.int64)[nodes], 0.0
    return greedy_once(dataclasses.replace(problem, options=options))


def pipeline_once(problem: Problem) -> Found:
    """Contiguous stages."""
    budget = problem.options.time_budget_s
    if problem.options.objective == "latency":
        return in_order_latency(problem, math.inf if budget is None else budget)
    return solve_pipeline(problem, budget_s=budget)


def attempt(problem: Problem, once: Once) -> Answer | bool:
    """One strategy's answer; without one, whether it is proven that there is none."""
    if problem.memory.sum() > problem.capacity.sum() or problem.memory.max() > problem.capacity.max():
        return True
    nodes, bound = once(problem)
    budget = problem.options.time_budget_s
    if nodes is None or not problem.fits(nodes):
        return math.isinf(bound)
    seconds = problem.bottleneck_s(nodes)
    if budget is not None and seconds > budget * (1 + 2 * SLACK):
        return math.isinf(bound)
    value = problem.latency_s(nodes) if problem.options.objective == "latency" else seconds
    return Answer(nodes=nodes, lower_bound_s=min(bound, value))


def best_answer(problem: Problem, strategy: str, once: Once) -> Answer:
    """The best answer of a strategy.

    Raises:
        Infeasible: If it finds none; says whether that is proven, what binds and what would help.
    """
    need_compute(problem)
    best = attempt(problem, once)
    fastest: float | None = None
    if not isinstance(best, Answer) and problem.options.time_budget_s is not None:
        options = dataclasses.replace(problem.options, time_budget_s=None, objective="throughput")
        unlimited = attempt(dataclasses.replace(problem, options=options), once)
        if not isinstance(unlimited, Answer):
            best = unlimited
        else:
            fastest = problem.bottleneck_s(unlimited.nodes)
            if fastest <= problem.options.time_budget_s * (1 + SLACK):
                bound = least_layers_s(problem) if problem.options.objective == "latency" else unlimited.lower_bound_s
                best = Answer(nodes=unlimited.nodes, lower_bound_s=bound)
    if isinstance(best, Answer):
        if problem.options.time_budget_s is not None and problem.options.objective == "throughput":
            return _balanced(problem, best, once)
        return best

    def solver(changed: Problem) -> Ints | None:
        answer = attempt(changed, once)
        return answer.nodes if isinstance(answer, Answer) else None

    raise infeasible(problem, solver, strategy=strategy, proven=best, fastest_s=fastest)


def _balanced(problem: Problem, answer: Answer, once: Once) -> Answer:
    """The fewest nodes are chosen; now the smallest bottleneck that just these can have, and its bound."""
    chosen = np.unique(answer.nodes).tolist()
    unused = {node.node_id for at, node in enumerate(problem.nodes) if at not in set(chosen)}
    options = dataclasses.replace(
        problem.options, time_budget_s=None, exclude=problem.options.exclude | frozenset(unused)
    )
    inner = build(problem.profile, problem.cluster, options)
    best = attempt(inner, once)
    if not isinstance(best, Answer) or inner.bottleneck_s(best.nodes) > problem.bottleneck_s(answer.nodes):
        bound = lower_bound_s(build_work(inner))
        return Answer(nodes=answer.nodes, lower_bound_s=min(bound, problem.bottleneck_s(answer.nodes)))
    return Answer(nodes=np.array(chosen, dtype=np.int64)[best.nodes], lower_bound_s=best.lower_bound_s)


def baseline(problem: Problem, strategy: str, nodes: Ints) -> Answer:
    """The answer of a rule that has already decided, if it is valid.

    Raises:
        Infeasible: If a node is over its memory, its share or the time budget.
    """
    if not problem.fits(nodes):
        raise _overfull(problem, strategy, nodes)
    seconds = problem.bottleneck_s(nodes)
    budget = problem.options.time_budget_s
    if budget is not None and seconds > budget * (1 + SLACK):
        raise Infeasible(
            f"{strategy} takes {seconds_text(seconds)} on its slowest node, the budget is {seconds_text(budget)}",
            details={"limit": "compute", "time_budget_s": budget, "needed_time_budget_s": seconds},
        )
    work = build_work(problem)
    if problem.options.objective == "latency":
        return Answer(nodes=nodes, lower_bound_s=any_order_latency(problem, work, math.inf)[1])
    return Answer(nodes=nodes, lower_bound_s=min(seconds, lower_bound_s(work)))


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
