"""FLOP and bytes to seconds: what a layer costs on a node.

A layer's time is the slower of arithmetic and memory traffic (roofline; Williams, Waterman, Patterson, CACM 2009),
a node's part is the sum over its layers. Prefill passes the whole prompt at once; decode passes one token a
sequence and reads the KV cache of the context before it.
"""

from __future__ import annotations

from collections.abc import Iterable

from planner.cluster import Node
from planner.plan import Phase
from planner.profile import Layer, ModelProfile

#: Entries that no forward pass touches: stored in a shard, neither computed nor loaded.
UNUSED = "unused"


def layer_flop(layer: Layer, profile: ModelProfile, *, phase: Phase = "prefill", use_min: bool = False) -> float:
    """FLOP of one pass through `layer` at the profile's batch size and sequence length.

    Prefill: B * (c0 + c1*S + c2*S^2), as profiled. Decode: one token after a context of S,
    B * (c0 + c1 + c2*S); without terms, the prefill's FLOP spread evenly over the tokens.
    """
    flop = layer.compute_required
    if use_min and layer.compute_min is not None:
        flop = layer.compute_min
    if phase == "prefill":
        return flop
    if layer.compute_terms is None:
        return flop / profile.sequence_length
    c0, c1, c2 = layer.compute_terms
    return profile.batch_size * (c0 + c1 + c2 * profile.sequence_length)


def layer_traffic_bytes(layer: Layer, profile: ModelProfile, *, phase: Phase = "prefill") -> float:
    """Bytes that one pass through `layer` reads from memory.

    Weights once a pass: of a mixture of experts the share that the tokens can reach at most (tokens * active
    share, until all experts are read); of an embedding only the rows looked up. Decode reads the KV cache as well.
    """
    if layer.layer_type == UNUSED or layer.idle_in == "profile":
        return 0.0
    steps = profile.sequence_length if phase == "prefill" else 1
    weights = float(layer.weight_bytes + layer.tied_bytes)
    if layer.layer_type == "embedding":
        weights = min(weights, layer.activation_bytes * steps / profile.sequence_length)
    elif layer.num_params and layer.active_params:
        weights *= min(1.0, profile.batch_size * steps * layer.active_params / layer.num_params)
    return weights + (layer.kv_cache_bytes if phase == "decode" else 0)


def layer_memory_bytes(layer: Layer) -> int:
    """Weights and KV cache of one layer, shared weights left out (see `tied_extra_bytes`)."""
    return 0 if layer.layer_type == UNUSED else layer.weight_bytes + layer.kv_cache_bytes


def tied_extra_bytes(layers: Iterable[Layer]) -> int:
    """Bytes that a node holding `layers` stores again because the layer that owns them is elsewhere.

    Shared weights are stored once a node, however many of its layers use them.
    """
    held = list(layers)
    names = {layer.name for layer in held}
    extra: dict[str, int] = {}
    for layer in held:
        if layer.tied_to is not None and layer.tied_to not in names:
            extra[layer.tied_to] = max(extra.get(layer.tied_to, 0), layer.tied_bytes)
    return sum(extra.values())


def node_memory_bytes(layers: Iterable[Layer], *, count_activations: bool = False) -> int:
    """Bytes that a node needs for `layers`: weights, KV cache, tied copies, and the largest working set if asked."""
    held = list(layers)
    peak = max((layer.peak_bytes for layer in held), default=0) if count_activations else 0
    return sum(layer_memory_bytes(layer) for layer in held) + tied_extra_bytes(held) + peak


def roofline_s(flop: float, traffic_bytes: float, node: Node) -> float:
    """Seconds `node` needs for `flop` and `traffic_bytes`: the slower of both."""
    arithmetic = flop / node.available_flop_per_s if flop else 0.0
    return max(arithmetic, traffic_bytes / node.memory_bytes_per_s) if node.memory_bytes_per_s else arithmetic


def payload_bytes(layer: Layer, profile: ModelProfile, *, phase: Phase = "prefill") -> float:
    """Bytes that cross a link after `layer`: its output for the whole prompt, or for one token a sequence."""
    if phase == "prefill":
        return layer.activation_bytes
    # Keys and values that later layers share are those of the whole context, in each pass.
    tokens = profile.batch_size * min(profile.sequence_length, profile.longest_sequence or profile.sequence_length)
    shared = min(layer.activation_bytes, tokens * layer.shared_kv_bytes_per_token)
    return (layer.activation_bytes - shared) / profile.sequence_length + shared
