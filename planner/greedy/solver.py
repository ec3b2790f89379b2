"""The strategy `greedy`: layers by compute, most first, each to the node with most available compute.

Available compute is a budget, FLOP/s times the seconds a node's part may take; the smallest budget that works is
found by bisection, and the result is then refined by steps that only improve. Where layers come in runs of equal
ones the same question is answered exactly by counting (`planner.problem.counting`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.greedy.fewest_nodes import MOST_CELLS, fewest_nodes_one_by_one
from planner.greedy.packing import best_fit, by_compute, by_tightness, earliest_finish, most_available
from planner.greedy.repair import by_density, by_free_memory, repair
from planner.problem.arrays import SLACK, Floats, Ints
from planner.problem.bounds import lower_bound_s
from planner.problem.counting import (
    Counts,
    assign_any_order,
    drop_weakest,
    fewest_nodes,
    in_any_order,
    is_exact,
    smallest_budget,
)
from planner.problem.items import Work


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """An assignment of items with what is proven about it."""

    assignment: Ints
    bottleneck_s: float
    lower_bound_s: float
    exact: bool


def solve(work: Work, rate: Floats, *, budget_s: float | None = None) -> Solution | None:
    """Allocate all items, any item anywhere, with the smallest bottleneck.

    Args:
        work: What to place.
        rate: (N,) FLOP/s available on each node.
        budget_s: Use the fewest nodes that keep this budget, instead of the smallest bottleneck; infinite: whether
            there is any allocation.

    Returns:
        The best found, or None if none was found: `exact` work then has none.
    """
    bound = lower_bound_s(work, thorough=not is_exact(work) and budget_s != math.inf)
    if len(work.kind) == 0:
        empty = np.zeros(0, dtype=np.int64)
        return Solution(assignment=empty, bottleneck_s=bound, lower_bound_s=bound, exact=True)
    if is_exact(work):
        return _solve_counts(in_any_order(work), rate, bound, budget_s)
    return _solve_items(work, rate, bound, budget_s)


def _solve_counts(counts: Counts, rate: Floats, bound: float, budget_s: float | None) -> Solution | None:
    if budget_s is None:
        found = smallest_budget(counts, bound)
        if found is None:
            return None
        hosting, high, low = found
        at_s = high
    else:
        placed = counts.place(counts.caps(budget_s))
        if placed is None:
            return None
        hosting, at_s, low = placed, budget_s, bound
    few = None if math.isinf(at_s) else fewest_nodes(counts, at_s)
    hosting = few if few is not None else drop_weakest(counts, hosting)
    assignment = assign_any_order(counts, counts.trimmed(hosting))
    if few is None and math.isfinite(at_s) and assignment.size * len(rate) <= MOST_CELLS:
        assignment = fewest_nodes_one_by_one(counts.work, rate, at_s, assignment)
    reached = float(counts.work.loads_s(assignment).max())
    exact = budget_s is None and reached <= low * (1 + 4 * SLACK)
    return Solution(assignment=assignment, bottleneck_s=reached, lower_bound_s=min(low, reached), exact=exact)


def _solve_items(work: Work, rate: Floats, bound: float, budget_s: float | None) -> Solution | None:
    best: Ints | None = None
    reached = math.inf
    large = len(work.kind) * len(work.base_s) > 200_000
    anything = budget_s == math.inf

    def consider(assignment: Ints | None) -> None:
        nonlocal best, reached
        if assignment is None:
            return
        seconds = float(work.loads_s(assignment).max())
        if seconds < reached * (1 - SLACK):
            best, reached = assignment, seconds

    consider(earliest_finish(work, by_compute(work)))
    if best is None or not (large or anything):
        consider(earliest_finish(work, by_tightness(work, bound)))
    if best is None:
        consider(best_fit(work, by_tightness(work, math.inf), math.inf))
    if best is None:
        consider(best_fit(work, np.argsort(-work.memory[work.kind], kind="stable"), math.inf))
    if best is None and not np.isfinite(work.room_flop).any():
        start = by_free_memory(work, np.argsort(-work.memory[work.kind], kind="stable"))
        consider(repair(work, start, math.inf, steps=600))
    if best is None:
        return None
    if anything:
        return Solution(assignment=best, bottleneck_s=reached, lower_bound_s=bound, exact=False)
    low, high = bound, reached
    for _ in range(3 if large else 10):
        if high <= low * 1.0005:
            break
        middle = (low + high) / 2
        packed = most_available(work, rate, middle)
        if packed is None and not large:
            packed = best_fit(work, by_compute(work), middle)
        if packed is None:
            low = middle
        else:
            consider(packed)
            high = min(middle, reached)
    if not large and not np.isfinite(work.room_flop).any():
        best = _repaired(work, rate, best, bound)
        reached = float(work.loads_s(best).max())
    if budget_s is not None:
        if reached > budget_s * (1 + SLACK):
            return None
        best = fewest_nodes_one_by_one(work, rate, budget_s, best)
        reached = float(work.loads_s(best).max())
    return Solution(
        assignment=best, bottleneck_s=reached, lower_bound_s=min(bound, reached), exact=reached <= bound * (1 + SLACK)
    )


def _repaired(work: Work, rate: Floats, best: Ints, bound: float, *, probes: int = 9) -> Ints:
    """Smaller budgets, reached by exchanges from the best so far or from a start by density."""
    reached = float(work.loads_s(best).max())
    failed, failures, steps = bound, 0, min(1200, 12 * len(work.kind))
    for _ in range(probes):
        if reached <= failed * 1.002 or failures == 5:
            break
        target = (failed + reached) / 2
        found = repair(work, best, target, steps=steps)
        if found is None and work.memory.any():
            found = repair(work, by_density(work, rate, target), target, steps=steps)
        if found is None:
            failed = target
            failures += 1
        else:
            best, reached = found, float(work.loads_s(found).max())
    return best
