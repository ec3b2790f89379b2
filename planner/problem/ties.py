"""Layers that share weights: every way to keep them together or apart, and what a stage holds of them.

A node holds shared weights once, so what a layer costs it depends on what else is there. Each allocation puts the
layers that share weights together in one way; for a given way, items have fixed costs again. The best over all ways
is the best there is, and the least of their bounds holds for all allocations.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from planner.problem.arrays import Ints, Problem

#: Sets of layers that are kept together, ascending; others that use another's weights have a copy each.
Blocks = tuple[tuple[int, ...], ...]

#: Ways that are told apart: all of a layer and three that use its weights.
MOST_WAYS = 15
#: Layers with shared weights whose copies are counted once a stage; with more each counts its own.
_MOST_MARKS = 24


def families(problem: Problem) -> list[list[int]]:
    """Each owner of shared weights with the layers that use them."""
    found: dict[int, list[int]] = {}
    for layer in np.flatnonzero(problem.tied_to >= 0).tolist():
        owner = int(problem.tied_to[layer])
        while problem.tied_to[owner] >= 0 and int(problem.tied_to[owner]) != owner:
            owner = int(problem.tied_to[owner])
        found.setdefault(owner, [owner]).append(layer)
    return list(found.values())


def ways_to_tie(problem: Problem) -> tuple[list[Blocks], bool]:
    """The ways there are, and whether these are all; else only all apart and all together."""
    shared = families(problem)
    count = 1
    for members in shared:
        count *= _bell(len(members))
    if count > MOST_WAYS:
        return [(), tuple(tuple(sorted(members)) for members in shared)], False
    choices = product(*(_partitions(members) for members in shared))
    return [tuple(block for blocks in choice for block in blocks) for choice in choices], True


def copied_bytes(problem: Problem, blocks: Blocks) -> Ints:
    """(L,) bytes that layers bring along because the weights they use are elsewhere: one copy for each block."""
    extra = problem.tied_bytes.copy()
    for block in blocks:
        members = list(block)
        tied = [layer for layer in members if problem.tied_to[layer] >= 0]
        copy = int(extra[tied].max()) if len(tied) == len(members) else 0
        extra[members] = 0
        extra[members[0]] = copy
    return extra


def _bell(size: int) -> int:
    """Partitions of so many, or more than are ever told apart."""
    return (1, 1, 2, 5, 15)[size] if size < 5 else MOST_WAYS + 1


def _partitions(members: list[int]) -> list[Blocks]:
    """Every partition, its parts of one layer left out."""
    parts: list[list[list[int]]] = [[]]
    for layer in members:
        parts = [
            [*blocks[:at], [*block, layer], *blocks[at + 1 :]]
            for blocks in parts
            for at, block in enumerate([*blocks, []])
        ]
    return [tuple(tuple(sorted(block)) for block in blocks if len(block) > 1) for blocks in parts]


class StageBytes:
    """What contiguous stages hold, weights that are shared within a stage once.

    Copies change only where a stage comes to include a layer with shared weights, so a stage's bytes are a prefix sum
    and an entry of a small table: copies of the marked layers from the i-th up to before the j-th.
    """

    def __init__(self, problem: Problem, order: Ints | None = None) -> None:
        order = np.arange(len(problem.kind)) if order is None else order
        owners = problem.tied_to[problem.tied_to >= 0]
        shares = problem.tied_to >= 0
        shares[owners] = True
        marks = np.flatnonzero(shares[order])
        memory = problem.memory
        #: Whether copies are counted once a stage.
        self.exact = len(marks) <= _MOST_MARKS
        if not self.exact:
            marks, memory = marks[:0], memory + problem.tied_bytes
        #: (L + 1,) bytes without copies before each position.
        self._before: Ints = np.concatenate(([0], np.cumsum(memory[order]))).astype(np.int64)
        self._marks: Ints = marks
        self._copies = np.zeros((len(marks) + 1, len(marks) + 1), dtype=np.int64)
        for first in range(len(marks)):
            inside: set[int] = set()
            copies: dict[int, int] = {}
            for at, layer in enumerate(order[marks[first:]].tolist(), start=first + 1):
                inside.add(layer)
                owner = int(problem.tied_to[layer])
                if owner >= 0:
                    copies[owner] = max(copies.get(owner, 0), int(problem.tied_bytes[layer]))
                self._copies[first, at] = sum(size for owner, size in copies.items() if owner not in inside)

    def held(self, start: int, end: int) -> int:
        """Bytes of the stage [start, end)."""
        first, last = np.searchsorted(self._marks, (start, end)).tolist()
        return int(self._before[end] - self._before[start] + self._copies[first, last])

    def ends(self, starts: Ints, capacity: int) -> Ints:
        """The furthest end that `capacity` bytes allow from each start."""
        before, marks = self._before, self._marks
        most = before[starts] + capacity
        if len(marks) == 0:
            return np.maximum(np.searchsorted(before, most, side="right") - 1, starts)
        first = np.searchsorted(marks, starts)
        ends, going = starts.copy(), np.ones(len(starts), dtype=np.bool_)
        for at in range(len(marks) + 1):
            stop = int(marks[at]) if at < len(marks) else len(before) - 1
            least = np.where(first == at, starts, int(marks[at - 1]) + 1 if at else 0)
            end = np.minimum(np.searchsorted(before, most - self._copies[first, at], side="right") - 1, stop)
            near = first <= at
            reached = going & near & (end >= least)
            ends = np.where(reached, end, ends)
            going &= ~near | (reached & (end == stop))
        return ends
