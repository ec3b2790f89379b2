"""Contiguous stages for very many layers and nodes: nodes in a fixed order, each as far as it gets."""

from __future__ import annotations

import math

import numpy as np

from planner.problem.arrays import SLACK, Ints, Problem
from planner.problem.ties import StageBytes

#: Entries (node classes times layers) beyond which `planner.pipeline.sequence` is not used.
MOST_ENTRIES = 1_000_000
_WINDOW = 64


def place_in_order(problem: Problem, held: StageBytes, order: list[int], budget_s: float) -> Ints | None:
    """(L,) nodes within `budget_s`, each node of `order` as many layers as it can take, or None."""
    length = len(problem.kind)
    flop_before = np.concatenate(([0.0], np.cumsum(problem.flop)))
    nodes = np.empty(length, dtype=np.int64)
    at = 0
    for node in order:
        end = int(held.ends(np.array([at]), int(problem.capacity[node]))[0])
        if math.isfinite(problem.flop_cap[node]):
            most = flop_before[at] + problem.flop_cap[node] * (1 + SLACK)
            end = min(end, int(np.searchsorted(flop_before, most, side="right")) - 1)
        left, reached = budget_s * (1 + SLACK), at
        while reached < end:
            stop = min(end, reached + _WINDOW)
            pins = problem.pinned[reached:stop]
            foreign = np.flatnonzero((pins >= 0) & (pins != node))
            if len(foreign):
                end = stop = reached + int(foreign[0])
                if stop == reached:
                    break
            used = np.cumsum(problem.seconds[node, problem.kind[reached:stop]])
            taken = int(np.searchsorted(used, left, side="right"))
            reached += taken
            if reached < stop:
                break
            left -= float(used[-1])
        nodes[at:reached] = node
        at = reached
        if at >= length:
            return nodes
    return None


def solve_long(problem: Problem, bound: float, budget_s: float | None) -> tuple[Ints | None, float]:
    """The best of a few orders by bisection on the budget: ((L,) nodes or None, lower bound in seconds)."""
    by_rate = np.lexsort((np.arange(len(problem.nodes)), -problem.rate)).tolist()
    by_memory = np.lexsort((np.arange(len(problem.nodes)), -problem.capacity)).tolist()
    orders = [by_rate, by_memory]
    held = StageBytes(problem)
    if budget_s is not None:
        tried = (place_in_order(problem, held, order, budget_s) for order in orders)
        return next((nodes for nodes in tried if nodes is not None), None), bound
    best: Ints | None = None
    high, low, excess = math.inf, bound, 0.01
    for _ in range(12):
        probe = bound * (1 + excess) if bound > 0 and excess < 1e9 else math.inf
        for order in orders:
            nodes = place_in_order(problem, held, order, probe)
            if nodes is not None:
                seconds = problem.bottleneck_s(nodes)
                if seconds < high:
                    best, high = nodes, seconds
        if best is not None or math.isinf(probe):
            break
        low, excess = probe, excess * (4 if excess < 1 else 100)
    for _ in range(8):
        if best is None or high <= low * 1.0005:
            break
        probe = (low + high) / 2
        found = [nodes for order in orders if (nodes := place_in_order(problem, held, order, probe)) is not None]
        if found:
            best = min(found, key=problem.bottleneck_s)
            high = problem.bottleneck_s(best)
        else:
            low = probe
    return best, min(bound, high)
