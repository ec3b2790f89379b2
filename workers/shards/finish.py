"""The last steps of a shard: the small files beside the weights, the manifest, and the final name."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from planner.errors import NodeFailure
from planner.plan import Plan
from workers.checkpoint.base import Checkpoint
from workers.disk.durable import explained, sync, sync_together
from workers.shards.folder import ShardRequest, is_shard_folder
from workers.shards.layout import Layout
from workers.shards.manifest import MANIFEST, Manifest, ShardFile, ShardTensor, SourceFile
from workers.shards.sharing import placed_tensors
from workers.transfer.digests import Digests, digest_of
from workers.transfer.journal import Journal, discard_partials, install_lock, state_file
from workers.transfer.outputs import Output


def finish(
    layout: Layout,
    journal: Journal,
    *,
    checkpoint: Checkpoint,
    plan: Plan,
    request: ShardRequest,
    output: Path,
    digests: Mapping[str, Digests | None],
    how: Mapping[str, str],
) -> Manifest:
    """Write the small files beside the weights, then the manifest, then give the folder its name.

    Args:
        layout: What the journal's folder holds.
        journal: The folder.
        checkpoint: Where the small files come from.
        plan: The plan it is a part of.
        request: What was asked for.
        output: The folder's name.
        digests: By weight file; None where no bytes passed.
        how: By weight file: "copy", "fetch", "link" or "reflink".

    Raises:
        NodeFailure: If the disk is full or cannot be written.
    """
    folder = journal.folder
    with explained(folder):
        extras = {name: checkpoint.read(name) for name in layout.extras}
        extras["model.safetensors.index.json"] = _index(layout)
        for name, source in layout.sources.items():
            if source.header:
                extras[f"source/{name}.header"] = source.header
        files = [_extra(folder / name, name, data) for name, data in extras.items()]
        for unexpected in set(folder.rglob("*")) - {folder / name for name in (*extras, *how)}:
            if unexpected.is_file() and unexpected != state_file(folder):
                unexpected.unlink()
        manifest = Manifest(
            plan_id=request.plan_id,
            model_name=checkpoint.model_name,
            revision=request.revision,
            node_id=request.node_id,
            layers=layout.layers,
            nodes=plan.allocation,
            files=tuple(
                _file(folder, item, layout, digests.get(item.name), how[item.name]) for item in layout.outputs
            ),
            tensors=tuple(t for item in layout.outputs for t in _tensors(item, digests.get(item.name))),
            extras=tuple(files),
            aliases=layout.aliases,
            twins=layout.twins,
            missing_tensors=plan.missing_tensors,
            unused=layout.unused,
            duplicated=layout.duplicated,
            source_files={
                name: SourceFile(
                    size_bytes=s.size_bytes, sha256=s.sha256, header_bytes=len(s.header), prefix=s.prefix
                )
                for name, s in layout.sources.items()
            },
            max_shard_bytes=request.max_shard_bytes,
            paranoid=request.paranoid,
            created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
        written = {folder / name for name in (*extras, MANIFEST)}
        sync_together([*written, *{path.parent for path in written}])
        return _install(journal, output, manifest, request)


def _install(journal: Journal, output: Path, manifest: Manifest, request: ShardRequest) -> Manifest:
    """Give the finished folder its name, and return the manifest that lies there then.

    Of two processes that made the same shard the first wins and the second's folder is deleted: a shard that was
    reported as finished must never be missing, not even for a moment.
    """
    folder = journal.folder
    with install_lock(output):
        if is_shard_folder(output) and any(output.iterdir()):
            theirs = request.find(output)
            if theirs is not None:
                shutil.rmtree(folder)
                return theirs
            old = output.with_name(f".{output.name}.partial-{uuid.uuid4().hex[:8]}")
            output.rename(old)
        state_file(folder).unlink()
        folder.rename(output)
        sync(output.parent)
    discard_partials(output)
    return manifest


def _index(layout: Layout) -> bytes:
    weight_map = {placed.tensor.name: item.name for item in layout.outputs for placed in item.placed}
    total = sum(placed.tensor.size_bytes for item in layout.outputs for placed in item.placed)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode()


def _extra(path: Path, name: str, data: bytes) -> ShardFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return ShardFile(name=name, size_bytes=len(data), digest=digest_of(data), mtime_ns=path.stat().st_mtime_ns)


def _file(folder: Path, item: Output, layout: Layout, found: Digests | None, how: str) -> ShardFile:
    stat = (folder / item.name).stat()
    if stat.st_size != item.size_bytes:
        raise NodeFailure(f"{folder / item.name} has {stat.st_size} bytes, not {item.size_bytes}: was it changed?")
    stated = layout.sources[item.whole].sha256 if item.whole else None
    return ShardFile(
        name=item.name,
        size_bytes=item.size_bytes,
        digest=found.file if found else None,
        sha256=(found.sha256 if found else None) or stated,
        how=how,
        mtime_ns=stat.st_mtime_ns,
    )


def _tensors(item: Output, found: Digests | None) -> list[ShardTensor]:
    return [replace(each, digest=found.tensors[each.name] if found else None) for each in placed_tensors(item)]
