"""Replicas: several chains from one cluster, each of which holds the whole model, for the most passes a second.

A chain of many nodes wastes what whole layers waste on each of them, and the largest layer bounds it; several
chains of fewer and better matching nodes waste less. Each is an ordinary plan of the ordinary strategy on its
own nodes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from planner.cluster import Cluster
from planner.errors import Infeasible, InvalidInput
from planner.explain.reports import gib, seconds_text
from planner.plan import Plan, PlanOptions
from planner.problem.arrays import SLACK, Problem, build
from planner.problem.items import build_work
from planner.profile import ModelProfile
from planner.replicas.bounds import ReplicaBound, replica_bound
from planner.replicas.search import MOST_SETS, divide, sets_of
from planner.replicas.speeds import Paces
from planner.replicas.starts import Division
from planner.strategies.make import make_plan
from planner.strategies.solve import need_compute

#: Strategies that look for the best plan; the others are there to compare with.
STRATEGIES = ("greedy", "pipeline")
#: Divisions that are planned where speeds are estimates: the best by estimate may not be the best. Fewer, if one
#: loses no more than this part of what is possible.
_TRIED, _ENOUGH = 3, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Chains on disjoint nodes, each with the whole model, and what they make together."""

    #: One plan a chain, the fastest first; each knows only its own nodes.
    plans: tuple[Plan, ...]
    #: The plan of one chain on all nodes, for comparison.
    one_chain: Plan
    #: Passes a second of all chains together: the sum of 1 / bottleneck_s.
    throughput_per_s: float
    #: No division of these nodes makes more passes a second.
    upper_bound_per_s: float
    #: upper_bound_per_s / throughput_per_s - 1.
    gap: float
    #: Whether the bound was proven to be reached.
    exact: bool
    #: (node_id, why) of each node that is in no chain, by id.
    idle: tuple[tuple[str, str], ...] = ()

    @property
    def ratio(self) -> float:
        """Throughput over that of one chain."""
        return self.throughput_per_s * self.one_chain.predicted.bottleneck_s


def check_replicas(options: PlanOptions, replicas: int | Literal["auto"]) -> None:
    """Refuse what makes no sense with replicas.

    Raises:
        InvalidInput: If the number is none, or an option is of no meaning for several chains.
    """
    if replicas != "auto" and (isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1):
        raise InvalidInput(
            f"replicas must be auto or a whole number of at least 1, got {replicas!r}", details={"field": "replicas"}
        )
    if options.objective != "throughput":
        raise InvalidInput(
            f"replicas raise throughput; objective {options.objective} asks for one request's time, which the best "
            "chain alone decides: plan one chain for it",
            details={"field": "objective"},
        )
    if options.strategy not in STRATEGIES:
        raise InvalidInput(
            f"replicas are planned by {' or '.join(STRATEGIES)}; {options.strategy} is a rule to compare with",
            details={"field": "strategy", "known": list(STRATEGIES)},
        )
    if options.pins and replicas != 1:
        raise InvalidInput(
            f"pins name one node for a layer ({len(options.pins)} are given), and with replicas each chain holds "
            "every layer; leave them out, or plan one chain (replicas 1)",
            details={"field": "pins", "pins": len(options.pins)},
        )


def make_replicas(
    profile: ModelProfile,
    cluster: Cluster,
    options: PlanOptions = PlanOptions(),  # noqa: B008  (frozen)
    *,
    replicas: int | Literal["auto"] = "auto",
    generated_at: str | None = None,
) -> Replicas:
    """Divide the nodes into groups that each hold the whole model, for the most passes a second in all.

    Args:
        profile: The model at the batch size and sequence length to plan for.
        cluster: Nodes and links.
        options: As for `make_plan`. A time budget is kept by each chain; shares are of one chain's compute.
        replicas: How many chains, or "auto": as many as are best, and never worse than one chain.
        generated_at: Time stamp to put into the plans.

    Raises:
        InvalidInput: As `make_plan` and `check_replicas` raise it.
        Infeasible: If not even one chain exists, or not as many as are asked for; `details` has the numbers.
    """
    check_replicas(options, replicas)
    one = _one_chain(profile, cluster, options, generated_at)
    if replicas == 1:
        return _single(profile, cluster, options, one)
    problem = build(profile, cluster, options)
    need_compute(problem)
    paces = Paces(problem)
    work = build_work(problem)
    assert work is not None, "without pins there is always something to place"
    bound = replica_bound(problem, work, one.predicted.lower_bound_s)
    parts = None if replicas == "auto" else replicas
    if parts is not None and parts > bound.most_replicas:
        raise _too_many(problem, parts, bound, proven=True)
    divisions = divide(paces, bound.most_each, parts)
    most = bound.per_s(parts)

    @functools.cache
    def chain(ids: frozenset[str]) -> Plan | None:
        if ids == frozenset(problem.node_ids):
            return one
        return _chain(profile, cluster, options, ids=ids, generated_at=generated_at)

    found: list[tuple[Plan, ...]] = []
    for division in divisions[: 1 if paces.exact else _TRIED]:
        found.append(_planned(paces, division, chain))
        if _throughput(found[-1]) >= most * (1 - _ENOUGH):
            break
    if parts is not None:
        found = [chains for chains in found if len(chains) == parts]
        if not found:
            raise _too_many(problem, parts, bound, proven=paces.exact and sets_of(paces.kind) <= MOST_SETS)
    else:
        found.append((one,))
    best = max(found, key=_throughput)
    if paces.exact and sets_of(paces.kind) <= MOST_SETS:  # all divisions were looked at
        most = min(most, float(paces.rates(divisions[0]).sum()) if divisions else most)
    return _stated(problem, best, one, most)


def _one_chain(profile: ModelProfile, cluster: Cluster, options: PlanOptions, generated_at: str | None) -> Plan:
    """The fastest chain of all nodes: within a time budget a plan takes few nodes, so it is asked for without."""
    fastest = make_plan(profile, cluster, dataclasses.replace(options, time_budget_s=None), generated_at=generated_at)
    budget = options.time_budget_s
    if budget is not None and fastest.predicted.bottleneck_s > budget * (1 + SLACK):
        return make_plan(profile, cluster, options, generated_at=generated_at)  # which says why there is none
    return fastest


def _chain(
    profile: ModelProfile, cluster: Cluster, options: PlanOptions, *, ids: frozenset[str], generated_at: str | None
) -> Plan | None:
    """The fastest chain of these nodes alone, or None if there is none or it is over the time budget."""
    mine = dataclasses.replace(cluster, nodes=tuple(node for node in cluster.nodes if node.node_id in ids))
    asked = dataclasses.replace(
        options,
        time_budget_s=None,
        exclude=frozenset(),
        max_memory_share={node: share for node, share in options.max_memory_share.items() if node in ids},
        max_compute_share={node: share for node, share in options.max_compute_share.items() if node in ids},
    )
    try:
        plan = make_plan(profile, mine, asked, generated_at=generated_at)
    except Infeasible:
        return None
    budget = math.inf if options.time_budget_s is None else options.time_budget_s
    return plan if plan.predicted.bottleneck_s <= budget * (1 + 2 * SLACK) else None


def _planned(paces: Paces, division: Division, chain: Callable[[frozenset[str]], Plan | None]) -> tuple[Plan, ...]:
    """A plan for each group, the fastest first; a group that has none gives its nodes to the slowest other."""
    ids, groups = paces.problem.node_ids, list(division)
    while groups:
        plans = [chain(frozenset(ids[node] for node in group)) for group in groups]
        made = [plan for plan in plans if plan is not None]
        if len(made) == len(groups):
            return tuple(sorted(made, key=lambda plan: (plan.predicted.bottleneck_s, min(plan.allocation))))
        failed = groups.pop(plans.index(None))
        if groups:
            slowest = int(paces.rates(groups).argmin())
            groups[slowest] = tuple(sorted((*groups[slowest], *failed)))
    return ()


def _throughput(plans: Sequence[Plan]) -> float:
    return sum(1 / plan.predicted.bottleneck_s for plan in plans)


def _single(profile: ModelProfile, cluster: Cluster, options: PlanOptions, one: Plan) -> Replicas:
    return _stated(build(profile, cluster, options), (one,), one, 1 / one.predicted.lower_bound_s)


def _stated(problem: Problem, plans: tuple[Plan, ...], one: Plan, most: float) -> Replicas:
    total = _throughput(plans)
    most = max(most, total)
    used = {node_id for plan in plans for node_id in plan.allocation}
    least = int(problem.memory.min())
    idle = {
        node_id: f"{gib(room)} hold no layer" if room < least else "no chain would be faster with it"
        for node_id, room in zip(problem.node_ids, problem.capacity.tolist(), strict=True)
        if node_id not in used
    }
    idle |= {node_id: why for node_id, (_, why) in problem.left_out.items()}
    return Replicas(
        plans=plans,
        one_chain=one,
        throughput_per_s=total,
        upper_bound_per_s=most,
        gap=most / total - 1,
        exact=most <= total * (1 + 1e-7),
        idle=tuple(sorted(idle.items())),
    )


def _too_many(problem: Problem, parts: int, bound: ReplicaBound, *, proven: bool) -> Infeasible:
    """Why there are not so many replicas: bytes first, then what whole layers leave, then time."""
    needed, usable = int(problem.memory.sum()), int(problem.capacity.sum())
    missing, name, count = max(0, parts * needed - usable), problem.profile.model_name, len(problem.nodes)
    budget = problem.options.time_budget_s
    details = {
        "limit": "memory" if missing or budget is None else "compute",
        "replicas": parts,
        "most_replicas": bound.most_replicas,
        "nodes": count,
        "needed_bytes": parts * needed,
        "usable_bytes": usable,
        "missing_bytes": missing,
        "time_budget_s": budget,
        "proven": proven,
    }
    text = f"{parts} replicas of {name} need {gib(parts * needed)} ({gib(needed)} each, weights and KV cache)"
    text += f" and the {count} nodes have {gib(usable)}"
    if missing:
        text += f": {gib(missing)} are missing"
    elif proven and parts > bound.most_replicas:
        text += f", but in whole layers{_within(budget)} they hold {bound.most_replicas} at most"
    else:
        text += f", but {'there is' if proven else 'found was'} no way to divide them into {parts} groups that each "
        text += f"hold the model{_within(budget)}"
    return Infeasible(text + "; ask for fewer, or for auto", details=details)


def _within(budget_s: float | None) -> str:
    return "" if budget_s is None else f" within {seconds_text(budget_s)}"
