"""Values -> JSON's kinds of objects. Loads nothing but the standard library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from planner.cluster import Cluster, Link, Node
from planner.plan import Plan, PlanOptions
from planner.profile import ModelProfile

#: The newest version of the metadata and plan JSON that this release reads, and the one that it writes.
SCHEMA_VERSION = 1

_DEFAULTS = PlanOptions()
#: Left out of a layer and of a hop where they say nothing, as in most models.
_WHERE_TRUE = {"idle_in", "shared_kv_bytes_per_token", "modules", "shared_kv_bytes"}
#: What is JSON already, booleans included.
_PLAIN = (str, int, type(None))


def profile_to_json(profile: ModelProfile) -> dict[str, Any]:
    """The metadata of `profile`: the williw protocol's fields and ours."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model_name": profile.model_name,
        "revision": profile.revision,
        "model_type": profile.model_type,
        "architecture": profile.architecture,
        "dtype": profile.dtype,
        "batch_size": profile.batch_size,
        "sequence_length": profile.sequence_length,
        "unit": profile.unit,
        "layers": [_short(layer) for layer in _json(profile.layers)],
        "total_compute": _number(profile.total_compute),
        "total_layers": len(profile.layers),
        "total_bytes": profile.total_bytes,
        "total_params": profile.total_params,
        "overhead_bytes": profile.overhead_bytes,
        "approximate": list(profile.approximate),
        "missing_tensors": _json(profile.missing_tensors),
        "longest_sequence": profile.longest_sequence,
        "generated_at": profile.generated_at,
        "node_id": profile.node_id,
    }


def _short(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by name, without those that are seldom true; a layer's cache is null where it is not known."""
    found = {name: value for name, value in fields.items() if value or name not in _WHERE_TRUE}
    if not found.pop("kv_known", True):
        found["kv_cache_bytes"] = None
    return found


def plan_to_json(plan: Plan, *, model_url: str | None = None) -> dict[str, Any]:
    """The plan as the API answers it: the williw protocol's fields and ours."""
    reports = {report.node_id: report for report in plan.nodes}
    return {
        "success": True,
        "schema_version": SCHEMA_VERSION,
        "model_name": plan.model_name,
        "model_url": model_url or f"https://huggingface.co/{plan.model_name}",
        "plan_id": plan.plan_id,
        "generated_at": plan.generated_at,
        "metadata_digest": plan.metadata_digest,
        "revision": plan.revision,
        "unit": plan.unit,
        "strategy": plan.strategy,
        "objective": plan.objective,
        "phase": plan.phase,
        "batch_size": plan.batch_size,
        "sequence_length": plan.sequence_length,
        "time_budget_s": _number(plan.time_budget_s),
        "metadata": {
            "total_layers": plan.total_layers,
            "total_compute": _number(plan.total_compute),
            "model_type": plan.model_type,
        },
        "selected_nodes": [
            {"node_id": report.node_id, "compute_power": _number(report.compute_power)}
            for report in plan.nodes
            if report.used
        ],
        "split_plan": {
            node_id: {
                "layer_names": list(names),
                "total_compute": _number(reports[node_id].flop),
                "compute_utilization": _number(reports[node_id].compute_utilization),
            }
            for node_id, names in plan.allocation.items()
        },
        "megaphone_plan": _megaphone_to_json(plan),
        "stages": _json(plan.stages),
        "predicted": _json(plan.predicted) | {"exact": bool(plan.predicted.exact)},
        "nodes": _json(plan.nodes),
        "approximate": list(plan.approximate),
        "missing_tensors": _json(plan.missing_tensors),
        "cluster": None if plan.cluster is None else cluster_to_json(plan.cluster),
        "options": None if plan.options is None else options_to_json(plan.options),
    }


def options_to_json(options: PlanOptions) -> dict[str, Any]:
    """What was asked of a plan; what was left at its default is left out."""
    result: dict[str, Any] = {}
    for name in PlanOptions.__dataclass_fields__:
        value = getattr(options, name)
        if value != getattr(_DEFAULTS, name):
            result[name] = sorted(value) if isinstance(value, frozenset) else _plain(value)
    return result


def node_to_json(node: Node) -> dict[str, Any]:
    """The node as nodes files have it."""
    return dict(_json(node))


def cluster_to_json(cluster: Cluster) -> dict[str, Any]:
    """The cluster as a nodes file has it."""
    result: dict[str, Any] = {"nodes": [node_to_json(node) for node in cluster.nodes]}
    if cluster.links or cluster.default_link != Link():
        result["links"] = _json(cluster.default_link)
        if cluster.links:
            result["links"]["pairs"] = [
                {"from": source, "to": target, **_json(link)} for (source, target), link in cluster.links.items()
            ]
    return result


def _megaphone_to_json(plan: Plan) -> dict[str, Any]:
    text_chain = list(plan.megaphone.text_chain)
    return {
        "start_node": plan.megaphone.start_node,
        "chain": [_short(_json(hop)) | {"check": _plain(hop.check)} for hop in plan.megaphone.chain],
        **({"text_chain": text_chain} if text_chain else {}),
        "announcement": _plain(plan.megaphone.announcement),
    }


def _json(value: Any) -> Any:
    """JSON's kinds of objects: a value's fields by name, in their order; numbers as `_number` has them."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_json(each) for each in value]
    if (names := getattr(value, "__dataclass_fields__", None)) is not None:
        return {name: field if isinstance(field := getattr(value, name), _PLAIN) else _json(field) for name in names}
    return _number(value)


def _number(value: float) -> float:
    """A plain number: numpy's as Python's, and a whole one as an int, which JSON shows shorter; exact up to 2**53."""
    value = float(value) if isinstance(value, float) else int(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _plain(value: Any) -> Any:
    """JSON's kinds of objects: tuples become lists, mappings dicts, numbers what they are read back as."""
    text = json.dumps(dict(value) if isinstance(value, Mapping) else value)
    return json.loads(text, parse_float=lambda figure: _number(float(figure)))
