"""One request's time where any layer may be anywhere: paths through (layer, node), priced and then improved.

Without limits on nodes the fastest plan is a shortest path. Prices on memory and on time make paths that keep the
limits, and each bounds from below whatever plan there is (Lagrange; Held and Karp, The travelling-salesman problem
and minimum spanning trees II, 1971). From the plans found, stretches of layers are moved to other nodes, two moves
at a time where the first would overfill one, as long as that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from planner.latency.node_orders import hop_seconds
from planner.problem.arrays import SLACK, Floats, Ints, Problem
from planner.problem.items import Found

#: Layers times nodes times nodes up to which prices are sought, and updates of them.
_MOST_STEPS, _UPDATES = 600_000, 120
#: Layers placed by branch and bound, in all: at most, and times layers times nodes.
_SEARCHED, _SEARCHED_CELLS = 20_000, 3_000_000
#: Layers up to which it is tried, and nodes up to which any of this is.
_DEEPEST, _MOST_NODES = 400, 128
#: Times that it gets to the last layer at least, and how near to the bound a plan is good enough.
_DIVES, _NEARLY = 12, 0.0005
#: Plans that are improved; stretches times nodes looked at for all; moves that overfill a node and get a second.
_STARTS, _MOST_LOOKED, _SECONDS = 6, 6_000_000, 24


def fastest(problem: Problem, candidates: Sequence[Ints], bound: float) -> Found:
    """The fastest plan from some that keep all limits, or from none, and the better of two bounds.

    Args:
        problem: With its time budget, if any.
        candidates: (L,) nodes of each layer; those that exceed a limit are left aside.
        bound: Seconds that no plan is below.
    """
    budget_s = problem.options.time_budget_s or math.inf
    kept = [nodes for nodes in candidates if keeps(problem, nodes, budget_s)]
    best = min(kept, key=problem.latency_s, default=None)
    if len(problem.nodes) > _MOST_NODES or (best is not None and problem.latency_s(best) <= bound * (1 + _NEARLY)):
        return best, bound
    space = _Space(problem, budget_s)
    plans, priced, prices = space.priced(best)
    starts = {nodes.tobytes(): nodes for nodes in sorted(kept + plans, key=problem.latency_s)[:_STARTS]}.values()
    improved = [space.improved(nodes, _MOST_LOOKED // len(starts)) for nodes in starts]
    best, complete = space.search(min(improved, key=problem.latency_s, default=None), prices)
    if best is None:
        return best, math.inf if complete else bound
    if complete:
        return best, problem.latency_s(best) * (1 - SLACK)
    return space.improved(best, _MOST_LOOKED // _STARTS), max(bound, priced * (1 - 1e-12))


def keeps(problem: Problem, nodes: Ints, budget_s: float) -> bool:
    """Whether an allocation keeps every limit, shared weights and time included."""
    return problem.fits(nodes) and problem.bottleneck_s(nodes) <= budget_s * (1 + SLACK)


class _Space:
    """Seconds, hops and limits of the problem as arrays."""

    def __init__(self, problem: Problem, budget_s: float) -> None:
        self.problem, self.budget_s = problem, budget_s
        self.nodes, self.layers = len(problem.nodes), len(problem.kind)
        self.latency, self.per_byte = hop_seconds(problem, list(range(self.nodes)))
        #: (N, L) seconds, infinite where a pin says otherwise.
        self.seconds = problem.seconds[:, problem.kind].copy()
        pinned = np.flatnonzero(problem.pinned >= 0)
        for layer in pinned.tolist():
            self.seconds[np.arange(self.nodes) != problem.pinned[layer], layer] = np.inf
        takes = [np.broadcast_to(problem.memory.astype(np.float64), self.seconds.shape)]
        most = [problem.capacity.astype(np.float64)]
        if math.isfinite(budget_s):
            takes.append(np.where(np.isfinite(self.seconds), self.seconds, 0.0))
            most.append(np.full(self.nodes, budget_s * (1 + SLACK)))
        if np.isfinite(problem.flop_cap).any():
            takes.append(np.broadcast_to(problem.flop, self.seconds.shape))
            most.append(np.where(np.isfinite(problem.flop_cap), problem.flop_cap * (1 + SLACK), 1e300))
        self.takes, self.most = np.array(takes), np.array(most)
        #: (R,) in units of the whole model bytes and seconds are priced alike.
        self.unit = np.maximum(self.takes.max(axis=1).sum(axis=1), 1e-300)

    def path(self, seconds: Floats) -> tuple[Ints, float]:
        """The shortest path for (N, L) priced seconds: ((L,) nodes, its length)."""
        back = np.empty((self.layers, self.nodes), dtype=np.int64)
        reached = seconds[:, 0]
        everyone = np.arange(self.nodes)
        for layer in range(1, self.layers):
            through = reached[:, None] + (self.latency + self.per_byte * self.problem.payload[layer - 1])
            back[layer] = through.argmin(axis=0)
            reached = through[back[layer], everyone] + seconds[:, layer]
        nodes = np.empty(self.layers, dtype=np.int64)
        nodes[-1] = reached.argmin()
        for layer in range(self.layers - 1, 0, -1):
            nodes[layer - 1] = back[layer, nodes[layer]]
        return nodes, float(reached.min())

    def priced(self, best: Ints | None) -> tuple[list[Ints], float, Floats]:
        """Plans that keep the limits, the best bound and its prices, which rise where a path takes too much."""
        takes, most = self.takes / self.unit[:, None, None], np.minimum(self.most / self.unit[:, None], 1e6)
        prices = dearest = np.zeros(most.shape)
        if self.layers * self.nodes**2 > _MOST_STEPS:
            return [], 0.0, dearest
        upper = math.inf if best is None else self.problem.latency_s(best)
        bound, pace, stale, plans = 0.0, 1.0, 0, []
        layers = np.arange(self.layers)
        for _ in range(_UPDATES):
            nodes, length = self.path(self.seconds + np.einsum("rn,rnl->nl", prices, takes))
            if not math.isfinite(length):
                break
            value = length - float((prices * most).sum())
            used = np.zeros(most.shape)
            for row in range(len(most)):
                used[row] = np.bincount(nodes, weights=takes[row, nodes, layers], minlength=self.nodes)
            if keeps(self.problem, nodes, self.budget_s):
                plans.append(nodes)
                upper = min(upper, self.problem.latency_s(nodes))
            if value > bound * (1 + 1e-6):
                bound, stale, dearest = value, 0, prices
            else:
                stale += 1
                if stale == 6:
                    pace, stale = pace / 2, 0
            slope = used - most
            slope[(prices == 0) & (slope < 0)] = 0.0
            size = float((slope**2).sum())
            if size < 1e-24 or bound >= upper * (1 - SLACK) or pace < 1e-3:
                break
            aim = upper if math.isfinite(upper) else 1.5 * max(value, length)
            prices = np.maximum(0.0, prices + pace * max(aim - value, 1e-3 * aim) / size * slope)
        return plans, bound, dearest

    def search(self, best: Ints | None, prices: Floats) -> tuple[Ints | None, bool]:
        """The best plan by branch and bound on the priced paths, and whether none was passed over."""
        if self.layers > _DEEPEST or self.layers * self.nodes**2 > _MOST_STEPS:
            return best, False
        takes, most = self.takes / self.unit[:, None, None], np.minimum(self.most / self.unit[:, None], 1e6)
        priced = self.seconds + np.einsum("rn,rnl->nl", prices, takes)
        ahead = np.zeros((self.layers, self.nodes))
        hops = [self.latency + self.per_byte * payload for payload in self.problem.payload[:-1].tolist()]
        for layer in range(self.layers - 2, -1, -1):
            ahead[layer] = (hops[layer] + (priced[:, layer + 1] + ahead[layer + 1])[None, :]).min(axis=1)
        paid = float((prices * most).sum())
        upper = math.inf if best is None else self.problem.latency_s(best)
        nodes = np.zeros(self.layers, dtype=np.int64)
        left = max(_DIVES * self.layers, min(_SEARCHED, _SEARCHED_CELLS // (self.layers * self.nodes)))
        complete = True

        def extend(layer: int, spent: float, room: Floats) -> None:
            nonlocal best, upper, left, complete
            if layer == self.layers:
                if (seconds := self.problem.latency_s(nodes)) < upper and keeps(self.problem, nodes, self.budget_s):
                    best, upper = nodes.copy(), seconds
                return
            here = spent + priced[:, layer] + (hops[layer - 1][nodes[layer - 1]] if layer else 0.0)
            value = here + ahead[layer] - paid
            value[(room < takes[:, :, layer]).any(axis=0)] = np.inf
            for node in np.argsort(value, kind="stable").tolist():
                if value[node] >= upper * (1 - SLACK) or not complete:
                    break
                left -= 1
                if left < 0:
                    complete = False
                    break
                nodes[layer] = node
                less = room.copy()
                less[:, node] -= takes[:, node, layer]
                extend(layer + 1, float(here[node]), less)

        extend(0, 0.0, most * (1 + 1e-12))
        return best, complete

    def improved(self, nodes: Ints, most: int) -> Ints:
        """Move stretches of layers while that is faster and keeps the limits; looks at `most` of them about."""
        looked = 0
        while True:
            starts, ends = _stretches(nodes)
            cells = len(starts) * self.nodes
            change, over = self._changes(nodes, starts, ends)
            looked += cells
            gain = -1e-9 * self.problem.latency_s(nodes)
            found = self._first(nodes, starts, ends, np.where(over, np.inf, change), gain)
            if found is None and looked + _SECONDS * cells <= most:
                found = self._both(nodes, starts, ends, np.where(over, change, np.inf), gain)
                looked += _SECONDS * cells
            if found is None or looked > most:
                return nodes if found is None else found
            nodes = found

    def _first(self, nodes: Ints, starts: Ints, ends: Ints, change: Floats, gain: float) -> Ints | None:
        """The fastest single move that keeps the limits."""
        for at in _least(change, 8):
            stretch, node = divmod(at, self.nodes)
            if change[stretch, node] >= gain:
                return None
            moved = nodes.copy()
            moved[starts[stretch] : ends[stretch]] = node
            if keeps(self.problem, moved, self.budget_s):
                return moved
        return None

    def _both(self, nodes: Ints, starts: Ints, ends: Ints, change: Floats, gain: float) -> Ints | None:
        """The fastest of two moves: one that overfills a node, and one that relieves it."""
        best, least = None, gain
        for at in _least(change, _SECONDS):
            stretch, node = divmod(at, self.nodes)
            first = float(change[stretch, node])
            if not math.isfinite(first):
                break
            moved = nodes.copy()
            moved[starts[stretch] : ends[stretch]] = node
            from_, to = _stretches(moved)
            second, over = self._changes(moved, from_, to)
            second[over] = np.inf
            for then in _least(second, 4):
                other, target = divmod(then, self.nodes)
                if first + float(second[other, target]) >= least:
                    break
                both = moved.copy()
                both[from_[other] : to[other]] = target
                if keeps(self.problem, both, self.budget_s):
                    best, least = both, first + float(second[other, target])
                    break
        return best

    def _changes(self, nodes: Ints, starts: Ints, ends: Ints) -> tuple[Floats, np.ndarray]:
        """(S, N) seconds that moving each stretch to each node adds, and whether a limit would then be exceeded."""
        layers = np.arange(self.layers)
        payload = self.problem.payload
        own = self.seconds[nodes, layers]
        hop = np.zeros(self.layers + 1)
        hop[1:-1] = self.latency[nodes[:-1], nodes[1:]] + self.per_byte[nodes[:-1], nodes[1:]] * payload[:-1]
        now = _sums(own)[ends] - _sums(own)[starts] + _sums(hop)[ends + 1] - _sums(hop)[starts]
        open_ = np.isfinite(self.seconds)
        shut = np.cumsum(np.pad(~open_, ((0, 0), (1, 0))), axis=1)
        there = np.pad(np.where(open_, self.seconds, 0.0).cumsum(axis=1), ((0, 0), (1, 0)))
        change = (there[:, ends] - there[:, starts]).T - now[:, None]
        left = np.flatnonzero(starts > 0)
        before = starts[left] - 1
        change[left] += self.latency[nodes[before]] + self.per_byte[nodes[before]] * payload[before][:, None]
        right = np.flatnonzero(ends < self.layers)
        after, last = nodes[ends[right]], ends[right] - 1
        change[right] += self.latency[:, after].T + self.per_byte[:, after].T * payload[last][:, None]
        change[(shut[:, ends] > shut[:, starts]).T] = np.inf
        used = np.zeros(self.most.shape)
        over = np.zeros(change.shape, dtype=np.bool_)
        held = nodes[None, :] == np.arange(self.nodes)[:, None]
        for row, most in enumerate(self.most):
            takes = self.takes[row]
            here = takes[nodes, layers]
            used[row] = np.bincount(nodes, weights=here, minlength=self.nodes)
            new = np.pad(np.where(held, 0.0, takes).cumsum(axis=1), ((0, 0), (1, 0)))
            slack = most * (1 + 1e-12)
            over |= slack < (used[row][:, None] + new[:, ends] - new[:, starts]).T
            # A node that is over already has to be relieved by this very stretch.
            late = np.flatnonzero(used[row] > slack)
            for node in late.tolist():
                relief = np.concatenate(([0.0], np.where(held[node], takes[node], 0.0).cumsum()))
                short = used[row, node] - (relief[ends] - relief[starts]) > slack[node]
                over |= short[:, None]
        return change, over


def _sums(values: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(values)))


def _stretches(nodes: Ints) -> tuple[Ints, Ints]:
    """Starts and ends of all stretches; of long chains those that begin or end with a stage, and single layers."""
    count = len(nodes)
    if count <= 40:
        starts, ends = np.triu_indices(count + 1, 1)
        return starts, ends
    edges = np.concatenate(([0], np.flatnonzero(np.diff(nodes)) + 1, [count]))
    every = np.arange(count + 1)
    a, b = np.meshgrid(edges, every, indexing="ij")
    pairs = np.concatenate(
        [
            np.stack([np.minimum(a, b).ravel(), np.maximum(a, b).ravel()]),
            np.stack([every[:-1], every[1:]]),
        ],
        axis=1,
    )
    pairs = np.unique(pairs[:, pairs[0] < pairs[1]], axis=1)
    return pairs[0], pairs[1]


def _least(values: Floats, most: int) -> Iterable[int]:
    """Flat positions of the smallest finite values, smallest first."""
    flat = values.ravel()
    count = min(most, flat.size)
    near = np.argpartition(flat, count - 1)[:count]
    near = near[np.lexsort((near, flat[near]))]
    return [int(at) for at in near if math.isfinite(flat[at])]
