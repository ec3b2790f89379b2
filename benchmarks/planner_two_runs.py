"""The referee's bound for contiguous stages over two long runs of equal layers (encoder and decoder), by counting.

Of the layers outside the runs only the costliest before, between and after them are kept: leaving layers out never
makes a chain slower. A node then hosts some of one run, or one of the kept layers with what it can of the runs beside
it, so a programme over (kept layers placed, layers of the first run placed) tells the most of the second run that
there is room for: exact for these layers, node order free.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from planner.problem.arrays import SLACK, Floats, Ints, Problem

#: Layers a run has at least, and the part of all layers that both have.
_SHORTEST, _PART = 4, 0.7
#: Steps of the programme (nodes * layers of the first run) up to which it is tried.
_MOST_STEPS = 20_000
_NEVER = -1e9


def two_runs_bound_s(problem: Problem, above_s: float, *, probes: int = 30) -> float:
    """The smallest bottleneck of the two runs and the kept layers, or `above_s` where that says no more.

    Shared weights count once, at their owner: a copy never makes a chain faster.

    Args:
        problem: What to plan.
        above_s: A bound known already, in seconds.
        probes: Steps of the bisection.
    """
    runs = _two_runs(problem)
    if runs is None or above_s <= 0 or (problem.pinned >= 0).any():
        return above_s
    programme = _Programme(problem, problem.memory, *runs)
    if len(problem.nodes) * programme.first > _MOST_STEPS or programme.hosts_all(above_s * (1 + 1e-6)):
        return above_s
    low, high, step = above_s, above_s, 1.01
    while not programme.hosts_all(high):
        low, high, step = high, high * step, min(step**2, 10.0)
        if high > above_s * 1e6:  # memory is too small; other checks say so
            return above_s
    for _ in range(probes):
        if high <= low * (1 + 1e-7):
            break
        middle = (low + high) / 2
        low, high = (low, middle) if programme.hosts_all(middle) else (middle, high)
    return low


def _two_runs(problem: Problem) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """[start, end) of the two longest stretches of equal layers, in order."""
    edges = np.flatnonzero(np.diff(problem.kind)) + 1
    bounds = [0, *edges.tolist(), len(problem.kind)]
    spans = sorted(pairwise(bounds), key=lambda span: span[0] - span[1])[:2]
    if len(spans) < 2 or any(b - a < _SHORTEST for a, b in spans):
        return None
    if sum(b - a for a, b in spans) < _PART * len(problem.kind):
        return None
    first, second = sorted(spans)
    return first, second


class _Programme:
    """Costs of the runs and the kept layers on each node; a layer that is not there costs nothing."""

    def __init__(self, problem: Problem, memory: Ints, first: tuple[int, int], second: tuple[int, int]) -> None:
        gaps = ((0, first[0]), (first[1], second[0]), (second[1], len(problem.kind)))
        kept = [a + int(problem.flop[a:b].argmax()) if a < b else -1 for a, b in gaps]
        zero = np.zeros(len(problem.nodes))
        #: (N,) seconds and bytes: before, between, after; of a layer of each run.
        self.odd = [(problem.seconds[:, problem.kind[at]], int(memory[at])) if at >= 0 else (zero, 0) for at in kept]
        self.one = (problem.seconds[:, problem.kind[first[0]]], int(memory[first[0]]))
        self.two = (problem.seconds[:, problem.kind[second[0]]], int(memory[second[0]]))
        self.first, self.second = first[1] - first[0], second[1] - second[0]
        self.room = problem.capacity.astype(np.float64)

    def hosts_all(self, budget_s: float) -> bool:
        """Whether everything has room within `budget_s`."""
        before, between, after = self.odd
        limit = budget_s * (1 + SLACK)
        many = np.arange(self.first + 1)

        def left(*parts: tuple[Floats, int]) -> tuple[Floats, Floats]:
            time = np.full(len(self.room), limit) - sum(seconds for seconds, _ in parts)
            return time, self.room - sum(size for _, size in parts)

        def most(of: tuple[Floats, int], have: tuple[Floats, Floats], cap: int) -> Floats:
            """(N,) or (N, P) how many layers of a run fit into what is left; `_NEVER` where less than nothing is."""
            time, space = have
            seconds = of[0].reshape(-1, *[1] * (time.ndim - 1))
            with np.errstate(divide="ignore", invalid="ignore"):
                by_time = np.where(seconds > 0, np.floor(time / seconds), float(cap))
                by_space = np.floor(space / of[1]) if of[1] else np.full_like(space, cap)
            fits = np.minimum(np.minimum(by_time, by_space), cap)
            return np.where((time < 0) | (space < 0), _NEVER, fits)

        def beside(*parts: tuple[Floats, int]) -> Floats:
            """(N, P) most of the second run beside p of the first and those layers."""
            time, space = left(*parts)
            time = time[:, None] - many * self.one[0][:, None]
            return most(self.two, (time, space[:, None] - many * self.one[1]), self.second)

        alone_one = most(self.one, left(), self.first)
        alone_two = most(self.two, left(), self.second)
        start = most(self.one, left(before), self.first)
        end = most(self.two, left(after), self.second)
        middle = beside(between)
        from_start = beside(before, between)[:, -1]
        to_end = beside(between, after)
        if (beside(before, between, after)[:, -1] >= self.second).any():
            return True
        # (start placed, between placed, end placed, layers of the first run) -> most of the second.
        best = np.full((2, 2, 2, self.first + 1), _NEVER)
        best[0, 0, 0, 0] = 0.0
        for node in range(len(self.room)):
            after_node = best.copy()

            _host(after_node, best, alone_one[node], 0.0)
            _host(after_node, best, 0.0, alone_two[node])
            _host(after_node[1], best[0], start[node], 0.0)
            _host(after_node[:, :, 1], best[:, :, 0], 0.0, end[node])
            _host(after_node[1, 1], best[0, 0], float(self.first), from_start[node])
            for ones in many.tolist():
                if middle[node, ones] < 0:
                    break
                _host(after_node[:, 1], best[:, 0], ones, middle[node, ones])
                if to_end[node, ones] >= self.second:
                    _host(after_node[:, 1, 1], best[:, 0, 0], ones, to_end[node, ones])
            best = after_node
        return bool(best[1, 1, 1, -1] >= self.second)


def _host(target: Floats, source: Floats, ones: float, twos: float) -> None:
    """Raise `target` to `source` with so many more of both runs placed; more than all of the first is all of it."""
    if ones < 0 or twos < 0:
        return
    shift, width = int(ones), source.shape[-1]
    moved = np.full_like(source, _NEVER)
    moved[..., shift:] = source[..., : width - shift]
    if shift:
        moved[..., -1] = source[..., width - 1 - shift :].max(axis=-1)
    np.maximum(target, moved + twos, out=target)
