"""Plain rules to compare with: the same number of layers for every node, or layers in proportion to memory."""

from __future__ import annotations

import numpy as np

from planner.problem.arrays import Floats, Ints, Problem
from planner.problem.items import fill_gaps


def equal_parts(problem: Problem) -> Ints:
    """(L,) node of each layer: contiguous stages of equally many layers, nodes by id."""
    return _proportional(problem, np.ones(len(problem.nodes)))


def by_memory(problem: Problem) -> Ints:
    """(L,) node of each layer: contiguous stages in proportion to memory, largest remainder, most first."""
    weight = problem.capacity.astype(np.float64)
    return _proportional(problem, weight if weight.sum() > 0 else np.ones(len(weight)))


def largest_remainder(total: int, weight: Floats) -> Ints:
    """Split `total` in proportion to `weight`; what rounding leaves goes to the largest remainders, then in order."""
    exact = total * weight / weight.sum()
    counts: Ints = np.floor(exact).astype(np.int64)
    for node in np.lexsort((np.arange(len(weight)), counts - exact))[: total - int(counts.sum())].tolist():
        counts[node] += 1
    return counts


def _proportional(problem: Problem, weight: Floats) -> Ints:
    free = np.flatnonzero((problem.pinned < 0) & ~problem.weightless)
    order = np.lexsort((np.arange(len(weight)), -weight))
    counts = largest_remainder(len(free), weight)
    nodes = problem.pinned.copy()
    nodes[free] = np.repeat(order, counts[order])
    return fill_gaps(nodes)
