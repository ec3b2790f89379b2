"""Lower bounds on the bottleneck: no allocation whatever is faster. Each is valid for contiguous stages as well."""

from __future__ import annotations

import numpy as np

from planner.problem.arrays import Floats, Ints
from planner.problem.items import Work

#: Kinds of layers beyond which fewer price lists are tried.
_MANY = 2_000


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
    return priced_bound_s(work, rates, above_s=simple)


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
    # Layers without bytes come first, whatever their FLOP: they take none of the room.
    density = np.divide(work.flop, work.memory, out=np.full(len(work.flop), np.inf), where=work.memory > 0)
    dense = np.lexsort((work.memory, -density))
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


def priced_bound_s(work: Work, rates: Floats, *, above_s: float = 0.0) -> float:
    """The best of several price lists, each of which says what one kind of scarcity costs.

    Layers of much FLOP or many bytes, counted or weighed: whole layers waste a part of a node. The smaller of FLOP
    and bytes at some rate of exchange: fast nodes full, roomy nodes busy; for layers that may be divided and rates
    that do not depend on the layer no other prices tell more.
    """
    priced = Priced(work, rates)
    # Among very many layers neighbours in rank hardly differ.
    cuts = 24 if len(work.count) <= _MANY else 6
    flop, size = work.flop, work.memory.astype(np.float64)
    best = above_s
    for cost in (flop, size):
        for least in _thresholds(cost, cuts):
            best = priced.bound_s((cost >= least).astype(np.float64), best)
            best = priced.bound_s(np.where(cost >= least, flop, 0.0), best)
    for grain in _thresholds(flop, cuts):
        for part in (1.0, 2.0, 3.0):
            best = priced.bound_s(np.floor(flop * part / grain * (1 + 1e-9)), best, grain=grain / part)
    if not size.any() or not flop.any():
        return best
    with np.errstate(divide="ignore", invalid="ignore"):
        exchange = size / flop
    for rate in np.quantile(exchange[np.isfinite(exchange)], np.linspace(0, 1, cuts)).tolist():
        best = priced.bound_s(np.minimum(flop * rate, size), best)
    best = priced.bound_s(size, best)
    for least in _thresholds(flop, cuts // 3):
        for lightest in _thresholds(size, cuts // 3):
            best = priced.bound_s(((flop >= least) & (size >= lightest)).astype(np.float64), best)
    return best


def _thresholds(cost: Floats, cuts: int) -> list[float]:
    """Costs at which to divide the layers: by rank, finer among the costliest, and at the widest steps."""
    values = np.unique(cost[cost > 0])[::-1]
    if len(values) <= 2 * cuts:
        return [float(value) for value in values]
    ranks = np.concatenate((np.geomspace(1, len(values), cuts // 2), np.linspace(1, len(values), cuts // 2)))
    steps = np.argsort(values[1:] / values[:-1], kind="stable")[: cuts // 4]
    chosen = np.unique(np.concatenate((np.round(ranks).astype(np.int64) - 1, steps)))
    return [float(values[at]) for at in chosen.tolist()]


class Priced:
    """How much of a price per layer all nodes can take in a time: too little for all layers means too little time.

    That holds for any prices (linear programming's duality). Of a price a node takes in time T no more than the best
    mix of layers, parts of layers allowed, that fits its time, nor that fits its memory; no more than all layers that
    fit it at all; and no more than the k dearest, where k layers are the most that fit.
    """

    def __init__(self, work: Work, rates: Floats) -> None:
        self.rates, self.base_s = rates, work.base_s
        self.flop, self.size, self.count = work.flop, work.memory.astype(np.float64), work.count
        self.room = np.maximum(work.room_bytes, 0).astype(np.float64)
        self.most_flop = work.room_flop

    def bound_s(self, price: Floats, above_s: float, *, grain: float = 0.0) -> float:
        """The smallest time in which all of `price` (K,) finds a node, or `above_s` if that is larger.

        With a grain the price is how many whole grains of FLOP a layer has, and a node takes whole grains only.
        """
        paid = price > 0
        flop, size, count, price = self.flop[paid], self.size[paid], self.count[paid], price[paid]
        idle = flop <= 0
        total = float(price @ count)
        free = float(price[idle] @ count[idle])  # takes no time at all: anyone's
        if total - free <= total * 1e-9:
            return above_s
        flop, size, count, price = flop[~idle], size[~idle], count[~idle], price[~idle]
        by_memory = np.minimum(
            np.interp(self.room, *concave(price, size, count)), within(size, price, count, self.room)
        )
        smallest = np.argsort(flop, kind="stable")
        axis = np.concatenate(([0.0], np.cumsum(np.repeat(flop[smallest], count[smallest]))))
        lightest = np.sort(np.repeat(size, count))
        most = np.searchsorted(np.cumsum(lightest), self.room, side="right")
        dearest = np.concatenate(([0.0], np.cumsum(np.sort(np.repeat(price, count))[::-1])))
        by_time = concave(price, flop, count)

        def possible(at_s: float) -> bool:
            # A little generous, so that rounding never makes the bound too large.
            able = np.minimum(np.maximum(at_s - self.base_s, 0.0) * self.rates * (1 + 1e-9), self.most_flop)
            whole = np.minimum(np.searchsorted(axis, able, side="right") - 1, most)
            taken = np.minimum(np.minimum(by_memory, np.interp(able, *by_time)), dearest[whole])
            taken = np.minimum(taken, within(flop, price, count, able))
            if grain:
                taken = np.minimum(taken, np.floor(able / grain))
            return bool(taken.sum() >= (total - free) * (1 - 1e-9))

        if above_s > 0 and possible(above_s * (1 + 1e-6)):
            return above_s
        if not possible(1e250):
            return above_s  # memory is too small for whole layers; other checks say so
        low, high = above_s, max(above_s, 1e-300)
        for _ in range(2_200):
            high *= 1.1 if above_s > 0 else 2.0
            if possible(high):
                break
            low = high
        for _ in range(50):
            middle = (low + high) / 2
            if high <= low * (1 + 1e-7):
                break
            low, high = (low, middle) if possible(middle) else (middle, high)
        return max(above_s, low * (1 - 1e-9))


def within(cost: Floats, price: Floats, count: Ints, room: Floats) -> Floats:
    """(N,) price of all layers whose own cost is within the room."""
    order = np.argsort(cost, kind="stable")
    value = np.concatenate(([0.0], np.cumsum((price * count)[order])))
    return value[np.searchsorted(cost[order], room, side="right")]


def concave(weight: Floats, cost: Floats, count: Ints) -> tuple[Floats, Floats]:
    """The most weight for a cost, best ratio first: points (cost, weight) of a concave line."""
    ratio = np.divide(weight, cost, out=np.full(len(cost), np.inf), where=cost > 0)
    order = np.argsort(-ratio, kind="stable")
    axis = np.concatenate(([0.0], np.cumsum((cost * count)[order])))
    value = np.concatenate(([0.0], np.cumsum((weight * count)[order])))
    # What costs nothing is had at once.
    start = int(np.count_nonzero(cost[order] <= 0))
    return axis[start:], value[start:]
