"""From a profile and a cluster to an accepted plan: one function a strategy, one dict of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from planner.cluster import Cluster
from planner.errors import Infeasible, InvalidInput
from planner.explain.remedies import MOST_TOKENS, longest_context
from planner.explain.reports import node_reports, seconds_text
from planner.greedy.hops import by_links
from planner.megaphone import megaphone, runs
from planner.plan import Plan, PlanOptions, Prediction
from planner.problem.arrays import SLACK, Ints, Problem, build
from planner.problem.items import Answer
from planner.profile import ModelProfile
from planner.strategies.baselines import by_memory, equal_parts
from planner.strategies.solve import attempt, baseline, best_answer, greedy_once, pipeline_once, shortest_chain
from planner.wire.identity import identified, metadata_digest

Strategy = Callable[[Problem], Answer]


def greedy(problem: Problem) -> Answer:
    """Layers by compute, most first, each to the node with most available compute; any layer anywhere."""
    answer = best_answer(problem, "greedy", greedy_once)
    if problem.options.objective == "latency":
        return answer
    return dataclasses.replace(answer, nodes=by_links(problem, shortest_chain(problem, answer.nodes)))


def pipeline(problem: Problem) -> Answer:
    """Contiguous stages, node order free."""
    answer = best_answer(problem, "pipeline", pipeline_once)
    if problem.options.objective == "latency":
        return answer
    return dataclasses.replace(answer, nodes=by_links(problem, answer.nodes))


def equal(problem: Problem) -> Answer:
    """The same number of layers for every node; a baseline."""
    return baseline(problem, "equal", equal_parts(problem))


def memory(problem: Problem) -> Answer:
    """Layers in proportion to memory; a baseline."""
    return baseline(problem, "memory", by_memory(problem))


STRATEGIES: Mapping[str, Strategy] = {"greedy": greedy, "pipeline": pipeline, "equal": equal, "memory": memory}


def compare(
    profile: ModelProfile,
    cluster: Cluster,
    options: PlanOptions = PlanOptions(),  # noqa: B008  (frozen)
) -> dict[str, Plan | Infeasible]:
    """Every strategy's plan for the same request, or why it has none.

    Raises:
        InvalidInput: If the request makes no sense for any of them.
    """
    results: dict[str, Plan | Infeasible] = {}
    for name in STRATEGIES:
        try:
            results[name] = make_plan(profile, cluster, dataclasses.replace(options, strategy=name))
        except Infeasible as error:
            results[name] = error
    return results


def max_context(
    profile: ModelProfile,
    cluster: Cluster,
    options: PlanOptions = PlanOptions(),  # noqa: B008  (frozen)
) -> int | None:
    """The largest sequence length for which the strategy finds a plan, in tokens; None if none at all fits.

    At the profile's batch size, with its KV cache. No more than `profile.longest_sequence`; `remedies.MOST_TOKENS`
    means at least as many, since longer ones are not tried.
    """
    strategy = _known(options.strategy)

    def solver(problem: Problem) -> Ints | None:
        try:
            return strategy(problem).nodes
        except Infeasible:
            return None

    once = {"greedy": greedy_once, "pipeline": pipeline_once}.get(options.strategy)
    if once is not None:

        def quick(problem: Problem) -> Ints | None:
            answer = attempt(problem, once)
            return answer.nodes if isinstance(answer, Answer) else None

        return longest_context(profile, cluster, options, quick)
    return longest_context(profile, cluster, options, solver)


def context_limit(profile: ModelProfile, longest: int) -> str:
    """What ends a `max_context`: `nodes`; `model`, which takes no more; or `search`, which goes no further."""
    if longest == profile.longest_sequence:
        return "model"
    return "search" if longest == MOST_TOKENS else "nodes"


def answer_for(problem: Problem) -> Answer:
    """The answer of the problem's own strategy; raises as `make_plan` does."""
    return _known(problem.options.strategy)(problem)


def _known(name: str) -> Strategy:
    strategy = STRATEGIES.get(name)
    if strategy is None:
        raise InvalidInput(
            f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}",
            details={"field": "strategy", "known": list(STRATEGIES)},
        )
    return strategy


def make_plan(
    profile: ModelProfile,
    cluster: Cluster,
    options: PlanOptions = PlanOptions(),  # noqa: B008  (frozen)
    *,
    generated_at: str | None = None,
) -> Plan:
    """Plan `profile` on `cluster`.

    Args:
        profile: The model at the batch size and sequence length to plan for (`profile.at(...)` gives another).
        cluster: Nodes and links.
        options: What the user asks.
        generated_at: Time stamp to put into the plan; no part of its id.

    Raises:
        InvalidInput: If the request makes no sense (no layers, no nodes, names that do not exist, bad numbers).
        Infeasible: If no plan exists; `details` has the binding limit and its numbers.
    """
    strategy = _known(options.strategy)
    problem = build(profile, cluster, options)
    return accept(problem, strategy(problem), generated_at=generated_at)


def plan_for(
    profile: ModelProfile,
    cluster: Cluster,
    options: PlanOptions,
    allocation: Mapping[str, tuple[int, ...]],
    *,
    generated_at: str | None = None,
) -> Plan:
    """The plan of a given allocation (imported, edited), if it is valid on this cluster.

    Args:
        profile: The model.
        cluster: Nodes and links.
        options: As for `make_plan`; `strategy` is only the plan's name for where it came from.
        allocation: node_id -> indices of the layers it holds.
        generated_at: As for `make_plan`.

    Raises:
        InvalidInput: If a layer is missing or there twice, or a node is unknown.
        Infeasible: If a node is over its memory, its share or the time budget.
    """
    problem = build(profile, cluster, options)
    nodes = np.full(len(profile.layers), -1, dtype=np.int64)
    for node_id, indices in sorted(allocation.items()):
        if indices and node_id not in problem.index_of:
            why = problem.left_out.get(node_id, ("", "it is not in the cluster"))[1]
            raise InvalidInput(f"node {node_id!r} cannot hold layers: {why}", details={"node_id": node_id})
        for index in indices:
            if not 0 <= index < len(nodes) or nodes[index] >= 0:
                raise InvalidInput(
                    f"layer {index} of {len(nodes)} is on {node_id!r} and on another node, or does not exist",
                    details={"layer": index, "node_id": node_id},
                )
            nodes[index] = problem.index_of[node_id]
    missing = [profile.layers[index].name for index in np.flatnonzero(nodes < 0).tolist()]
    if missing:
        raise InvalidInput(
            f"{len(missing)} layers are on no node: {', '.join(missing[:3])}...", details={"layers": missing[:100]}
        )
    moved = np.flatnonzero((problem.pinned >= 0) & (problem.pinned != nodes))
    if len(moved):
        layer = profile.layers[int(moved[0])].name
        raise InvalidInput(f"layer {layer!r} is pinned to another node", details={"field": "pins", "layer": layer})
    return accept(problem, baseline(problem, options.strategy, nodes), generated_at=generated_at)


def _as_used(cluster: Cluster) -> Cluster:
    nodes = sorted(cluster.nodes, key=lambda node: node.node_id)
    # Without the device: a reader would complete the node's figures from the catalogue, which this plan did not use.
    return dataclasses.replace(cluster, nodes=tuple(dataclasses.replace(node, device=None) for node in nodes))


def _to_idle_s(problem: Problem) -> float:
    """What hops to layers that the pass does not run count at most, to those who take all layers for a chain."""
    idle = sum(layer.idle_in == "profile" for layer in problem.profile.layers)
    if not idle or problem.options.objective == "throughput":
        return 0.0
    slowest = max(link.latency_s for link in (problem.cluster.default_link, *problem.cluster.links.values()))
    return min(idle, len(problem.nodes) - 1) * slowest


def accept(problem: Problem, answer: Answer, *, generated_at: str | None = None) -> Plan:
    """Check an answer's invariants and state it as a plan, with its prediction, reports and chain."""
    profile, options, nodes = problem.profile, problem.options, answer.nodes
    if len(nodes) != len(profile.layers) or not problem.fits(nodes):
        raise AssertionError("a plan must hold each layer exactly once, no node over its memory or share")
    bottleneck = problem.bottleneck_s(nodes)
    budget = bottleneck if options.time_budget_s is None else options.time_budget_s
    if bottleneck > budget * (1 + 4 * SLACK):
        raise AssertionError(f"a node takes {seconds_text(bottleneck)}, over the budget of {seconds_text(budget)}")
    held = [np.flatnonzero(nodes == node) for node in np.unique(nodes)]
    indices = {problem.nodes[int(nodes[part[0]])].node_id: tuple(part.tolist()) for part in held}
    names = {
        node_id: tuple(profile.layers[index].name for index in part) for node_id, part in sorted(indices.items())
    }
    stages = runs(profile, indices)
    layer_s = problem.seconds[nodes, problem.kind]
    chain = megaphone(
        profile,
        problem.cluster,
        stages,
        plan_id="",
        phase=options.phase,
        compute_s=[float(layer_s[stage.start : stage.end].sum()) for stage in stages],
    )
    latency = float(layer_s.sum()) + sum(hop.transfer_s for hop in chain.chain)
    objective = bottleneck if options.objective == "throughput" else latency
    bound = float(min(max(0.0, answer.lower_bound_s - _to_idle_s(problem)), objective))
    plan = Plan(
        plan_id="",
        model_name=profile.model_name,
        revision=profile.revision,
        model_type=profile.model_type,
        unit=profile.unit,
        strategy=options.strategy,
        objective=options.objective,
        phase=options.phase,
        batch_size=profile.batch_size,
        sequence_length=profile.sequence_length,
        time_budget_s=max(budget, bottleneck),
        total_compute=float(problem.flop.sum()),
        total_layers=len(profile.layers),
        allocation=names,
        stages=stages,
        predicted=Prediction(
            bottleneck_s=bottleneck,
            latency_s=latency,
            lower_bound_s=bound,
            gap=objective / bound - 1 if bound > 0 else 0.0,
            exact=objective <= bound * (1 + 1e-7),
        ),
        nodes=node_reports(problem, nodes, max(budget, bottleneck)),
        megaphone=chain,
        approximate=profile.approximate,
        missing_tensors=profile.missing_tensors,
        cluster=_as_used(problem.cluster),
        options=options,
        metadata_digest=metadata_digest(profile),
        generated_at=generated_at,
    )
    return identified(plan)
