"""Moves and swaps that only improve: the slowest node gives a layer away, or trades it for a cheaper one."""

from __future__ import annotations

import numpy as np

from planner.problem.arrays import SLACK, Ints
from planner.problem.items import Work


class _State:
    """Loads and rooms of an allocation under change."""

    def __init__(self, work: Work, assignment: Ints) -> None:
        self.work = work
        self.assignment = assignment.copy()
        self.loads = work.loads_s(assignment)
        nodes = len(work.base_s)
        used = np.zeros(nodes, dtype=np.int64)
        np.add.at(used, assignment, work.memory[work.kind])
        self.room = work.room_bytes - used
        self.share = work.room_flop - np.bincount(assignment, weights=work.flop[work.kind], minlength=nodes)
        self.shared = bool(np.isfinite(work.room_flop).any())
        self.memory = work.memory[work.kind]
        self.flop = work.flop[work.kind]

    def move(self, item: int, node: int) -> None:
        work, kind, old = self.work, int(self.work.kind[item]), int(self.assignment[item])
        self.loads[old] -= work.seconds[old, kind]
        self.loads[node] += work.seconds[node, kind]
        self.room[old] += self.memory[item]
        self.room[node] -= self.memory[item]
        if self.shared:
            self.share[old] += self.flop[item]
            self.share[node] -= self.flop[item]
        self.assignment[item] = node


def _distinct(state: _State, node: int) -> Ints:
    """One item of each kind that `node` holds."""
    held = np.flatnonzero(state.assignment == node)
    _, first = np.unique(state.work.kind[held], return_index=True)
    return held[first]


def _best_move(state: _State, slowest: int, held: Ints, limit: float) -> tuple[int, int] | None:
    work = state.work
    after = state.loads[:, None] + work.seconds[:, work.kind[held]]
    after[slowest] = np.inf
    after[state.room[:, None] < state.memory[held][None, :]] = np.inf
    if state.shared:
        after[state.share[:, None] < state.flop[held][None, :]] = np.inf
    rest = state.loads[slowest] - work.seconds[slowest, work.kind[held]]
    worst = np.maximum(after, rest[None, :])
    node, at = divmod(int(worst.argmin()), len(held))
    return (int(held[at]), node) if worst[node, at] < limit else None


def _best_swap(state: _State, slowest: int, held: Ints, limit: float) -> tuple[int, int] | None:
    work = state.work
    others = np.flatnonzero(state.assignment != slowest)
    if len(others) == 0:
        return None
    home, kinds = state.assignment[others], work.kind[others]
    freed = state.loads[home] - work.seconds[home, kinds]
    taken = work.seconds[slowest, kinds]
    best: tuple[float, int, int] | None = None
    for item in held.tolist():
        kind = int(work.kind[item])
        here = state.loads[slowest] - work.seconds[slowest, kind] + taken
        there = freed + work.seconds[home, kind]
        worst = np.maximum(here, there)
        shift = state.memory[others] - state.memory[item]
        worst[(shift > state.room[slowest]) | (-shift > state.room[home])] = np.inf
        if state.shared:
            flop = state.flop[others] - state.flop[item]
            worst[(flop > state.share[slowest]) | (-flop > state.share[home])] = np.inf
        at = int(worst.argmin())
        if worst[at] < limit and (best is None or worst[at] < best[0]):
            best = (float(worst[at]), item, int(others[at]))
    return None if best is None else best[1:]


def refine(work: Work, assignment: Ints, *, target_s: float = 0.0, steps: int = 400) -> Ints:
    """Improve the slowest node by moves, then swaps, until it has none or `target_s` is reached.

    Every step lowers the load of the slowest node and lifts no other to it, so the bottleneck never grows.
    """
    if len(assignment) == 0 or len(work.base_s) == 1:
        return assignment
    state = _State(work, assignment)
    for _ in range(steps):
        slowest = int(state.loads.argmax())
        limit = float(state.loads[slowest]) * (1 - SLACK)
        if limit <= target_s:
            break
        held = _distinct(state, slowest)
        if len(held) == 0:  # pins alone make it the slowest
            break
        move = _best_move(state, slowest, held, limit)
        if move is not None:
            state.move(*move)
            continue
        swap = _best_swap(state, slowest, held, limit)
        if swap is None:
            break
        node = int(state.assignment[swap[1]])
        state.move(swap[1], slowest)
        state.move(swap[0], node)
    return state.assignment
