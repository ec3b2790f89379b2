"""What machines offer: nodes, links, and both together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine that can host layers."""

    node_id: str
    #: Sustained rate at the model's dtype, in FLOP/s (measured wins over the catalogue's figure).
    flop_per_s: float
    #: Memory usable for weights and KV cache, in bytes.
    memory_bytes: int
    #: Memory bandwidth, in bytes per second; None where unknown (then only compute bounds a stage).
    memory_bytes_per_s: float | None = None
    #: Fraction of the compute that others already use, from 0 to 1.
    load: float = 0.0
    #: Device name as probed ("NVIDIA RTX 4090"), for display and the catalogue.
    device: str | None = None

    @property
    def available_flop_per_s(self) -> float:
        """FLOP/s left beside the present load."""
        return self.flop_per_s * (1.0 - self.load)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A directed connection between two nodes."""

    latency_s: float = 0.0
    #: Bandwidth in bytes per second; None: not limiting.
    bytes_per_s: float | None = None

    def transfer_s(self, size_bytes: float) -> float:
        """Seconds to move `size_bytes`."""
        return self.latency_s + (size_bytes / self.bytes_per_s if self.bytes_per_s else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes with their links; a pair without an entry of its own uses `default_link`."""

    nodes: tuple[Node, ...]
    default_link: Link = field(default_factory=Link)
    #: (from, to) -> link, by node id.
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    def link(self, source: str, target: str) -> Link:
        """The link from node `source` to node `target`; free within one node."""
        if source == target:
            return Link()
        return self.links.get((source, target), self.default_link)

    def node(self, node_id: str) -> Node:
        """The node of that id; KeyError if there is none."""
        for node in self.nodes:
            if node.node_id == node_id:
                return node
        raise KeyError(node_id)
