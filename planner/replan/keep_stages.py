"""Contiguous stages that keep what nodes already hold, and how few bytes such stages can move at all.

Were a node to be had more than once, the fewest bytes would follow from a programme over positions alone. A price for
each use of a node beyond its first makes that a bound (Lagrange), raised by subgradient steps as long as it grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Several
from itertools import permutations

import numpy as np

from planner.pipeline.sequence import Sequence
from planner.problem.arrays import Floats, Ints
from planner.replan.moved_bytes import Moving

#: Orders of nodes that are tried for a pipeline, exchanges in the best of them, and nodes of which all orders are.
MAX_ORDERS, MAX_EXCHANGES, MOST_EVERY = 160, 600, 5
#: Orders times nodes times layers, exchanges times both; that many orders are tried whatever the size.
_ORDER_CELLS, _EXCHANGE_CELLS, _LEAST_ORDERS = 8_000_000, 3_000_000, 8
#: Layers up to which cuts of a pipeline are refitted.
MAX_LAYERS = 1_500
#: Layers squared times nodes up to which the bound is worked out, and its steps.
_MOST, _ROUNDS = 1_000_000, 60


def least_moved(windows: Several[_Window], lost: Floats, *, known: float) -> tuple[float, list[list[int]]]:
    """Bytes that any contiguous plan moves, and orders of nodes that come near.

    Args:
        windows: Where the stages of each node can begin.
        lost: (N, L) bytes that holding each layer takes each node.
        known: Bytes that a plan is known to move.
    """
    nodes, length = lost.shape
    if length * length * nodes > _MOST:
        return 0.0, []
    moved = np.concatenate((np.zeros((nodes, 1)), np.cumsum(lost, axis=1)), axis=1)
    # The first position from which each node gets as far as each position.
    first = np.array([window.low for window in windows])
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


def keep_stages(moving: Moving, budget_s: float, best_nodes: Ints) -> tuple[list[Ints], float]:
    """Contiguous stages within the budget that move fewest bytes, over orders close to the present and the best one.

    Args:
        moving: Who holds what now.
        budget_s: Seconds that no stage may exceed.
        best_nodes: (L,) nodes of the best plan.

    Returns:
        (at most one plan's (L,) nodes, bytes that any contiguous plan within the budget moves).
    """
    problem, old = moving.problem, moving.held
    length = len(old)
    if length > MAX_LAYERS:
        return [], 0.0
    sequence = Sequence(problem)
    reach = sequence.reach(budget_s)
    class_of = {node: at for at, nodes in enumerate(sequence.classes) for node in nodes}
    every = [_Window(row) for row in reach]
    windows = [every[class_of[node]] for node in range(len(problem.nodes))]
    present: list[int] = []
    for node in old.tolist():
        if node >= 0 and node not in present:
            present.append(node)
    absent = [node for node in range(len(problem.nodes)) if node not in present]
    absent.sort(key=lambda node: (-int((reach[class_of[node]] - np.arange(length + 1)).max()), node))
    # Of equal bytes the fewest layers.
    lost = moving.alone() + (old[None, :] != np.arange(len(problem.nodes))[:, None])
    no_less = float(lost.min(axis=0).sum())
    most, tried = max(_LEAST_ORDERS, min(MAX_ORDERS, _ORDER_CELLS // lost.size)), 0
    best: tuple[float, Ints, list[int]] | None = None

    def consider(order: list[int]) -> bool:
        nonlocal tried, best
        if best is not None and best[0] < no_less + 0.5:
            return False
        tried += 1
        found = _fixed_order([windows[node] for node in order], lost[order])
        if found is not None:
            found = found[0], np.array(order, dtype=np.int64)[found[1]]
        if found is not None and (best is None or found[0] < best[0] - 0.5):
            best = (*found, order)
            return True
        return False

    consider(present)
    # Insert what is not in use yet, one after the other, where it helps most; then exchange neighbours.
    base = present
    for _ in range(4):
        start = base if best is None else best[2]
        before = best
        for node in [node for node in absent if node not in start][:8]:
            for at in range(len(start) + 1):
                if tried < most:
                    consider([*start[:at], node, *start[at:]])
        if best is before:
            if best is not None:
                break
            # Nothing fits yet: add the roomiest where the sequence has its largest gap, and go on.
            left = [node for node in absent if node not in base]
            if not left:
                break
            gap = _gap(old, base)
            base = [*base[:gap], left[0], *base[gap:]]
            consider(base)
    if best is not None:
        order = best[2]
        for at in range(len(order) - 1):
            if tried < 2 * most:
                swapped = list(best[2])
                if at + 1 < len(swapped):
                    swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
                    consider(swapped)
    known = float(lost.max(axis=0).sum()) if best is None else best[0]
    least = moving.least().astype(np.float64)
    bound, orders = least_moved(windows, least, known=known)
    for order in orders:
        consider(order)
        consider(order + [node for node in present if node not in order])
    consider(list(dict.fromkeys([*best_nodes.tolist(), *present, *absent])))
    if len(problem.nodes) <= MOST_EVERY:
        bound = math.inf
        for order in map(list, permutations(range(len(problem.nodes)))):
            consider(order)
            found = _fixed_order([windows[node] for node in order], least[order])
            bound = bound if found is None else min(bound, found[0])
    elif best is not None and best[0] > bound:
        _exchange(best[2], consider, min(MAX_EXCHANGES, _EXCHANGE_CELLS // lost.size))
    if not sequence.exact_bytes or math.isinf(bound):
        bound = 0.0
    return [] if best is None else [best[1]], bound


def _exchange(order: list[int], consider: Callable[[list[int]], bool], left: int) -> None:
    """Nodes moved to another place in the order, near ones first, as long as that is better."""
    improved = True
    while improved:
        improved = False
        for distance in range(1, len(order)):
            for at in range(len(order) - distance):
                for source, target in ((at, at + distance), (at + distance, at)):
                    left -= 1
                    if left < 0:
                        return
                    trial = order[:source] + order[source + 1 :]
                    trial.insert(target, order[source])
                    swapped = list(order)
                    swapped[source], swapped[target] = order[target], order[source]
                    for changed in (trial, swapped) if source < target else (trial,):
                        if consider(changed):
                            order, improved = changed, True
                            break


def _gap(old: Ints, order: Several[int]) -> int:
    """Where in `order` a node fits that takes over the longest stretch of layers without a home."""
    orphans = np.flatnonzero(old < 0)
    if len(orphans) == 0:
        return len(order)
    before = set(old[: int(orphans[0])].tolist())
    return sum(1 for node in order if node in before)


class _Window:
    """Where the stages of a node can begin, by where they end: positions [low, end) of the layers."""

    def __init__(self, reach: Ints) -> None:
        """Of the (L + 1,) furthest ends of stages from each position."""
        ends = np.arange(len(reach))
        self.low: Ints = np.searchsorted(reach, ends)
        self.any = self.low < ends
        width = np.where(self.any, ends - self.low, 1)
        # A window's least is that of two overlapping ones, each as long as the largest power of two within.
        level = np.frexp(width)[1] - 1
        self.levels = int(level.max()) + 1
        self.left = level, np.where(self.any, self.low, 0)
        self.right = level, np.where(self.any, ends - (1 << level), 0)

    def least(self, values: Floats) -> Floats:
        """(L + 1,) least of `values` within each window; infinity where there is none."""
        table = np.full((self.levels, len(values)), np.inf)
        table[0] = values
        for level in range(1, self.levels):
            half = 1 << (level - 1)
            table[level, :-half] = np.minimum(table[level - 1, :-half], table[level - 1, half:])
        return np.where(self.any, np.minimum(table[self.left], table[self.right]), np.inf)


def _fixed_order(windows: Several[_Window], lost: Floats | Ints) -> tuple[float, Ints] | None:
    """The cuts of nodes in a fixed order that lose least: (what, (L,) place in that order)."""
    nodes, length = lost.shape
    moved = np.concatenate((np.zeros((nodes, 1)), np.cumsum(lost, axis=1)), axis=1)
    ahead, used = np.empty(moved.shape), np.empty(moved.shape, dtype=np.bool_)
    best = np.full(length + 1, np.inf)
    best[0] = 0.0
    for at, window in enumerate(windows):
        ahead[at] = best - moved[at]
        taken = window.least(ahead[at]) + moved[at]
        used[at] = taken < best
        best = np.minimum(best, taken)
    if not np.isfinite(best[length]):
        return None
    places, end = np.empty(length, dtype=np.int64), length
    for at in range(nodes - 1, -1, -1):
        if used[at, end]:
            low = int(windows[at].low[end])
            start = low + int(ahead[at, low:end].argmin())
            places[start:end] = at
            end = start
    return (float(best[length]), places) if end == 0 else None
