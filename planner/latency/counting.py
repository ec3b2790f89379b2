"""One request's time: every layer on some node and a hop from each node used to the next.

For runs of equal layers and links that are alike the counting programme of `planner.problem.counting` is minimised
over the sum instead of the bottleneck. Nodes are taken fastest first: of two that hold only a part of what they
could, moving a layer to the faster one is no slower, so only the slowest node used is ever partly full.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.problem.arrays import Floats, Ints
from planner.problem.counting import Counts, Hosting


def least_latency(
    counts: Counts, caps: Floats, *, hop_alone_s: Floats, hop_with_run_s: Floats
) -> tuple[Hosting, float] | None:
    """Host everything with the least sum of layer times and hops.

    Args:
        counts: The run and the groups of odd layers.
        caps: (N, U) most of the run each node may hold beside each group.
        hop_alone_s: (U,) the hop a node pays for a group without any of the run.
        hop_with_run_s: (U,) the same with some of the run.

    Returns:
        (hosting, seconds), or None if not everything has a place.
    """
    run, without = counts.run, counts.groups.without
    states, options = without.shape
    order = np.lexsort((np.arange(len(caps)), counts.main_s))
    # full: all nodes so far hold none of the run or as much as they can; done: the whole run is placed.
    full = np.full((states + 1, run + 1), np.inf)
    full[0, 0] = 0.0
    done = np.full(states + 1, np.inf)
    if run == 0:
        done[0] = 0.0
    took_full = np.full((len(order), states, run + 1), -1, dtype=np.int16)
    took_done = np.full((len(order), states, 2), -1, dtype=np.int64)
    for step, node in enumerate(order.tolist()):
        unit = float(counts.main_s[node])
        next_full, next_done = full.copy(), done.copy()
        for option in range(options):
            cap = caps[node, option]
            if cap < 0:
                continue
            cap = int(min(cap, run))
            least = int(counts.groups.run_least[option])
            group_s = float(counts.groups.seconds[node, option])
            source = without[:, option]
            rows = np.flatnonzero(source < states)
            before = full[source[rows]]
            alone_s = group_s + float(hop_alone_s[option])
            with_s = group_s + float(hop_with_run_s[option])
            if option and least == 0:  # none of the run
                _keep(next_full, took_full[step], rows, before + alone_s, shift=0, code=2 * option)
                self_done = done[source[rows]] + alone_s
                better = self_done < next_done[rows]
                next_done[rows[better]] = self_done[better]
                took_done[step, rows[better]] = (2 * option, -1)
            if cap >= max(least, 1):
                _keep(next_full, took_full[step], rows, before + with_s + cap * unit, shift=cap, code=2 * option + 1)
                amounts = np.arange(max(least, 1), cap + 1)
                ends = before[:, run - amounts] + (with_s + amounts * unit)[None, :]
                at = ends.argmin(axis=1)
                value = ends[np.arange(len(rows)), at]
                better = value < next_done[rows]
                next_done[rows[better]] = value[better]
                took_done[step, rows[better], 0] = 2 * option + 1
                took_done[step, rows[better], 1] = amounts[at[better]]
        full, done = next_full, next_done
    if not np.isfinite(done[states - 1]):
        return None
    return _unwind(counts, caps, order, took_full, took_done), float(done[states - 1])


def _keep(best: Floats, took: NDArray[np.int16], rows: Ints, before: Floats, *, shift: int, code: int) -> None:
    """Take what is better of `before`, moved up by `shift` of the run."""
    width = best.shape[1] - shift
    target = best[rows, shift:]
    better = before[:, :width] < target
    best[rows, shift:] = np.where(better, before[:, :width], target)
    took[rows, shift:] = np.where(better, code, took[rows, shift:])


def _unwind(counts: Counts, caps: Floats, order: Ints, took_full: NDArray[np.int16], took_done: Ints) -> Hosting:
    without = counts.groups.without
    state = np.zeros(len(caps), dtype=np.int64)
    main = np.zeros(len(caps), dtype=np.int64)
    now, left, finished = len(without) - 1, counts.run, True
    for step in range(len(order) - 1, -1, -1):
        node = int(order[step])
        if finished:
            code, amount = int(took_done[step, now, 0]), int(took_done[step, now, 1])
            if code < 0:
                continue
            option, holds = divmod(code, 2)
            state[node] = option
            now = int(without[now, option])
            if holds:
                main[node] = amount
                left -= amount
                finished = False
            continue
        code = int(took_full[step, now, left])
        if code < 0:
            continue
        option, holds = divmod(code, 2)
        state[node] = option
        now = int(without[now, option])
        if holds:
            main[node] = int(min(caps[node, option], counts.run))
            left -= int(main[node])
    return Hosting(state=state, main=main)
