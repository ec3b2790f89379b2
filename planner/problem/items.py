"""What is left to place once pins are fixed: items, their kinds, and the room beside what is pinned.

Tied weights make a node's memory depend on what it holds together. A `Work` settles that in one of these ways:

- "shared": as if the copy were free. Never holds too much back, so its bound is valid for all of them.
- "copied": every layer that uses another's weights brings its own copy. What fits so always fits.
- some blocks: the layers of each are one item with one copy at most, all others bring their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from planner.problem.arrays import SLACK, Floats, Ints, Problem
from planner.problem.ties import Blocks, copied_bytes

Ties = Literal["shared", "copied"] | Blocks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """I items of K kinds to place on N nodes."""

    #: (I,) first layer and kind of each item; other layers that go with an item.
    layer: Ints
    kind: Ints
    followers: Mapping[int, tuple[int, ...]]
    #: (K,) how many; bytes; FLOP. (N, K) seconds.
    count: Ints
    memory: Ints
    flop: Floats
    seconds: Floats
    #: (N,) what pins already take or leave: seconds used, bytes and FLOP free.
    base_s: Floats
    room_bytes: Ints
    room_flop: Floats
    #: (L,) node of each pinned layer, else -1.
    fixed: Ints

    def layers(self, assignment: Ints) -> Ints:
        """(L,) node of each layer from the (I,) node of each item; weightless layers follow their neighbour."""
        nodes = self.fixed.copy()
        nodes[self.layer] = assignment
        for item, others in self.followers.items():
            nodes[list(others)] = assignment[item]
        return fill_gaps(nodes)

    def loads_s(self, assignment: Ints) -> Floats:
        """(N,) seconds of each node."""
        return self.base_s + np.bincount(
            assignment, weights=self.seconds[assignment, self.kind], minlength=len(self.base_s)
        )


def fill_gaps(nodes: Ints) -> Ints:
    """Give layers without a node (-1) the node of the layer before, or of the first that has one."""
    known = np.flatnonzero(nodes >= 0)
    if len(known) == len(nodes):
        return nodes
    if len(known) == 0:
        return np.zeros_like(nodes)
    last = np.maximum.accumulate(np.where(nodes >= 0, np.arange(len(nodes)), -1))
    return nodes[np.where(last >= 0, last, known[0])]


@overload
def build_work(problem: Problem) -> Work: ...
@overload
def build_work(problem: Problem, ties: Ties) -> Work | None: ...
def build_work(problem: Problem, ties: Ties = "shared") -> Work | None:
    """Items, kinds and room for one way to treat tied weights; None if pins tear a block apart."""
    fixed = problem.pinned.copy()
    blocks = ties if isinstance(ties, tuple) else ()
    for block in blocks:
        pins = {int(problem.pinned[layer]) for layer in block} - {-1}
        if len(pins) > 1:
            return None
        fixed[list(block)] = max(pins, default=-1)
    followers_of = {block[0]: block[1:] for block in blocks if fixed[block[0]] < 0}
    skipped = {layer for others in followers_of.values() for layer in others}
    free = np.array(
        [layer for layer in np.flatnonzero((fixed < 0) & ~problem.weightless).tolist() if layer not in skipped],
        dtype=np.int64,
    )
    extra = np.zeros_like(problem.tied_bytes) if ties == "shared" else copied_bytes(problem, blocks)
    kind, count, memory, flop, seconds = _merge_kinds(problem, free, extra, followers_of)
    pinned = np.flatnonzero(fixed >= 0)
    nodes = len(problem.nodes)
    base_s = np.zeros(nodes)
    room_bytes = problem.capacity.copy()
    room_flop = problem.flop_cap.copy()
    if len(pinned):
        homes = fixed[pinned]
        np.add.at(base_s, homes, problem.seconds[homes, problem.kind[pinned]])
        np.subtract.at(room_bytes, homes, problem.memory[pinned] + extra[pinned])
        np.subtract.at(room_flop, homes, problem.flop[pinned])
    return Work(
        layer=free,
        kind=kind,
        followers={item: followers_of[layer] for item, layer in enumerate(free.tolist()) if layer in followers_of},
        count=count,
        memory=memory,
        flop=flop,
        seconds=seconds,
        base_s=base_s,
        room_bytes=room_bytes,
        room_flop=np.where(np.isfinite(room_flop), room_flop + SLACK * np.abs(problem.flop.sum()), room_flop),
        fixed=fixed,
    )


def _merge_kinds(
    problem: Problem, free: Ints, extra: Ints, followers_of: Mapping[int, tuple[int, ...]]
) -> tuple[Ints, Ints, Ints, Floats, Floats]:
    """Kinds among the free layers; those with followers are a kind of their own, with the costs of all."""
    key: dict[tuple[int, int], int] = {}
    kind = np.empty(len(free), dtype=np.int64)
    sources: list[tuple[int, ...]] = []
    for item, layer in enumerate(free.tolist()):
        name = (int(problem.kind[layer]), layer if layer in followers_of else -1)
        if name not in key:
            key[name] = len(sources)
            sources.append((layer, *followers_of.get(layer, ())))
        kind[item] = key[name]
    if len(sources) == problem.seconds.shape[1] and not followers_of:
        seconds = problem.seconds
        order = [int(problem.kind[members[0]]) for members in sources]
        if order != list(range(len(order))):
            seconds = seconds[:, order]
    else:
        seconds = np.zeros((len(problem.nodes), len(sources)))
        for at, members in enumerate(sources):
            for layer in members:
                seconds[:, at] += problem.seconds[:, problem.kind[layer]]
    memory = np.array([int((problem.memory[list(m)] + extra[list(m)]).sum()) for m in sources], dtype=np.int64)
    flop = np.array([float(problem.flop[list(m)].sum()) for m in sources], dtype=np.float64)
    return kind, np.bincount(kind, minlength=len(sources)).astype(np.int64), memory, flop, seconds


#: (L,) nodes or None where none were found, and a lower bound in seconds: infinite where there are provably none.
Found = tuple[Ints | None, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What a strategy found: the (L,) node of each layer, and what is proven about the objective."""

    nodes: Ints
    lower_bound_s: float
