"""Several chains as JSON."""

from __future__ import annotations

from typing import Any

from planner.replicas.make import Replicas
from planner.wire.write import SCHEMA_VERSION, _number, plan_to_json


def replicas_to_json(found: Replicas) -> dict[str, Any]:
    """Several chains as the command line and the API answer them; each of `plans` is a plan of its own."""
    one = found.one_chain
    return {
        "success": True,
        "schema_version": SCHEMA_VERSION,
        "model_name": one.model_name,
        "chains": len(found.plans),
        "throughput_per_s": _number(found.throughput_per_s),
        "upper_bound_per_s": _number(found.upper_bound_per_s),
        "gap": _number(found.gap),
        "exact": bool(found.exact),
        "ratio": _number(found.ratio),
        "one_chain": {
            "plan_id": one.plan_id,
            "throughput_per_s": _number(1 / one.predicted.bottleneck_s),
            "nodes_used": len(one.allocation),
        },
        "idle": [{"node_id": node_id, "reason": why} for node_id, why in found.idle],
        "plans": [plan_to_json(plan) for plan in found.plans],
    }
