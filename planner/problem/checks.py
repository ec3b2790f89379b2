"""What cannot be planned at all is refused here, with the field and the number."""

from __future__ import annotations

import math

from planner.cluster import Cluster
from planner.errors import InvalidCheckpoint, InvalidInput
from planner.plan import PlanOptions
from planner.profile import ModelProfile, lacking


def _number(value: float, what: str, *, positive: bool = False) -> float:
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "a finite number above 0" if positive else "a finite number of at least 0"
        raise InvalidInput(f"{what} must be {wanted}, got {value}", details={"field": what, "value": str(value)})
    return value


def check_nodes(cluster: Cluster) -> None:
    """Refuse a cluster without nodes, with an id twice, or with figures that are no figures."""
    if not cluster.nodes:
        raise InvalidInput("the cluster has 0 nodes; at least 1 is needed", details={"nodes": 0})
    seen: set[str] = set()
    for node in cluster.nodes:
        if node.node_id in seen:
            raise InvalidInput(f"node_id {node.node_id!r} is given twice", details={"node_id": node.node_id})
        seen.add(node.node_id)
        name = f"node {node.node_id!r}"
        _number(node.flop_per_s, f"{name}: flop_per_s", positive=True)
        _number(node.memory_bytes, f"{name}: memory_bytes")
        if _number(node.load, f"{name}: load") > 1:
            raise InvalidInput(f"{name}: load must be between 0 and 1, got {node.load}")
        if node.memory_bytes_per_s is not None:
            _number(node.memory_bytes_per_s, f"{name}: memory_bytes_per_s", positive=True)
    for (source, target), link in [*cluster.links.items(), (("default", "link"), cluster.default_link)]:
        _number(link.latency_s, f"link {source} -> {target}: latency_s")
        if link.bytes_per_s is not None:
            _number(link.bytes_per_s, f"link {source} -> {target}: bytes_per_s", positive=True)


def check_options(profile: ModelProfile, cluster: Cluster, options: PlanOptions) -> None:
    """Refuse options that name what does not exist, contradict each other, or are out of range.

    And a checkpoint that lacks tensors of its model, unless the options allow it.
    """
    if profile.missing_tensors and not options.allow_missing:
        raise InvalidCheckpoint(
            f"{lacking(profile.missing_tensors)[0]}; to plan it all the same, give --allow-missing "
            "(allow_missing over HTTP)",
            details={"field": "allow_missing", "missing_tensors": list(profile.missing_tensors[:1000])},
        )
    ids = {node.node_id for node in cluster.nodes}
    named = [("exclude", node_id) for node_id in options.exclude] + [
        (field_name, node_id)
        for field_name, shares in (
            ("max_memory_share", options.max_memory_share),
            ("max_compute_share", options.max_compute_share),
        )
        for node_id in shares
    ]
    for field_name, node_id in [*named, *(("pins", node_id) for node_id in options.pins.values())]:
        if node_id not in ids:
            raise InvalidInput(
                f"{field_name} names node {node_id!r}, which is not among the {len(ids)} nodes",
                details={"field": field_name, "node_id": node_id, "nodes": sorted(ids)[:100]},
            )
    layers = {layer.name for layer in profile.layers}
    for layer_name, node_id in options.pins.items():
        if layer_name not in layers:
            raise InvalidInput(
                f"pins names layer {layer_name!r}, which {profile.model_name} does not have",
                details={"field": "pins", "layer": layer_name},
            )
        if node_id in options.exclude:
            raise InvalidInput(
                f"layer {layer_name!r} is pinned to {node_id!r}, which is excluded",
                details={"field": "pins", "layer": layer_name, "node_id": node_id},
            )
    for shares in (options.max_memory_share, options.max_compute_share):
        for node_id, share in shares.items():
            if _number(share, f"share of {node_id!r}") > 1:
                raise InvalidInput(f"share of {node_id!r} must be between 0 and 1, got {share}")
    _number(options.reserve_bytes, "reserve_bytes")
    if options.time_budget_s is not None:
        _number(options.time_budget_s, "time_budget_s", positive=True)
    if options.phase not in ("prefill", "decode"):
        raise InvalidInput(f"phase must be prefill or decode, got {options.phase!r}")
    if options.objective not in ("throughput", "latency"):
        raise InvalidInput(f"objective must be throughput or latency, got {options.objective!r}")


def check_layers(profile: ModelProfile) -> None:
    """Refuse a profile without layers, with a name twice, or with figures that are no figures."""
    if not profile.layers:
        raise InvalidInput(f"{profile.model_name} has 0 layers; nothing to plan", details={"layers": 0})
    if profile.batch_size < 1 or profile.sequence_length < 1:
        raise InvalidInput(
            f"batch_size and sequence_length must be at least 1, got {profile.batch_size}, {profile.sequence_length}"
        )
    unknown = [layer.name for layer in profile.layers if not layer.kv_known]
    if unknown:
        raise InvalidInput(
            f"the KV cache of {profile.model_name} is not known in {len(unknown)} layers, such as {unknown[0]}: say "
            "how many bytes a token takes in all of these together, --kv-bytes-per-token N (over HTTP "
            "kv_bytes_per_token), or profile the model with compute",
            details={"field": "kv_bytes_per_token", "layers": unknown[:50]},
        )
    seen: set[str] = set()
    for layer in profile.layers:
        if layer.name in seen:
            raise InvalidInput(f"layer {layer.name!r} is given twice", details={"layer": layer.name})
        seen.add(layer.name)
        for name in ("compute_required", "weight_bytes", "kv_cache_bytes", "activation_bytes", "tied_bytes"):
            # Asked here as well: 10,000 layers' figures are right, and their names need not be put together.
            if not 0 <= getattr(layer, name) < math.inf:
                _number(getattr(layer, name), f"layer {layer.name!r}: {name}")
