"""Layer by layer: the plain greedy rule and its relatives, for layers that do not come in runs.

Each returns the (I,) node of each item, or None where a layer finds no node.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from planner.problem.arrays import SLACK, Floats, Ints
from planner.problem.items import Work


def by_kind(work: Work) -> Floats:
    """(K, N) seconds, laid out for reading by kind; large tables are left as they are rather than doubled."""
    return np.ascontiguousarray(work.seconds.T) if work.seconds.size <= 1_000_000 else work.seconds.T


def by_compute(work: Work) -> Ints:
    """Items by compute, most first; equal ones by bytes, then in order."""
    return np.lexsort((np.arange(len(work.kind)), -work.memory[work.kind], -work.flop[work.kind]))


def by_tightness(work: Work, budget_s: float) -> Ints:
    """Items by the larger of their shares of all compute time and all memory, most first."""
    weight = np.zeros(len(work.count))
    room = float(np.maximum(work.room_bytes, 0).sum())
    if room > 0:
        weight = np.maximum(weight, work.memory / room)
    if math.isfinite(budget_s) and budget_s > 0:
        weight = np.maximum(weight, work.seconds.mean(axis=0) / (budget_s * len(work.base_s)))
    return np.lexsort((np.arange(len(work.kind)), -work.flop[work.kind], -weight[work.kind]))


def most_available(work: Work, rate: Floats, budget_s: float) -> Ints | None:
    """The plain rule: layers by compute, most first, each to the node with most available compute.

    Available compute is the node's FLOP/s times what is left of its budget; no node goes beyond compute or memory.
    """
    left = (budget_s * (1 + SLACK) - work.base_s).tolist()
    room = work.room_bytes.tolist()
    share = work.room_flop.tolist()
    rates = rate.tolist()
    kinds = work.kind.tolist()
    memory, flop = work.memory.tolist(), work.flop.tolist()
    heap = [(-seconds * rates[node], node) for node, seconds in enumerate(left) if seconds >= 0]
    heapq.heapify(heap)
    assignment = np.empty(len(kinds), dtype=np.int64)
    for item in by_compute(work).tolist():
        kind = kinds[item]
        aside = []
        while heap:
            entry = heapq.heappop(heap)
            node = entry[1]
            cost = float(work.seconds[node, kind])
            if cost <= left[node] and memory[kind] <= room[node] and flop[kind] <= share[node]:
                break
            aside.append(entry)
        else:
            return None
        assignment[item] = node
        left[node] -= cost
        room[node] -= memory[kind]
        share[node] -= flop[kind]
        heapq.heappush(heap, (-left[node] * rates[node], node))
        for entry in aside:
            heapq.heappush(heap, entry)
    return assignment


def earliest_finish(work: Work, order: Ints) -> Ints | None:
    """Each layer to the node that would be done first with it."""
    columns = by_kind(work)
    return _each_to_the_least(work, order, work.base_s, lambda kind: columns[kind])


def best_fit(work: Work, order: Ints, budget_s: float) -> Ints | None:
    """Each layer to the node that it leaves least room on: of time within the budget, or of memory without one."""
    if math.isinf(budget_s):
        room = work.room_bytes.astype(np.float64)
        return None if (room < 0).any() else _each_to_the_least(work, order, room, lambda kind: -work.memory[kind])
    left, columns = budget_s * (1 + SLACK) - work.base_s, by_kind(work)
    return None if (left < 0).any() else _each_to_the_least(work, order, left, lambda kind: -columns[kind])


def _each_to_the_least(work: Work, order: Ints, now: Floats, change: Callable[[int], Any]) -> Ints | None:
    """Each layer to the node where (N,) `now` is least after its `change`: at least 0, within memory and share."""
    now, room, share = now.copy(), work.room_bytes.copy(), work.room_flop.copy()
    shared = bool(np.isfinite(share).any())
    assignment = np.empty(len(work.kind), dtype=np.int64)
    memory, kinds = work.memory.tolist(), work.kind.tolist()
    for item in order.tolist():
        kind = kinds[item]
        after = now + change(kind)
        after[(after < 0) | (room < memory[kind])] = np.inf
        if shared:
            after[share < work.flop[kind]] = np.inf
        node = int(after.argmin())
        if after[node] == np.inf:
            return None
        assignment[item] = node
        now[node] = after[node]
        room[node] -= memory[kind]
        if shared:
            share[node] -= work.flop[kind]
    return assignment
