"""A new plan for a changed cluster that moves as little as it can.

What is within `tolerance` of the best plan is good enough; among such plans the one is taken that leaves most bytes
where they are.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from planner.cluster import Cluster
from planner.errors import InvalidInput
from planner.explain.reports import gib
from planner.greedy.hops import fewest_hops
from planner.plan import Plan, PlanOptions
from planner.problem.arrays import SLACK, Ints, Problem, build
from planner.problem.items import Answer, Ties, build_work
from planner.problem.ties import ways_to_tie
from planner.profile import ModelProfile
from planner.replan.give_back import give_back, priced
from planner.replan.keep_layers import exchange_equal, keep_counts, keep_items
from planner.replan.keep_stages import keep_stages
from planner.replan.moved_bytes import Moving
from planner.strategies.make import accept, answer_for

#: Plans within the tolerance that layers are given back in, those first that move least; nodes times layers up to
#: which they are.
_GIVEN_BACK, _MOST_CELLS = 6, 40_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One layer that a node has to fetch."""

    layer_name: str
    #: node_id that held it; None where that node is gone, so that it comes from the checkpoint.
    source: str | None
    target: str
    #: What the target fetches: without tied weights that it has already, or that another move brings it.
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """The new plan and its difference to the old one."""

    plan: Plan
    #: In execution order.
    moves: tuple[Move, ...]
    moved_bytes: int
    #: No plan within the tolerance moves fewer bytes than this.
    must_move_bytes: int
    #: Seconds of the objective: of the plan that was taken, and of the best there is without regard to moves.
    objective_s: float
    best_objective_s: float
    #: One sentence with the numbers.
    reason: str


def replan(
    plan: Plan,
    profile: ModelProfile,
    cluster: Cluster,
    options: PlanOptions | None = None,
    *,
    tolerance: float = 0.05,
    generated_at: str | None = None,
) -> Replan:
    """Plan again after a node left, joined or turned out slower, moving the fewest bytes.

    Args:
        plan: What the nodes hold now.
        profile: The same model at the batch size and sequence length to plan for.
        cluster: The nodes there are now.
        options: What is asked; None: the plan's own strategy, objective and phase.
        tolerance: How much larger than the best objective the new plan's may be, as a fraction.
        generated_at: As for `make_plan`.

    Raises:
        InvalidInput: If the plan is not of this model.
        Infeasible: If no plan exists any more.
    """
    if not math.isfinite(tolerance) or tolerance < 0:
        raise InvalidInput(f"tolerance must be a finite number of at least 0, got {tolerance}")
    if options is None:
        options = PlanOptions(
            strategy=plan.strategy,
            objective=plan.objective,
            phase=plan.phase,
            allow_missing=bool(plan.missing_tensors),
        )
    problem = build(profile, cluster, options)
    moving = Moving(problem=problem, held=_holders(plan, problem))
    old = np.where((problem.pinned >= 0) & (problem.pinned != moving.held), -1, moving.held)
    best = answer_for(problem)
    latency = options.objective == "latency"

    def value(nodes: Ints) -> float:
        return problem.latency_s(nodes) if latency else problem.bottleneck_s(nodes)

    least = value(best.nodes)
    allowed = least * (1 + tolerance)
    budget = options.time_budget_s
    within = budget if budget is not None else (math.inf if latency else allowed)
    staying, known = _candidates(moving, old, within, best.nodes)
    candidates = [best.nodes, *staying]
    if options.strategy != "pipeline":
        candidates.append(exchange_equal(problem, best.nodes, old))
    must = max(_must_move(moving, old, within), known)
    fitting: list[tuple[int, float, int, Ints]] = []

    def consider(nodes: Ints) -> None:
        if (nodes < 0).any() or not problem.fits(nodes):
            return
        seconds = value(nodes)
        if budget is not None and problem.bottleneck_s(nodes) > budget * (1 + SLACK):
            return
        if seconds <= allowed * (1 + 2 * SLACK) or (budget is not None and not latency):
            fitting.append((int(moving.fetched(nodes).sum()), seconds, len(fitting), nodes))

    def improve() -> tuple[int, float, int, Ints]:
        for moved, _, _, nodes in sorted(fitting, key=lambda entry: entry[:3])[:_GIVEN_BACK]:
            if moved <= must:
                break
            if len(problem.nodes) * len(nodes) <= _MOST_CELLS:
                consider(give_back(moving, nodes, allowed if latency else within))
        return min(fitting, key=lambda entry: entry[:3])

    for nodes in candidates:
        consider(nodes)
    moved, seconds, _, nodes = improve()
    if latency and moved > must:
        cheaper, at_least = priced(moving, [best.nodes, *(entry[3] for entry in fitting)], allowed)
        must = max(must, math.ceil(at_least - 1e-6))
        for nodes in cheaper:
            consider(nodes)
        moved, seconds, _, nodes = improve()
    accepted = accept(
        problem, Answer(nodes=nodes, lower_bound_s=min(best.lower_bound_s, seconds)), generated_at=generated_at
    )
    moves = _moves(plan, moving, nodes)
    return Replan(
        plan=accepted,
        moves=moves,
        moved_bytes=moved,
        must_move_bytes=min(must, moved),
        objective_s=seconds,
        best_objective_s=least,
        reason=_reason(
            moved,
            min(must, moved),
            seconds,
            least,
            len(moves),
            limit="tolerance" if budget is None else "time budget",
        ),
    )


def _reason(moved: int, must: int, seconds: float, least: float, layers: int, *, limit: str) -> str:
    text = f"{layers} layers move, {gib(moved)}, of which {gib(must)} have to; "
    text += f"{seconds / least - 1:.2%} above the best plan" if least > 0 else "as good as the best plan"
    if moved > must:
        text += f"; more than is known to have to move, because no plan within the {limit} was found that moves less"
    return text


def _holders(plan: Plan, problem: Problem) -> Ints:
    """(L,) usable node that holds each layer now, or -1."""
    names = {layer.name: at for at, layer in enumerate(problem.profile.layers)}
    old = np.full(len(names), -1, dtype=np.int64)
    for node_id, layer_names in plan.allocation.items():
        for name in layer_names:
            if name not in names:
                raise InvalidInput(
                    f"plan {plan.plan_id} holds layer {name!r}, which {problem.profile.model_name} does not have",
                    details={"plan_id": plan.plan_id, "layer": name},
                )
            old[names[name]] = problem.index_of.get(node_id, -1)
    return old


def _candidates(moving: Moving, old: Ints, within_s: float, best: Ints) -> tuple[list[Ints], int]:
    """Plans that keep much, and bytes that every plan moves, as far as it is known."""
    problem = moving.problem
    found: list[Ints] = []
    if (old >= 0).all():
        found.append(old)
    if problem.options.strategy == "pipeline":
        stages, bound = keep_stages(moving, within_s, best)
        return found + stages, math.ceil(bound * (1 - 1e-9))
    ways: tuple[Ties, ...] = ("shared", *ways_to_tie(problem)[0])
    bound = 0.0
    for way in ways if (problem.tied_to >= 0).any() else ways[:1]:
        work = build_work(problem, way)
        if work is None:
            continue
        plans, least = keep_counts(moving, work, old, within_s)
        if way == "shared":  # as if a copy were free: a bound for every way
            bound = least
        for nodes in plans:
            labelled = exchange_equal(problem, nodes, old)
            found.append(labelled)
            # Layers without a home are free to be arranged; those that stay are not.
            staying = dataclasses.replace(problem, pinned=np.where(labelled == old, old, problem.pinned))
            found.append(fewest_hops(staying, labelled))
        kept = keep_items(work, old, within_s)
        if kept is not None:
            found.append(kept)
    return found, math.ceil(bound * (1 - 1e-9))


def _must_move(moving: Moving, old: Ints, within_s: float) -> int:
    """Bytes that any plan within `within_s` moves: what has no home, and what is too much where it is."""
    problem, weights = moving.problem, moving.anywhere().astype(np.float64)
    must = float(weights[old < 0].sum())
    seconds = problem.seconds[np.maximum(old, 0), problem.kind]
    for node in np.unique(old[old >= 0]).tolist():
        held = np.flatnonzero(old == node)
        over_s = float(seconds[held].sum()) - within_s
        over_bytes = int(problem.memory[held].sum() - problem.capacity[node])
        shed = 0.0
        if over_s > 0:
            with np.errstate(divide="ignore", invalid="ignore"):
                price = np.where(seconds[held] > 0, weights[held] / seconds[held], np.inf)
            left = over_s
            for at in np.argsort(price, kind="stable").tolist():
                part = min(1.0, left / float(seconds[held[at]])) if seconds[held[at]] > 0 else 0.0
                shed += part * float(weights[held[at]])
                left -= part * float(seconds[held[at]])
                if left <= 0:
                    break
        if over_bytes > 0:
            # KV cache goes with its layer; at best only the weights' share of the bytes has to move.
            share = (weights / np.maximum(problem.memory, 1))[held[problem.memory[held] > 0]]
            shed = max(shed, over_bytes * float(share.min(initial=1.0)))
        must += shed
    return math.floor(must)


def _moves(plan: Plan, moving: Moving, nodes: Ints) -> tuple[Move, ...]:
    problem, fetched = moving.problem, moving.fetched(nodes)
    holder = {name: node_id for node_id, names in plan.allocation.items() for name in names}
    present = {node.node_id for node in problem.cluster.nodes}
    moves = []
    for at in np.flatnonzero(nodes != moving.held).tolist():
        name = problem.profile.layers[at].name
        source = holder.get(name)
        moves.append(
            Move(
                layer_name=name,
                source=source if source in present else None,
                target=problem.nodes[int(nodes[at])].node_id,
                size_bytes=int(fetched[at]),
            )
        )
    return tuple(moves)
