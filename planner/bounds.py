"""Lower bounds on the bottleneck: no allocation whatever is faster. Each is valid for contiguous stages as well."""

from __future__ import annotations

import numpy as np

from planner.placement import Work
from planner.problem import Floats, Ints


def lower_bound_s(work: Work, *, thorough: bool = True) -> float:
    """The best bound on the bottleneck in seconds; 0 if there is nothing to place.

    Args:
        work: What to place.
        thorough: Try the costlier bounds, which only matter where the answer is not exact anyway.
    """
    pinned = float(work.base_s.max(initial=0.0))
    if len(work.count) == 0:
        return pinned
    rates = effective_rates(work)
    simple = max(pinned, single_bound_s(work), shared_bound_s(work, rates))
    if not thorough:
        return simple
    simple = max(simple, surrogate_bound_s(work, rates))
    return max(simple, pigeonhole_bound_s(work, rates, above_s=simple))


def single_bound_s(work: Work) -> float:
    """The costliest layer on the node that is best for it."""
    alone = np.full(len(work.count), np.inf)
    for node in range(len(work.base_s)):
        after = np.where(work.room_bytes[node] >= work.memory, work.base_s[node] + work.seconds[node], np.inf)
        np.minimum(alone, after, out=alone)
    return float(np.where(np.isfinite(alone), alone, 0.0).max())


def effective_rates(work: Work) -> Floats:
    """(N,) FLOP/s that no layer on the node exceeds."""
    weight = work.flop > 0
    if not weight.any():
        return np.zeros(len(work.base_s))
    rates = np.empty(len(work.base_s))
    flop = work.flop[weight]
    with np.errstate(divide="ignore", invalid="ignore"):
        for node in range(len(rates)):  # by rows: all at once takes as much memory again as the table itself
            rates[node] = (flop / work.seconds[node, weight]).max()
    return rates


def _most_flop(work: Work) -> Floats:
    """(N,) most FLOP that a node's memory and share let it hold: densest layers first, parts of layers allowed."""
    most = np.minimum(work.room_flop, float(work.flop @ work.count))
    dense = np.lexsort((work.memory, -work.flop / np.maximum(work.memory, 1)))
    memory = np.concatenate(([0.0], np.cumsum((work.memory * work.count)[dense].astype(np.float64))))
    flop = np.concatenate(([0.0], np.cumsum((work.flop * work.count)[dense])))
    room = np.maximum(work.room_bytes, 0).astype(np.float64)
    return np.minimum(most, np.interp(room, memory, flop) * (1 + 1e-12))


def shared_bound_s(work: Work, rates: Floats) -> float:
    """All compute at once on all nodes, each limited by its memory: water-filling over the time."""
    total = float(work.flop @ work.count)
    most = _most_flop(work)
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


def surrogate_bound_s(work: Work, rates: Floats) -> float:
    """All layers weighed by a mix of FLOP and bytes: a node takes as much of the mix as its time and memory let it.

    For any weights that is valid, parts of layers allowed; bytes alone say when slow nodes have to hold much because
    the fast ones are full.
    """
    flop, size = work.flop * work.count, work.memory.astype(np.float64) * work.count
    if flop.sum() <= 0 or size.sum() <= 0:
        return 0.0
    free = work.flop <= 0
    room = np.maximum(work.room_bytes, 0).astype(np.float64)
    best = 0.0
    for share in (1.0, 0.8, 0.5, 0.2):
        weight = share * work.memory / size.sum() + (1 - share) * work.flop / flop.sum()
        total = float(weight @ work.count)
        by_bytes = np.interp(room, *_concave(weight, work.memory.astype(np.float64), work.count))
        # What takes no time is anyone's; the rest by time.
        axis, value = _concave(np.where(free, 0.0, weight), work.flop, work.count)
        idle = float(weight[free] @ work.count[free])

        def hosted(at_s: float, by_bytes: Floats = by_bytes, axis: Floats = axis, value: Floats = value) -> float:
            by_time = np.interp(np.maximum(at_s - work.base_s, 0.0) * rates, axis, value)
            return float(np.minimum(by_bytes, by_time).sum())

        low, high = (
            0.0,
            float((work.base_s + np.divide(flop.sum(), rates, out=np.zeros_like(rates), where=rates > 0)).max()),
        )
        if hosted(high) + idle < total:
            continue
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if hosted(middle) + idle >= total * (1 - 1e-12) else (middle, high)
            if high <= low * (1 + 1e-9):
                break
        best = max(best, low * (1 - 1e-9))
    return best


def _concave(weight: Floats, cost: Floats, count: Ints) -> tuple[Floats, Floats]:
    """The most weight for a cost, best ratio first: points (cost, weight) of a concave line."""
    ratio = np.divide(weight, cost, out=np.full(len(cost), np.inf), where=cost > 0)
    order = np.argsort(-ratio, kind="stable")
    axis = np.concatenate(([0.0], np.cumsum((cost * count)[order])))
    value = np.concatenate(([0.0], np.cumsum((weight * count)[order])))
    # What costs nothing is had at once.
    start = int(np.count_nonzero(cost[order] <= 0))
    return axis[start:], value[start:]


def pigeonhole_bound_s(work: Work, rates: Floats, *, above_s: float = 0.0, cuts: int = 20) -> float:
    """Whole layers only: what a node can do of the n layers of most FLOP, for several n.

    In time T a node does at most k of them, where the k smallest just fit, and at most the FLOP of the k largest;
    its memory limits k likewise. All nodes together must do all n and their FLOP. Only looked for above `above_s`.
    """
    order = np.argsort(-work.flop, kind="stable")
    flop = np.repeat(work.flop[order], work.count[order])
    flop = flop[flop > 0]
    if len(flop) == 0:
        return 0.0
    size = np.repeat(work.memory[order], work.count[order])[: len(flop)]
    largest = np.concatenate(([0.0], np.cumsum(flop)))
    room = np.maximum(work.room_bytes, 0)
    most_flop = np.minimum(work.room_flop, np.inf)
    best = above_s
    chosen = np.unique(np.round(np.geomspace(1, len(flop), cuts)).astype(np.int64))
    chosen = np.unique(np.append(chosen, np.linspace(1, len(flop), cuts).astype(np.int64)))
    for needed in chosen.tolist():
        smallest = np.concatenate(([0.0], np.cumsum(flop[:needed][::-1])))
        lightest = np.concatenate(([0], np.cumsum(np.sort(size[:needed]))))
        by_memory = np.searchsorted(lightest, room, side="right") - 1
        total = float(largest[needed])

        def possible(
            at_s: float,
            needed: int = needed,
            smallest: Floats = smallest,
            by_memory: Ints = by_memory,
            total: float = total,
        ) -> bool:
            # A little generous, so that rounding never makes the bound too large.
            able = np.minimum(np.maximum(at_s - work.base_s, 0.0) * rates * (1 + 1e-9), most_flop)
            whole = np.minimum(np.searchsorted(smallest, able, side="right") - 1, by_memory)
            done = np.minimum(able, largest[whole])
            return bool(whole.sum() >= needed and done.sum() >= total * (1 - 1e-9))

        if best > 0 and possible(best * (1 + 1e-6)):
            continue
        if not possible(1e250):
            return best  # memory is too small for whole layers; other checks say so
        low, high = best, max(best, 1e-300)
        for _ in range(2_200):
            high *= 1.2 if best > 0 else 2.0
            if possible(high):
                break
            low = high
        for _ in range(50):
            middle = (low + high) / 2
            if high <= low * (1 + 1e-9):
                break
            low, high = (low, middle) if possible(middle) else (middle, high)
        best = max(best, low * (1 - 1e-9))
    return best
