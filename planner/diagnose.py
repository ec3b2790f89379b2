"""Why no plan exists, and the smallest change that would make one.

Feasibility is what the strategies themselves answer, so a change is only offered if the plan with it was found.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from planner.cluster import Cluster, Node
from planner.errors import Infeasible
from planner.plan import PlanOptions
from planner.problem import Problem, build
from planner.profile import ModelProfile
from planner.reports import gib, seconds_text

#: Answers a problem with a bottleneck in seconds, or None where it finds no plan.
Solver = Callable[[Problem], float | None]

#: Contexts are searched up to this many tokens.
MOST_TOKENS = 16_777_216
#: Halvings of the interval in which the bytes that are missing lie.
_STEPS = 14
#: Strongest and largest nodes of which a larger memory is tried.
_TRIED = 2


def infeasible(
    problem: Problem, solver: Solver, *, strategy: str, proven: bool, fastest_s: float | None = None
) -> Infeasible:
    """The error for a problem without a plan: the binding limit with its numbers, and what would help.

    Args:
        problem: What could not be planned.
        solver: How plans of this strategy are looked for.
        strategy: Its name.
        proven: Whether it is certain that there is no plan, or none was found.
        fastest_s: Seconds of the slowest node in the best plan found without the time budget, if that is what binds.
    """
    if fastest_s is not None:
        return _over_time(problem, strategy, fastest_s)
    sentence, details = _binding(problem, strategy, proven=proven)
    remedies = _remedies(problem, _feasible(solver))
    details["proven"] = proven
    details["remedies"] = [remedy for remedy, _ in remedies]
    if remedies:
        sentence += ". It would fit with " + ", or with ".join(text for _, text in remedies)
    return Infeasible(sentence, details=details)


def _feasible(solver: Solver) -> Solver:
    """The same solver asked only for any plan at all, without a search for the best."""

    def quick(problem: Problem) -> float | None:
        options = dataclasses.replace(problem.options, time_budget_s=math.inf, objective="throughput")
        return solver(dataclasses.replace(problem, options=options))

    return quick


def _over_time(problem: Problem, strategy: str, seconds: float) -> Infeasible:
    budget = problem.options.time_budget_s or 0.0
    count = len(problem.nodes)
    # One more node like the strongest there is: how many of them?
    return Infeasible(
        f"{problem.profile.model_name} does not fit in a time budget of {seconds_text(budget)} on {count} nodes: "
        f"the smallest that {strategy} found is {seconds_text(seconds)}",
        details={
            "limit": "compute",
            "strategy": strategy,
            "time_budget_s": budget,
            "needed_time_budget_s": seconds,
            "nodes": count,
            "remedies": [{"change": "time_budget_s", "time_budget_s": seconds}],
        },
    )


def _binding(problem: Problem, strategy: str, *, proven: bool) -> tuple[str, dict[str, Any]]:
    needed, usable = int(problem.memory.sum()), int(problem.capacity.sum())
    name, count = problem.profile.model_name, len(problem.nodes)
    details: dict[str, Any] = {
        "limit": "memory",
        "strategy": strategy,
        "nodes": count,
        "needed_bytes": needed,
        "usable_bytes": usable,
        "missing_bytes": max(0, needed - usable),
    }
    pinned = np.flatnonzero(problem.pinned >= 0)
    for node in np.unique(problem.pinned[pinned]).tolist():
        held = int(problem.memory[problem.pinned == node].sum())
        if held > problem.capacity[node]:
            node_id = problem.nodes[node].node_id
            details |= {"limit": "pin", "node_id": node_id, "missing_bytes": held - int(problem.capacity[node])}
            return (
                f"what is pinned to {node_id} needs {gib(held)} and it has {gib(int(problem.capacity[node]))}",
                details,
            )
    free = np.where(problem.pinned < 0, problem.memory, 0)
    largest, room = int(free.max()), int(problem.capacity.max())
    if largest > room:
        layer = problem.profile.layers[int(free.argmax())].name
        details |= {"layer": layer, "layer_bytes": largest, "largest_node_bytes": room}
        details["missing_bytes"] = max(details["missing_bytes"], largest - room)
        return f"layer {layer} needs {gib(largest)} and no node has more than {gib(room)}", details
    if needed > usable:
        text = f"{name} needs {gib(needed)} (weights and KV cache) and the {count} nodes have {gib(usable)}"
        return f"{text}: {gib(needed - usable)} are missing", details
    if np.isfinite(problem.flop_cap).all() and problem.flop_cap.sum() < problem.flop.sum():
        share = float(problem.flop_cap.sum() / problem.flop.sum())
        details |= {"limit": "share", "allowed_share": share}
        return f"the shares of the compute that the {count} nodes may have add up to {share:.1%}", details
    how = "there is no way" if proven else f"{strategy} found no way"
    bound_by = "pins" if len(pinned) else "shares" if np.isfinite(problem.flop_cap).any() else "memory"
    details["limit"] = {"pins": "pin", "shares": "share"}.get(bound_by, "memory")
    parts = "contiguous stages" if strategy == "pipeline" else "whole layers"
    text = f"{name} needs {gib(needed)} of the {gib(usable)} on {count} nodes"
    return f"{text}, but {how} to cut it into {parts} that fit", details


def _remedies(problem: Problem, solver: Solver) -> list[tuple[dict[str, Any], str]]:
    """Changes that were tried and work, as data and in words: more bytes, a node more, a shorter context."""
    remedies: list[tuple[dict[str, Any], str]] = []
    extra = _more_bytes(problem, solver)
    if extra is not None:
        node_id, size = extra
        remedies.append(
            ({"change": "memory", "node_id": node_id, "extra_bytes": size}, f"{gib(size)} more memory on {node_id}")
        )
    twin = _one_node_more(problem, solver)
    if twin is not None:
        remedies.append(
            (
                {"change": "node", "like": twin.node_id, "memory_bytes": twin.memory_bytes},
                f"one more node like {twin.node_id} ({gib(twin.memory_bytes)})",
            )
        )
    shrinks = any(layer.kv_cache_bytes for layer in problem.profile.layers)
    context = None
    if shrinks:
        most = problem.profile.sequence_length
        context = longest_context(problem.profile, problem.cluster, problem.options, solver, most=most)
    if context is not None:
        remedies.append(
            (
                {"change": "sequence_length", "sequence_length": context},
                f"a context of {context:,} tokens at most (asked: {problem.profile.sequence_length:,})",
            )
        )
    return remedies


def _more_bytes(problem: Problem, solver: Solver) -> tuple[str, int] | None:
    """The node and the fewest bytes more on that one node with which a plan is found."""
    best: tuple[str, int] | None = None
    most = int(problem.memory.sum() + problem.tied_bytes.sum()) + int(problem.capacity.max())
    # The strongest and the largest nodes are where memory would be added first; all of them where there are few.
    by_rate = np.lexsort((np.arange(len(problem.nodes)), -problem.rate)).tolist()
    by_memory = np.lexsort((np.arange(len(problem.nodes)), -problem.capacity)).tolist()
    tried = _TRIED if len(problem.nodes) * len(problem.kind) <= 4_000 else 1
    for node in dict.fromkeys([*by_rate[:tried], *by_memory[:tried]]):

        def works(extra: int, at: int = node) -> bool:
            capacity = problem.capacity.copy()
            capacity[at] += extra
            return solver(dataclasses.replace(problem, capacity=capacity)) is not None

        high = most if best is None else best[1] - 1
        if high <= 0 or not works(high):
            continue
        low = 0
        for _ in range(_STEPS):
            if high - low <= max(1, high // 1_000) and high > 100_000:
                break
            middle = (low + high) // 2
            low, high = (low, middle) if works(middle) else (middle, high)
        best = (problem.nodes[node].node_id, high)
    return best


def _one_node_more(problem: Problem, solver: Solver) -> Node | None:
    """The weakest node of which a second one would be enough."""
    tried: set[tuple[float, int]] = set()
    for node in sorted(problem.nodes, key=lambda n: (n.memory_bytes, n.flop_per_s, n.node_id)):
        key = (node.flop_per_s, node.memory_bytes)
        if key in tried or len(tried) >= 6:
            continue
        tried.add(key)
        twin = dataclasses.replace(node, node_id=f"{node.node_id}+1")
        cluster = dataclasses.replace(problem.cluster, nodes=(*problem.cluster.nodes, twin))
        if solver(build(problem.profile, cluster, problem.options)) is not None:
            return node
    return None


def longest_context(
    profile: ModelProfile, cluster: Cluster, options: PlanOptions, solver: Solver, *, most: int = MOST_TOKENS
) -> int | None:
    """The largest sequence length for which a plan is found at the profile's batch size; None if there is none.

    At most `most`, and no more than the model takes: of a longer sequence it reads no more, so that all would fit.
    """
    most = min(most, profile.longest_sequence or most)

    def works(tokens: int) -> bool:
        at = profile.at(batch_size=profile.batch_size, sequence_length=tokens)
        return solver(build(at, cluster, options)) is not None

    if not works(1):
        return None
    low, high = 1, 2
    while high <= most and works(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low
