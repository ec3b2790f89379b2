"""Contiguous stages in execution order, node order free, smallest bottleneck.

Where the sequence is [few odd layers][one run of equal layers][few odd layers] the counting programme answers
exactly: odd layers form contiguous groups, the groups next to the run may hold some of it, all other nodes hold only
the run, in any order. Other sequences are searched by `planner.pipeline.sequence`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.pipeline.large import MOST_ENTRIES, solve_long
from planner.pipeline.sequence import Sequence
from planner.problem.arrays import SLACK, Ints, Problem
from planner.problem.bounds import lower_bound_s
from planner.problem.counting import (
    Counts,
    Groups,
    Hosting,
    drop_weakest,
    fewest_nodes,
    in_any_order,
    is_exact,
    smallest_budget,
)
from planner.problem.items import Found, Work, build_work
from planner.problem.ties import Blocks, StageBytes, ways_to_tie

#: Odd layers around the run up to which counting is used.
MAX_ODD = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunEnds:
    """Positions of the items around the run, and what each group of the programme holds of them."""

    run_start: int
    run_end: int
    #: (start, end) of each group in items; the first is empty.
    groups: list[tuple[int, int]]


def longest_run(kind: Ints, able: NDArray[np.bool_]) -> tuple[int, int]:
    """[start, end) of the longest stretch of equal kinds, of those that are able; the first of equal length."""
    edges = np.flatnonzero(np.diff(kind)) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(kind))
    at = int(np.argmax(np.where(able[starts], ends - starts, 0)))
    return int(starts[at]), int(ends[at])


def in_order(problem: Problem, work: Work) -> tuple[Counts, RunEnds] | None:
    """The counting programme for contiguous stages, or None if the layers do not come as one run with few around.

    Groups of odd layers count weights that they share once; the run itself must share none.
    """
    if len(work.kind) == 0 or (work.fixed >= 0).any():
        return None
    alone = problem.tied_to < 0
    alone[problem.tied_to[~alone]] = False
    start, end = longest_run(work.kind, alone[work.layer])
    total = len(work.kind)
    if not alone[work.layer[start]]:
        return None
    odd = [*range(start), *range(end, total)]
    if len(odd) > MAX_ODD:
        return None
    run, bit = end - start, {item: 1 << at for at, item in enumerate(odd)}
    spans: list[tuple[int, int]] = [(start, start)]
    least, most = [0], [run]
    for a in range(start):
        for b in range(a + 1, start + 1):
            spans.append((a, b))
            least.append(0)
            most.append(run if b == start else 0)
    for a in range(end, total):
        for b in range(a + 1, total + 1):
            spans.append((a, b))
            least.append(0)
            most.append(run if a == end else 0)
    for a in range(start):
        for b in range(end + 1, total + 1):
            spans.append((a, b))
            least.append(run)
            most.append(run)
    masks, memory, flop = [], [], []
    held = StageBytes(problem)
    seconds = np.zeros((len(work.base_s), len(spans)))
    for at, (a, b) in enumerate(spans):
        items = [item for item in odd if a <= item < b]
        masks.append(sum(bit[item] for item in items))
        kinds = work.kind[items]
        size = held.held(int(work.layer[a]), int(work.layer[b - 1]) + 1) if items else 0
        memory.append(size - (run * int(work.memory[work.kind[start]]) if a < start < end < b else 0))
        flop.append(float(work.flop[kinds].sum()))
        seconds[:, at] = work.seconds[:, kinds].sum(axis=1)
    states = 1 << len(odd)
    all_states, mask = np.arange(states)[:, None], np.array(masks, dtype=np.int64)[None, :]
    groups = Groups(
        pieces=len(odd),
        memory=np.array(memory, dtype=np.int64),
        flop=np.array(flop),
        seconds=seconds,
        without=np.where((all_states & mask) == mask, all_states - mask, states),
        run_least=np.array(least, dtype=np.int64),
        run_most=np.array(most, dtype=np.int64),
    )
    return Counts(work, int(work.kind[start]), run, groups), RunEnds(run_start=start, run_end=end, groups=spans)


def stage_nodes(counts: Counts, ends: RunEnds, hosting: Hosting) -> Ints:
    """(I,) node of each item: groups before the run, nodes with only the run by id, groups after it."""
    hosting = counts.trimmed(hosting)
    nodes = np.full(len(counts.work.kind), -1, dtype=np.int64)
    first: int | None = None
    last: int | None = None
    for node in np.flatnonzero(hosting.state).tolist():
        a, b = ends.groups[int(hosting.state[node])]
        nodes[a:b] = node
        if a < ends.run_start and b > ends.run_end:  # one node holds the whole run between its ends
            hosting = Hosting(state=hosting.state, main=np.zeros_like(hosting.main))
        elif b == ends.run_start:
            first = node
        elif a == ends.run_end:
            last = node
    order = [node for node in np.flatnonzero(hosting.main).tolist() if node not in (first, last)]
    at = ends.run_start
    for node in [*([first] if first is not None else []), *order, *([last] if last is not None else [])]:
        nodes[at : at + int(hosting.main[node])] = node
        at += int(hosting.main[node])
    return nodes


def _solve_run(counts: Counts, ends: RunEnds, bound: float, budget_s: float | None) -> Found:
    work = counts.work
    if budget_s is None:
        found = smallest_budget(counts, bound)
        if found is None:
            return None, math.inf
        hosting, at_s, low = found
    else:
        placed = counts.place(counts.caps(budget_s))
        if placed is None:
            return None, math.inf
        hosting, at_s, low = placed, budget_s, bound
    few = fewest_nodes(counts, at_s)
    items = stage_nodes(counts, ends, few if few is not None else _drop_idle(counts, hosting))
    return work.layers(items), min(low, float(work.loads_s(items).max()))


def _drop_idle(counts: Counts, hosting: Hosting) -> Hosting:
    """Leave out the nodes that hold only a little of the run while the others have room for it."""
    if counts.groups.run_least[hosting.state].any():
        return hosting
    return drop_weakest(counts, hosting)


def solve_pipeline(problem: Problem, *, budget_s: float | None = None) -> Found:
    """Contiguous stages with the smallest bottleneck, or with the fewest nodes within `budget_s`; any if infinite.

    Returns:
        ((L,) nodes or None, lower bound in seconds); the bound is infinite where it is proven that there is no plan.
    """
    work = build_work(problem)
    run = in_order(problem, work)
    bound = lower_bound_s(work, thorough=run is None and budget_s != math.inf)
    if run is not None:
        return _solve_run(*run, bound, budget_s)
    return _solve_sequence(problem, bound, budget_s)


def _solve_sequence(problem: Problem, bound: float, budget_s: float | None) -> Found:
    if len(problem.nodes) * len(problem.kind) > MOST_ENTRIES:
        return solve_long(problem, bound, budget_s)
    forward = Sequence(problem)
    if budget_s is not None:
        nodes = _place(problem, [forward, *_mirrored(problem, forward)], budget_s)
        return nodes, math.inf if nodes is None and forward.impossible else bound
    if forward.is_exact:
        return _bisect(problem, forward, bound)
    bound = _relaxed_bound_s(problem, bound)
    if math.isinf(bound):
        return None, math.inf
    return _search(problem, [forward, *_mirrored(problem, forward)], bound)


def _relaxed_bound_s(problem: Problem, bound: float) -> float:
    """A better bound, infinite if it proves that there is no plan.

    Layers that share weights are apart, each with a copy, or some are on one node with all that is between them.
    """
    ways, complete = ways_to_tie(problem)
    together = min((_spans_bound_s(problem, way) for way in ways if way), default=math.inf) if complete else 0.0
    apart = together > bound
    work = build_work(problem, "copied" if apart else "shared")
    assert work is not None, "only layers kept together can be torn apart by pins"
    alone = bound
    if is_exact(work) and len(work.kind):
        # Any layer anywhere is never slower than contiguous stages, and is solved exactly here.
        relaxed = smallest_budget(in_any_order(work), bound)
        alone = math.inf if relaxed is None else max(bound, relaxed[2])
    return max(bound, min(alone, together)) if apart else alone


def _spans_bound_s(problem: Problem, way: Blocks) -> float:
    """Seconds of the slowest span from a block's first layer to its last, each on the node that is best for it."""
    held, slowest = StageBytes(problem), 0.0
    for block in way:
        able = problem.capacity >= held.held(block[0], block[-1] + 1)
        seconds = problem.seconds[:, problem.kind[block[0] : block[-1] + 1]].sum(axis=1)
        slowest = max(slowest, float(seconds[able].min(initial=math.inf)))
    return slowest


def _mirrored(problem: Problem, forward: Sequence) -> list[Sequence]:
    return [] if forward.is_exact else [Sequence(problem, reverse=True)]


def _place(problem: Problem, ways: list[Sequence], budget_s: float) -> Ints | None:
    """The better of what placing from the front and from the back gives."""
    best: Ints | None = None
    for at, way in enumerate(ways):
        stages = way.place(budget_s)
        if way.impossible:  # from the back as well
            ways[0].impossible = True
            return None
        if stages is not None:
            nodes = way.assignment(stages, reverse=at == 1)
            if best is None or problem.bottleneck_s(nodes) < problem.bottleneck_s(best):
                best = nodes
    return best


def _bisect(problem: Problem, sequence: Sequence, bound: float) -> Found:
    """The smallest budget where placing is exact."""
    found: Ints | None = None
    low, high, step, probe = bound, math.inf, 1.01, bound
    for _ in range(80):
        nodes = _place(problem, [sequence], probe)
        if nodes is not None:
            found, high = nodes, max(low, min(probe, problem.bottleneck_s(nodes)))
        elif math.isinf(probe):
            return None, math.inf
        else:
            low = max(low, probe)
        if high <= low * (1 + SLACK):
            break
        if found is None:
            probe = max(low, 1e-300) * step if step < 1e9 else math.inf
            step = step**2
        else:
            probe = (low + high) / 2
    if found is None:
        return None, bound
    return found, min(low, problem.bottleneck_s(found))


def _search(problem: Problem, ways: list[Sequence], bound: float) -> Found:
    """Growing budgets until one is enough; then what prices exclude, and between both ever smaller budgets."""
    found: Ints | None = None
    forward, low, excess = ways[0], bound, 0.0005
    for _ in range(18):
        probe = bound * (1 + excess) if excess < 1e6 and bound > 0 else math.inf
        found = _place(problem, ways, probe)
        if found is not None:
            break
        if math.isinf(probe):
            found = None if forward.impossible else forward.reorder(math.inf, [], tries=20_000)
            if found is None:
                return None, math.inf if forward.impossible else low
            break
        if forward.impossible:
            low = probe
        excess *= 3 if excess < 1 else 30
    assert found is not None
    high = problem.bottleneck_s(found)
    open_s = high
    for _ in range(9):
        if open_s <= low * 1.0005:
            break
        probe = (low + open_s) / 2
        if forward.excludes(probe):
            low = probe
        else:
            open_s = probe
    failed = low
    for _ in range(9):
        if high <= failed * 1.0005:
            break
        probe = (failed + high) / 2
        nodes = _place(problem, ways, probe)
        if nodes is None:
            nodes = forward.reorder(probe, found.tolist())
        if nodes is None:
            failed = probe
        else:
            found, high = nodes, problem.bottleneck_s(nodes)
    return found, min(low, high)
