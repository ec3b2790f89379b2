"""The fewest nodes that keep a time budget, where layers are too different to be counted.

Fewer nodes are packed step by step: each set of one node less, most to spare first, by the plain rule, by best fit
and by exchanges, until none of the sets tried can be packed. Sets that provably can't be are passed over.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from planner.greedy.packing import best_fit, by_compute, by_tightness, most_available
from planner.greedy.repair import by_density, repair
from planner.problem.arrays import SLACK, Floats, Ints
from planner.problem.bounds import effective_rates, lower_bound_s
from planner.problem.items import Work

#: Sets of one node less up to which all are looked at; beyond that, those near the nodes in use.
_MOST_SETS = 5_000
#: Sets that are packed for each number of nodes, and layers times nodes up to which exchanges are tried for them.
_MOST_TRIED, MOST_CELLS = 24, 4_000
#: Layers times nodes up to which sets are passed over by the costlier bound.
_PRICED_CELLS = 500
#: Exchanges for each number of nodes, shared by the sets that are tried, and for each set at least.
_STEPS, _LEAST_STEPS = 4_000, 300


def fewest_nodes_one_by_one(work: Work, rate: Floats, budget_s: float, start: Ints) -> Ints:
    """As few nodes as are found for all items within the budget, beginning from a `start` that keeps it."""
    search = _Search(work, rate, budget_s)
    best = search.strongest(start)
    while (fewer := search.one_less(best)) is not None:
        best = fewer
    return best


class _Search:
    """What each node gives within the budget, and what all items together take."""

    def __init__(self, work: Work, rate: Floats, budget_s: float) -> None:
        self.work, self.rate, self.budget_s = work, rate, budget_s
        self.pinned = frozenset(work.fixed[work.fixed >= 0].tolist())
        time = np.maximum(budget_s * (1 + SLACK) - work.base_s, 0.0)
        flop, memory = float(work.flop @ work.count), int(work.memory @ work.count)
        gives = np.minimum(time * effective_rates(work), np.maximum(work.room_flop, 0.0))
        #: (N,) parts of all FLOP and of all bytes that a node can take.
        self.time = gives / flop if flop > 0 else np.full(len(time), math.inf)
        self.room = np.maximum(work.room_bytes, 0) / memory if memory else np.full(len(time), math.inf)

    def strongest(self, start: Ints) -> Ints:
        """An allocation on as few of the strongest nodes as a bisection over their number finds."""
        best, order = start, self._ranked(self.rate, self.work.room_bytes)
        low, high = max(1, len(self.pinned)), len(set(start.tolist()) | self.pinned) - 1
        while low <= high:
            middle = (low + high) // 2
            chosen = np.array(sorted(self.pinned.union(order[: middle - len(self.pinned)])), dtype=np.int64)
            packed = _packed(_only(self.work, chosen), self.rate[chosen], self.budget_s)
            if packed is None:
                low = middle + 1
            else:
                best, high = chosen[packed], middle - 1
        return best

    def _ranked(self, *measures: Floats | Ints) -> list[int]:
        """Nodes without pins, those with most of the first measure first, then of the next."""
        order = np.lexsort((np.arange(len(self.rate)), *(-measure for measure in reversed(measures))))
        return [node for node in order.tolist() if node not in self.pinned]

    def one_less(self, best: Ints) -> Ints | None:
        """An allocation on one node less than `best` uses, or on fewer still."""
        used = set(best.tolist()) | self.pinned
        cells = best.size * len(used)
        tried = max(1, min(_MOST_TRIED, 20 * MOST_CELLS // cells))
        ranked = heapq.nlargest(tried, self._sets(used), key=lambda entry: entry[0])
        exchange = cells <= MOST_CELLS and not np.isfinite(self.work.room_flop).any()
        parts = [_only(self.work, chosen) for _, chosen in ranked]
        for (_, chosen), part in zip(ranked, parts, strict=True):
            if (packed := _packed(part, self.rate[chosen], self.budget_s)) is not None:
                return chosen[packed]
        if not exchange:
            return None
        open_ = [
            at
            for at, part in enumerate(parts)
            if lower_bound_s(part, thorough=cells <= _PRICED_CELLS) <= self.budget_s * (1 + SLACK)
        ]
        for at in open_:
            (_, chosen), part = ranked[at], parts[at]
            start = by_density(part, self.rate[chosen], self.budget_s)
            packed = repair(part, start, self.budget_s, steps=max(_LEAST_STEPS, _STEPS // len(open_)))
            if packed is not None:
                return chosen[packed]
        return None

    def _sets(self, used: set[int]) -> Iterator[tuple[float, Ints]]:
        """Sets of one node less that may hold everything, with what they have to spare at least."""
        size = len(used) - 1
        free = [node for node in range(len(self.rate)) if node not in self.pinned]
        wanted = size - len(self.pinned)
        if wanted < 0 or (wanted == 0 and not self.pinned):
            return
        if len(free) <= 64 and math.comb(len(free), wanted) <= _MOST_SETS:
            sets: Iterator[tuple[int, ...]] = itertools.combinations(free, wanted)
        else:
            sets = self._near(sorted(used - self.pinned), free, wanted)
        for members in sets:
            chosen = np.array(sorted(self.pinned.union(members)), dtype=np.int64)
            spare = min(float(self.time[chosen].sum()), float(self.room[chosen].sum()))
            if spare >= 1 - SLACK:
                yield spare, chosen

    def _near(self, used: list[int], free: list[int], wanted: int) -> Iterator[tuple[int, ...]]:
        """The nodes in use but one, those but two with another, and the strongest by either measure and by both."""
        for measure in (self.time, self.room, np.minimum(self.time, self.room)):
            yield tuple(self._ranked(measure)[:wanted])
        others = [node for node in free if node not in set(used)]
        yield from itertools.combinations(used, wanted)
        count = 0
        for kept in itertools.combinations(used, wanted - 1):
            for other in others:
                count += 1
                if count > _MOST_SETS:
                    return
                yield (*kept, other)


def _only(work: Work, chosen: Ints) -> Work:
    """The same items on the chosen nodes alone."""
    fixed = np.where(work.fixed >= 0, np.searchsorted(chosen, work.fixed), work.fixed)
    return replace(
        work,
        seconds=work.seconds[chosen],
        base_s=work.base_s[chosen],
        room_bytes=work.room_bytes[chosen],
        room_flop=work.room_flop[chosen],
        fixed=fixed,
    )


def _packed(part: Work, rate: Floats, budget_s: float) -> Ints | None:
    """All items layer by layer: by the plain rule, else wherever least is left over."""
    packed = most_available(part, rate, budget_s)
    for order in (by_compute(part), by_tightness(part, budget_s)):
        if packed is None:
            packed = best_fit(part, order, budget_s)
    return packed
