"""Values -> JSON's kinds of objects. Loads nothing but the standard library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from planner.cluster import Cluster, Link, Node
from planner.plan import Plan, PlanOptions
from planner.profile import Layer, ModelProfile

#: The newest version of the metadata and plan JSON that this release reads, and the one that it writes.
SCHEMA_VERSION = 1

_DEFAULTS = PlanOptions()


def profile_to_json(profile: ModelProfile) -> dict[str, Any]:
    """The metadata of `profile`: the seed's fields and ours (DESIGN, section 3)."""
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
        "layers": [_layer_to_json(layer) for layer in profile.layers],
        "total_compute": _number(profile.total_compute),
        "total_layers": len(profile.layers),
        "total_bytes": profile.total_bytes,
        "total_params": profile.total_params,
        "approximate": list(profile.approximate),
        "longest_sequence": profile.longest_sequence,
        "generated_at": profile.generated_at,
        "node_id": profile.node_id,
    }


def plan_to_json(plan: Plan, *, model_url: str | None = None) -> dict[str, Any]:
    """The plan as the API answers it: the seed's fields and ours."""
    reports = {report.node_id: report for report in plan.nodes}
    predicted = plan.predicted
    return {
        "success": True,
        "schema_version": SCHEMA_VERSION,
        "model_name": plan.model_name,
        "model_url": model_url or f"https://huggingface.co/{plan.model_name}",
        "plan_id": plan.plan_id,
        "generated_at": plan.generated_at,
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
        "stages": [
            {
                "rank": stage.rank,
                "node_id": stage.node_id,
                "start": stage.start,
                "end": stage.end,
                "layer_names": list(stage.layer_names),
            }
            for stage in plan.stages
        ],
        "predicted": {
            "bottleneck_s": _number(predicted.bottleneck_s),
            "latency_s": _number(predicted.latency_s),
            "lower_bound_s": _number(predicted.lower_bound_s),
            "gap": _number(predicted.gap),
            "exact": bool(predicted.exact),
        },
        "nodes": [
            {
                "node_id": report.node_id,
                "used": report.used,
                "reason": report.reason,
                "limit": report.limit,
                "flop": _number(report.flop),
                "seconds": _number(report.seconds),
                "memory_used_bytes": int(report.memory_used_bytes),
                "memory_free_bytes": int(report.memory_free_bytes),
                "compute_power": _number(report.compute_power),
                "compute_utilization": _number(report.compute_utilization),
            }
            for report in plan.nodes
        ],
        "approximate": list(plan.approximate),
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
    return {
        "node_id": node.node_id,
        "flop_per_s": _number(node.flop_per_s),
        "memory_bytes": node.memory_bytes,
        "memory_bytes_per_s": None if node.memory_bytes_per_s is None else _number(node.memory_bytes_per_s),
        "load": _number(node.load),
        "device": node.device,
    }


def cluster_to_json(cluster: Cluster) -> dict[str, Any]:
    """The cluster as a nodes file has it."""
    result: dict[str, Any] = {"nodes": [node_to_json(node) for node in cluster.nodes]}
    if cluster.links or cluster.default_link != Link():
        result["links"] = _link_to_json(cluster.default_link)
        if cluster.links:
            result["links"]["pairs"] = [
                {"from": source, "to": target, **_link_to_json(link)}
                for (source, target), link in cluster.links.items()
            ]
    return result


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    kv, mask = layer.kv_terms, layer.mask_terms
    return {
        "name": layer.name,
        "index": layer.index,
        "layer_type": layer.layer_type,
        "num_params": layer.num_params,
        "active_params": layer.active_params,
        "weight_bytes": layer.weight_bytes,
        "kv_cache_bytes": layer.kv_cache_bytes,
        "activation_bytes": layer.activation_bytes,
        "peak_bytes": layer.peak_bytes,
        "compute_required": _number(layer.compute_required),
        "compute_min": None if layer.compute_min is None else _number(layer.compute_min),
        "compute_terms": _terms(layer.compute_terms),
        "once_terms": _terms(layer.once_terms),
        "terms_range": None if layer.terms_range is None else list(layer.terms_range),
        "kv_terms": None
        if kv is None
        else {
            "fixed_bytes": kv.fixed_bytes,
            "bytes_per_token": kv.bytes_per_token,
            "window_tokens": kv.window_tokens,
            "bytes_per_later_token": kv.bytes_per_later_token,
        },
        "parts": {name: _number(flop) for name, flop in layer.parts.items()},
        "part_terms": {name: _terms(terms) for name, terms in layer.part_terms.items()},
        "once_part_terms": {name: _terms(terms) for name, terms in layer.once_part_terms.items()},
        "mask_terms": None
        if mask is None
        else {
            "flop_per_pair": _number(mask.flop_per_pair),
            "behind_tokens": mask.behind_tokens,
            "ahead_tokens": mask.ahead_tokens,
            "chunk_tokens": mask.chunk_tokens,
        },
        "activation_terms": _terms(layer.activation_terms),
        "peak_terms": _terms(layer.peak_terms),
        "tied_to": layer.tied_to,
        "tied_bytes": layer.tied_bytes,
        "tied_tensors": list(layer.tied_tensors),
        "tensors": [
            {
                "name": tensor.name,
                "file": tensor.file,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "begin": tensor.begin,
                "end": tensor.end,
            }
            for tensor in layer.tensors
        ],
    }


def _terms(terms: Sequence[float] | None) -> list[int | float] | None:
    return None if terms is None else [_number(term) for term in terms]


def _megaphone_to_json(plan: Plan) -> dict[str, Any]:
    return {
        "start_node": plan.megaphone.start_node,
        "chain": [
            {
                "node_id": hop.node_id,
                "step": hop.step,
                "layer_names": list(hop.layer_names),
                "next_nodes": list(hop.next_nodes),
                "payload_bytes": hop.payload_bytes,
                "link": None if hop.link is None else _link_to_json(hop.link),
                "transfer_s": _number(hop.transfer_s),
                "compute_s": _number(hop.compute_s),
                "check": _plain(hop.check),
            }
            for hop in plan.megaphone.chain
        ],
        "announcement": _plain(plan.megaphone.announcement),
    }


def _link_to_json(link: Link) -> dict[str, Any]:
    return {
        "latency_s": link.latency_s,
        "bytes_per_s": None if link.bytes_per_s is None else _number(link.bytes_per_s),
    }


def _number(value: float) -> float:
    """A plain number: numpy's as Python's, and a whole one as an int, which JSON shows shorter; exact up to 2**53."""
    value = float(value) if isinstance(value, float) else int(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _plain(value: Any) -> Any:
    """JSON's kinds of objects: tuples become lists, mappings dicts."""
    return json.loads(json.dumps(dict(value) if isinstance(value, Mapping) else value))
