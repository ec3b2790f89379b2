"""Exact allocation of layers that come in runs: how many of each kind a node hosts, not which.

Layers of equal cost are interchangeable, so a transformer is one large kind (the run) and a few odd layers. For a
time budget T a node hosts floor(T / c) of the run, or what its memory holds. Odd layers on a node cost it some of
the run: its loss. All is placed if the losses leave room for the whole run, a small assignment problem in which
only the nodes with the least losses matter: were a group of odd layers on another node, one of the p best for it
would be free (p odd layers occupy p nodes at most) and moving there loses no more. A dynamic programme over what
is placed so far finds the best; its optimum and the smallest T are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.problem.arrays import SLACK, Floats, Ints
from planner.problem.items import Work

#: Largest number of states (products of odd counts + 1) that is solved exactly.
MAX_STATES = 2_048
_NEVER = -1e18


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hosting:
    """What each node hosts at a budget: a state of odd layers (index into states) and how many of the run."""

    state: Ints
    main: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Which groups of odd layers a node may host, U of them (the first is none), and the S states of what is placed.

    The last state is "all placed"; `without[s, u]` is the state s without group u, or S where u is not part of s.
    """

    #: Odd layers in all.
    pieces: int
    #: (U,) bytes and FLOP, (N, U) seconds of each group.
    memory: Ints
    flop: Floats
    seconds: Floats
    #: (S, U)
    without: Ints
    #: (U,) how many of the run a node may host beside the group: at least, at most.
    run_least: Ints
    run_most: Ints


class Counts:
    """A run of equal layers and groups of odd ones, ready to be probed at any budget."""

    def __init__(self, work: Work, main: int, run: int, groups: Groups) -> None:
        self.work = work
        self.groups = groups
        self.main = main
        #: Layers in the run, all of kind `main`.
        self.run = run
        self.main_s: Floats = work.seconds[:, main]
        self._fixed_cap = self._caps_by_room()
        # Every state with each group that is part of it, by state: the group, and the state without it.
        states, self._group = np.nonzero(groups.without < len(groups.without))
        self._left = groups.without[states, self._group]
        self._first = np.searchsorted(states, np.arange(len(groups.without)))

    def _caps_by_room(self) -> Floats:
        """(N, U) how many of the run fit beside each group by memory and share, `_NEVER` where the group does not."""
        work, groups = self.work, self.groups
        left = (work.room_bytes[:, None] - groups.memory[None, :]).astype(np.float64)
        caps = np.broadcast_to(groups.run_most.astype(np.float64), left.shape).copy()
        if self.run and work.memory[self.main] > 0:
            caps = np.minimum(caps, np.floor(left / work.memory[self.main]))
        caps[left < 0] = _NEVER
        if np.isfinite(work.room_flop).any():
            flop_left = work.room_flop[:, None] - groups.flop[None, :]
            if self.run and work.flop[self.main] > 0:
                caps = np.minimum(caps, np.floor(flop_left / work.flop[self.main]))
            caps[flop_left < 0] = _NEVER
        caps[caps < groups.run_least[None, :]] = _NEVER
        return caps

    def caps(self, budget_s: float) -> Floats:
        """(N, Q) how many of the run each node hosts beside each state within `budget_s`."""
        if math.isinf(budget_s):
            return self._fixed_cap
        left = budget_s * (1 + SLACK) - self.work.base_s[:, None] - self.groups.seconds
        caps = self._fixed_cap
        if self.run:
            with np.errstate(divide="ignore", invalid="ignore"):
                by_time = np.where(self.main_s[:, None] > 0, np.floor(left / self.main_s[:, None]), self.run)
            caps = np.minimum(caps, by_time)
        return np.where((left < 0) | (caps < self.groups.run_least[None, :]), _NEVER, caps)

    def place(self, caps: Floats) -> Hosting | None:
        """Host everything within `caps`, the most of the run left over; None if that cannot be."""
        alone = caps[:, 0]
        if (alone < 0).any():  # a pinned part alone is over the budget
            return None
        if len(self.groups.without) == 1:
            state = np.zeros(len(caps), dtype=np.int64)
            return Hosting(state=state, main=alone.astype(np.int64)) if alone.sum() >= self.run else None
        loss = alone[:, None] - caps
        nodes = self._candidates(loss)
        size = len(self.groups.without)
        best = np.full(size, _NEVER)
        best[0] = 0.0
        before = []
        for node in nodes.tolist():
            before.append(best)
            best = self.added(best, -loss[node])
        if best[size - 1] <= _NEVER / 2 or float(alone.sum()) + best[size - 1] < self.run:
            return None
        state = np.zeros(len(caps), dtype=np.int64)
        now = size - 1
        for node, prior in zip(nodes[::-1].tolist(), before[::-1], strict=True):
            state[node], now = self.unwound(prior, -loss[node], now)
        return Hosting(state=state, main=caps[np.arange(len(caps)), state].astype(np.int64))

    def added(self, best: Floats, value: Floats) -> Floats:
        """(..., S) best sums with one node more that hosts a group worth `value` (U,), from those without it."""
        sums: Floats = np.maximum.reduceat(best[..., self._left] + value[self._group], self._first, axis=-1)
        return sums

    def unwound(self, best: Floats, value: Floats, state: int) -> tuple[int, int]:
        """The group that `added` chose for a state, the first of equal ones, and the state without it."""
        end = int(self._first[state + 1]) if state + 1 < len(self._first) else len(self._left)
        part = slice(int(self._first[state]), end)
        at = part.start + int((best[self._left[part]] + value[self._group[part]]).argmax())
        return int(self._group[at]), int(self._left[at])

    @property
    def pairs(self) -> int:
        """States times the groups that are part of them."""
        return len(self._left)

    def _candidates(self, loss: Floats) -> Ints:
        """Nodes that may host odd layers: for each state the `pieces` nodes that lose least."""
        count, pieces = len(loss), self.groups.pieces
        if count <= pieces * 2:
            return np.arange(count)
        key = np.where(loss < -_NEVER / 2, loss, 1e9) * count + np.arange(count)[:, None]
        picked = np.argpartition(key[:, 1:], pieces - 1, axis=0)[:pieces]
        return np.unique(picked)

    def used_s(self, hosting: Hosting) -> Floats:
        """(N,) seconds of each node at that hosting."""
        at = np.arange(len(hosting.state))
        return self.work.base_s + self.groups.seconds[at, hosting.state] + hosting.main * self.main_s

    def next_budget(self, budget_s: float, caps: Floats) -> float:
        """The smallest budget above `budget_s` at which any node hosts more than `caps`."""
        open_state = self._fixed_cap > _NEVER / 2
        grown = np.where(caps < 0, self.groups.run_least[None, :], caps + 1) if self.run else np.zeros_like(caps)
        grows = open_state & (caps < self._fixed_cap)
        at = self.work.base_s[:, None] + self.groups.seconds + grown * self.main_s[:, None]
        at = at[grows & (at > budget_s)]
        return float(at.min()) if at.size else math.inf

    def trimmed(self, hosting: Hosting) -> Hosting:
        """Exactly the run: what is hosted too much is taken from the slowest nodes."""
        main = hosting.main.copy()
        least = self.groups.run_least[hosting.state]
        if least.any():  # one node holds the whole run
            return Hosting(state=hosting.state, main=least)
        surplus = int(main.sum()) - self.run
        for node in np.lexsort((-np.arange(len(main)), -self.main_s)).tolist():
            if surplus <= 0:
                break
            taken = min(surplus, int(main[node]))
            main[node] -= taken
            surplus -= taken
        return Hosting(state=hosting.state, main=main)


def smallest_budget(counts: Counts, start_s: float) -> tuple[Hosting, float, float] | None:
    """The smallest budget that hosts everything, by bisection from `start_s` (no plan is below it).

    Both ends move to the next budget at which a node's part changes at all, so they meet after few probes.

    Returns:
        (hosting, its bottleneck in seconds, proven lower bound in seconds), or None if no budget is enough.
    """
    low, high, step = start_s, math.inf, 1.02
    found: Hosting | None = None
    probe = start_s
    for _ in range(200):
        caps = counts.caps(probe)
        hosting = counts.place(caps)
        if hosting is not None:
            found, high = hosting, min(probe, max(low, float(counts.used_s(hosting).max())))
        else:
            if math.isinf(probe):
                return None
            low = max(low, counts.next_budget(probe, caps))
        if high <= low * (1 + SLACK) or (found is not None and math.isinf(low)):
            break
        if math.isinf(low):
            probe = math.inf
        elif found is None:
            probe = max(low, low * step)
            step = step**2 if step < 1e6 else math.inf
        else:
            probe = (low + high) / 2
    if found is None:
        return None
    return found, high, min(low, high)


def fewest_nodes(counts: Counts, budget_s: float, *, limit: int = 2_000_000) -> Hosting | None:
    """Host everything within `budget_s` on as few nodes as can be; of those the hosting with most room left.

    A programme over (nodes used, what is placed); None where that would take more than `limit` steps a node set.
    """
    caps = counts.caps(budget_s)
    pieces = counts.groups.pieces
    nodes, size = len(caps), len(counts.groups.without)
    if (caps[:, 0] < 0).any():
        return None
    forced = counts.work.base_s > 0
    forced |= np.isin(np.arange(nodes), counts.work.fixed[counts.work.fixed >= 0])
    # No more nodes than these: the largest hosts alone, one more for each odd layer, and those with pins.
    order = np.argsort(-caps[:, 0], kind="stable")
    enough = int(np.searchsorted(np.cumsum(caps[order, 0]), counts.run)) + 1
    most = min(nodes, enough + 2 * pieces + int(forced.sum()))
    if nodes * (most + 1) * counts.pairs > limit:
        return None
    best = np.full((most + 1, size), _NEVER)
    best[0, 0] = 0.0
    before = []
    for node in range(nodes):
        before.append(best)
        with_it = counts.added(best[:-1], caps[node])
        best = np.full_like(best, _NEVER) if forced[node] else best.copy()
        np.maximum(best[1:], with_it, out=best[1:])
    enough_at = np.flatnonzero(best[:, size - 1] >= counts.run)
    if len(enough_at) == 0:
        return None
    used, now = int(enough_at[0]), size - 1
    state = np.zeros(nodes, dtype=np.int64)
    main = np.zeros(nodes, dtype=np.int64)
    for node in range(nodes - 1, -1, -1):
        value = best[used, now]
        best = before[node]
        if not forced[node] and best[used, now] >= value:
            continue
        state[node], now = counts.unwound(best[used - 1], caps[node], now)
        main[node] = int(caps[node, state[node]])
        used -= 1
    return Hosting(state=state, main=main)


def states_of(work: Work) -> tuple[int, int]:
    """States of the programme for layers in any order, and pairs of a state and a group of it; or too many."""
    others = np.delete(work.count, int(np.argmax(work.count))).tolist() if len(work.count) else []
    if len(others) > 16:
        return MAX_STATES + 1, MAX_STATES + 1
    return math.prod(q + 1 for q in others), math.prod((q + 1) * (q + 2) // 2 for q in others)


@lru_cache(maxsize=4)
def _parts(quantities: tuple[int, ...]) -> tuple[Ints, Ints]:
    """(S, kinds) how many of each kind a state has; (S, S) the state without another one, S where that is no part."""
    sizes = [quantity + 1 for quantity in quantities]
    held = np.indices(sizes).reshape(len(sizes), -1).T if sizes else np.zeros((1, 0), dtype=np.int64)
    part = np.ones((1, 1), dtype=np.bool_)
    for size in sizes:
        less = np.tri(size, dtype=np.bool_)
        part = (part[:, None, :, None] & less[None, :, None, :]).reshape(len(part) * size, -1)
    without = np.full(part.shape, len(part), dtype=np.int64)
    states, groups = np.nonzero(part)
    without[states, groups] = states - groups
    without.flags.writeable = False
    return held.astype(np.int64), without


def in_any_order(work: Work) -> Counts:
    """Any odd layers may go together: a group is how many of each odd kind."""
    main = int(np.argmax(work.count))
    odd = [kind for kind in range(len(work.count)) if kind != main]
    quantities = tuple(int(work.count[kind]) for kind in odd)
    held, without = _parts(quantities)
    size = len(held)
    groups = Groups(
        pieces=sum(quantities),
        memory=held @ work.memory[odd],
        flop=held @ work.flop[odd],
        seconds=work.seconds[:, odd] @ held.T,
        without=without,
        run_least=np.zeros(size, dtype=np.int64),
        run_most=np.full(size, work.count[main], dtype=np.int64),
    )
    return Counts(work, main, int(work.count[main]), groups)


def assign_any_order(counts: Counts, hosting: Hosting) -> Ints:
    """(I,) node of each item: equal items in order, node by node."""
    work = counts.work
    odd = [kind for kind in range(len(work.count)) if kind != counts.main]
    quantities = [int(work.count[kind]) + 1 for kind in odd]
    nodes = np.empty(len(work.kind), dtype=np.int64)
    ids = np.arange(len(hosting.state))
    held = np.array(np.unravel_index(hosting.state, quantities)) if odd else np.zeros((0, len(ids)), dtype=np.int64)
    for row, kind in enumerate(odd):
        nodes[work.kind == kind] = np.repeat(ids, held[row])
    nodes[work.kind == counts.main] = np.repeat(ids, hosting.main)
    return nodes


def drop_weakest(counts: Counts, hosting: Hosting) -> Hosting:
    """Leave out the nodes that add least while all of the run still has room."""
    main = hosting.main.copy()
    surplus = int(main.sum()) - counts.run
    for node in np.lexsort((np.arange(len(main)), main)).tolist():
        if hosting.state[node] or main[node] == 0:
            continue
        if main[node] > surplus:
            break
        surplus -= int(main[node])
        main[node] = 0
    return Hosting(state=hosting.state, main=main)


#: States times groups of odd layers times nodes up to which layers are counted.
_MOST_PAIRS = 16_000_000


def is_exact(work: Work) -> bool:
    """Whether the layers come in few enough runs to be solved exactly, so that no solution means there is none."""
    states, pairs = states_of(work)
    return states <= MAX_STATES and pairs * len(work.base_s) <= _MOST_PAIRS
