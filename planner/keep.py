"""Allocations that keep what nodes already hold: the fewest bytes moved within a time budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Several
from itertools import permutations

import numpy as np

from planner.counts import Hosting, assign_any_order, in_any_order
from planner.greedy import is_exact
from planner.moving import Moving
from planner.packing import best_fit
from planner.placement import Work
from planner.problem import SLACK, Floats, Ints, Problem
from planner.sequence import Sequence
from planner.staying import least_moved

#: Orders of nodes that are tried for a pipeline, exchanges in the best of them, and nodes of which all orders are.
MAX_ORDERS, MAX_EXCHANGES, MOST_EVERY = 160, 600, 5
#: Exchanges times nodes times layers squared.
MOST_CELLS = 200_000_000
#: Layers up to which cuts of a pipeline are refitted.
MAX_LAYERS = 1_500


def keep_labels(problem: Problem, nodes: Ints, old: Ints) -> Ints:
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


def keep_counts(problem: Problem, work: Work, old: Ints, budget_s: float) -> list[Ints]:
    """Hostings within the budget that keep most bytes where they are, for layers in runs; may be empty."""
    if not is_exact(work) or len(work.kind) == 0:
        return []
    counts = in_any_order(work)
    caps = counts.caps(budget_s)
    if (caps[:, 0] < 0).any():
        return []
    held = np.zeros((len(problem.nodes), len(work.count)), dtype=np.int64)
    homes = old[work.layer]
    np.add.at(held, (homes[homes >= 0], work.kind[homes >= 0]), 1)
    odd = [kind for kind in range(len(work.count)) if kind != counts.main]
    weight = np.array(
        [int(problem.memory[work.layer[np.flatnonzero(work.kind == kind)[0]]]) for kind in range(len(work.count))],
        dtype=np.float64,
    )
    quantities = [int(work.count[kind]) + 1 for kind in odd]
    groups = len(counts.groups.memory)
    state_counts = (
        np.array(np.unravel_index(np.arange(groups), quantities)).T if odd else np.zeros((1, 0), dtype=np.int64)
    )
    stays = np.minimum(state_counts[None, :, :], held[:, odd][:, None, :]) @ weight[odd]
    stays = stays + np.minimum(np.maximum(caps, 0), held[:, counts.main][:, None]) * weight[counts.main]
    results = []
    for price in (0.0, 0.25, 1.0, 4.0):
        value = np.where(caps < 0, -1e30, stays + price * weight[counts.main] * caps)
        state = _best_states(counts.groups.without, value)
        if state is None:
            continue
        most = caps[np.arange(len(caps)), state].astype(np.int64)
        if int(most.sum()) < counts.run:
            continue
        main = np.minimum(most, held[:, counts.main])
        missing = counts.run - int(main.sum())
        # The rest goes to the fastest nodes that have room; those already in use first.
        for node in np.lexsort((np.arange(len(main)), counts.main_s, main == 0)).tolist():
            added = min(missing, int(most[node] - main[node]))
            main[node] += added
            missing -= added
        results.append(work.layers(assign_any_order(counts, Hosting(state=state, main=main))))
    return results


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
    return None


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


def keep_stages(moving: Moving, budget_s: float, best_nodes: Ints) -> tuple[list[Ints], float]:
    """Contiguous stages within the budget that move fewest bytes, over orders close to the present and the best one.

    Args:
        moving: Who holds what now.
        budget_s: Seconds that no stage may exceed.
        best_nodes: (L,) nodes of the best plan.

    Returns:
        (at most one plan's (L,) nodes, bytes that any contiguous plan within the budget moves).
    """
    problem, old = moving.problem, moving.held
    length = len(old)
    if length > MAX_LAYERS:
        return [], 0.0
    sequence = Sequence(problem)
    reach = sequence.reach(budget_s)
    class_of = {node: at for at, nodes in enumerate(sequence.classes) for node in nodes}
    present: list[int] = []
    for node in old.tolist():
        if node >= 0 and node not in present:
            present.append(node)
    absent = [node for node in range(len(problem.nodes)) if node not in present]
    absent.sort(key=lambda node: (-int((reach[class_of[node]] - np.arange(length + 1)).max()), node))
    # Of equal bytes the fewest layers.
    lost = moving.alone() + (old[None, :] != np.arange(len(problem.nodes))[:, None])
    tried = 0
    best: tuple[float, Ints, list[int]] | None = None

    def consider(order: list[int]) -> bool:
        nonlocal tried, best
        tried += 1
        found = _fixed_order([reach[class_of[node]] for node in order], lost[order])
        if found is not None:
            found = found[0], np.array(order, dtype=np.int64)[found[1]]
        if found is not None and (best is None or found[0] < best[0] - 0.5):
            best = (*found, order)
            return True
        return False

    consider(present)
    # Insert what is not in use yet, one after the other, where it helps most; then exchange neighbours.
    base = present
    for _ in range(4):
        start = base if best is None else best[2]
        before = best
        for node in [node for node in absent if node not in start][:8]:
            for at in range(len(start) + 1):
                if tried < MAX_ORDERS:
                    consider([*start[:at], node, *start[at:]])
        if best is before:
            if best is not None:
                break
            # Nothing fits yet: add the roomiest where the sequence has its largest gap, and go on.
            left = [node for node in absent if node not in base]
            if not left:
                break
            gap = _gap(old, base)
            base = [*base[:gap], left[0], *base[gap:]]
            consider(base)
    if best is not None:
        order = best[2]
        for at in range(len(order) - 1):
            if tried < 2 * MAX_ORDERS:
                swapped = list(best[2])
                if at + 1 < len(swapped):
                    swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
                    consider(swapped)
    known = float(lost.max(axis=0).sum()) if best is None else best[0]
    least = moving.least().astype(np.float64)
    bound, orders = least_moved(problem, least, within_s=budget_s, known=known)
    for order in orders:
        consider(order)
        consider(order + [node for node in present if node not in order])
    consider(list(dict.fromkeys([*best_nodes.tolist(), *present, *absent])))
    if len(problem.nodes) <= MOST_EVERY:
        bound = math.inf
        for every in permutations(range(len(problem.nodes))):
            consider(list(every))
            found = _fixed_order([reach[class_of[node]] for node in every], least[list(every)])
            bound = bound if found is None else min(bound, found[0])
    elif best is not None and best[0] > bound:
        _exchange(best[2], consider, min(MAX_EXCHANGES, MOST_CELLS // lost.size // length))
    if not sequence.exact_bytes or math.isinf(bound):
        bound = 0.0
    return [] if best is None else [best[1]], bound


def _exchange(order: list[int], consider: Callable[[list[int]], bool], left: int) -> None:
    """Nodes moved to another place in the order, near ones first, as long as that is better."""
    improved = True
    while improved:
        improved = False
        for distance in range(1, len(order)):
            for at in range(len(order) - distance):
                for source, target in ((at, at + distance), (at + distance, at)):
                    left -= 1
                    if left < 0:
                        return
                    trial = order[:source] + order[source + 1 :]
                    trial.insert(target, order[source])
                    swapped = list(order)
                    swapped[source], swapped[target] = order[target], order[source]
                    for changed in (trial, swapped) if source < target else (trial,):
                        if consider(changed):
                            order, improved = changed, True
                            break


def _gap(old: Ints, order: Several[int]) -> int:
    """Where in `order` a node fits that takes over the longest stretch of layers without a home."""
    orphans = np.flatnonzero(old < 0)
    if len(orphans) == 0:
        return len(order)
    before = set(old[: int(orphans[0])].tolist())
    return sum(1 for node in order if node in before)


def _fixed_order(reach: Several[Ints], lost: Floats | Ints) -> tuple[float, Ints] | None:
    """The cuts of nodes in a fixed order that lose least: (what, (L,) place in that order)."""
    length = lost.shape[1]
    positions = np.arange(length + 1)
    best = np.full(length + 1, np.inf)
    best[0] = 0.0
    starts = np.empty((len(lost), length + 1), dtype=np.int64)
    after = positions[None, :] > positions[:, None]
    for at, row in enumerate(lost):
        moved = np.concatenate(([0.0], np.cumsum(row)))
        open_cut = after & (positions[None, :] <= reach[at][:, None])
        value = np.where(open_cut, (best - moved)[:, None], np.inf)
        start = value.argmin(axis=0)
        taken = value[start, positions] + moved
        use = taken < best
        starts[at] = np.where(use, start, -1)
        best = np.where(use, taken, best)
    if not np.isfinite(best[length]):
        return None
    nodes, at = np.empty(length, dtype=np.int64), length
    for step in range(len(lost) - 1, -1, -1):
        start_at = int(starts[step, at])
        if start_at >= 0:
            nodes[start_at:at] = step
            at = start_at
    return (float(best[length]), nodes) if at == 0 else None
