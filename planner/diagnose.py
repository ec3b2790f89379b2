"""Why no plan exists, and the smallest change that would make one."""

from __future__ import annotations

import numpy as np

from planner.errors import Infeasible
from planner.problem import Problem
from planner.reports import gib, seconds_text


def infeasible(
    problem: Problem, *, strategy: str, proven: bool = True, bottleneck_s: float | None = None
) -> Infeasible:
    """The error for a problem without a plan: the binding limit with its numbers.

    Args:
        problem: What could not be planned.
        strategy: Which strategy failed.
        bottleneck_s: The best bottleneck without the time budget, if that is what binds.
    """
    needed = int(problem.memory.sum())
    usable = int(problem.capacity.sum())
    name = problem.profile.model_name
    if bottleneck_s is not None:
        budget = problem.options.time_budget_s or 0.0
        return Infeasible(
            f"{name} does not fit in a time budget of {seconds_text(budget)} on these {len(problem.nodes)} nodes: "
            f"the smallest that {strategy} found is {seconds_text(bottleneck_s)}",
            details={"limit": "compute", "time_budget_s": budget, "needed_time_budget_s": bottleneck_s},
        )
    largest = int(problem.memory.max())
    at = int(np.argmax(problem.memory))
    if largest > int(problem.capacity.max()) and problem.pinned[at] < 0:
        layer = problem.profile.layers[at]
        return Infeasible(
            f"layer {layer.name} needs {gib(largest)} and no node has more than {gib(int(problem.capacity.max()))}",
            details={
                "limit": "memory",
                "layer": layer.name,
                "needed_bytes": largest,
                "largest_node_bytes": int(problem.capacity.max()),
                "missing_bytes": largest - int(problem.capacity.max()),
            },
        )
    if needed > usable:
        return Infeasible(
            f"{name} needs {gib(needed)} (weights and KV cache) and the {len(problem.nodes)} nodes have {gib(usable)}: "
            f"{gib(needed - usable)} are missing",
            details={
                "limit": "memory",
                "needed_bytes": needed,
                "usable_bytes": usable,
                "missing_bytes": needed - usable,
            },
        )
    return Infeasible(
        f"{name} needs {gib(needed)} of the {gib(usable)} on {len(problem.nodes)} nodes, but {strategy} found no way "
        "to cut it into whole layers that fit",
        details={"limit": "memory", "needed_bytes": needed, "usable_bytes": usable, "missing_bytes": 0},
    )
