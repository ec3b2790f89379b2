"""Why no plan exists, and the smallest change that would make one.

Feasibility is what the strategies themselves answer, so a change is only offered if the plan with it was found.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from planner.errors import Infeasible
from planner.explain.remedies import Solver, overfull, remedies
from planner.explain.reports import have_text, need_text, seconds_text
from planner.problem.arrays import Ints, Problem


def infeasible(
    problem: Problem, solver: Solver, *, strategy: str, proven: bool, fastest_s: float | None = None
) -> Infeasible:
    """The error for a problem without a plan: the binding limit with its numbers, and what would help.

    Args:
        problem: What could not be planned.
        solver: How plans of this strategy are looked for.
        strategy: Its name.
        proven: Whether it is certain that there is no plan, or none was found.
        fastest_s: Seconds of the slowest node in the best plan found without the time budget, if that is what binds.
    """
    if fastest_s is not None:
        return _over_time(problem, strategy, fastest_s)
    sentence, details = _binding(problem, strategy, proven=proven)
    budget = problem.options.time_budget_s
    staged = strategy == "pipeline"
    found = remedies(problem, _feasible(solver, math.inf if budget is None else budget), staged=staged)
    if not found and budget is not None:
        endless = dataclasses.replace(problem, options=dataclasses.replace(problem.options, time_budget_s=None))
        found = [
            (change | {"time_budget_s": None}, f"{text} and no time budget")
            for change, text in remedies(endless, _feasible(solver, math.inf), staged=staged)
        ]
    details["proven"] = proven
    details["remedies"] = [change for change, _ in found]
    if found:
        sentence += ". It would fit with " + ", or with ".join(text for _, text in found)
    return Infeasible(sentence, details=details)


def _feasible(solver: Solver, budget_s: float) -> Solver:
    """The same solver asked only for any plan within the budget, without a search for the best."""

    def quick(problem: Problem) -> Ints | None:
        options = dataclasses.replace(problem.options, time_budget_s=budget_s, objective="throughput")
        return solver(dataclasses.replace(problem, options=options))

    return quick


def _over_time(problem: Problem, strategy: str, seconds: float) -> Infeasible:
    budget = problem.options.time_budget_s or 0.0
    count = len(problem.nodes)
    return Infeasible(
        f"{problem.profile.model_name} does not fit in a time budget of {seconds_text(budget)} on {count} nodes: "
        f"the smallest that {strategy} found is {seconds_text(seconds, up=True)}",
        details={
            "limit": "compute",
            "strategy": strategy,
            "time_budget_s": budget,
            "needed_time_budget_s": seconds,
            "nodes": count,
            "remedies": [{"change": "time_budget_s", "time_budget_s": seconds}],
        },
    )


def _binding(problem: Problem, strategy: str, *, proven: bool) -> tuple[str, dict[str, Any]]:
    needed, usable = int(problem.memory.sum()), int(problem.capacity.sum())
    name, count = problem.profile.model_name, len(problem.nodes)
    details: dict[str, Any] = {
        "limit": "memory",
        "strategy": strategy,
        "nodes": count,
        "needed_bytes": needed,
        "usable_bytes": usable,
        "missing_bytes": max(0, needed - usable),
    }
    for node, held in overfull(problem).items():
        node_id, room = problem.nodes[node].node_id, int(problem.capacity[node])
        details |= {"limit": "pin", "node_id": node_id, "missing_bytes": held - room}
        return f"what is pinned to {node_id} needs {need_text(held)} and it has {have_text(room)}", details
    free = np.where(problem.pinned < 0, problem.memory, 0)
    largest, room = int(free.max()), int(problem.capacity.max())
    if largest > room:
        layer = problem.profile.layers[int(free.argmax())].name
        details |= {"layer": layer, "layer_bytes": largest, "largest_node_bytes": room}
        details["missing_bytes"] = max(details["missing_bytes"], largest - room)
        return f"layer {layer} needs {need_text(largest)} and no node has more than {have_text(room)}", details
    if needed > usable:
        text = (
            f"{name} needs {need_text(needed)} (weights and KV cache) and the {count} nodes have {have_text(usable)}"
        )
        return f"{text}: {need_text(needed - usable)} are missing", details
    if np.isfinite(problem.flop_cap).all() and problem.flop_cap.sum() < problem.flop.sum():
        share = float(problem.flop_cap.sum() / problem.flop.sum())
        details |= {"limit": "share", "allowed_share": share}
        return f"the shares of the compute that the {count} nodes may have add up to {share:.1%}", details
    how = "there is no way" if proven else f"{strategy} found no way"
    bound_by = (
        "pins" if (problem.pinned >= 0).any() else "shares" if np.isfinite(problem.flop_cap).any() else "memory"
    )
    details["limit"] = {"pins": "pin", "shares": "share"}.get(bound_by, "memory")
    parts = "contiguous stages" if strategy == "pipeline" else "whole layers"
    text = f"{name} needs {need_text(needed)} of the {have_text(usable)} on {count} nodes"
    return f"{text}, but {how} to cut it into {parts} that fit", details
