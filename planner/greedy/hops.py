"""Which of the equal layers a node holds, and in which order nodes follow: loads stay, hops and link time shrink.

Layers of one kind are interchangeable, so an allocation fixes only how many of each kind a node has. The chain is
shortest where each node's layers are neighbours, and fastest where neighbours have good links.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np

from planner.problem.arrays import Ints, Problem
from planner.problem.items import fill_gaps

#: Exchanges of two layers are tried on sequences up to this long.
_POLISH_LAYERS = 400
#: Nodes looked at for each next part of the chain.
_CANDIDATES = 24


def hops(nodes: Ints) -> int:
    """How often the chain changes its node."""
    return int(np.count_nonzero(np.diff(nodes)))


def fewest_hops(problem: Problem, nodes: Ints) -> Ints:
    """The same number of each kind on each node, arranged so that the chain changes nodes seldom."""
    used = len(np.unique(nodes))
    best, best_hops = nodes, hops(nodes)
    if best_hops <= used - 1 or len(np.unique(problem.kind)) == len(problem.kind):
        return nodes
    for reverse in (False, True):
        for thrifty in (True, False):
            walked = _walk(problem, nodes, reverse=reverse, thrifty=thrifty)
            if hops(walked) < best_hops:
                best, best_hops = walked, hops(walked)
            if best_hops <= used - 1:
                return best
    # Exchanges cost more than all the rest; a hop or two too many is not worth them.
    return _polish(problem, best) if len(nodes) <= _POLISH_LAYERS and best_hops > 1.2 * (used - 1) else best


def _segments(problem: Problem, order: Ints) -> list[tuple[int, int, int]]:
    """(kind, pin, length) of the stretches of equal layers; kind -1 for weightless ones."""
    kind = np.where(problem.weightless[order] & (problem.pinned[order] < 0), -1, problem.kind[order])
    pin = problem.pinned[order]
    edges = np.flatnonzero((np.diff(kind) != 0) | (np.diff(pin) != 0)) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(order))
    return list(zip(kind[starts].tolist(), pin[starts].tolist(), (ends - starts).tolist(), strict=True))


def _walk(problem: Problem, nodes: Ints, *, reverse: bool, thrifty: bool) -> Ints:
    """Walk the chain; stay on a node while it has layers of the kind that comes, then take the one that fits best."""
    order = np.arange(len(nodes))[:: -1 if reverse else 1]
    segments = _segments(problem, order)
    free = (problem.pinned < 0) & ~problem.weightless
    pairs, amounts = np.unique(np.stack((nodes[free], problem.kind[free])), axis=1, return_counts=True)
    quota: dict[int, dict[int, int]] = defaultdict(dict)
    holders: dict[int, dict[int, None]] = defaultdict(dict)
    for node, kind, amount in zip(pairs[0].tolist(), pairs[1].tolist(), amounts.tolist(), strict=True):
        quota[node][kind] = amount
        holders[kind][node] = None
    parts: list[tuple[int, int]] = []
    current = -1
    for at, (kind, pin, length) in enumerate(segments):
        if kind == -1 or pin >= 0:
            current = pin if pin >= 0 else current
            parts.append((current, length))
            continue
        left = length
        while left:
            if not quota[current].get(kind, 0):
                current = _next_node(segments, at, left, quota, list(holders[kind]), thrifty=thrifty)
            taken = min(left, quota[current][kind])
            quota[current][kind] -= taken
            if not quota[current][kind]:
                del quota[current][kind]
                del holders[kind][current]
            left -= taken
            parts.append((current, taken))
    walked = np.repeat([node for node, _ in parts], [length for _, length in parts]).astype(np.int64)
    return fill_gaps(walked[::-1].copy() if reverse else walked)


def _next_node(
    segments: list[tuple[int, int, int]],
    at: int,
    left: int,
    quota: dict[int, dict[int, int]],
    candidates: list[int],
    *,
    thrifty: bool,
) -> int:
    kind = segments[at][0]
    best: tuple[tuple[int, int, int], int] | None = None
    simulated = 0
    for node in candidates:
        own = quota[node]
        if len(own) == 1 and own[kind] <= left:
            return node  # all it has goes here
        if simulated >= _CANDIDATES:
            continue
        simulated += 1
        extent, rest = _extent(segments, at, left, own)
        rank = (0 if rest == 0 else 1, rest if thrifty else -extent, node)
        if best is None or rank < best[0]:
            best = (rank, node)
    assert best is not None
    return best[1]


def _extent(segments: list[tuple[int, int, int]], at: int, left: int, own: dict[int, int]) -> tuple[int, int]:
    """How many layers from here on the node would hold without a gap, and how many it would have left."""
    have, total, extent = dict(own), sum(own.values()), 0
    for kind, pin, length in [(segments[at][0], -1, left), *segments[at + 1 : at + 65]]:
        if kind == -1:
            continue
        taken = min(length, have.get(kind, 0)) if pin < 0 else 0
        extent += taken
        have[kind] = have.get(kind, 0) - taken
        if taken < length:
            break
    return extent, total - extent


def _polish(problem: Problem, nodes: Ints) -> Ints:
    """Exchange two equal layers while that removes a hop."""
    nodes = nodes.copy()
    length = len(nodes)
    members = {
        kind: np.flatnonzero((problem.kind == kind) & (problem.pinned < 0))
        for kind in np.unique(problem.kind).tolist()
    }
    for _ in range(4):
        improved = False
        for at in range(length):
            if problem.pinned[at] >= 0:
                continue
            lonely = (at == 0 or nodes[at - 1] != nodes[at]) or (at + 1 == length or nodes[at + 1] != nodes[at])
            if not lonely:
                continue
            here = _around(nodes, at)
            for other in members[int(problem.kind[at])].tolist():
                if abs(other - at) < 2 or nodes[other] == nodes[at]:
                    continue
                before = here + _around(nodes, other)
                nodes[at], nodes[other] = nodes[other], nodes[at]
                if _around(nodes, at) + _around(nodes, other) < before:
                    improved = True
                    break
                nodes[at], nodes[other] = nodes[other], nodes[at]
        if not improved:
            break
    return nodes


def _around(nodes: Ints, at: int) -> int:
    changes = 0
    if at > 0 and nodes[at - 1] != nodes[at]:
        changes += 1
    if at + 1 < len(nodes) and nodes[at + 1] != nodes[at]:
        changes += 1
    return changes


def by_links(problem: Problem, nodes: Ints, *, passes: int = 6) -> Ints:
    """Reorder the stages inside each run of equal layers so that the chain's link time is least found.

    Stages keep their sizes, so loads and memory stay as they are. Swaps and relocations, until none helps.
    """
    if problem.uniform_link is not None:
        return nodes
    nodes = nodes.copy()
    edges = np.concatenate(([0], np.flatnonzero(np.diff(nodes)) + 1, [len(nodes)]))
    stage_node = [int(nodes[start]) for start in edges[:-1].tolist()]
    kind_edges = np.diff(problem.kind) != 0
    groups: list[list[int]] = []
    for stage in range(len(stage_node)):
        start, end = int(edges[stage]), int(edges[stage + 1])
        plain = not kind_edges[start : end - 1].any() and (problem.pinned[start:end] < 0).all()
        if not plain:
            continue
        last = groups[-1] if groups else None
        if last is not None and last[-1] == stage - 1 and not kind_edges[start - 1]:
            last.append(stage)
        else:
            groups.append([stage])
    for group in groups:
        if 2 <= len(group) <= 256:
            _reorder(problem, nodes, edges, stage_node, group=group, passes=passes)
    return nodes


def _reorder(
    problem: Problem, nodes: Ints, edges: Ints, stage_node: list[int], *, group: list[int], passes: int
) -> None:
    first, last = group[0], group[-1]
    sizes = {stage_node[stage]: int(edges[stage + 1] - edges[stage]) for stage in group}
    if len(sizes) < len(group):
        return  # a node has two stages here
    inner = [stage_node[stage] for stage in group]
    before = stage_node[first - 1] if first else -1
    after = stage_node[last + 1] if last + 1 < len(stage_node) else -1
    payload = float(problem.payload[int(edges[first]) : int(edges[last + 1])].max())
    cost: dict[tuple[int, int], float] = {}

    def hop(a: int, b: int) -> float:
        if a < 0 or b < 0 or a == b:
            return 0.0
        if (a, b) not in cost:
            cost[a, b] = problem.link(a, b).transfer_s(payload)
        return cost[a, b]

    def total(order: list[int]) -> float:
        chain = [before, *order, after]
        return sum(hop(a, b) for a, b in pairwise(chain))

    best, best_s = inner, total(inner)
    near: list[int] = []
    left = list(inner)
    while left:
        here = near[-1] if near else before
        nearest = min(left, key=lambda node: (hop(here, node), node))
        near.append(nearest)
        left.remove(nearest)
    if total(near) < best_s:
        best, best_s = near, total(near)
    tried = 0
    for _ in range(passes):
        improved = False
        for a in range(len(best)):
            for b in range(len(best)):
                if a == b or tried > 20_000:
                    continue
                tried += 1
                moved = best[:a] + best[a + 1 :]
                moved.insert(b, best[a])
                candidates = [moved]
                if a < b:
                    swapped = list(best)
                    swapped[a], swapped[b] = swapped[b], swapped[a]
                    candidates += [swapped, best[:a] + best[a : b + 1][::-1] + best[b + 1 :]]
                for order in candidates:
                    seconds = total(order)
                    if seconds < best_s * (1 - 1e-12):
                        best, best_s, improved = order, seconds, True
        if not improved:
            break
    at = int(edges[first])
    for node in best:
        nodes[at : at + sizes[node]] = node
        at += sizes[node]
