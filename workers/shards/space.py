"""Whether a shard fits on the disk and in the node's quota, checked before its first byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from planner.errors import NodeFailure
from workers.disk.copying import cloned_bytes
from workers.disk.space import check_free, listing_bytes, needed_bytes, used_bytes
from workers.shards.layout import Layout
from workers.transfer.outputs import Output


def check_room(
    folder: Path,
    layout: Layout,
    outputs: Sequence[Output],
    *,
    clone: bool,
    nodes: Mapping[str, Sequence[str]],
    quota_bytes: int | None,
) -> None:
    """Check, before the first byte, that the shard fits on the disk and in the quota.

    Args:
        folder: Where it is being made; what files there take already is not needed again.
        layout: What it will hold.
        outputs: The weight files that are not linked.
        clone: They share the checkpoint's extents where that is possible.
        nodes: The plan's nodes with their layers, which the manifest names.
        quota_bytes: What all shards beside it may take together; None: what the disk has.

    Raises:
        NodeFailure: If it does not fit; the message says by how much.
    """
    sizes = {item.name: item.size_bytes - (_cloned(item) if clone else 0) for item in outputs}
    sizes |= layout.extras
    sizes |= {f"source/{name}.header": len(source.header) for name, source in layout.sources.items()}
    placed = [item for output in layout.outputs for item in output.placed]
    sizes["manifest.json"] = listing_bytes(
        [(item.tensor.name, item.layer, item.tensor.file, item.tensor.shape) for item in placed],
        others=(
            nodes,
            layout.layers,
            layout.aliases,
            layout.twins,
            layout.unused,
            layout.duplicated,
            list(layout.sources),
        ),
    )
    needed = needed_bytes(folder, sizes)
    check_free(folder.parent, needed)
    if quota_bytes is not None:
        used = used_bytes(folder.parent)
        if used + needed > quota_bytes:
            raise NodeFailure(
                f"the shards of this node take {used:,} bytes and this one {needed:,} more, over the quota of "
                f"{quota_bytes:,} (FAIRSHARD_DISK_QUOTA); remove plans no longer needed (fairshard delete PLAN)",
                details={"used_bytes": used, "needed_bytes": needed, "quota_bytes": quota_bytes},
            )


def _cloned(output: Output) -> int:
    """Bytes of an output file that are shared with its sources, if all of its runs can be."""
    shared = [cloned_bytes(run.begin, run.end, run.target) for run in output.runs]
    return 0 if None in shared else sum(count or 0 for count in shared)
