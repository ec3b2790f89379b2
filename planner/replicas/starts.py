"""Divisions of nodes into groups by rules that look at memory and compute alone: where a search starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from planner.problem.arrays import Floats, Ints
from planner.replicas.speeds import Group, Paces

#: Disjoint groups of nodes, ascending.
Division = tuple[Group, ...]


def canonical(groups: Sequence[Group]) -> Division:
    """The same groups in a fixed order, without the empty ones."""
    return tuple(sorted(tuple(sorted(group)) for group in groups if group))


def dealt(paces: Paces, most_each: Floats, parts: int | None) -> Iterator[Division]:
    """Divisions by several rules; some of their groups may turn out too small.

    Args:
        paces: The problem.
        most_each: (N,) passes a second that a node adds to any group at most.
        parts: How many groups; None: several numbers are tried.
    """
    problem = paces.problem
    count = len(most_each)
    part = _part_held(paces)
    rate = most_each
    fill_s = part / np.maximum(rate, 1e-300)
    ids = np.arange(count)
    # Nodes whose memory takes equally long to fill idle least together; else fast with fast, large with large.
    orders = [
        np.lexsort((ids, -rate, fill_s)),
        np.lexsort((ids, -part, -rate)),
        np.lexsort((ids, -rate, -problem.capacity)),
    ]
    most = max(1, min(count, int(part.sum())))
    numbers = [parts] if parts is not None else sorted({round(k) for k in np.geomspace(1, most, 24)})
    for order in orders:
        for number in numbers:
            yield from (_cut(order, weight, number) for weight in (part, rate))
            yield from (_dealt(order, weight, number) for weight in (part, rate))
        for enough in (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0) if parts is None else ():
            yield _filled(order, part, enough)


def _part_held(paces: Paces) -> Floats:
    """(N,) part of the model that a node's memory holds, in whole layers of the mean size; at most 1."""
    problem = paces.problem
    weight = ~problem.weightless
    size = max(1.0, float(problem.memory[weight].sum()) / max(1, int(weight.sum())))
    held = np.floor(problem.capacity / size) * size / max(1, int(problem.memory.sum()))
    if not problem.memory.any():
        held = np.ones(len(held))
    return np.clip(np.minimum(held, problem.flop_cap / max(float(problem.flop.sum()), 1e-300)), 0.0, 1.0)


def _cut(order: Ints, weight: Floats, number: int) -> Division:
    """The order cut into stretches of equal weight."""
    passed = np.cumsum(weight[order]) - weight[order] / 2
    total = float(weight.sum()) or 1.0
    home = np.minimum((passed * number / total).astype(np.int64), number - 1)
    return canonical([tuple(order[home == at].tolist()) for at in range(number)])


def _dealt(order: Ints, weight: Floats, number: int) -> Division:
    """Each node in the order to the group of least weight."""
    groups: list[list[int]] = [[] for _ in range(number)]
    loads = np.zeros(number)
    for node in sorted(order.tolist(), key=lambda node: -weight[node]):
        home = int(loads.argmin())
        groups[home].append(node)
        loads[home] += weight[node] or 1e-12
    return canonical([tuple(group) for group in groups])


def _filled(order: Ints, part: Floats, enough: float) -> Division:
    """Groups as small as hold `enough` models; what is left over goes to the last."""
    groups: list[list[int]] = [[]]
    held = 0.0
    for node in order.tolist():
        if held >= enough or (held >= 1 and part[node] >= 1):
            groups.append([])
            held = 0.0
        groups[-1].append(node)
        held += float(part[node])
    if held < 1 and len(groups) > 1:
        last = groups.pop()
        groups[-1] += last
    return canonical([tuple(group) for group in groups])
