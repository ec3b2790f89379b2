"""The plan with the least time for one request, and a bound on it, from the programmes that apply."""

from __future__ import annotations

import math

import numpy as np

from planner.cluster import Link
from planner.latency.counting import least_latency
from planner.latency.node_orders import EXACT_NODES, MOST_LAYERS, Chains, improve
from planner.pipeline.solver import RunEnds, in_order, solve_pipeline, stage_nodes
from planner.problem.arrays import Ints, Problem
from planner.problem.counting import Counts, assign_any_order, in_any_order, is_exact, states_of
from planner.problem.items import Found, Work, build_work

#: States of the programme over any layer anywhere, which looks at one group of odd layers at a time.
_MOST_STATES = 256


def best_link(problem: Problem) -> Link:
    """A link as good as the best between any two usable nodes in every respect."""
    uniform = problem.uniform_link
    if uniform is not None:
        return uniform
    ids = set(problem.index_of)
    links = [problem.cluster.default_link] + [
        link for (a, b), link in problem.cluster.links.items() if a in ids and b in ids and a != b
    ]
    rates = [link.bytes_per_s for link in links]
    known = [rate for rate in rates if rate is not None]
    return Link(
        latency_s=min(link.latency_s for link in links),
        bytes_per_s=None if None in rates else max(known),
    )


def _lowest_hop_s(problem: Problem) -> float:
    inner = problem.payload[:-1]
    return best_link(problem).transfer_s(float(inner.min())) if len(inner) else 0.0


def any_order_latency(problem: Problem, work: Work, budget_s: float) -> Found:
    """Any layer anywhere: the nodes of the least sum of layer times and one hop for each node but one."""
    if len(work.kind) == 0 or not is_exact(work) or states_of(work)[0] > _MOST_STATES or work.count.max() > 4_000:
        return None, least_layers_s(problem)
    counts = in_any_order(work)
    hop = np.full(len(counts.groups.memory), _lowest_hop_s(problem))
    caps = counts.caps(budget_s)
    if (caps[:, 0] < 0).any():
        return None, math.inf
    found = least_latency(counts, caps, hop_alone_s=hop, hop_with_run_s=hop)
    if found is None:
        return None, math.inf
    hosting, seconds = found
    used = int(np.count_nonzero(hosting.state | hosting.main))
    pinned = _pinned_s(problem, work)
    # Nodes that hold pinned layers may be used without paying: then the hops counted are still a bound from below.
    bound = seconds - (hop[0] if used else 0.0) + pinned
    return work.layers(assign_any_order(counts, hosting)), max(0.0, bound * (1 - 1e-12))


def _pinned_s(problem: Problem, work: Work) -> float:
    pinned = np.flatnonzero(work.fixed >= 0)
    return float(problem.seconds[work.fixed[pinned], problem.kind[pinned]].sum())


def least_layers_s(problem: Problem) -> float:
    """Every layer on the node fastest at it."""
    fits = problem.capacity[:, None] >= problem.memory[None, :]
    seconds = np.where(fits, problem.seconds[:, problem.kind], np.inf).min(axis=0)
    return float(np.where(np.isfinite(seconds), seconds, 0.0).sum())


def in_order_latency(problem: Problem, budget_s: float) -> Found:
    """Contiguous stages: exact for a run with links that are alike or few nodes, else the best found."""
    run = in_order(problem, build_work(problem))
    bound = 0.0
    nodes: Ints | None = None
    if run is not None and run[0].run <= 4_000 and not problem.weightless.any():
        nodes, bound = _run_latency(problem, *run, budget_s)
        if math.isinf(bound) or problem.uniform_link is not None:
            return nodes, bound
    if len(problem.kind) > MOST_LAYERS:
        return _fallback(problem, nodes, budget_s), max(bound, least_layers_s(problem))
    chains = Chains(problem, budget_s)
    if chains.complete and len(chains.chosen) <= EXACT_NODES:
        found = chains.exact()
        return (None, math.inf) if found is None else (found[0], found[1] * (1 - 1e-12))
    if chains.complete:
        relaxed = chains.search(reuse=True)
        if relaxed is None:
            return None, math.inf
        bound = max(bound, relaxed[1] * (1 - 1e-12))
    best = None if nodes is None else (nodes, problem.latency_s(nodes))
    found = chains.search(reuse=False)
    if found is not None and (best is None or found[1] < best[1]):
        best = found
    if best is None:
        fallback = _fallback(problem, None, budget_s)
        if fallback is None:
            return None, bound
        best = (fallback, problem.latency_s(fallback))
    size = len(problem.kind) ** 2 * len(np.unique(best[0]))
    best = improve(chains, *best, tries=max(20, min(600, 40_000_000 // max(size, 1))))
    return best[0], max(bound, least_layers_s(problem))


def _fallback(problem: Problem, nodes: Ints | None, budget_s: float) -> Ints | None:
    if nodes is not None:
        return nodes
    return solve_pipeline(problem, budget_s=None if math.isinf(budget_s) else budget_s)[0]


def _run_latency(problem: Problem, counts: Counts, ends: RunEnds, budget_s: float) -> Found:
    """The programme for [odd layers][run][odd layers]; with the best link for all it bounds unequal links too."""
    link = best_link(problem)
    layers, total = counts.work.layer, len(counts.work.layer)

    def hop(end: int) -> float:
        return link.transfer_s(float(problem.payload[layers[end - 1]])) if 0 < end < total else 0.0

    inside = [hop(end) for end in range(ends.run_start + 1, ends.run_end)]
    inner = min(inside) if inside else 0.0
    closing = 0.0 if ends.run_end == total else hop(ends.run_end)
    alone = np.array([hop(b) for _, b in ends.groups])
    with_run = np.array([hop(b) if b > ends.run_end else inner for _, b in ends.groups])
    # Whoever ends the run hands on what the run hands on inside, but for the last of all layers.
    for at, (a, b) in enumerate(ends.groups):
        if a >= ends.run_end or (at and b < ends.run_start):
            with_run[at] = alone[at] = hop(b)
    if ends.run_end == total:
        fix = -inner
    elif not inside:
        with_run = np.where([b <= ends.run_start for _, b in ends.groups], closing, with_run)
        fix = 0.0
    else:
        # The stage that ends the run without a group after it hands on `closing`, the others `inner`.
        fix = min(0.0, closing - inner)
    plain = bool(
        np.allclose(alone[[at for at, (_, b) in enumerate(ends.groups) if at and b == ends.run_start]], inner)
    )
    caps = counts.caps(budget_s)
    if (caps[:, 0] < 0).any():
        return None, math.inf
    found = least_latency(counts, caps, hop_alone_s=alone, hop_with_run_s=with_run)
    if found is None:
        return None, math.inf
    nodes = counts.work.layers(stage_nodes(counts, ends, found[0]))
    bound = found[1] + fix
    if not plain:
        least = np.minimum(alone, with_run)
        lower = least_latency(counts, caps, hop_alone_s=least, hop_with_run_s=least)
        assert lower is not None
        bound = min(bound, lower[1] + fix)
    return nodes, max(0.0, min(bound * (1 - 1e-12), problem.latency_s(nodes)))
