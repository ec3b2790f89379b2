"""Bring an allocation within a budget and within memory by exchanges that take off what is too much.

A tabu search on the sum of what nodes are over their time and their memory, each node weighed by how long it has
been over (Morris, The breakout method, AAAI 1993). It passes through allocations that are worse, which moves and
swaps that only improve cannot: to put one more layer on a fast node whose memory is full, large layers on it first
have to be traded for small ones. The tries are a fixed sequence and bounded by a number of steps, so equal input
gives equal plans.
"""

from __future__ import annotations

import random

import numpy as np

from planner.problem.arrays import SLACK, Floats, Ints
from planner.problem.items import Work

#: Steps for which a layer does not return to the node that it left: at least, and drawn on top.
_TABU, _TABU_DRAWN = 6, 10
#: What each step over its limit adds to a node's weight.
_HEAVIER = 0.02
_NOTHING = 1e-12


class Exchanges:
    """Loads and rooms of an allocation under change, in units of a mean layer."""

    def __init__(self, work: Work, assignment: Ints, budget_s: float) -> None:
        self.home = assignment.copy()
        nodes = len(work.base_s)
        unit_s = np.maximum((work.seconds @ work.count) / max(1, len(work.kind)), 1e-300)
        sizes = work.memory[work.kind].astype(np.float64)
        unit_bytes = max(1.0, float(sizes.mean()))
        #: (N, I) time of each item, (I,) its bytes; (N,) what is left of time and memory, negative if over.
        self.cost: Floats = np.ascontiguousarray(work.seconds[:, work.kind]) / unit_s[:, None]
        self.size = sizes / unit_bytes
        self.time: Floats = (budget_s * (1 + SLACK) - work.loads_s(assignment)) / unit_s
        held = np.bincount(assignment, weights=sizes, minlength=nodes)
        self.room: Floats = (work.room_bytes.astype(np.float64) - held) / unit_bytes
        self.weight = np.ones(nodes)
        #: (N, I) the step before which an item does not go to a node.
        self.closed = np.zeros((nodes, len(assignment)), dtype=np.int64)
        self.draw = random.Random(len(assignment) * 1_000_003 + nodes)  # noqa: S311  (a fixed sequence of tries)

    def repair(self, steps: int) -> bool:
        """Exchange until no node is over; whether that was reached in so many steps."""
        for step in range(1, steps + 1):
            over = _over(self.time, self.room)
            late = np.flatnonzero(over > _NOTHING)
            if len(late) == 0:
                return True
            self.weight[late] += _HEAVIER
            self._exchange(int(late[self.draw.randrange(len(late))]), over, step)
        return False

    def _exchange(self, node: int, over: Floats, step: int) -> None:
        """The move or swap of an item of `node` that takes most off, all weights considered."""
        held = np.flatnonzero(self.home == node)
        if len(held) == 0:
            return
        change = self._moves(node, held, over)
        change[self.closed[:, held] > step] = np.inf
        target, at = divmod(int(change.argmin()), len(held))
        least, item, other = float(change[target, at]), int(held[at]), -1
        others = np.flatnonzero((self.home != node) & (self.closed[node] <= step))
        if len(others):
            change = self._swaps(node, held, others, over)
            closed = self.closed[:, held][self.home[others]].T
            change[closed > step] = np.inf
            at, column = divmod(int(change.argmin()), len(others))
            if float(change[at, column]) < least - _NOTHING:
                least, item, other = float(change[at, column]), int(held[at]), int(others[column])
                target = int(self.home[other])
        if not np.isfinite(least):
            return
        until = step + _TABU + self.draw.randrange(_TABU_DRAWN)
        self._move(item, target, until)
        if other >= 0:
            self._move(other, node, until)

    def _moves(self, node: int, held: Ints, over: Floats) -> Floats:
        """(N, H) change by moving an item to another node."""
        here = _over(self.time[node] + self.cost[node, held], self.room[node] + self.size[held])
        there = _over(self.time[:, None] - self.cost[:, held], self.room[:, None] - self.size[held][None, :])
        change: Floats = self.weight[:, None] * (there - over[:, None])
        change += self.weight[node] * (here - over[node])[None, :]
        change[node] = np.inf
        return change

    def _swaps(self, node: int, held: Ints, others: Ints, over: Floats) -> Floats:
        """(H, O) change by exchanging an item for another node's."""
        homes = self.home[others]
        shift = self.size[held][:, None] - self.size[others][None, :]
        here = _over(
            (self.time[node] + self.cost[node, held])[:, None] - self.cost[node, others][None, :],
            self.room[node] + shift,
        )
        there = _over(
            (self.time[homes] + self.cost[homes, others])[None, :] - self.cost[:, held][homes].T,
            self.room[homes][None, :] - shift,
        )
        change: Floats = self.weight[node] * (here - over[node]) + self.weight[homes] * (there - over[homes])
        return change

    def _move(self, item: int, node: int, until: int) -> None:
        old = int(self.home[item])
        self.time[old] += self.cost[old, item]
        self.time[node] -= self.cost[node, item]
        self.room[old] += self.size[item]
        self.room[node] -= self.size[item]
        self.closed[old, item] = until
        self.home[item] = node


def _over(time: Floats, room: Floats) -> Floats:
    """What is too much of time and of memory."""
    over: Floats = np.maximum(-time, 0.0) + np.maximum(-room, 0.0)
    return over


def repair(work: Work, assignment: Ints, budget_s: float, *, steps: int) -> Ints | None:
    """An allocation within `budget_s` and memory, starting from `assignment`, or None if none was found."""
    exchanges = Exchanges(work, assignment, budget_s)
    if not exchanges.repair(steps):
        return None
    used = np.zeros(len(work.base_s), dtype=np.int64)
    np.add.at(used, exchanges.home, work.memory[work.kind])
    late = work.loads_s(exchanges.home) > budget_s * (1 + 2 * SLACK)
    return None if late.any() or (used > work.room_bytes).any() else exchanges.home


def by_free_memory(work: Work, order: Ints) -> Ints:
    """Each item, in order, to the node with the largest share of its memory free: a start, not yet within memory."""
    room = work.room_bytes.astype(np.float64)
    whole = np.maximum(room, 1.0)
    assignment = np.empty(len(work.kind), dtype=np.int64)
    for item in order.tolist():
        size = float(work.memory[work.kind[item]])
        left = (room - size) / whole
        node = int(np.where(room >= size, left, left - 1e6).argmax())
        assignment[item] = node
        room[node] -= size
    return assignment


def by_density(work: Work, rates: Floats, budget_s: float) -> Ints:
    """Nodes whose memory is scarce for their speed take the layers with most FLOP a byte, the others what is left.

    Each node takes the layer whose FLOP per byte is nearest to what it has left of both, while one fits. What no
    node could take is poured; a start, not yet within memory and time.
    """
    flop, size = work.flop[work.kind], work.memory[work.kind].astype(np.float64)
    density = flop / np.maximum(size, 1.0)
    left = np.argsort(density, kind="stable").tolist()
    values = [float(density[item]) for item in left]
    room = work.room_bytes.astype(np.float64)
    time = np.maximum(budget_s - work.base_s, 0.0) * rates
    assignment = np.full(len(work.kind), -1, dtype=np.int64)
    for node in np.argsort(-time / np.maximum(room, 1.0), kind="stable").tolist():
        have, spare = float(time[node]), float(room[node])
        while left:
            at = int(np.searchsorted(values, have / max(spare, 1.0)))
            near = [p for p in range(max(0, at - 2), min(len(left), at + 3)) if flop[left[p]] <= have * (1 + SLACK)]
            near = [p for p in near if size[left[p]] <= spare]
            if not near:
                break
            pick = min(near, key=lambda p: (abs(values[p] - have / max(spare, 1.0)), p))
            item = left.pop(pick)
            values.pop(pick)
            assignment[item] = node
            have -= float(flop[item])
            spare -= float(size[item])
        room[node], time[node] = spare, have
    for item in sorted(left, key=lambda item: (-size[item], item)):
        fits = np.where(room >= size[item], time, -np.inf)
        node = int(fits.argmax() if np.isfinite(fits.max()) else room.argmax())
        assignment[item] = node
        room[node] -= size[item]
        time[node] -= flop[item]
    return assignment
