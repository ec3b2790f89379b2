"""The compute nodes that `fairshard up` runs, and the size that each states."""

from __future__ import annotations

from pathlib import Path

import psutil

from planner.cluster import Node
from planner.errors import InvalidInput
from planner.wire.read import cluster_from_json, load_file

#: FLOP/s that the smallest of `--nodes N` states; the others state multiples.
_UNIT_FLOP_PER_S = 100e9
#: Memory bandwidth of the smallest, likewise.
_UNIT_BYTES_PER_S = 10e9
#: Share of the machine's memory that the nodes state together.
_MEMORY_SHARE = 0.8
#: Names of the other roles, whose logs and places are theirs.
_ROLES = frozenset({"redis", "api", "planner", "flower"})


def stated_nodes(nodes: str | None, *, memory_bytes: int | None = None) -> tuple[Node, ...]:
    """The nodes to run: `N` (default 3) of unequal size, or those of a nodes file.

    Of N nodes the k-th from the end states k shares of 80 % of the machine's memory, k × 100 GFLOP/s and k × 10 GB/s.

    Args:
        nodes: A number, or the path of a nodes file (YAML or JSON).
        memory_bytes: The machine's memory; None: ask it.

    Raises:
        InvalidInput: If it is neither, or lists no nodes.
    """
    text = "3" if nodes is None else nodes.strip()
    if not text.isdecimal():
        if not Path(text).is_file():
            raise InvalidInput(f"--nodes takes a number or a nodes file, and there is no file {text!r}")
        cluster = cluster_from_json(load_file(Path(text)), strict=True)
        if not cluster.nodes:
            raise InvalidInput(f"{text} lists no nodes")
        taken = _ROLES & {node.node_id for node in cluster.nodes}
        if taken:
            raise InvalidInput(f"{text} calls a node {min(taken)!r}, and that's the name of another role here")
        return cluster.nodes
    count = int(text)
    if not 1 <= count <= 64:
        raise InvalidInput(f"--nodes must be 1 to 64, got {count}")
    total = psutil.virtual_memory().total if memory_bytes is None else memory_bytes
    share = total * _MEMORY_SHARE / (count * (count + 1) / 2)
    return tuple(
        Node(
            node_id=f"node-{i}",
            flop_per_s=part * _UNIT_FLOP_PER_S,
            memory_bytes=int(part * share) >> 20 << 20,
            memory_bytes_per_s=part * _UNIT_BYTES_PER_S,
        )
        for i, part in enumerate(range(count, 0, -1), start=1)
    )
