"""How fast each of many sets of nodes runs the whole model: one exact count, done for all sets at once.

The counting programme of `planner.problem.counting` takes a millisecond a set, most of it spent in calls of numpy. A
search over ways to divide a cluster asks for thousands, so here every step is done for all sets together: 10 to
60 µs a set. What the programme can't count (layers that are all different) is counted as a run of layers of the
mean size: an estimate, not exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from planner.pipeline.solver import in_order
from planner.problem.arrays import SLACK, Floats, Ints, Problem
from planner.problem.bounds import effective_rates
from planner.problem.counting import Counts, in_any_order, is_exact
from planner.problem.items import Work, build_work
from planner.problem.ties import ways_to_tie

#: States × groups of odd layers above which layers are blurred into one run, as every set pays for each; more where
#: there are few nodes, and so few sets.
MOST_STEPS, _FEW, _FEW_STEPS = 256, 6, 2_048
#: Odd layers that a blurred run leaves as they are.
_ODD = 3
#: Sets × nodes × states × groups that are worked on at a time, for memory's sake.
_AT_ONCE = 2_000_000
_NEVER = -1e18

#: Nodes by index into `Problem.nodes`, ascending.
Group = tuple[int, ...]


class Paces:
    """Seconds of the slowest node of the best chain that any set of a problem's nodes can form, remembered."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        #: Whether the seconds are those of the best chain, or an estimate.
        self.exact = True
        self._most_steps = _FEW_STEPS if len(problem.nodes) <= _FEW else MOST_STEPS
        self._counts = self._counting(problem)
        #: (N,) seconds of the whole model on one node, which stores shared weights once; infinite where it can't.
        total = float(problem.flop.sum())
        held, able = int(problem.memory.sum()), problem.flop_cap * (1 + SLACK) >= total
        alone = problem.seconds[:, problem.kind].sum(axis=1)
        self.alone_s: Floats = np.where((problem.capacity >= held) & able, alone, math.inf)
        #: (N,) class of each node: nodes of a class are interchangeable.
        self.kind: Ints = self._classes()
        self._kinds: list[int] = self.kind.tolist()
        self._known: dict[Group, float] = {}

    def _classes(self) -> Ints:
        found: dict[tuple[object, ...], int] = {}
        rows = zip(
            self.problem.seconds.tolist(), self.problem.capacity.tolist(), self.problem.flop_cap.tolist(), strict=True
        )
        return np.array([found.setdefault((*s, m, f), len(found)) for s, m, f in rows], dtype=np.int64)

    def _counting(self, problem: Problem) -> list[Counts]:
        """Programmes whose best is the best."""
        ways, complete = ways_to_tie(problem)
        if problem.options.strategy == "pipeline":
            run = in_order(problem, build_work(problem))
            if run is not None and run[0].groups.without.size <= self._most_steps:
                return [run[0]]
            ways, complete = [()], False  # any layer anywhere: never slower
        self.exact = complete
        found = []
        for way in ways:
            work = build_work(problem, way)
            assert work is not None, "there are no pins"
            counts = in_any_order(work) if is_exact(work) else None
            if counts is None or counts.groups.without.size > self._most_steps:
                self.exact = False
                counts = in_any_order(_blurred(work))
            found.append(counts)
        return found

    def seconds(self, groups: Iterable[Group]) -> Floats:
        """(G,) seconds of each group's slowest node, at best; infinite where the group can't hold the model."""
        asked = list(groups)
        kinds = self._kinds
        keys = [tuple(sorted([kinds[node] for node in group])) for group in asked]
        fresh: dict[Group, Group] = {}
        for key, group in zip(keys, asked, strict=True):
            if key not in self._known:
                fresh.setdefault(key, group)
        # Sets of like size together: all are as wide as the widest.
        order = sorted(fresh, key=lambda key: (len(key), key))
        at = 0
        while at < len(order):
            wide = len(order[at]) + max(2, len(order[at]) // 4)
            end = at
            while end < len(order) and len(order[end]) <= wide:
                end += 1
            for counts in self._counts:
                step = max(1, _AT_ONCE // (wide * counts.groups.without.size))
                for start in range(at, end, step):
                    part = order[start : min(end, start + step)]
                    found = _smallest(counts, [fresh[key] for key in part])
                    for key, value in zip(part, found.tolist(), strict=True):
                        self._known[key] = min(value, self._known.get(key, math.inf))
            at = end
        for key in order:
            whole = min((float(self.alone_s[node]) for node in fresh[key]), default=math.inf)
            self._known[key] = min(self._known.get(key, math.inf), whole)
        return np.array([self._known[key] for key in keys])

    def rates(self, groups: Iterable[Group]) -> Floats:
        """(G,) passes a second; 0 where the group can't hold the model or is over the time budget."""
        seconds = self.seconds(groups)
        budget = self.problem.options.time_budget_s
        late = seconds > (math.inf if budget is None else budget * (1 + SLACK))
        return np.where(np.isfinite(seconds) & ~late, 1 / seconds, 0.0)


def _blurred(work: Work) -> Work:
    """The same work with all layers of the mean size but the few that are largest, each the only one of its kind."""
    size = work.memory.astype(np.float64)
    mean_flop = max(float(work.flop @ work.count) / float(work.count.sum()), 1e-300)
    mean_size = max(float(size @ work.count) / float(work.count.sum()), 1e-300)
    excess = np.where(work.count == 1, np.maximum(work.flop / mean_flop, size / mean_size), 0.0)
    odd = [kind for kind in np.argsort(-excess, kind="stable")[:_ODD].tolist() if excess[kind] > 1]
    rest = np.setdiff1d(np.arange(len(work.count)), odd)
    if len(rest) == 0:
        odd, rest = odd[:-1], np.array(odd[-1:])
    count = work.count[rest]
    share = count / count.sum()
    return dataclasses.replace(
        work,
        count=np.append(count.sum(), work.count[odd]),
        memory=np.append(math.ceil(share @ size[rest]), work.memory[odd]),
        flop=np.append(share @ work.flop[rest], work.flop[odd]),
        seconds=np.column_stack((work.seconds[:, rest] @ share, work.seconds[:, odd])),
    )


def _smallest(counts: Counts, groups: list[Group]) -> Floats:
    """(G,) the smallest budget at which each group hosts everything: as `counts.smallest_budget`, for all at once."""
    work, wide = counts.work, max(len(group) for group in groups)
    none = len(work.base_s)  # a node that hosts nothing fills the rows of smaller groups
    rows = np.array([[*group, *[none] * (wide - len(group))] for group in groups], dtype=np.int64)
    fixed = np.vstack((counts.caps(math.inf), np.full(counts.groups.without.shape[1], _NEVER)))
    fixed[none, 0] = 0
    odd_s = np.vstack((counts.groups.seconds, np.zeros(counts.groups.without.shape[1])))[rows]
    run_s, most = np.append(counts.main_s, 0.0)[rows][:, :, None], fixed[rows]
    least = counts.groups.run_least[None, None, :]
    total = float(work.flop @ work.count)
    able = np.append(effective_rates(work), 0.0)[rows].sum(axis=1)
    low = np.divide(total * (1 - SLACK), able, out=np.zeros(len(groups)), where=able > 0)
    high = np.full(len(groups), math.inf)
    probe, step = low * 1.03, np.full(len(groups), 1.06)
    open_ = np.flatnonzero(_hosts(counts, most))
    for _ in range(80):
        if len(open_) == 0:
            break
        at_s, cap, odd, run = probe[open_, None, None], most[open_], odd_s[open_], run_s[open_]
        left = at_s * (1 + SLACK) - odd
        with np.errstate(divide="ignore", invalid="ignore"):
            caps = np.minimum(cap, np.where(run > 0, np.floor(left / run), cap))
        caps = np.where((left < 0) | (caps < least), _NEVER, caps)
        ok = _hosts(counts, caps)
        # Nothing changes between two budgets at which some node's part does, so both ends move to such.
        used = np.where(caps >= 0, odd + caps * run, 0.0).max(axis=(1, 2))
        grown = odd + np.where(caps < 0, least, caps + 1) * run
        grown = np.where((cap > _NEVER / 2) & (caps < cap) & (grown > at_s), grown, math.inf).min(axis=(1, 2))
        high[open_] = np.where(ok, np.minimum(probe[open_], np.maximum(low[open_], used)), high[open_])
        low[open_] = np.where(ok, low[open_], np.maximum(low[open_], grown))
        found = np.isfinite(high[open_])
        step[open_] = np.where(found, step[open_], np.minimum(step[open_] ** 2, 1e9))
        probe[open_] = np.where(found, (low[open_] + high[open_]) / 2, low[open_] * step[open_])
        open_ = open_[~(high[open_] <= low[open_] * (1 + SLACK)) & np.isfinite(low[open_])]
    return high


def _hosts(counts: Counts, caps: Floats) -> np.typing.NDArray[np.bool_]:
    """(G,) whether all is placed where each node of a group hosts `caps` (G, n, U) of the run beside odd layers."""
    alone = caps[:, :, 0]
    total = alone.sum(axis=1)
    without, pieces = counts.groups.without, counts.groups.pieces
    if len(without) == 1:
        return np.asarray(total >= counts.run)
    loss = alone[:, :, None] - caps
    kinds = loss.shape[2] - 1
    if pieces * kinds < loss.shape[1]:  # only the nodes that lose least matter (`Counts`)
        best = np.argpartition(loss[:, :, 1:], pieces - 1, axis=1)[:, :pieces].reshape(len(loss), -1)
        marked = np.zeros(loss.shape[:2], dtype=bool)
        np.put_along_axis(marked, best, values=True, axis=1)
        chosen = np.argsort(~marked, axis=1, kind="stable")[:, : int(marked.sum(axis=1).max())]
        loss = np.take_along_axis(loss, chosen[:, :, None], axis=1)
    size = len(without)
    placed = np.full((len(loss), size + 1), _NEVER)
    placed[:, 0] = 0.0
    for node in range(loss.shape[1]):
        placed[:, :size] = (placed[:, without] - loss[:, node, None, :]).max(axis=2)
    return np.asarray((placed[:, size - 1] > _NEVER / 2) & (total + placed[:, size - 1] >= counts.run))
