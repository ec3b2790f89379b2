"""Ways to divide nodes into groups that may each hold the whole model.

Few different sets of nodes are all looked at, by a programme over how many of each class are left. More nodes are
dealt out by several rules, and an estimate of each division's throughput says which are worth a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np

from planner.problem.arrays import Floats, Ints, Problem

#: Nodes by index into `Problem.nodes`, ascending; disjoint groups of them, ascending.
Group = tuple[int, ...]
Division = tuple[Group, ...]


def classes(problem: Problem) -> list[list[int]]:
    """Nodes that are interchangeable, in classes by their first node."""
    found: dict[tuple[object, ...], list[int]] = {}
    for node, seconds in enumerate(problem.seconds.tolist()):
        found.setdefault((*seconds, int(problem.capacity[node]), float(problem.flop_cap[node])), []).append(node)
    return list(found.values())


def best_division(members: list[list[int]], rate: Callable[[Group], float], parts: int | None) -> Division | None:
    """The division with the most throughput of all there are; None if there is none.

    Args:
        members: Classes of nodes.
        rate: Passes a second of a group; 0 where it can't hold the model.
        parts: How many groups; None: any number.
    """
    able: list[tuple[tuple[int, ...], float]] = []
    for counts in product(*(range(len(nodes) + 1) for nodes in members)):
        group = tuple(sorted(node for nodes, count in zip(members, counts, strict=True) for node in nodes[:count]))
        if group and (value := rate(group)) > 0:
            able.append((counts, value))

    @cache
    def best(left: tuple[int, ...], parts: int | None) -> tuple[float, tuple[tuple[int, ...], ...]]:
        found: tuple[float, tuple[tuple[int, ...], ...]] = (0.0 if not parts else -math.inf, ())
        for counts, value in able if parts != 0 else ():
            if all(map(int.__le__, counts, left)):
                rest = tuple(map(int.__sub__, left, counts))
                total, groups = best(rest, None if parts is None else parts - 1)
                if total + value > found[0] * (1 + 1e-12):
                    found = (total + value, (counts, *groups))
        return found

    total, groups = best(tuple(len(nodes) for nodes in members), parts)
    if not groups or total == -math.inf:
        return None
    left = [iter(nodes) for nodes in members]
    return _canonical([[next(left[at]) for at, n in enumerate(counts) for _ in range(n)] for counts in groups])


def promising(problem: Problem, most_each: Floats, parts: int | None) -> list[Division]:
    """Divisions dealt out by rules, those of most throughput by estimate first.

    Args:
        problem: Without pins.
        most_each: (N,) passes a second that a node adds to any group at most.
        parts: How many groups; None: several numbers are tried.
    """
    ids, layers = np.arange(len(most_each)), np.flatnonzero(~problem.weightless)
    seconds = problem.seconds[:, problem.kind[layers]]
    size, flop = float(problem.memory[layers].mean()), float(problem.flop[layers].mean())
    #: (N,) layers of the mean size that a node's memory and share hold, and seconds of one.
    held = np.minimum(np.full(len(ids), float(len(layers))), np.floor(problem.flop_cap / flop))
    held = np.minimum(held, np.floor(problem.capacity / size)) if size else held
    each_s = seconds.mean(axis=1)
    largest = int(seconds.mean(axis=0).argmax())
    alone_s = np.where(problem.capacity >= problem.memory[layers[largest]], seconds[:, largest], np.inf)

    @cache
    def rate(group: Group) -> float:
        """Passes a second if all layers were of the mean size, but the costliest a whole one."""
        members = list(group)
        low = float(alone_s[members].min())
        if held[members].sum() < len(layers) or math.isinf(low):
            return 0.0
        high = max(low, (len(layers) + 1) * float(each_s[members].max()))
        for _ in range(24):
            middle = math.sqrt(low * high)
            enough = np.minimum(middle // each_s[members], held[members]).sum() >= len(layers)
            low, high = (low, middle) if enough else (middle, high)
        return 1 / high

    most = max(1, min(len(ids), int(held.sum() / len(layers))))
    numbers = [parts] if parts is not None else sorted({round(k) for k in np.geomspace(1, most, 24)})
    # Nodes whose memory takes equally long to fill idle least together; else fast with fast, large with large.
    orders = [
        np.lexsort((ids, -most_each, held / np.maximum(most_each, 1e-300))),
        np.lexsort((ids, -held, -most_each)),
        np.lexsort((ids, -most_each, -problem.capacity)),
    ]
    found = {_cut(order, held, number) for order, number in product(orders, numbers)}
    found |= {_dealt_out(weight, number) for weight, number in product((held, most_each), numbers)}
    return sorted(found, key=lambda division: (-sum(map(rate, division)), len(division), division))


def _cut(order: Ints, weight: Floats, number: int) -> Division:
    """The order cut into stretches of equal weight."""
    passed = np.cumsum(weight[order]) - weight[order] / 2
    home = np.minimum((passed * number / (float(weight.sum()) or 1.0)).astype(np.int64), number - 1)
    return _canonical([order[home == at].tolist() for at in range(number)])


def _dealt_out(weight: Floats, number: int) -> Division:
    """Each node, heaviest first, to the group of least weight."""
    groups: list[list[int]] = [[] for _ in range(number)]
    loads = np.zeros(number)
    for node in np.argsort(-weight, kind="stable").tolist():
        home = int(loads.argmin())
        groups[home].append(node)
        loads[home] += weight[node] or 1e-12
    return _canonical(groups)


def _canonical(groups: list[list[int]]) -> Division:
    return tuple(sorted(tuple(sorted(group)) for group in groups if group))
