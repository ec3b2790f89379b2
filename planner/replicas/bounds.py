"""Upper bounds on the passes a second of several chains: no division of the nodes makes more.

A group with the bottleneck T makes 1/T passes a second, and each of its nodes holds a part of the model. For
prices of the layers that sum to 1 the parts in a group are worth 1 together, so its nodes add 1/T = (sum of
their parts' prices) ÷ T. In T seconds a node computes layers worth T × max(price ÷ seconds) at most, and its
memory holds only so much; and no group is faster than the fastest chain that all nodes form. So each node adds
a bounded amount whatever its group, and every division is below the sum of these amounts, for any prices: the
best of many are taken.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from planner.problem.arrays import Floats, Problem
from planner.problem.bounds import concave, within
from planner.problem.items import Work

#: Steps by which prices are adapted to what nodes do best, from each start.
_STEPS = 40
#: Bounds are loosened by this, so that rounding never makes them too small.
_LOOSE = 1e-9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplicaBound:
    """What no division into replicas exceeds."""

    #: (N,) passes a second that each node adds at most.
    most_each: Floats
    #: The most replicas whose layers the nodes' memory holds.
    most_replicas: int
    #: The most passes a second of one replica.
    fastest_per_s: float

    def per_s(self, parts: int | None = None) -> float:
        """The most passes a second of `parts` replicas together; None: of any number."""
        count = self.most_replicas if parts is None else min(parts, self.most_replicas)
        return min(float(self.most_each.sum()), count * self.fastest_per_s)


def replica_bound(problem: Problem, work: Work, least_s: float) -> ReplicaBound:
    """The bound for a problem without pins.

    Args:
        problem: Nodes and the time budget.
        work: Its layers, shared weights as if their copy were free.
        least_s: A lower bound on the bottleneck of one chain of all nodes.
    """
    prices = _prices(work)
    budget = problem.options.time_budget_s
    best, most = None, math.inf
    for price in prices:
        rate, held = _most_priced(work, price)
        each = np.minimum(rate, held / least_s) if least_s > 0 else rate
        if best is None or each.sum() < best.sum():
            best = each
        most = min(most, float((held if budget is None else np.minimum(held, rate * budget * (1 + _LOOSE))).sum()))
    assert best is not None
    for kind in range(len(work.count)):
        most = min(most, float((work.room_bytes >= work.memory[kind]).sum()))
    return ReplicaBound(
        most_each=best * (1 + _LOOSE),
        most_replicas=int(most * (1 + _LOOSE) + _LOOSE),
        fastest_per_s=(1 + _LOOSE) / least_s if least_s > 0 else math.inf,
    )


def _prices(work: Work) -> list[Floats]:
    """(K,) price of a layer of each kind, all layers of the model 1 together: by compute, by bytes, and between."""
    flop = _shares(work, work.flop)
    starts = [flop, _shares(work, work.seconds.mean(axis=0))]
    if work.memory.any():
        size = _shares(work, work.memory.astype(np.float64))
        starts += [flop * (1 - part) + size * part for part in (0.1, 0.25, 0.5, 0.75, 1.0)]
    for kind in np.argsort(-work.count, kind="stable")[:2].tolist():
        alone = np.zeros(len(work.count))
        alone[kind] = 1.0
        starts.append(_shares(work, alone))
    return starts[:2] + [p for start in starts[:2] for p in _adapted(work, start)] + starts[2:]


def _shares(work: Work, cost: Floats) -> Floats:
    total = float(cost @ work.count)
    return cost / total if total > 0 else np.full(len(cost), 1.0 / float(work.count.sum()))


def _adapted(work: Work, price: Floats) -> list[Floats]:
    """Layers that many nodes do best get cheaper, those that few do dearer: towards the prices of the best bound."""
    rows = np.arange(len(work.seconds))
    with np.errstate(divide="ignore"):
        pace = np.where(work.seconds > 0, 1 / work.seconds, 0.0)
    found: list[tuple[float, int, Floats]] = []
    for step in range(_STEPS):
        value = price[None, :] * pace
        favourite = value.argmax(axis=1)
        total = float(value[rows, favourite].sum())
        found.append((total, step, price))
        made = np.bincount(favourite, weights=pace[rows, favourite], minlength=len(price)) / work.count
        if total <= 0:
            break
        price = _shares(work, price * np.exp(-0.5 / (1 + step / 4) * (made / total - 1).clip(-1, 3)))
    return [price for _, _, price in sorted(found, key=lambda entry: entry[:2])[:2]]


def _most_priced(work: Work, price: Floats) -> tuple[Floats, Floats]:
    """(N,) the most price a node computes in a second; the most that its memory and share hold of one model."""
    with np.errstate(divide="ignore", invalid="ignore"):
        pace = np.where(price > 0, price / work.seconds, 0.0)
    rate: Floats = pace.max(axis=1)
    room, size = np.maximum(work.room_bytes, 0).astype(np.float64), work.memory.astype(np.float64)
    held = np.minimum(np.interp(room, *concave(price, size, work.count)), within(size, price, work.count, room))
    light = np.argsort(size, kind="stable")
    most = np.searchsorted(np.cumsum(np.repeat(size[light], work.count[light])), room, side="right")
    dearest = np.concatenate(([0.0], np.cumsum(np.sort(np.repeat(price, work.count))[::-1])))
    held = np.minimum(held, dearest[most])
    if np.isfinite(work.room_flop).any():
        held = np.minimum(held, np.interp(work.room_flop, *concave(price, work.flop, work.count)))
    return rate, np.minimum(held, 1.0)
