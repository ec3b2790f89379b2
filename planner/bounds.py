"""Lower bounds on the bottleneck: no allocation whatever is faster. Each is valid for contiguous stages as well."""

from __future__ import annotations

import numpy as np

from planner.placement import Work
from planner.problem import Floats


def lower_bound_s(work: Work) -> float:
    """The best of the simple bounds on the bottleneck in seconds; 0 if there is nothing to place."""
    pinned = float(work.base_s.max(initial=0.0))
    if len(work.count) == 0:
        return pinned
    return max(pinned, single_bound_s(work), shared_bound_s(work), pigeonhole_bound_s(work))


def single_bound_s(work: Work) -> float:
    """The costliest layer on the node that is best for it."""
    least = np.where(work.room_bytes[:, None] >= work.memory[None, :], work.base_s[:, None] + work.seconds, np.inf)
    alone = least.min(axis=0)
    return float(np.where(np.isfinite(alone), alone, 0.0).max())


def _effective_rates(work: Work) -> Floats:
    """(N,) FLOP/s that no layer on the node exceeds."""
    weight = work.flop > 0
    if not weight.any():
        return np.zeros(len(work.base_s))
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = work.flop[weight][None, :] / work.seconds[:, weight]
    return np.asarray(rates.max(axis=1), dtype=np.float64)


def _most_flop(work: Work) -> Floats:
    """(N,) most FLOP that a node's memory and share let it hold: densest layers first, parts of layers allowed."""
    most = np.minimum(work.room_flop, float(work.flop @ work.count))
    dense = np.lexsort((work.memory, -work.flop / np.maximum(work.memory, 1)))
    memory = np.concatenate(([0.0], np.cumsum((work.memory * work.count)[dense].astype(np.float64))))
    flop = np.concatenate(([0.0], np.cumsum((work.flop * work.count)[dense])))
    room = np.maximum(work.room_bytes, 0).astype(np.float64)
    return np.minimum(most, np.interp(room, memory, flop) * (1 + 1e-12))


def shared_bound_s(work: Work) -> float:
    """All compute at once on all nodes, each limited by its memory: water-filling over the time."""
    total = float(work.flop @ work.count)
    rates, most = _effective_rates(work), _most_flop(work)
    usable = (rates > 0) & (most > 0)
    if total <= 0 or not usable.any():
        return 0.0
    rates, most, base = rates[usable], most[usable], work.base_s[usable]
    # FLOP done by time t is piecewise linear: a node starts at its pinned load and stops when its memory is full.
    full = base + most / rates
    points = np.unique(np.concatenate((base, full)))
    done = (
        np.minimum(np.maximum(points[:, None] - base[None, :], 0.0) * rates[None, :], most[None, :]).sum(axis=1)
        if len(points) * len(base) <= 4_000_000
        else _done_sparse(points, base, full, rates)
    )
    at = int(np.searchsorted(done, total))
    if at >= len(points):  # memory is too small for all of it; other checks say so
        return float(points[-1]) * (1 - 1e-9)
    if at == 0:
        return float(points[0])
    share = (total - done[at - 1]) / (done[at] - done[at - 1])
    return float(points[at - 1] + share * (points[at] - points[at - 1])) * (1 - 1e-12)


def _done_sparse(points: Floats, base: Floats, full: Floats, rates: Floats) -> Floats:
    starts, ends = np.argsort(base), np.argsort(full)
    started = np.concatenate(([0.0], np.cumsum(rates[starts])))
    offset = np.concatenate(([0.0], np.cumsum((rates * base)[starts])))
    ended = np.concatenate(([0.0], np.cumsum(rates[ends])))
    stop = np.concatenate(([0.0], np.cumsum((rates * full)[ends])))
    s = np.searchsorted(base[starts], points, side="right")
    e = np.searchsorted(full[ends], points, side="right")
    return points * started[s] - offset[s] - (points * ended[e] - stop[e])


def pigeonhole_bound_s(work: Work, *, cuts: int = 24) -> float:
    """Large layers cannot share: of the n layers of at least s FLOP a node hosts floor(T * rate / s) at most."""
    rates = _effective_rates(work)
    order = np.argsort(-work.flop, kind="stable")
    sizes, counts = work.flop[order], work.count[order]
    ranks = np.cumsum(counts)
    best = 0.0
    chosen = np.unique(np.linspace(0, len(sizes) - 1, min(cuts, len(sizes))).astype(np.int64))
    for at in chosen.tolist():
        size, needed = float(sizes[at]), int(ranks[at])
        if size <= 0:
            continue
        by_memory = np.full(len(rates), np.inf)
        smallest = int(work.memory[order[: at + 1]].min())
        if smallest > 0:
            by_memory = np.floor(np.maximum(work.room_bytes, 0) / smallest)
        each = np.divide(size, rates, out=np.full(len(rates), np.inf), where=rates > 0)
        best = max(best, _kth_finish(work.base_s, each, np.minimum(by_memory, needed), needed))
    return best


def _kth_finish(base: Floats, each: Floats, most: Floats, needed: int) -> float:
    """The time by which `needed` equal layers can be done, `each` seconds a piece on each node."""
    usable = np.isfinite(each) & (most > 0)
    if not usable.any() or most[usable].sum() < needed:
        return 0.0
    base, each, most = base[usable], each[usable], most[usable]
    low, high = 0.0, float((base + each * most).max())
    for _ in range(60):
        middle = (low + high) / 2
        if high <= low * (1 + 1e-12):
            break
        # A little generous, so that rounding never makes the bound too large.
        hosted = np.minimum(np.floor(np.maximum(middle - base, 0) / each * (1 + 1e-12)), most).sum()
        if hosted >= needed:
            high = middle
        else:
            low = middle
    return low * (1 - 1e-12)
