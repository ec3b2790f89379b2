"""Contiguous stages over layers of any kind: how far each node gets from each layer, and in which order to use nodes.

For a budget a node's reach from a layer is the furthest layer it can end at. Getting further with the same nodes is
never worse, so the state of a search is only which nodes are used. Nodes that are alike form classes; while the
counts of classes used make few states the programme over them is exact, beyond that a beam keeps the best.
"""

from __future__ import annotations

import math
import random

import numpy as np

from planner.pipeline.node_prices import Prices, price_nodes
from planner.problem.arrays import SLACK, Ints, Problem
from planner.problem.ties import StageBytes

#: States up to which the programme over class counts is solved exactly.
EXACT_STATES = 20_000
#: Node sets kept a step beyond that.
BEAM = 64


class Sequence:
    """All layers of a problem in execution order, and classes of nodes that are alike."""

    def __init__(self, problem: Problem, *, reverse: bool = False) -> None:
        """Lay out the layers.

        Args:
            problem: What to plan.
            reverse: From the last layer to the first.
        """
        self.problem = problem
        order = np.arange(len(problem.kind))[:: -1 if reverse else 1]
        self.layers = len(order)
        keys: dict[tuple[object, ...], list[int]] = {}
        bandwidth = [node.memory_bytes_per_s for node in problem.nodes]
        pinned_nodes = set(problem.pinned[problem.pinned >= 0].tolist())
        for node in range(len(problem.nodes)):
            key = (
                problem.rate[node],
                bandwidth[node],
                int(problem.capacity[node]),
                problem.flop_cap[node],
                node if node in pinned_nodes else -1,
            )
            keys.setdefault(key, []).append(node)
        #: Nodes of each class, by id.
        self.classes = list(keys.values())
        heads = [nodes[0] for nodes in self.classes]
        kinds = problem.kind[order]
        zero = np.zeros((len(heads), 1))
        #: (C, L + 1) seconds, (L + 1,) bytes and FLOP before each position.
        self.before_s = np.concatenate((zero, np.cumsum(problem.seconds[heads][:, kinds], axis=1)), axis=1)
        self._bytes = StageBytes(problem, order)
        #: Whether shared weights are counted once a stage, or the bytes of stages are at most those counted.
        self.exact_bytes = self._bytes.exact
        self._before_flop = np.concatenate(([0.0], np.cumsum(problem.flop[order])))
        self.limit = self._limits(heads, problem.pinned[order])
        self.counts = [len(nodes) for nodes in self.classes]
        self.states = math.prod(count + 1 for count in self.counts) if len(self.counts) <= 16 else EXACT_STATES + 1
        self._levels: list[tuple[Ints, list[tuple[int, Ints, Ints]]]] | None = None
        # A set of nodes is known by the sum of its classes' keys.
        self._keys = np.random.default_rng(0).integers(2**40, 2**52, len(self.classes))
        #: Of the last budget looked at.
        self.prices: Prices | None = None
        self.impossible = False

    def _limits(self, heads: list[int], pinned: Ints) -> Ints:
        """(C, L + 1) furthest end that memory, shares and pins allow from each position."""
        problem, length = self.problem, self.layers
        limit = np.full((len(heads), length + 1), length, dtype=np.int64)
        for row, node in enumerate(heads):
            limit[row] = self._bytes.ends(np.arange(length + 1), int(problem.capacity[node]))
            if math.isfinite(problem.flop_cap[node]):
                most = self._before_flop + problem.flop_cap[node] * (1 + SLACK)
                limit[row] = np.minimum(limit[row], np.searchsorted(self._before_flop, most, side="right") - 1)
            foreign = np.flatnonzero((pinned >= 0) & (pinned != node))
            if len(foreign):
                stops = np.append(foreign, length)
                limit[row] = np.minimum(limit[row], stops[np.searchsorted(foreign, np.arange(length + 1))])
        return np.maximum(limit, np.arange(length + 1)[None, :])

    def reach(self, budget_s: float) -> Ints:
        """(C, L + 1) furthest end from each position within `budget_s`."""
        if math.isinf(budget_s):
            return self.limit
        ends = np.empty_like(self.limit)
        for row in range(len(self.classes)):
            before = self.before_s[row]
            ends[row] = np.searchsorted(before, before + budget_s + SLACK * (budget_s + before), side="right") - 1
        return np.minimum(ends, self.limit)

    def place(self, budget_s: float) -> list[tuple[int, int, int]] | None:
        """Stages [(class, start, end)] that cover all layers within `budget_s`, or None if none were found.

        Sets `impossible` to whether that is proven.
        """
        reach = self.reach(budget_s)
        if self.is_exact:
            found = self._place_exact(reach)
            self.impossible = found is None
            return found
        self.prices = price_nodes(reach, self.counts, None if self.prices is None else self.prices.worth)
        self.impossible = self.prices.impossible
        return None if self.impossible else self._place_beam(reach, self.prices)

    def excludes(self, budget_s: float) -> bool:
        """Whether prices prove that no stages keep `budget_s`."""
        self.prices = price_nodes(
            self.reach(budget_s), self.counts, None if self.prices is None else self.prices.worth
        )
        return self.prices.impossible

    @property
    def is_exact(self) -> bool:
        """Whether `place` finds stages whenever there are any."""
        return self.states <= EXACT_STATES

    def _prepare(self) -> list[tuple[Ints, list[tuple[int, Ints, Ints]]]]:
        """States by how many nodes they use; for each class those that can have used one of it last."""
        if self._levels is None:
            shape = tuple(count + 1 for count in self.counts)
            grids = np.array(np.unravel_index(np.arange(self.states), shape))
            strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
            level = grids.sum(axis=0)
            order = np.argsort(level, kind="stable")
            edges = np.searchsorted(level[order], np.arange(int(level.max()) + 2))
            self._levels = []
            for depth in range(1, int(level.max()) + 1):
                members = order[edges[depth] : edges[depth + 1]]
                steps = []
                for at in range(len(shape)):
                    rows = np.flatnonzero(grids[at][members] > 0)
                    if len(rows):
                        steps.append((at, rows, members[rows] - strides[at]))
                self._levels.append((members, steps))
        return self._levels

    def _place_exact(self, reach: Ints) -> list[tuple[int, int, int]] | None:
        position = np.zeros(self.states, dtype=np.int64)
        came = np.full(self.states, -1, dtype=np.int64)
        strides = [math.prod(c + 1 for c in self.counts[at + 1 :]) for at in range(len(self.counts))]
        for members, steps in self._prepare():
            ends = np.full(len(members), -1, dtype=np.int64)
            via = np.full(len(members), -1, dtype=np.int64)
            for at, rows, previous in steps:
                end = reach[at][position[previous]]
                better = end > ends[rows]
                ends[rows[better]] = end[better]
                via[rows[better]] = at
            position[members] = ends
            came[members] = via
            done = np.flatnonzero(ends >= self.layers)
            if len(done):
                state = int(members[done[0]])
                stages = []
                while state:
                    at = int(came[state])
                    previous_state = state - strides[at]
                    stages.append((at, int(position[previous_state]), int(position[state])))
                    state = previous_state
                return stages[::-1]
        return None

    def _place_beam(self, reach: Ints, prices: Prices) -> list[tuple[int, int, int]] | None:
        """Best few node sets a step, by how much more of the layers' price they covered than their nodes' price."""
        classes = len(self.classes)
        left = np.array([self.counts], dtype=np.int64)
        position = np.zeros(1, dtype=np.int64)
        trail: list[tuple[Ints, Ints, Ints]] = []
        before, worth = prices.covered, prices.worth
        spent = np.zeros(1)
        names = np.zeros(1, dtype=np.int64)
        for _ in range(sum(self.counts)):
            ends = reach[:, position].T  # (B, C)
            usable = (left > 0) & (ends > position[:, None])
            if not usable.any():
                return None
            gained = before[ends]
            score = np.where(usable, gained - (spent[:, None] + worth[None, :]), -np.inf)
            finished = usable & (ends >= self.layers)
            if finished.any():
                row, at = divmod(int(np.argmax(finished)), classes)
                trail.append((np.array([row]), np.array([at]), np.array([self.layers])))
                return self._unwind(trail)
            flat = score.ravel()
            count = min(BEAM * 4, len(flat) - 1)
            top = np.argpartition(-flat, count)[: count + 1]
            top = top[np.isfinite(flat[top])]
            top = top[np.lexsort((top, -flat[top]))]
            rows, ats = top // classes, top % classes
            after = names[rows] + self._keys[ats]
            _, first = np.unique(after, return_index=True)
            keep = np.sort(first)[:BEAM]
            rows, ats, names = rows[keep], ats[keep], after[keep]
            left = left[rows]
            left[np.arange(len(rows)), ats] -= 1
            position = ends[rows, ats]
            spent = spent[rows] + worth[ats]
            trail.append((rows, ats, position))
        return None

    def reorder(self, budget_s: float, present: list[int], *, tries: int = 2_500) -> Ints | None:
        """(L,) nodes within `budget_s` from an order found by exchanging and moving nodes, or None.

        Args:
            budget_s: The budget.
            present: (L,) nodes of a plan to start from; empty: the roomiest first.
            tries: Orders looked at.
        """
        rows = self.reach(budget_s).tolist()
        class_of = {node: at for at, nodes in enumerate(self.classes) for node in nodes}
        used = list(dict.fromkeys(present))
        rest = [node for node in range(len(self.problem.nodes)) if node not in set(used)]
        rest.sort(key=lambda node: (-rows[class_of[node]][0], node))
        order = [class_of[node] for node in used + rest]
        length, count = self.layers, len(order)
        ends = [0] * (count + 1)

        def run(trial: list[int], start: int) -> list[int]:
            position, passed = ends[start], []
            for at in trial[start:]:
                position = rows[at][position]
                passed.append(position)
                if position >= length:
                    break
            return passed

        ends[1:] = run(order, 0)
        ends += [ends[-1]] * (count + 1 - len(ends))
        best = ends[count]
        draw = random.Random(count * 1_000_003 + length)  # noqa: S311  (a fixed sequence of tries)
        for _ in range(tries):
            if best >= length:
                break
            a, b = draw.randrange(count), draw.randrange(count)
            if a == b or order[a] == order[b]:
                continue
            trial = list(order)
            if draw.random() < 0.6:
                trial[a], trial[b] = trial[b], trial[a]
            else:
                trial.insert(b, trial.pop(a))
            start = min(a, b)
            passed = run(trial, start)
            if passed[-1] >= best:
                order, best = trial, passed[-1]
                ends[start + 1 :] = passed + [best] * (count - start - len(passed))
        if best < length:
            return None
        stages, position = [], 0
        for at in order:
            end = rows[at][position]
            if end > position:
                stages.append((at, position, end))
                position = end
            if position >= length:
                break
        return self.assignment(stages)

    @staticmethod
    def _unwind(trail: list[tuple[Ints, Ints, Ints]]) -> list[tuple[int, int, int]]:
        stages: list[tuple[int, int, int]] = []
        row = 0
        for depth in range(len(trail) - 1, -1, -1):
            rows, ats, positions = trail[depth]
            previous = int(rows[row])
            start = int(trail[depth - 1][2][previous]) if depth else 0
            stages.append((int(ats[row]), start, int(positions[row])))
            row = previous
        return stages[::-1]

    def assignment(self, stages: list[tuple[int, int, int]], *, reverse: bool = False) -> Ints:
        """(L,) node of each layer; nodes of a class in order of their ids."""
        nodes = np.empty(self.layers, dtype=np.int64)
        taken = [0] * len(self.classes)
        for at, start, end in stages:
            nodes[start:end] = self.classes[at][taken[at]]
            taken[at] += 1
        return nodes[::-1].copy() if reverse else nodes
