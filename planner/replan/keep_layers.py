"""Allocations that keep what nodes already hold: the fewest bytes moved within a time budget."""

from __future__ import annotations

import math

import numpy as np

from planner.greedy.packing import best_fit
from planner.greedy.repair import repair
from planner.problem.arrays import SLACK, Floats, Ints, Problem
from planner.problem.counting import Hosting, assign_any_order, in_any_order, is_exact
from planner.problem.items import Work
from planner.replan.moved_bytes import Moving

#: Prices of room tried for layers in runs; groups of odd layers beyond which fewer are.
PRICES, MANY_GROUPS = 12, 512
#: Items times nodes up to which an allocation is repaired that has no room for what lost its node, and steps of that.
MOST_MENDED, MEND_STEPS = 100_000, 1_000


def exchange_equal(problem: Problem, nodes: Ints, old: Ints) -> Ints:
    """Exchange equal layers so that as many as can be stay on the node that holds them now (`old`, -1: nobody)."""
    kept = nodes.copy()
    for kind in np.unique(problem.kind).tolist():
        members = np.flatnonzero((problem.kind == kind) & (problem.pinned < 0))
        if len(members) < 2:
            continue
        wanted = np.bincount(nodes[members], minlength=len(problem.nodes))
        open_members = []
        for layer in members.tolist():
            home = int(old[layer])
            if home >= 0 and wanted[home] > 0:
                wanted[home] -= 1
                kept[layer] = home
            else:
                open_members.append(layer)
        kept[open_members] = np.repeat(np.arange(len(wanted)), wanted)
    return kept


def keep_counts(moving: Moving, work: Work, old: Ints, budget_s: float) -> tuple[list[Ints], float]:
    """Hostings within the budget that keep most bytes where they are, for layers in runs.

    Room for the run has a price: the higher it is, the more of it nodes are given and the less stays. Each price
    bounds what can stay (Lagrange).

    Returns:
        ((L,) nodes of each plan, perhaps none; bytes that any allocation of these items within the budget moves).
    """
    if not is_exact(work) or len(work.kind) == 0:
        return [], 0.0
    counts = in_any_order(work)
    caps = counts.caps(budget_s)
    if (caps[:, 0] < 0).any():
        return [], 0.0
    held = np.zeros((len(caps), len(work.count)), dtype=np.int64)
    homes = old[work.layer]
    np.add.at(held, (homes[homes >= 0], work.kind[homes >= 0]), 1)
    odd = [kind for kind in range(len(work.count)) if kind != counts.main]
    size = moving.anywhere()
    sizes = size[work.layer]
    for item, others in work.followers.items():
        sizes[item] += size[list(others)].sum()
    weight = np.array([int(sizes[work.kind == kind].min()) for kind in range(len(work.count))], dtype=np.float64)
    quantities = [int(work.count[kind]) + 1 for kind in odd]
    groups = len(counts.groups.memory)
    state_counts = (
        np.array(np.unravel_index(np.arange(groups), quantities)).T if odd else np.zeros((1, 0), dtype=np.int64)
    )
    stays = np.minimum(state_counts[None, :, :], held[:, odd][:, None, :]) @ weight[odd]
    stays = stays + np.minimum(np.maximum(caps, 0), held[:, counts.main][:, None]) * weight[counts.main]
    results, bound, unit = [], 0.0, max(1.0, float(weight[counts.main]))
    low, high, price = 0.0, math.inf, 0.0
    for _ in range(PRICES if groups <= MANY_GROUPS else PRICES // 3):
        value = np.where(caps < 0, -1e30, stays + price * unit * caps)
        state = _best_states(counts.groups.without, value)
        if state is None:
            break
        rows = np.arange(len(caps))
        most = caps[rows, state].astype(np.int64)
        can_stay = float(value[rows, state].sum()) - price * unit * counts.run
        bound = max(bound, float(weight @ work.count) - can_stay)
        if int(most.sum()) < counts.run:
            low = price
        else:
            high = price
            main = np.minimum(most, held[:, counts.main])
            missing = counts.run - int(main.sum())
            # The rest goes to the fastest nodes that have room; those already in use first.
            for node in np.lexsort((np.arange(len(main)), counts.main_s, main == 0)).tolist():
                added = min(missing, int(most[node] - main[node]))
                main[node] += added
                missing -= added
            results.append(work.layers(assign_any_order(counts, Hosting(state=state, main=main))))
            if price == 0:
                break
        price = (low + high) / 2 if math.isfinite(high) else max(0.25, 4 * price)
    return results, bound


def _best_states(without: Ints, value: Floats) -> Ints | None:
    """(N,) group of each node with the greatest sum of values and everything placed."""
    size = len(without)
    best = np.full(size + 1, -1e30)
    best[0] = 0.0
    choices = np.empty((len(value), size), dtype=np.int64)
    rows = np.arange(size)
    for node in range(len(value)):
        total = best[without] + value[node][None, :]
        choices[node] = total.argmax(axis=1)
        best[:size] = total[rows, choices[node]]
    if best[size - 1] < -1e29:
        return None
    state = np.zeros(len(value), dtype=np.int64)
    now = size - 1
    for node in range(len(value) - 1, -1, -1):
        state[node] = choices[node, now]
        now = int(without[now, state[node]])
    return state


def keep_items(work: Work, old: Ints, budget_s: float) -> Ints | None:
    """Everything stays but what has no home or is too much where it is; that goes where it fits best."""
    homes = old[work.layer].copy()
    _shed(work, homes, budget_s)
    open_items = np.flatnonzero(homes < 0)
    stay = np.flatnonzero(homes >= 0)
    base, room, share = work.base_s.copy(), work.room_bytes.copy(), work.room_flop.copy()
    np.add.at(base, homes[stay], work.seconds[homes[stay], work.kind[stay]])
    np.subtract.at(room, homes[stay], work.memory[work.kind[stay]])
    np.subtract.at(share, homes[stay], work.flop[work.kind[stay]])
    part = Work(
        layer=work.layer[open_items],
        kind=work.kind[open_items],
        followers={},
        count=work.count,
        memory=work.memory,
        flop=work.flop,
        seconds=work.seconds,
        base_s=base,
        room_bytes=room,
        room_flop=share,
        fixed=work.fixed,
    )
    order = np.lexsort((np.arange(len(open_items)), -work.flop[part.kind], -work.memory[part.kind]))
    by_flop = np.lexsort((np.arange(len(open_items)), -work.memory[part.kind], -work.flop[part.kind]))
    for way in (by_flop, order):
        packed = best_fit(part, way, budget_s)
        if packed is not None:
            homes[open_items] = packed
            return work.layers(homes)
    if np.isfinite(work.room_flop).any() or len(work.kind) * len(base) > MOST_MENDED:
        return None
    # No room without exchanges: start with everything at home, what has none where that is done first, and repair it.
    homes = old[work.layer].copy()
    loads = work.base_s.copy()
    np.add.at(loads, homes[homes >= 0], work.seconds[homes[homes >= 0], work.kind[homes >= 0]])
    for item in [item for item in np.argsort(-work.flop[work.kind], kind="stable").tolist() if homes[item] < 0]:
        homes[item] = int((loads + work.seconds[:, work.kind[item]]).argmin())
        loads[homes[item]] += work.seconds[homes[item], work.kind[item]]
    repaired = repair(work, homes, budget_s, steps=MEND_STEPS)
    return None if repaired is None else work.layers(repaired)


def _shed(work: Work, homes: Ints, budget_s: float) -> None:
    """Take the lightest sufficient layers off nodes that are over their room or budget (in place: -1)."""
    limit = budget_s * (1 + SLACK)
    for node in np.unique(homes[homes >= 0]).tolist():
        held = np.flatnonzero(homes == node)
        kinds = work.kind[held]
        load = float(work.base_s[node] + work.seconds[node, kinds].sum())
        room = int(work.room_bytes[node] - work.memory[kinds].sum())
        share = float(work.room_flop[node] - work.flop[kinds].sum())
        while len(held) and (load > limit or room < 0 or share < 0):
            kinds = work.kind[held]
            enough = (
                (load - work.seconds[node, kinds] <= limit)
                & (room + work.memory[kinds] >= 0)
                & (share + work.flop[kinds] >= 0)
            )
            size = work.memory[kinds].astype(np.float64)
            if enough.any():
                at = int(np.where(enough, size, np.inf).argmin())
            else:
                at = (
                    int((size / np.maximum(work.seconds[node, kinds], 1e-300)).argmin())
                    if room >= 0
                    else int(size.argmax())
                )
            homes[held[at]] = -1
            load -= float(work.seconds[node, kinds[at]])
            room += int(work.memory[kinds[at]])
            share += float(work.flop[kinds[at]])
            held = np.delete(held, at)
