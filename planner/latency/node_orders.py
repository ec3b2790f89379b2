"""One request's time where links differ or layers come in no run: node orders, searched.

Up to `EXACT_NODES` nodes the programme over (nodes used, last node, position) is exact. Beyond that it keeps one best
chain for each (position, last node), which never uses a node twice; without that rule the same recursion bounds from
below whatever chain there is.
"""

from __future__ import annotations

import numpy as np

from planner.pipeline.sequence import Sequence
from planner.problem.arrays import Floats, Ints, Problem

#: Nodes up to which all node sets are tried.
EXACT_NODES = 8
#: Nodes considered beyond that, the most promising ones.
MOST_NODES = 64
#: Layers up to which the search is made at all.
MOST_LAYERS = 1_200


def hop_seconds(problem: Problem, chosen: list[int]) -> tuple[Floats, Floats]:
    """(n, n) latency and seconds per byte between the chosen nodes; free within one."""
    size = len(chosen)
    latency, per_byte = np.zeros((size, size)), np.zeros((size, size))
    for a in range(size):
        for b in range(size):
            if a != b:
                link = problem.link(chosen[a], chosen[b])
                latency[a, b] = link.latency_s
                per_byte[a, b] = 1.0 / link.bytes_per_s if link.bytes_per_s else 0.0
    return latency, per_byte


class Chains:
    """Seconds, reaches and links of the nodes a chain may use."""

    def __init__(self, problem: Problem, budget_s: float, *, most: int = MOST_NODES) -> None:
        self.problem = problem
        sequence = Sequence(problem)
        self.layers = sequence.layers
        reach = sequence.reach(budget_s)
        class_of = {node: at for at, nodes in enumerate(sequence.classes) for node in nodes}
        total = sequence.before_s[:, -1]
        needed = set(problem.pinned[problem.pinned >= 0].tolist())
        everyone = range(len(problem.nodes))
        farthest = {node: int((reach[class_of[node]] - np.arange(self.layers + 1)).max()) for node in everyone}
        promising = sorted(
            everyone, key=lambda node: (node not in needed, total[class_of[node]] / max(farthest[node], 0.5), node)
        )
        # Half by speed, half by how much they hold, so that few large nodes are never missed.
        roomy = sorted(everyone, key=lambda node: (-farthest[node], total[class_of[node]], node))
        self.chosen = sorted(set(promising[: most // 2]) | set(roomy[: most - most // 2]) | needed)
        rows = [class_of[node] for node in self.chosen]
        self.before = sequence.before_s[rows]
        self.reach = reach[rows]
        self.latency, self.per_byte = hop_seconds(problem, self.chosen)
        #: (L + 1,) bytes handed on when a stage ends before each position.
        self.payload = np.concatenate(([0.0], problem.payload))
        self.complete = len(self.chosen) == len(problem.nodes)

    def exact(self) -> tuple[Ints, float] | None:
        """The best chain over all node sets: ((L,) nodes, seconds), or None if there is none."""
        size, length = len(self.chosen), self.layers
        best = np.full((1 << size, size, length + 1), np.inf)
        came_from = np.full((1 << size, size, length + 1), -1, dtype=np.int16)
        came_last = np.full((1 << size, size, length + 1), -1, dtype=np.int8)
        positions = np.arange(length + 1)
        allowed = (positions[None, None, :] > positions[None, :, None]) & (
            positions[None, None, :] <= self.reach[:, :, None]
        )
        steps = np.where(allowed, self.before[:, None, :] - self.before[:, :, None], np.inf)
        for mask in range(1 << size):
            for node in range(size):
                if mask >> node & 1:
                    continue
                target = mask | 1 << node
                if mask == 0:
                    arrive = np.full(length + 1, np.inf)
                    arrive[0] = 0.0
                    last = np.full(length + 1, -1, dtype=np.int8)
                else:
                    hop = self.latency[:, node][:, None] + self.per_byte[:, node][:, None] * self.payload[None, :]
                    through = best[mask] + hop
                    last = through.argmin(axis=0).astype(np.int8)
                    arrive = through.min(axis=0)
                if not np.isfinite(arrive).any():
                    continue
                value = arrive[:, None] + steps[node]
                start = value.argmin(axis=0)
                seconds = value[start, positions]
                best[target, node] = seconds
                came_from[target, node] = start
                came_last[target, node] = last[start]
        ends = best[:, :, length]
        mask, node = divmod(int(ends.argmin()), size)
        seconds = float(ends[mask, node])
        if not np.isfinite(seconds):
            return None
        nodes = np.empty(length, dtype=np.int64)
        at = length
        while at > 0:
            start = int(came_from[mask, node, at])
            nodes[start:at] = self.chosen[node]
            previous = int(came_last[mask, node, at])
            mask ^= 1 << node
            at, node = start, previous
        return nodes, seconds

    def search(self, *, reuse: bool) -> tuple[Ints, float] | None:
        """One best chain for each (position, last node): ((L,) nodes, seconds) or None.

        Args:
            reuse: Let a chain come back to a node, whose memory counts anew: a bound from below, not a plan.
        """
        size, length = len(self.chosen), self.layers
        best = np.full((length + 1, size), np.inf)
        start_of = np.zeros((length + 1, size), dtype=np.int32)
        last_of = np.full((length + 1, size), -1, dtype=np.int32)
        used = np.zeros((length + 1, size, size), dtype=np.bool_)
        for at in range(length):
            if at == 0:
                arrive, last = np.zeros(size), np.full(size, -1)
            else:
                through = best[at][:, None] + self.latency + self.per_byte * self.payload[at]
                np.fill_diagonal(through, np.inf)
                if not reuse:
                    through[used[at]] = np.inf
                last = through.argmin(axis=0)
                arrive = through[last, np.arange(size)]
            if not np.isfinite(arrive).any():
                continue
            ends = np.arange(at + 1, length + 1)
            value = arrive[None, :] + self.before[:, at + 1 :].T - self.before[:, at][None, :]
            value[ends[:, None] > self.reach[:, at][None, :]] = np.inf
            better = value < best[at + 1 :]
            rows, columns = np.nonzero(better)
            best[at + 1 + rows, columns] = value[rows, columns]
            start_of[at + 1 + rows, columns] = at
            last_of[at + 1 + rows, columns] = last[columns]
            if not reuse:
                history = used[at, last] if at else np.zeros((size, size), dtype=np.bool_)
                history[np.arange(size), np.arange(size)] = True
                used[at + 1 + rows, columns] = history[columns]
        node = int(best[length].argmin())
        seconds = float(best[length, node])
        if not np.isfinite(seconds):
            return None
        nodes, at = np.empty(length, dtype=np.int64), length
        while at > 0:
            start = int(start_of[at, node])
            nodes[start:at] = self.chosen[node]
            at, node = start, int(last_of[at, node])
        return nodes, seconds

    def in_this_order(self, order: list[int]) -> tuple[Ints, float] | None:
        """The best cuts for a fixed order of nodes (positions in `chosen`), each used once or left out."""
        length = self.layers
        best = np.full(length + 1, np.inf)
        best[0] = 0.0
        positions = np.arange(length + 1)
        states: list[tuple[Floats, Ints, Ints]] = []
        ending = np.full((len(order), length + 1), np.inf)
        for at, node in enumerate(order):
            arrive = np.full(length + 1, np.inf)
            arrive[0] = 0.0
            last = np.full(length + 1, -1, dtype=np.int64)
            if at:
                hop = self.latency[order[:at], node][:, None] + (
                    self.per_byte[order[:at], node][:, None] * self.payload[None, :]
                )
                through = ending[:at] + hop
                chosen = through.argmin(axis=0)
                value = through[chosen, positions]
                arrive[1:], last[1:] = value[1:], chosen[1:]
            steps = self.before[node][None, :] - self.before[node][:, None]
            closed = (positions[None, :] <= positions[:, None]) | (positions[None, :] > self.reach[node][:, None])
            value_all = arrive[:, None] + np.where(closed, np.inf, steps)
            start = value_all.argmin(axis=0)
            ending[at] = value_all[start, positions]
            states.append((arrive, start, last))
        final = int(ending[:, length].argmin())
        seconds = float(ending[final, length])
        if not np.isfinite(seconds):
            return None
        nodes, where, at = np.empty(length, dtype=np.int64), final, length
        while at > 0:
            start_at = int(states[where][1][at])
            nodes[start_at:at] = self.chosen[order[where]]
            where, at = int(states[where][2][start_at]), start_at
        return nodes, seconds


def improve(chains: Chains, nodes: Ints, seconds: float, *, tries: int = 400) -> tuple[Ints, float]:
    """Swap, replace, insert and reorder nodes of a chain, cuts refitted each time, while that is faster."""
    place = {node: at for at, node in enumerate(chains.chosen)}
    edges = np.concatenate(([0], np.flatnonzero(np.diff(nodes)) + 1))
    if any(int(nodes[edge]) not in place for edge in edges):
        return nodes, seconds
    order = [place[int(nodes[edge])] for edge in edges]
    tried = 0
    improved = True
    while improved and tried < tries:
        improved = False
        outside = [at for at in range(len(chains.chosen)) if at not in order]
        variants: list[list[int]] = []
        for a in range(len(order)):
            variants += [[*order[:a], other, *order[a + 1 :]] for other in outside]
            for b in range(a + 1, len(order)):
                swapped = list(order)
                swapped[a], swapped[b] = swapped[b], swapped[a]
                variants.append(swapped)
        for a in range(len(order) + 1):
            variants += [[*order[:a], other, *order[a:]] for other in outside]
        for variant in variants:
            if tried >= tries:
                break
            tried += 1
            found = chains.in_this_order(variant)
            if found is not None and found[1] < seconds * (1 - 1e-12):
                nodes, seconds = found
                edges = np.concatenate(([0], np.flatnonzero(np.diff(nodes)) + 1))
                order = [place[int(nodes[edge])] for edge in edges]
                improved = True
                break
    return nodes, seconds
