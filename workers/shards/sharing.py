"""Plans that give a node the same layers of a revision share one copy of its weight files on the disk.

Each has a folder of its own with a manifest of its own, whose weight files are links to the same bytes (or share
their extents). So the filesystem counts the users: what the last of them deletes is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from workers.disk.copying import link_whole
from workers.shards.folder import file_is_whole, finished_shards
from workers.shards.layout import Layout
from workers.shards.manifest import Manifest, ShardFile, ShardTensor
from workers.transfer.digests import Digests
from workers.transfer.outputs import Output


def share(
    layout: Layout,
    folder: Path,
    *,
    output: Path,
    model_name: str,
    revision: str,
    known: Mapping[str, str],
    sha256: bool,
    paranoid: bool,
) -> tuple[dict[str, Digests], dict[str, str]]:
    """Link the weight files of another finished shard of this node, where they are those of `layout`.

    Args:
        layout: What is wanted.
        folder: Where the links go.
        output: What `folder` will be named; the other shards lie beside it.
        model_name: The model.
        revision: Its revision.
        known: Tensor -> digest that others found; a shard that differs is not shared.
        sha256: Whether each file's SHA-256 must be known.
        paranoid: Whether every byte must have been fetched twice, and is read again now.

    Returns:
        Digests by file name, and how each came here; both empty where no such shard is.
    """
    for there, manifest in finished_shards(output.parent):
        if there == output or (manifest.model_name, manifest.revision) != (model_name, revision):
            continue
        if (paranoid and not manifest.paranoid) or not _same(layout, there, manifest, sha256=sha256):
            continue
        if any(known.get(tensor.name, tensor.digest) != tensor.digest for tensor in manifest.tensors):
            continue
        if not all(file_is_whole(there, file, read=paranoid) for file in manifest.files):
            continue
        if all(link_whole(there / file.name, folder / file.name) for file in manifest.files):
            return {file.name: _digests(file, manifest) for file in manifest.files}, {
                file.name: file.how for file in manifest.files
            }
    return {}, {}


def placed_tensors(item: Output) -> list[ShardTensor]:
    """The tensors of a weight file as its manifest names them, without digests."""
    return [
        ShardTensor(
            name=placed.tensor.name,
            file=item.name,
            dtype=placed.tensor.dtype,
            shape=placed.tensor.shape,
            begin=placed.begin,
            end=placed.end,
            layer=placed.layer,
            source_file=placed.tensor.file,
            source_begin=placed.tensor.begin,
        )
        for placed in item.placed
    ]


def _same(layout: Layout, there: Path, manifest: Manifest, *, sha256: bool) -> bool:
    """Whether the shard's weight files have the layout's bytes, and digests for all of them."""
    if {file.name: file.size_bytes for file in manifest.files} != {o.name: o.size_bytes for o in layout.outputs}:
        return False
    if any(file.digest is None or (sha256 and file.sha256 is None) for file in manifest.files):
        return False
    placed = [tensor for item in layout.outputs for tensor in placed_tensors(item)]
    if placed != [replace(tensor, digest=None) for tensor in manifest.tensors]:
        return False
    return all(_begins_with(there / item.name, item.header) for item in layout.outputs)


def _begins_with(path: Path, header: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header
    except OSError:
        return False


def _digests(file: ShardFile, manifest: Manifest) -> Digests:
    tensors = {t.name: t.digest for t in manifest.tensors if t.file == file.name and t.digest is not None}
    return Digests(file=str(file.digest), tensors=tensors, sha256=file.sha256)
