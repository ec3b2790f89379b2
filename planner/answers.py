"""How each strategy answers a problem: the nodes of all layers with a proven bound, or why there are none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from planner.arrange import by_links, fewest_hops, hops
from planner.bounds import lower_bound_s
from planner.diagnose import infeasible
from planner.errors import Infeasible, InvalidInput
from planner.greedy import is_exact, solve
from planner.pipeline import in_order, solve_pipeline
from planner.placement import Answer, Found, Ties, Work, build_work
from planner.problem import SLACK, Ints, Problem, build
from planner.refine import refine
from planner.reports import gib, seconds_text
from planner.shortest import any_order_latency, in_order_latency

#: What a chain without detours may be slower than the best allocation, as a fraction.
NEARLY = 0.0005
#: One strategy's attempt under one treatment of tied weights.
Once = Callable[[Problem, Ties], Found]


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


def greedy_once(problem: Problem, ties: Ties) -> Found:
    """Any layer anywhere."""
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
    if work is None or (in_order(work) is None and len(problem.nodes) * len(problem.kind) > 10_000):
        return best  # contiguous stages would take longer to find than all the rest
    held = problem.memory + problem.tied_bytes
    several = hops(best) > 1.5 * (used - 1)
    slowest = min(seconds * (1 + NEARLY), max(seconds, problem.options.time_budget_s or math.inf))
    for limit in (seconds, slowest) if several else (seconds,):
        staged, _ = solve_pipeline(problem, work, held, budget_s=limit * (1 + SLACK))
        if staged is not None and problem.fits(staged) and problem.bottleneck_s(staged) <= limit * (1 + 2 * SLACK):
            return staged if hops(staged) < hops(best) else best
    alike = len(np.unique(problem.kind)) <= len(problem.kind) / 2
    if not several or not alike or len(work.kind) != len(work.layer) or work.followers:
        return best
    # The best contiguous stages, with as few layers moved as bring the slowest nodes down to the same time.
    staged, _ = solve_pipeline(problem, work, held)
    if staged is None:
        return best
    mended = work.layers(refine(work, staged[work.layer], target_s=seconds * (1 + SLACK)))
    mended = fewest_hops(problem, mended)
    if problem.fits(mended) and problem.bottleneck_s(mended) <= seconds * (1 + 2 * SLACK):
        return mended if hops(mended) < hops(best) else best
    return best


def _greedy_latency(problem: Problem, work: Work, ties: Ties) -> Found:
    """Hops cost time, so contiguous stages are candidates as well as any layer anywhere."""
    budget = problem.options.time_budget_s or math.inf
    nodes, bound = any_order_latency(problem, work, budget)
    staged, _ = pipeline_once(problem, ties)
    candidates = [found for found in (nodes, staged) if found is not None]
    if not candidates:
        return None, bound
    arranged = [by_links(problem, fewest_hops(problem, found)) for found in candidates] + candidates
    fitting = [found for found in arranged if problem.fits(found)] or arranged
    return min(fitting, key=problem.latency_s), bound


def pipeline_once(problem: Problem, ties: Ties) -> Found:
    """Contiguous stages."""
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


def attempt(problem: Problem, once: Once) -> Answer | bool:
    """The best over the ways to treat tied weights; without one, whether it is proven that there is none.

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
    return math.isinf(bound)


def best_answer(problem: Problem, strategy: str, once: Once) -> Answer:
    """The best answer of a strategy.

    Raises:
        Infeasible: If it finds none; says whether that is proven, what binds and what would help.
    """
    need_compute(problem)
    best = attempt(problem, once)
    if isinstance(best, Answer):
        if problem.options.time_budget_s is not None and problem.options.objective == "throughput":
            return _balanced(problem, best, once)
        return best

    def solver(changed: Problem) -> float | None:
        answer = attempt(changed, once)
        return changed.bottleneck_s(answer.nodes) if isinstance(answer, Answer) else None

    raise infeasible(problem, solver, strategy=strategy, proven=best)


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
        work = build_work(inner)
        bound = lower_bound_s(work) if work is not None else 0.0
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
    assert work is not None
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
