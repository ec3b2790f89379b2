"""How few bytes contiguous stages can move at all, and the order of nodes in which that nearly happens.

Were a node to be had more than once, the fewest bytes would follow from a programme over positions alone. A price for
each use of a node beyond its first makes that a bound (Lagrange), raised by subgradient steps as long as it grows.
"""

from __future__ import annotations

import numpy as np

from planner.problem import Floats, Ints, Problem
from planner.sequence import Sequence

#: Layers squared times nodes up to which the bound is worked out, and its steps.
_MOST, _ROUNDS = 1_000_000, 60


def least_moved(problem: Problem, lost: Floats, *, within_s: float, known: float) -> tuple[float, list[list[int]]]:
    """Bytes that any contiguous plan within `within_s` moves, and orders of nodes that come near.

    Args:
        problem: What to plan.
        lost: (N, L) bytes that holding each layer takes each node.
        within_s: The budget.
        known: Bytes that a plan is known to move.
    """
    nodes, length = lost.shape
    if length * length * nodes > _MOST:
        return 0.0, []
    sequence = Sequence(problem)
    class_of = {node: at for at, members in enumerate(sequence.classes) for node in members}
    reach = sequence.reach(within_s)[[class_of[node] for node in range(nodes)]]
    moved = np.concatenate((np.zeros((nodes, 1)), np.cumsum(lost, axis=1)), axis=1)
    # The first position from which each node gets as far as each position.
    first = np.array([np.searchsorted(row, np.arange(length + 1)) for row in reach])
    price = np.zeros(nodes)
    best, pace, since = 0.0, 1.0, 0
    orders: list[list[int]] = []
    for _ in range(_ROUNDS):
        value, path = _cheapest(moved, first, price)
        if not np.isfinite(value):
            break
        bound = value - float(price.sum())
        since = 0 if bound > best else since + 1
        best = max(best, bound)
        order = list(dict.fromkeys(path))
        if order not in orders:
            orders.append(order)
        excess = np.bincount(path, minlength=nodes) - 1.0
        excess[(price <= 0) & (excess < 0)] = 0.0
        if not excess.any() or best >= known:
            break
        if since >= 4:
            pace, since = pace / 2, 0
        price = np.maximum(0.0, price + pace * max(known - bound, 0.0) / float(excess @ excess) * excess)
    return best, orders


def _cheapest(moved: Floats, first: Ints, price: Floats) -> tuple[float, list[int]]:
    """The least bytes and prices of stages over all layers, nodes used again at will, and their nodes in order."""
    nodes, positions = moved.shape
    rows, every = np.arange(nodes), np.arange(positions)
    open_s = np.full((nodes, positions), np.inf)
    open_s[:, 0] = 0.0
    came = np.zeros((positions, 2), dtype=np.int64)
    value = 0.0
    for end in range(1, positions):
        ahead = np.where(every[None, :end] >= first[:, end, None], open_s[:, :end], np.inf)
        start = ahead.argmin(axis=1)
        total = ahead[rows, start] + moved[:, end] + price
        node = int(total.argmin())
        value = float(total[node])
        came[end] = node, start[node]
        open_s[:, end] = value - moved[:, end]
    path, at = [], positions - 1
    while at and np.isfinite(value):
        path.append(int(came[at, 0]))
        at = int(came[at, 1])
    return value, path[::-1]
