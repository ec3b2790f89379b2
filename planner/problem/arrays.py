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
from planner.errors import InvalidInput
from planner.plan import PlanOptions
from planner.problem.checks import check_layers, check_nodes, check_options
from planner.problem.cost import (
    layer_flop,
    layer_memory_bytes,
    layer_traffic_bytes,
    payload_bytes,
)
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


def usable_bytes(node: Node, options: PlanOptions, peak_bytes: int) -> int:
    """What a node's memory leaves for layers: its share of it, less the reserve and working sets."""
    share = options.max_memory_share.get(node.node_id, 1.0)
    return max(0, math.floor(node.memory_bytes * share) - options.reserve_bytes - peak_bytes)


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
    check_layers(profile)
    check_nodes(cluster)
    check_options(profile, cluster, options)
    nodes, left_out = _usable(cluster, options)
    if not nodes:
        raise InvalidInput(
            f"none of the {len(cluster.nodes)} nodes may be used: "
            + "; ".join(f"{node_id}: {why}" for node_id, (_, why) in list(left_out.items())[:5]),
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
    # Nothing is handed to layers that the pass does not run, which come last.
    payload[[layer.index - 1 for layer in layers if layer.idle_in == "profile" and layer.index]] = 0
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
        capacity=np.array([usable_bytes(node, options, peak) for node in nodes], dtype=np.int64),
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
