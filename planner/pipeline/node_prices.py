"""What each node is worth to a chain: prices that prove a budget too small, and that lead a search where it is not.

Give every node a price. The cheapest chain over all layers, were each node to be had as often as one likes, costs
no more than any real chain, which costs no more than all nodes together. So if the cheapest costs more than all,
there is no real chain: a proof that knows of contiguity, of memory and of whole layers. Prices are raised where that
chain takes a node too often (multiplicative subgradient steps). What remains to be paid from each layer on is, at
good prices, what it is worth to have come so far.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np

from planner.problem.arrays import Floats, Ints

#: Rounds of steps: at most, and such that rounds * layers * classes stay below a number of entries.
_MOST_ROUNDS = 40
_ENTRIES = 4_000_000
#: A chain this much dearer than all nodes is a proof; less may be rounding.
_DEARER = 1 + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prices:
    """Prices of node classes, all nodes together costing 1."""

    #: (C,) price of one node.
    worth: Floats
    #: (L + 1,) least price of the layers before each position.
    covered: Floats
    #: Whether they prove that there is no chain.
    impossible: bool


def _cheapest(ends: Ints, worth: Floats) -> tuple[Floats, list[int]]:
    """(L + 1,) least price from each position on, and the class to take there."""
    length = len(ends)
    left = np.zeros(length + 2)
    left[length + 1] = np.inf
    take = [0] * length
    for at in range(length - 1, -1, -1):
        price = left[ends[at]] + worth
        best = int(price.argmin())
        take[at] = best
        left[at] = price[best]
    return left[: length + 1], take


def price_nodes(reach: Ints, counts: Several[int], start: Floats | None = None) -> Prices:
    """Prices at which the cheapest chain is as dear as found.

    Args:
        reach: (C, L + 1) furthest end of each class of nodes from each position.
        counts: Nodes in each class.
        start: (C,) prices to begin with, as of a budget close by.
    """
    classes, length = len(reach), reach.shape[1] - 1
    available = np.asarray(counts, dtype=np.float64)
    positions = np.arange(length + 1)
    # Who gets nowhere from a position is sent to an end that costs more than anything.
    ends = np.ascontiguousarray(np.where(reach > positions, reach, length + 1)[:, :length].T)
    worth = start if start is not None else np.maximum((reach - positions).mean(axis=1), 1e-6)
    worth = worth / float(worth @ available)
    best, best_worth, step, since = -1.0, worth, 0.3, 0
    best_left = np.zeros(length + 1)
    for _ in range(max(2, min(_MOST_ROUNDS, _ENTRIES // (length * (classes + 40))))):
        left, take = _cheapest(ends, worth)
        if left[0] > best * (1 + 1e-9):
            best, best_worth, best_left, since = float(left[0]), worth, left, 0
        else:
            since += 1
        if best > _DEARER:
            break
        used, at = np.zeros(classes), 0
        while at < length:
            used[take[at]] += 1
            at = int(ends[at, take[at]])
        if since >= 4:
            step, since, worth = step * 0.6, 0, best_worth
        worth = worth * np.exp(step * np.clip(used / available - 1, -1.0, 3.0) * 0.3)
        worth /= float(worth @ available)
    finite = np.where(np.isfinite(best_left), best_left, best * 2 if np.isfinite(best) else 2.0)
    return Prices(worth=best_worth, covered=finite[0] - finite, impossible=best > _DEARER)
