"""Plans within a tolerance that move less: layers given back to who holds them, and moves that cost time.

For one request every byte that moves is charged some seconds, as if its node were slower: the best plan at that price
is a plan that moves little, and its bound proves how little any plan can move (Lagrange).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from planner.latency.detours import fastest
from planner.latency.node_orders import hop_seconds
from planner.latency.solver import least_layers_s
from planner.problem.arrays import SLACK, Ints
from planner.replan.moved_bytes import Moving
from planner.strategies.solve import pipeline_once

#: Prices tried; nodes times layers up to which they are; layers of all changes looked at in a round; rounds.
_PRICES, _MOST_CELLS, _MOST_CHANGES, _ROUNDS = 8, 1_200, 400_000, 40
#: Ends of runs that are looked at.
_MOST_POINTS = 400
#: Layers up to which runs of any length are given back; beyond that, only such as end where stages do.
_SHORT = 24


def priced(moving: Moving, known: Sequence[Ints], within_s: float) -> tuple[list[Ints], float]:
    """Plans for one request that move little, and bytes that any plan within `within_s` moves.

    Args:
        moving: Who holds what now.
        known: (L,) nodes of plans; the first is within `within_s`.
        within_s: Seconds that one request may take.
    """
    problem, lost = moving.problem, moving.least().astype(np.float64)
    if lost.size > _MOST_CELLS or not lost.any():
        return [], 0.0
    layers = np.arange(lost.shape[1])
    options = dataclasses.replace(problem.options, time_budget_s=None)
    apart = dataclasses.replace(problem, kind=layers, options=options)
    seconds = problem.seconds[:, problem.kind]

    def point(nodes: Ints) -> tuple[float, float]:
        return problem.latency_s(nodes), float(lost[nodes, layers].sum())

    found: list[Ints] = []
    bound = 0.0
    good, bad = point(known[0]), None
    price = 2 * float(seconds.max(axis=0).sum()) / float(lost[lost > 0].min())
    for _ in range(_PRICES):
        charged = dataclasses.replace(apart, seconds=seconds + price * lost)
        if options.strategy == "pipeline":
            nodes, least_s = pipeline_once(charged)
        else:
            nodes, least_s = fastest(charged, [*known, *found], least_layers_s(charged))
        if nodes is None:
            break
        bound = max(bound, (least_s * (1 - SLACK) - within_s) / price)
        found.append(nodes)
        now = point(nodes)
        if bad is not None and now[0] + price * now[1] >= (good[0] + price * good[1]) * (1 - SLACK):
            break
        if now[0] <= within_s:
            good = now
        else:
            bad = now
        if bad is None or good[1] <= bad[1] or good[0] >= bad[0]:
            break
        price = (bad[0] - good[0]) / (good[1] - bad[1])
    return found, bound


def give_back(moving: Moving, nodes: Ints, within_s: float) -> Ints:
    """`nodes` (L,) with as many bytes back where they are held as the objective's limit allows, run after run.

    For pipelines stages stay contiguous. The time budget is kept as well.
    """
    problem, weights = moving.problem, moving.anywhere().astype(np.float64)
    lost = moving.least().astype(np.float64)
    layers = np.arange(len(nodes))
    latency = problem.options.objective == "latency"
    hops = hop_seconds(problem, list(range(len(problem.nodes)))) if latency else None
    budget = problem.options.time_budget_s
    longest = (math.inf if budget is None else budget) if latency or budget is not None else within_s
    best = nodes
    if not weights.any():
        return best
    for _ in range(_ROUNDS):
        tried = _runs(moving.held, best)
        if problem.options.strategy == "pipeline" and len(tried):
            stages = 1 + np.count_nonzero(np.diff(tried, axis=1), axis=1)
            tried = tried[stages == 1 + np.count_nonzero(np.diff(np.sort(tried, axis=1), axis=1), axis=1)]
        saved = float(lost[best, layers].sum()) - lost[tried, layers].sum(axis=1)
        tried, saved = tried[saved > 0.5], saved[saved > 0.5]
        if math.isfinite(longest) and len(tried):
            place = tried + len(problem.nodes) * np.arange(len(tried))[:, None]
            loads = np.bincount(
                place.ravel(),
                weights=problem.seconds[tried, problem.kind].ravel(),
                minlength=len(tried) * len(problem.nodes),
            )
            slowest = loads.reshape(len(tried), -1).max(axis=1)
            keeps = slowest <= longest * (1 + SLACK)
            tried, saved = tried[keeps], saved[keeps]
        seconds = np.zeros(len(tried))
        if hops is not None:
            delay, per_byte = hops
            seconds = problem.seconds[tried, problem.kind].sum(axis=1)
            left, right = tried[:, :-1], tried[:, 1:]
            seconds += (delay[left, right] + per_byte[left, right] * problem.payload[:-1]).sum(axis=1)
            keeps = seconds <= within_s * (1 + SLACK)
            tried, saved, seconds = tried[keeps], saved[keeps], seconds[keeps]
        order = np.lexsort((seconds, -saved)).tolist()
        at = next((at for at in order[:200] if problem.fits(tried[at])), None)
        if at is None:
            break
        best = tried[at]
    return best


def _runs(held: Ints, nodes: Ints) -> Ints:
    """(C, L) `nodes` with a run of layers given to a node that holds some of them now and is not to have them."""
    length = len(nodes)
    points = np.arange(length + 1)
    if length > _SHORT:
        edges = np.flatnonzero((np.diff(held) != 0) | (np.diff(nodes) != 0)) + 1
        points = np.unique(np.concatenate(([0, length], edges - 1, edges, edges + 1)))[:_MOST_POINTS]
    wanted = (nodes != held) & (held >= 0)
    spans = [(start, end) for start in points.tolist() for end in points[points > start].tolist()]
    found: list[Ints] = []
    for start, end in [*((at, at + 1) for at in np.flatnonzero(wanted).tolist()), *spans]:
        if (len(found) + 1) * length > _MOST_CHANGES:
            break
        for node in np.unique(held[start:end][wanted[start:end]]).tolist():
            changed = nodes.copy()
            changed[start:end] = node
            found.append(changed)
    return np.array(found, dtype=np.int64).reshape(-1, length)
