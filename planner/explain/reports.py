"""What each node holds and what stops it from holding more, used or not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from planner.plan import NodeReport
from planner.problem.arrays import SLACK, Floats, Ints, Problem


def gib(size_bytes: float, *, to: Callable[[float], float] = round) -> str:
    """Bytes for people; `to` (round, math.ceil, math.floor) says which of two short numbers is taken."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{to(size * 10) / 10:.1f} {unit}" if unit != "B" else f"{to(size)} B"
        size /= 1024
    return f"{to(size * 100) / 100:,.2f} GiB"


def need_text(size_bytes: int) -> str:
    """Bytes that are needed, for people: no fewer than there are."""
    return gib(size_bytes, to=math.ceil)


def have_text(size_bytes: int) -> str:
    """Bytes that are to be had, for people: no more than there are."""
    return gib(size_bytes, to=math.floor)


def seconds_text(seconds: float, *, up: bool = False) -> str:
    """Seconds for people, with four digits; `up`: no fewer than there are."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        size = seconds * factor
        if size >= 1 or unit == "µs":
            text = f"{size:.4g}"
            if up and float(text) < size * (1 - SLACK):
                text = f"{size + 10.0 ** (math.floor(math.log10(size)) - 3) / 2:.4g}"
            return f"{text} {unit}"
    raise AssertionError


def node_reports(problem: Problem, nodes: Ints, budget_s: float) -> tuple[NodeReport, ...]:
    """One report for each node of the cluster, by id.

    Args:
        problem: What was planned.
        nodes: (L,) node of each layer.
        budget_s: The plan's time budget; a node's compute is exhausted when no layer more would fit in it.
    """
    loads, flops, memory = problem.loads_s(nodes), problem.flops(nodes), problem.memory_used(nodes)
    free = np.flatnonzero(~problem.weightless & (problem.pinned < 0))
    held = np.bincount(nodes, minlength=len(problem.nodes))
    least_s, least_bytes, least_flop = _least(problem, free)
    pinned = np.zeros(len(problem.nodes), dtype=np.int64)
    np.add.at(pinned, problem.pinned[problem.pinned >= 0], 1)
    reports = []
    for node in problem.cluster.nodes:
        if node.node_id in problem.left_out:
            limit, why = problem.left_out[node.node_id]
            reports.append(
                NodeReport(
                    node_id=node.node_id,
                    used=False,
                    reason=why,
                    limit=limit,
                    compute_power=node.available_flop_per_s / 1e9,
                )
            )
            continue
        at = problem.index_of[node.node_id]
        room = int(problem.capacity[at] - memory[at])
        over_time = loads[at] + least_s[at] > budget_s * (1 + SLACK)
        over_memory = room < least_bytes
        over_share = flops[at] + least_flop > problem.flop_cap[at] * (1 + SLACK)
        if len(free) == 0:
            limit_now = "pin" if pinned[at] else None
        else:
            limit_now = "memory" if over_memory else "share" if over_share else "compute" if over_time else None
        used = bool(held[at])
        reports.append(
            NodeReport(
                node_id=node.node_id,
                used=used,
                reason=_reason(
                    problem,
                    at,
                    held=int(held[at]),
                    limit=limit_now,
                    load_s=float(loads[at]),
                    used_bytes=int(memory[at]),
                    budget_s=budget_s,
                ),
                limit=limit_now,
                flop=float(flops[at]),
                seconds=float(loads[at]),
                memory_used_bytes=int(memory[at]),
                memory_free_bytes=room,
                compute_power=node.available_flop_per_s / 1e9,
                compute_utilization=min(1.0, float(flops[at] / (problem.rate[at] * budget_s)))
                if budget_s > 0
                else 0.0,
            )
        )
    return tuple(sorted(reports, key=lambda report: report.node_id))


def _least(problem: Problem, free: Ints) -> tuple[Floats, int, float]:
    """Least seconds by node, bytes and FLOP that one layer more would take."""
    if len(free) == 0:
        return np.zeros(len(problem.nodes)), 0, 0.0
    # The most common kind is what a node would be given next; odd layers are placed once and for all.
    kinds = problem.kind[free]
    common = int(np.bincount(kinds).argmax())
    layer = int(free[np.flatnonzero(kinds == common)[0]])
    return problem.seconds[:, common], int(problem.memory[layer]), float(problem.flop[layer])


def _reason(
    problem: Problem, at: int, *, held: int, limit: str | None, load_s: float, used_bytes: int, budget_s: float
) -> str:
    capacity = int(problem.capacity[at])
    common = f"{seconds_text(load_s)} of {seconds_text(budget_s)}, {gib(used_bytes)} of {gib(capacity)}"
    if held == 0:
        if limit == "memory":
            least = int(problem.memory[~problem.weightless & (problem.pinned < 0)].min())
            what = "no layer" if capacity < least else "none of the layers that are most"
            return f"left out: {have_text(capacity)} hold {what}"
        if limit == "compute":
            return f"left out: one layer alone would take it longer than {seconds_text(budget_s)}"
        if limit == "share":
            return "left out: its share of the compute is less than one layer"
        if problem.options.objective == "latency":
            return "left out: no plan with it was found in which one request takes less"
        return f"left out: the other nodes keep {seconds_text(budget_s)} without it"
    pinned = int((problem.pinned == at).sum())
    tail = {
        "memory": "no memory for one more layer",
        "compute": "one more layer would make it the slowest node",
        "share": "its share of the compute is reached",
        "pin": "holds what is pinned to it",
        None: "could take more",
    }[limit]
    unit = problem.profile.unit if held == 1 else f"{problem.profile.unit}s"
    return f"{held} {unit}{f' ({pinned} pinned)' if pinned else ''}: {common}; {tail}"
