"""Bring an allocation within a budget and within memory by the exchanges that take most off what is too much.

A tabu search on the sum of what nodes are over their time and their memory. It may pass through allocations that
are worse, which moves and swaps that only improve cannot: to put one more layer on a fast node whose memory is full,
large layers on it first have to be traded for small ones. Deterministic, and bounded by a number of steps.
"""

from __future__ import annotations

import numpy as np

from planner.placement import Work
from planner.problem import SLACK, Floats, Ints

#: Steps for which a layer that was exchanged stays where it is.
_TABU = 9


class Mender:
    """Loads, rooms and what is too much, in units of a mean layer."""

    def __init__(self, work: Work, assignment: Ints) -> None:
        self.work = work
        self.home = assignment.copy()
        self.size = work.memory[work.kind].astype(np.float64)
        self.unit_bytes = max(1.0, float(self.size.mean()))
        self.unit_s = np.maximum((work.seconds @ work.count) / max(1, len(work.kind)), 1e-300)
        self.loads = work.loads_s(assignment)
        nodes = len(work.base_s)
        held = np.bincount(assignment, weights=self.size, minlength=nodes)
        self.room: Floats = work.room_bytes.astype(np.float64) - held
        self.held_until = np.zeros(len(assignment), dtype=np.int64)
        self.step = 0

    def _over(self, load: Floats, room: Floats, node: Ints | int, limit_s: float) -> Floats:
        late = np.maximum(load - limit_s, 0.0) / self.unit_s[node]
        return np.asarray(late + np.maximum(-room, 0.0) / self.unit_bytes)

    def within(self, budget_s: float, *, steps: int) -> bool:
        """Exchange until no node is over `budget_s` or its memory; whether that was reached in so many steps."""
        work = self.work
        limit = budget_s * (1 + SLACK)
        every = np.arange(len(work.base_s))
        least = np.inf
        for _ in range(steps):
            over = self._over(self.loads, self.room, every, limit)
            total = float(over.sum())
            if total <= 0:
                return True
            least = min(least, total)
            worst = int(over.argmax())
            self.step += 1
            if not self._exchange(worst, over, limit, total - least):
                return False
        return bool(self._over(self.loads, self.room, every, limit).sum() <= 0)

    def _exchange(self, worst: int, over: Floats, limit: float, above: float) -> bool:
        work, kinds = self.work, self.work.kind
        held = np.flatnonzero(self.home == worst)
        if len(held) == 0:
            return False
        own_s = work.seconds[worst, kinds[held]]
        free = self.held_until[held] <= self.step
        # Moves: (held, nodes).
        after_here = self._over(self.loads[worst] - own_s, self.room[worst] + self.size[held], worst, limit)
        nodes = np.arange(len(work.base_s))
        there = self._over(
            self.loads[None, :] + work.seconds[:, kinds[held]].T,
            self.room[None, :] - self.size[held][:, None],
            nodes[None, :],
            limit,
        )
        change = after_here[:, None] - over[worst] + there - over[None, :]
        change[:, worst] = np.inf
        change[~free] += np.where(change[~free] < -above - 1e-9, 0.0, np.inf)
        row, node = divmod(int(change.argmin()), len(nodes))
        best = float(change[row, node])
        pick: tuple[int, int] = (int(held[row]), -1)
        # Swaps: (held, others).
        others = np.flatnonzero((self.home != worst) & (self.held_until <= self.step))
        if len(others) and best > -over[worst] and free.any():
            mine = held[free]
            homes = self.home[others]
            my_s = work.seconds[worst, kinds[mine]][:, None]
            here = self._over(
                self.loads[worst] - my_s + work.seconds[worst, kinds[others]][None, :],
                self.room[worst] + self.size[mine][:, None] - self.size[others][None, :],
                worst,
                limit,
            )
            away = self._over(
                (self.loads[homes] - work.seconds[homes, kinds[others]])[None, :]
                + work.seconds[homes[None, :], kinds[mine][:, None]],
                (self.room[homes] + self.size[others])[None, :] - self.size[mine][:, None],
                homes[None, :],
                limit,
            )
            trade = here - over[worst] + away - over[homes][None, :]
            at, column = divmod(int(trade.argmin()), len(others))
            if float(trade[at, column]) < best - 1e-12:
                best, pick = float(trade[at, column]), (int(mine[at]), int(others[column]))
        if not np.isfinite(best):
            return False
        if pick[1] < 0:
            self._move(pick[0], node)
        else:
            target = int(self.home[pick[1]])
            self._move(pick[0], target)
            self._move(pick[1], worst)
        return True

    def _move(self, item: int, node: int) -> None:
        kind, old = int(self.work.kind[item]), int(self.home[item])
        self.loads[old] -= self.work.seconds[old, kind]
        self.loads[node] += self.work.seconds[node, kind]
        self.room[old] += self.size[item]
        self.room[node] -= self.size[item]
        self.home[item] = node
        self.held_until[item] = self.step + _TABU


def mend(work: Work, assignment: Ints, budget_s: float, *, steps: int) -> Ints | None:
    """An allocation within `budget_s` and memory, starting from `assignment`, or None if none was found."""
    mender = Mender(work, assignment)
    return mender.home if mender.within(budget_s, steps=steps) else None


def pour(work: Work, order: Ints) -> Ints:
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
