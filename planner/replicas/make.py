"""Replicas: several chains from one cluster, each of which holds the whole model, for the most passes a second.

A chain of many nodes wastes what whole layers waste on each of them, and the largest layer bounds it; several
chains of fewer and better matching nodes waste less. Each is an ordinary plan of the ordinary strategy on its
own nodes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.cluster import Cluster
from planner.errors import Infeasible, InvalidInput
from planner.explain.reports import gib, seconds_text
from planner.plan import Plan, PlanOptions
from planner.problem.arrays import SLACK, Problem, build
from planner.problem.counting import is_exact
from planner.problem.items import Answer, build_work
from planner.profile import ModelProfile
from planner.replicas.bounds import ReplicaBound, replica_bound
from planner.replicas.divisions import Division, Group, best_division, classes, promising
from planner.strategies.make import accept, answer_for, make_plan
from planner.strategies.solve import attempt, greedy_once, need_compute, pipeline_once

#: Strategies that look for the best plan; the others are there to compare with.
STRATEGIES = ("greedy", "pipeline")
#: Sets of nodes up to which all are looked at, and divisions that are where there are more: if layers come in runs,
#: so that a chain takes a millisecond or so to find, and else.
_MOST_SETS, _MOST_SETS_ELSE = 256, 32
_TRIED, _TRIED_ELSE = 6, 3


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
    one = _fastest(profile, cluster, options, generated_at)
    problem = build(profile, cluster, options)
    if replicas == 1:
        return _stated(problem, (one,), one, 1 / one.predicted.lower_bound_s)
    need_compute(problem)
    bound = replica_bound(problem, build_work(problem), one.predicted.lower_bound_s)
    parts = None if replicas == "auto" else replicas
    if parts is not None and parts > bound.most_replicas:
        raise _too_many(problem, parts, bound, proven=True)
    chains, members, most = _Chains(problem), classes(problem), bound.per_s(parts)
    sets = math.prod(len(nodes) + 1 for nodes in members)
    ideal: Division | None = ()
    if sets <= (_MOST_SETS if chains.counted else _MOST_SETS_ELSE):
        best = best_division(members, chains.rate, parts)
        ideal = best_division(members, chains.most, parts)
        most = min(most, sum(map(chains.most, ideal or ())))
    else:
        tried = promising(problem, bound.most_each, parts)[: _TRIED if chains.counted else _TRIED_ELSE]
        joined = [division for division in map(chains.joined, tried) if parts in (None, len(division))]
        best = max(joined, key=chains.total, default=None)
    parted = [_part(problem, group) for group in best or ()]
    found = [accept(part, answer_for(part), generated_at=generated_at) for part in parted]
    plans = tuple(sorted(found, key=lambda plan: (plan.predicted.bottleneck_s, min(plan.allocation))))
    if parts is not None and not plans:
        raise _too_many(problem, parts, bound, proven=ideal is None)
    if parts is None and _throughput(plans) < _throughput((one,)):
        plans = (one,)
    return _stated(problem, plans, one, most)


class _Chains:
    """How fast the best chain of any group of nodes is, remembered."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._once = {"greedy": greedy_once, "pipeline": pipeline_once}[problem.options.strategy]
        self.counted = is_exact(build_work(problem))
        self._known: dict[Group, tuple[float, float]] = {}

    def rate(self, group: Group) -> float:
        """Passes a second; 0 where no chain is found that holds the model and keeps the time budget."""
        return self._rates(group)[0]

    def most(self, group: Group) -> float:
        """Passes a second that no chain of the group exceeds."""
        return self._rates(group)[1]

    def total(self, division: Division) -> float:
        """Passes a second of all groups together."""
        return sum(map(self.rate, division))

    def joined(self, division: Division) -> Division:
        """The same without groups that have no chain: their nodes go to the slowest group that has one."""
        able = [group for group in division if self.rate(group) > 0]
        if able and len(able) < len(division):
            slowest = min(able, key=lambda group: (self.rate(group), group))
            spare = [node for group in division if group not in able for node in group]
            able[able.index(slowest)] = tuple(sorted((*slowest, *spare)))
        return tuple(able)

    def _rates(self, group: Group) -> tuple[float, float]:
        if group not in self._known:
            inner = _part(self._problem, group)
            answer = attempt(inner, self._once)
            # Without a chain there is either provably none, or nobody knows how fast one would be.
            rate, most = 0.0, 0.0 if answer is True else math.inf
            if isinstance(answer, Answer):
                rate, most = 1 / inner.bottleneck_s(answer.nodes), 1 / answer.lower_bound_s
            least = (1 - 2 * SLACK) / (self._problem.options.time_budget_s or math.inf)
            self._known[group] = (rate if rate >= least else 0.0, most if most >= least else 0.0)
        return self._known[group]


def _part(problem: Problem, group: Group) -> Problem:
    """The same layers on these nodes alone, without a time budget."""
    rows, nodes, asked = np.array(group), tuple(problem.nodes[node] for node in group), problem.options
    ids = {node.node_id for node in nodes}
    return dataclasses.replace(
        problem,
        cluster=dataclasses.replace(problem.cluster, nodes=nodes),
        options=dataclasses.replace(
            asked,
            time_budget_s=None,
            exclude=frozenset(),
            max_memory_share={node: share for node, share in asked.max_memory_share.items() if node in ids},
            max_compute_share={node: share for node, share in asked.max_compute_share.items() if node in ids},
        ),
        nodes=nodes,
        left_out={},
        seconds=problem.seconds[rows],
        capacity=problem.capacity[rows],
        flop_cap=problem.flop_cap[rows],
        rate=problem.rate[rows],
        index_of={node.node_id: at for at, node in enumerate(nodes)},
    )


def _fastest(profile: ModelProfile, cluster: Cluster, options: PlanOptions, generated_at: str | None) -> Plan:
    """The fastest chain of all nodes: within a time budget a plan takes few nodes, so it is asked for without."""
    fastest = make_plan(profile, cluster, dataclasses.replace(options, time_budget_s=None), generated_at=generated_at)
    budget = options.time_budget_s
    if budget is not None and fastest.predicted.bottleneck_s > budget * (1 + SLACK):
        return make_plan(profile, cluster, options, generated_at=generated_at)  # which says why there is none
    return fastest


def _throughput(plans: tuple[Plan, ...]) -> float:
    return sum(1 / plan.predicted.bottleneck_s for plan in plans)


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
    within = "" if budget is None else f" within {seconds_text(budget)}"
    text = f"{parts} replicas of {name} need {gib(parts * needed)} ({gib(needed)} each, weights and KV cache)"
    text += f" and the {count} nodes have {gib(usable)}"
    if missing:
        text += f": {gib(missing)} are missing"
    elif proven and parts > bound.most_replicas:
        text += f", but in whole layers{within} they hold {bound.most_replicas} at most"
    else:
        text += f", but {'there is' if proven else 'found was'} no way to divide them into {parts} groups that each "
        text += f"hold the model{within}"
    return Infeasible(text + "; ask for fewer, or for auto", details=details)
