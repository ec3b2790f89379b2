"""Nodes divided into groups that each run the whole model, so that all together make the most passes a second.

Few nodes are divided exactly: a programme over how many of each class of nodes are taken. Many nodes are dealt
out by several rules, and the best divisions are improved by dividing the nodes of two groups anew, again
exactly where those are few, else by moving and exchanging nodes. What two groups lose against all of their
nodes' compute is the most that this can win, so the pairs that lose most come first. Searches end by counts,
and ties break by node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product

import numpy as np

from planner.problem.arrays import Floats, Ints
from planner.replicas.speeds import Group, Paces
from planner.replicas.starts import Division, canonical, dealt

#: Sets of nodes up to which a division is found exactly: ten different nodes, or 31 and 31 of two classes.
MOST_SETS = 1_024
#: As much for the nodes of two groups, of which many pairs are looked at.
_PAIR_SETS = 256
#: Pairs of groups that are divided anew, for the best start and those after it; in a round; exchanges for a pair.
_PAIRS, _AT_A_TIME, _EXCHANGES = (240, 80, 80, 80), 32, 48
#: Share of all compute that may be lost: less is not looked for.
_ENOUGH = 5e-4


def sets_of(kind: Ints) -> int:
    """How many different sets these nodes have: products of the classes' counts + 1."""
    found = 1
    for count in np.unique(kind, return_counts=True)[1].tolist():
        found = min(found * (count + 1), 2**40)
    return found


def divide(paces: Paces, most_each: Floats, parts: int | None) -> list[Division]:
    """The best divisions found, best first; where there are few sets of nodes only one, the best there is.

    Args:
        paces: How fast a set of nodes is.
        most_each: (N,) passes a second that a node adds to any group at most.
        parts: How many groups; None: as many as are best.

    Returns:
        Groups that can each hold the model, ascending; nodes that are of no use are in none. Nothing, if there is no
        such division (proven where there are few sets).
    """
    nodes = tuple(range(len(paces.kind)))
    if sets_of(paces.kind) <= MOST_SETS:
        sets = list(_subsets(paces, nodes))
        rates = paces.rates(sets)
        best = _best(paces, nodes, sets, rates, parts)
        return [] if best is None else [_tidy(paces, best)]
    value = _worth(paces, most_each, parts)
    starts = sorted(set(dealt(paces, most_each, parts)))
    rated = value([group for start in starts for group in start])
    totals, at = [], 0
    for start in starts:
        totals.append(float(rated[at : at + len(start)].sum()))
        at += len(start)
    order = sorted(range(len(starts)), key=lambda s: (-totals[s], len(starts[s]), starts[s]))
    found = {
        _tidy(paces, _improved(paces, most_each, value, starts[at], parts=parts, most=pairs))
        for at, pairs in zip(order, _PAIRS, strict=False)
    }
    whole = [division for division in found if division and parts in (None, len(division))]
    return sorted(whole, key=lambda division: (-float(paces.rates(division).sum()), len(division), division))


def _tidy(paces: Paces, groups: Sequence[Group]) -> Division:
    """Without groups that can't hold the model and nodes that make theirs no faster."""
    kept = []
    for group, rate in zip(groups, paces.rates(groups).tolist(), strict=True):
        if rate <= 0:
            continue
        lean = tuple(sorted(group))
        for node in sorted(group, key=lambda node: (paces.problem.rate[node], node)):
            less = tuple(other for other in lean if other != node)
            if less and len(lean) <= len(group) and float(paces.rates([less])[0]) >= rate * (1 - 1e-12):
                lean = less
        kept.append(lean)
    return tuple(sorted(kept))


def _worth(paces: Paces, most_each: Floats, parts: int | None) -> Callable[[Sequence[Group]], Floats]:
    """What a group is worth; where the number of groups is given, one without room costs more than all others."""
    lost = 0.0 if parts is None else -2 * float(most_each.sum())

    def value(groups: Sequence[Group]) -> Floats:
        rates = paces.rates(groups)
        return np.where(rates > 0, rates, lost)

    return value


# --- exactly


def _subsets(paces: Paces, nodes: Group) -> Iterator[Group]:
    """One set of nodes for each multiset of their classes, in the programme's order; the first is empty."""
    members = _members(paces, nodes)
    for counts in product(*(range(len(of_kind) + 1) for of_kind in members)):
        yield tuple(node for of_kind, count in zip(members, counts, strict=True) for node in of_kind[:count])


def _members(paces: Paces, nodes: Group) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for node in sorted(nodes):
        found.setdefault(int(paces.kind[node]), []).append(node)
    return list(found.values())


def _best(paces: Paces, nodes: Group, sets: Sequence[Group], rates: Floats, parts: int | None) -> Division | None:
    """The best division of `nodes` into `parts` groups (None: any number), by a programme over sets.

    Args:
        paces: For the nodes' classes.
        nodes: What to divide.
        sets: All sets of them, from `_subsets`.
        rates: (S,) passes a second of each set.
        parts: See above.
    """
    members = _members(paces, nodes)
    held = np.array(list(product(*(range(len(of_kind) + 1) for of_kind in members))), dtype=np.int64)
    able = np.flatnonzero(rates > 0)
    if len(able) == 0:
        return None
    worth = rates[able]
    size, full = len(sets), len(sets) - 1
    rounds = 1 if parts is None else parts
    # best[s] is the most that set s makes in `parts` groups; the index of a set less another is the difference.
    best = np.zeros(size)
    taken = np.full((rounds, size), -1, dtype=np.int64)
    for at in range(rounds):
        before = best
        best = best.copy() if parts is None else np.full(size, -np.inf)
        for now in range(size) if at < rounds - 1 or parts is None else [full]:
            inside = (held[able] <= held[now]).all(axis=1)
            if not inside.any():
                continue
            first = able[inside]
            values = worth[inside] + (best if parts is None else before)[now - first]
            chosen = int(values.argmax())
            if values[chosen] > best[now]:
                best[now], taken[at, now] = values[chosen], first[chosen]
    if not np.isfinite(best[full]):
        return None
    groups, now = [], full
    for at in range(rounds - 1, -1, -1) if parts is not None else [0] * len(nodes):
        first = int(taken[at, now])
        if first < 0:
            break
        groups.append(held[first])
        now -= first
    left = [list(of_kind) for of_kind in members]
    return canonical(
        [tuple(left[k].pop(0) for k, count in enumerate(group) for _ in range(count)) for group in groups]
    )


# --- improvement


def _improved(
    paces: Paces,
    most_each: Floats,
    value: Callable[[Sequence[Group]], Floats],
    start: Division,
    *,
    parts: int | None,
    most: int,
) -> Division:
    """Pairs of groups divided anew, `most` of them, until none gets better."""
    groups = list(start)
    enough = _ENOUGH * float(most_each.sum())
    tried: set[tuple[Group, Group]] = set()
    while len(tried) < most:
        values = value(groups)
        lost = np.array([most_each[list(group)].sum() for group in groups]) - values
        if lost.sum() <= enough:
            break
        pairs = [
            (lost[a] + lost[b], a, b)
            for a, b in combinations(range(len(groups)), 2)
            if lost[a] + lost[b] > enough / len(groups) and (groups[a], groups[b]) not in tried
        ]
        chosen = sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))[:_AT_A_TIME]
        if not chosen:
            break
        tried.update((groups[a], groups[b]) for _, a, b in chosen)
        ways = [_ways(paces, groups[a], groups[b]) for _, a, b in chosen]
        value([group for sets in ways for way in sets for group in way if group])  # all at once; remembered
        changed: dict[int, Division] = {}
        for (_, a, b), sets in zip(chosen, ways, strict=True):
            if a in changed or b in changed:
                continue
            better = _better(paces, value, (groups[a], groups[b]), sets, parts)
            if better is not None:
                changed[a], changed[b] = better, ()
        groups = sorted(
            [g for at, g in enumerate(groups) if at not in changed] + [g for d in changed.values() for g in d]
        )
    return tuple(groups)


def _ways(paces: Paces, a: Group, b: Group) -> list[Division]:
    """Ways to divide the nodes of two groups anew: all sets of them where they are few, else moves and exchanges."""
    union = (*a, *b)
    if sets_of(paces.kind[list(union)]) <= _PAIR_SETS:
        return [(group,) for group in _subsets(paces, tuple(sorted(union)))]
    ways: list[Division] = [(tuple(sorted(union)),)]
    for giver, taker in ((a, b), (b, a)):
        for node in giver:
            less = tuple(other for other in giver if other != node)
            ways.append(canonical([less, (*taker, node)]))
    rate = paces.problem.rate
    # Exchanges of nodes that are most alike change least: they are what is left when moves are too coarse.
    swaps = sorted(product(a, b), key=lambda pair: (abs(rate[pair[0]] - rate[pair[1]]), pair))[:_EXCHANGES]
    for x, y in swaps:
        if paces.kind[x] != paces.kind[y]:
            mine, theirs = [n for n in a if n != x], [n for n in b if n != y]
            ways.append(canonical([(*mine, y), (*theirs, x)]))
    return ways


def _better(
    paces: Paces,
    value: Callable[[Sequence[Group]], Floats],
    pair: tuple[Group, Group],
    ways: list[Division],
    parts: int | None,
) -> Division | None:
    """The best of the ways, if it is better than the pair as it is."""
    now = float(value(pair).sum())
    union = tuple(sorted((*pair[0], *pair[1])))
    if len(ways[0]) == 1 and not ways[0][0]:  # all sets: a programme finds the best
        sets = [way[0] for way in ways]
        best = _best(paces, union, sets, paces.rates(sets), 2 if parts is not None else None)
        if best is None:
            return None
        spare = sorted(set(union) - {node for group in best for node in group})
        best = (tuple(sorted((*best[0], *spare))), *best[1:])
    else:
        allowed = [way for way in ways if parts is None or len(way) == 2]
        worth = value([group for way in allowed for group in way])
        ends = np.cumsum([len(way) for way in allowed])
        best = allowed[int(np.add.reduceat(worth, ends - [len(way) for way in allowed]).argmax())]
    return canonical(best) if float(value(best).sum()) > now * (1 + 1e-9) + 1e-300 else None
