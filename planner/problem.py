"""The planning problem as arrays: what every strategy works on, checked once.

Nodes are sorted by id, so that ties break by id and the order of the input never matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.cluster import Cluster, Link, Node
from planner.cost import (
    layer_flop,
    layer_memory_bytes,
    layer_traffic_bytes,
    payload_bytes,
)
from planner.errors import InvalidInput
from planner.plan import PlanOptions
from planner.profile import ModelProfile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Seconds are compared with this relative slack: sums of the same numbers in another order differ in the last bits.
SLACK = 1e-9
#: Stands for "no limit" where an integer is needed.
UNLIMITED = 2**62


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """Layers and nodes as arrays; L layers, N usable nodes, K kinds of layers that cost the same."""

    profile: ModelProfile
    cluster: Cluster
    options: PlanOptions
    #: Usable nodes by id.
    nodes: tuple[Node, ...]
    #: node_id -> why it is not usable at all.
    left_out: Mapping[str, tuple[str, str]]
    #: (L,) FLOP of one pass, bytes read, bytes held (tied copies apart), bytes handed on.
    flop: Floats
    traffic: Floats
    memory: Ints
    payload: Floats
    #: (L,) bytes that a layer needs again where the owner of its tied weights is elsewhere; the owner's index, or -1.
    tied_bytes: Ints
    tied_to: Ints
    #: (L,) kind of each layer; (N, K) seconds of a kind on a node.
    kind: Ints
    seconds: Floats
    #: (L,) node index that must hold the layer, or -1.
    pinned: Ints
    #: (L,) whether the layer costs nothing at all and simply follows its neighbour.
    weightless: NDArray[np.bool_]
    #: (N,) usable bytes; largest FLOP by a share the user set.
    capacity: Ints
    flop_cap: Floats
    #: (N,) FLOP/s beside the present load.
    rate: Floats
    #: Bytes taken off every node's capacity for working sets.
    peak_bytes: int = 0
    index_of: Mapping[str, int] = field(default_factory=dict)

    @property
    def node_ids(self) -> list[str]:
        """Ids of the usable nodes, ascending."""
        return [node.node_id for node in self.nodes]

    @property
    def uniform_link(self) -> Link | None:
        """The link between any two usable nodes if all are alike, else None."""
        ids = set(self.index_of)
        default = self.cluster.default_link
        for (source, target), link in self.cluster.links.items():
            if source in ids and target in ids and source != target and link != default:
                return None
        return default

    def loads_s(self, assignment: Ints) -> Floats:
        """(N,) seconds of each node's part of one pass."""
        weights = self.seconds[assignment, self.kind]
        return np.bincount(assignment, weights=weights, minlength=len(self.nodes)).astype(np.float64)

    def flops(self, assignment: Ints) -> Floats:
        """(N,) FLOP of each node's part."""
        return np.bincount(assignment, weights=self.flop, minlength=len(self.nodes)).astype(np.float64)

    def memory_used(self, assignment: Ints) -> Ints:
        """(N,) bytes each node holds, tied weights that are stored again included."""
        used = np.zeros(len(self.nodes), dtype=np.int64)
        np.add.at(used, assignment, self.memory)
        copies: dict[tuple[int, int], int] = {}
        for layer in np.flatnonzero(self.tied_to >= 0):
            owner, node = int(self.tied_to[layer]), int(assignment[layer])
            if int(assignment[owner]) != node:
                copies[node, owner] = max(copies.get((node, owner), 0), int(self.tied_bytes[layer]))
        for (node, _), extra in copies.items():
            used[node] += extra
        return used

    def fits(self, assignment: Ints) -> bool:
        """Whether every node holds what it is given: memory, shares and pins; time is not looked at."""
        pinned = self.pinned >= 0
        return bool(
            (assignment >= 0).all()
            and (assignment[pinned] == self.pinned[pinned]).all()
            and (self.memory_used(assignment) <= self.capacity).all()
            and (self.flops(assignment) <= self.flop_cap * (1 + SLACK)).all()
        )

    def bottleneck_s(self, assignment: Ints) -> float:
        """Seconds of the slowest node."""
        return float(self.loads_s(assignment).max())

    def link(self, source: int, target: int) -> Link:
        """The link between two usable nodes, by index."""
        return self.cluster.link(self.nodes[source].node_id, self.nodes[target].node_id)

    def latency_s(self, assignment: Ints) -> float:
        """Seconds of one pass through the chain: every layer, and a hop wherever the node changes."""
        total = float(self.seconds[assignment, self.kind].sum())
        for left in np.flatnonzero(np.diff(assignment)):
            link = self.link(int(assignment[left]), int(assignment[left + 1]))
            total += link.transfer_s(float(self.payload[left]))
        return total


def _number(value: float, what: str, *, positive: bool = False) -> float:
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "a finite number above 0" if positive else "a finite number of at least 0"
        raise InvalidInput(f"{what} must be {wanted}, got {value}", details={"field": what, "value": str(value)})
    return value


def _check_nodes(cluster: Cluster) -> None:
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


def _check_options(profile: ModelProfile, cluster: Cluster, options: PlanOptions) -> None:
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


def _check_layers(profile: ModelProfile) -> None:
    if not profile.layers:
        raise InvalidInput(f"{profile.model_name} has 0 layers; nothing to plan", details={"layers": 0})
    if profile.batch_size < 1 or profile.sequence_length < 1:
        raise InvalidInput(
            f"batch_size and sequence_length must be at least 1, got {profile.batch_size}, {profile.sequence_length}"
        )
    seen: set[str] = set()
    for layer in profile.layers:
        if layer.name in seen:
            raise InvalidInput(f"layer {layer.name!r} is given twice", details={"layer": layer.name})
        seen.add(layer.name)
        for name in ("compute_required", "weight_bytes", "kv_cache_bytes", "activation_bytes", "tied_bytes"):
            _number(getattr(layer, name), f"layer {layer.name!r}: {name}")


def _usable(cluster: Cluster, options: PlanOptions) -> tuple[list[Node], dict[str, tuple[str, str]]]:
    nodes, left_out = [], {}
    for node in sorted(cluster.nodes, key=lambda n: n.node_id):
        if node.node_id in options.exclude:
            left_out[node.node_id] = ("excluded", "excluded by the request")
        elif node.load >= 1:
            left_out[node.node_id] = ("compute", "its compute is fully used by others (load 1)")
        elif options.max_compute_share.get(node.node_id) == 0 or options.max_memory_share.get(node.node_id) == 0:
            left_out[node.node_id] = ("share", "its share is capped at 0")
        else:
            nodes.append(node)
    return nodes, left_out


def _kinds(columns: Sequence[NDArray[np.generic]]) -> tuple[Ints, Ints]:
    """(first layer of each kind, kind of each layer), kinds by first appearance."""
    order: dict[tuple[object, ...], int] = {}
    first: list[int] = []
    kind = np.empty(len(columns[0]), dtype=np.int64)
    for at, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if row not in order:
            order[row] = len(first)
            first.append(at)
        kind[at] = order[row]
    return np.array(first, dtype=np.int64), kind


def build(profile: ModelProfile, cluster: Cluster, options: PlanOptions) -> Problem:
    """Check the input and lay it out as arrays.

    Raises:
        InvalidInput: Whatever cannot be planned at all: no layers, no nodes, numbers that are not finite,
            names that do not exist.
    """
    _check_layers(profile)
    _check_nodes(cluster)
    _check_options(profile, cluster, options)
    nodes, left_out = _usable(cluster, options)
    if not nodes:
        raise InvalidInput(
            f"none of the {len(cluster.nodes)} nodes may be used: "
            + "; ".join(f"{node_id} {why}" for node_id, (_, why) in list(left_out.items())[:5]),
            details={"nodes": len(cluster.nodes), "usable": 0},
        )
    layers = profile.layers
    flop = np.array(
        [layer_flop(layer, profile, phase=options.phase, use_min=options.use_compute_min) for layer in layers],
        dtype=np.float64,
    )
    if not np.isfinite(flop).all() or (flop < 0).any():
        raise InvalidInput("a layer's FLOP is not a finite number of at least 0")
    traffic = np.array(
        [layer_traffic_bytes(layer, profile, phase=options.phase) for layer in layers], dtype=np.float64
    )
    memory = np.array([layer_memory_bytes(layer) for layer in layers], dtype=np.int64)
    payload = np.array([payload_bytes(layer, profile, phase=options.phase) for layer in layers], dtype=np.float64)
    at = {layer.name: position for position, layer in enumerate(layers)}
    tied_to = np.array([at.get(layer.tied_to, -1) if layer.tied_to else -1 for layer in layers], dtype=np.int64)
    tied_bytes = np.where(tied_to >= 0, np.array([layer.tied_bytes for layer in layers], dtype=np.int64), np.int64(0))
    tied_to = np.where(tied_bytes > 0, tied_to, -1)
    rate = np.array([node.available_flop_per_s for node in nodes], dtype=np.float64)
    bandwidth = np.array([node.memory_bytes_per_s or math.inf for node in nodes], dtype=np.float64)
    # A layer that others share weights with is a kind of its own: it matters which node holds it.
    owner = np.full(len(layers), -1, dtype=np.int64)
    owner[tied_to[tied_to >= 0]] = tied_to[tied_to >= 0]
    first, kind = _kinds((flop, traffic, memory, tied_bytes, tied_to, owner))
    seconds = flop[first][None, :] / rate[:, None]
    for row, bytes_per_s in enumerate(bandwidth):
        if math.isfinite(bytes_per_s):
            np.maximum(seconds[row], traffic[first] / bytes_per_s, out=seconds[row])
    peak = max(layer.peak_bytes for layer in layers) if options.count_activations else 0
    total = float(flop.sum())
    index_of = {node.node_id: position for position, node in enumerate(nodes)}
    for layer_name, node_id in options.pins.items():
        if node_id not in index_of:
            raise InvalidInput(
                f"layer {layer_name!r} is pinned to {node_id!r}, which cannot be used: {left_out[node_id][1]}",
                details={"field": "pins", "layer": layer_name, "node_id": node_id},
            )
    return Problem(
        profile=profile,
        cluster=cluster,
        options=options,
        nodes=tuple(nodes),
        left_out=left_out,
        flop=flop,
        traffic=traffic,
        memory=memory,
        payload=payload,
        tied_bytes=tied_bytes,
        tied_to=tied_to,
        kind=kind,
        seconds=seconds,
        pinned=np.array(
            [index_of[options.pins[layer.name]] if layer.name in options.pins else -1 for layer in layers],
            dtype=np.int64,
        ),
        weightless=(flop == 0) & (traffic == 0) & (memory == 0) & (tied_bytes == 0),
        capacity=np.array(
            [
                max(
                    0,
                    math.floor(node.memory_bytes * options.max_memory_share.get(node.node_id, 1.0))
                    - options.reserve_bytes
                    - peak,
                )
                for node in nodes
            ],
            dtype=np.int64,
        ),
        flop_cap=np.array(
            [
                options.max_compute_share[node.node_id] * total
                if node.node_id in options.max_compute_share
                else math.inf
                for node in nodes
            ],
            dtype=np.float64,
        ),
        rate=rate,
        peak_bytes=peak,
        index_of=index_of,
    )
