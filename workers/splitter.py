"""Cuts a node's shard out of a checkpoint: only the node's own bytes, and either all of them or no shard at all.

    <output>/
      model.safetensors, or model-00001-of-0000N.safetensors ...     the node's tensors
      model.safetensors.index.json                                   tensor -> file
      config.json, ...                                               and on the first node the tokenizer's files
      source/<checkpoint file>.header                                to rebuild the checkpoint's files from
      manifest.json                                                  what is here, with digests

It is made beside `output` as `.<name>.partial-<random>` and renamed when every byte is on the disk. After an
interruption the next call goes on with that folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from planner.errors import Conflict
from planner.names import check_node_id
from planner.plan import Plan
from planner.profile import ModelProfile
from workers.checkpoint.base import Checkpoint
from workers.disk.copying import can_clone, link_whole
from workers.disk.durable import explained
from workers.progress import Progress, silent
from workers.shards.finish import finish
from workers.shards.folder import ShardRequest, is_shard_folder
from workers.shards.layout import Layout, lay_out
from workers.shards.manifest import Manifest
from workers.shards.origins import Origins, Peer
from workers.shards.sharing import share
from workers.shards.space import check_room
from workers.transfer.checking import Checks
from workers.transfer.copy import copy_outputs
from workers.transfer.digests import Digests
from workers.transfer.fetch import CONNECTIONS, fetch_outputs
from workers.transfer.journal import discard_partials, open_journal
from workers.transfer.outputs import MAX_SHARD_BYTES
from workers.transfer.segments import cut

if TYPE_CHECKING:
    from workers.runtime.stage import load_stage
    from workers.shards.folder import delete_shard
    from workers.shards.merge import merge
    from workers.shards.verify import verify

_LAZY = {
    "verify": "workers.shards.verify",
    "merge": "workers.shards.merge",
    "load_stage": "workers.runtime.stage",
    "delete_shard": "workers.shards.folder",
}

__all__ = ["MAX_SHARD_BYTES", "delete_shard", "load_stage", "merge", "split", "verify"]


def __getattr__(name: str) -> Any:
    """Names that callers find here but that cutting a shard does not need (`load_stage` loads torch)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def split(
    checkpoint: Checkpoint,
    profile: ModelProfile,
    plan: Plan,
    *,
    node_id: str,
    output: Path,
    progress: Progress = silent,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    digests: bool = True,
    sha256: bool = False,
    paranoid: bool = False,
    link: bool = True,
    known_digests: Mapping[str, str] | None = None,
    peers: tuple[Peer, ...] = (),
    quota_bytes: int | None = None,
    connections: int = CONNECTIONS,
) -> Manifest:
    """Make `node_id`'s shard of `plan` in the folder `output`; a whole one that is there already is kept.

    Args:
        checkpoint: Where the bytes come from; files that lie on this machine are copied, others fetched by range.
        profile: The model's layers with their tensors.
        plan: Which layers are the node's.
        node_id: The node.
        output: The shard's folder. Other shards beside it serve as sources of tensors that they hold.
        progress: Told the bytes; may raise to stop.
        max_shard_bytes: Largest weight file, but for a tensor that is larger.
        digests: Digest what is copied here (what is fetched always is).
        sha256: A sha256 of each weight file as well.
        paranoid: Read every byte from the server twice, over two connections, and compare; what another node or shard
            has once, and compare. A shard that is there is read again, and made anew unless it was made so.
        link: Share the bytes of a checkpoint file, or of another plan's shard here that has the same tensors, where
            the filesystem can, instead of copying.
        known_digests: Tensor -> digest that another node found for this revision.
        peers: Other nodes that hold shards of this revision, asked before the Hub.
        quota_bytes: What all shards beside `output` may take together with this one.
        connections: Ranges that are fetched at once.

    Returns:
        The shard's manifest, as written.

    Raises:
        NotFound: If the plan gives the node nothing, or the checkpoint lacks a file.
        Conflict: If the revisions differ, a file changes meanwhile, or `output` holds something that is no shard.
        InvalidMetadata, InvalidCheckpoint: If the profile or a header is wrong.
        NodeFailure: If the disk is full or cannot be written; the message names the numbers.
        IntegrityError: If bytes stay wrong however often they are fetched.
        AccessDenied, Unavailable: As the server answers.
    """
    check_node_id(node_id)
    output = output.absolute()
    if output.exists() and not is_shard_folder(output):
        raise Conflict(f"{output} holds something that is no shard; name another folder")
    request = ShardRequest(
        plan_id=plan.plan_id,
        revision=checkpoint.revision,
        node_id=node_id,
        max_shard_bytes=max_shard_bytes,
        sha256=sha256,
        paranoid=paranoid,
    )
    there = request.find(output)
    if there is not None:
        discard_partials(output)
        progress(there.total_bytes, there.total_bytes, what="shard")
        return there
    doubted = output if paranoid else None
    sources = Origins(checkpoint, beside=output.parent, peers=peers, known=known_digests or {}, doubted=doubted)
    clone = link and _can_clone(checkpoint, output)
    stamps = _stamps(checkpoint, checkpoint.files)
    layout = lay_out(checkpoint, profile, plan, node_id=node_id, max_shard_bytes=max_shard_bytes, file_per_run=clone)
    journal = open_journal(output, key=_key(request, layout))
    try:
        found: dict[str, Digests | None] = {}
        linked = _link(layout, checkpoint, journal.folder) if link else {}
        if link and len(linked) < len(layout.outputs):
            shared, how = share(
                layout,
                journal.folder,
                output=output,
                model_name=checkpoint.model_name,
                revision=checkpoint.revision,
                known=known_digests or {},
                sha256=sha256,
                paranoid=paranoid,
            )
            found.update(shared)
            linked |= how
        rest = [item for item in layout.outputs if item.name not in linked]
        check_room(journal.folder, layout, rest, clone=clone, nodes=plan.allocation, quota_bytes=quota_bytes)
        checks = Checks(
            digests=digests,
            sha256=sha256,
            paranoid=paranoid,
            known=sources.known() if rest else {},
            stated_sha256={
                item.name: layout.sources[item.whole].sha256 or ""
                for item in layout.outputs
                if item.whole and layout.sources[item.whole].sha256 and digests
            },
        )
        local = {run.source: checkpoint.local_path(run.source) for item in rest for run in item.runs}
        here = {name: path for name, path in local.items() if path is not None}
        if not rest:
            progress(layout.total_bytes, layout.total_bytes, what="shard")
        elif len(here) == len(local):
            found.update(copy_outputs(rest, here, journal, checks=checks, progress=progress, clone=clone))
        else:
            total = sum(item.size_bytes for item in rest)
            segments = [
                segment
                for index, item in enumerate(rest)
                for segment in cut(item, index, origins=sources.of, connections=connections, total_bytes=total)
            ]
            found.update(
                fetch_outputs(rest, segments, journal, checks=checks, progress=progress, connections=connections)
            )
        means = "fetch" if len(here) != len(local) else "reflink" if clone else "copy"
        changed = [name for name, stamp in _stamps(checkpoint, layout.sources).items() if stamp != stamps.get(name)]
        if changed:
            raise Conflict(f"{changed[0]} of {checkpoint.model_name} changed while the shard was cut from it")
        how = linked | {item.name: "copy" if found[item.name] and clone else means for item in rest}
        return finish(
            layout,
            journal,
            checkpoint=checkpoint,
            plan=plan,
            request=request,
            output=output,
            digests=found,
            how=how,
        )
    finally:
        journal.close()


def _key(request: ShardRequest, layout: Layout) -> str:
    """What decides a shard's bytes and how they are checked; an unfinished folder of another key is begun anew."""
    digest = blake3(repr(request).encode())
    for item in layout.outputs:
        digest.update(f"\0{item.name}\0{item.size_bytes}\0{item.whole}\0".encode() + item.header)
        digest.update(repr([(run.source, run.begin, run.end, run.target) for run in item.runs]).encode())
    return digest.hexdigest()


def _stamps(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of a folder's weight files, to notice a change; files of the Hub have digests instead."""
    stamps = {}
    for name in names:
        weights = name.endswith((".safetensors", ".bin")) and checkpoint.files[name].etag is None
        path = checkpoint.local_path(name) if weights else None
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                stamps[name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return stamps


def _can_clone(checkpoint: Checkpoint, output: Path) -> bool:
    """Whether the filesystem shares extents between the checkpoint and the shard."""
    local = [checkpoint.local_path(name) for name in checkpoint.files if name.endswith(".safetensors")]
    here = [path for path in local if path is not None]
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        one_disk = len(here) == len(local) and len({path.stat().st_dev for path in here}) == 1
        return one_disk and can_clone(here[0], output.parent)


def _link(layout: Layout, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Link the checkpoint files that are wanted whole; output name -> how."""
    linked: dict[str, str] = {}
    for item in layout.outputs:
        source = checkpoint.local_path(item.whole) if item.whole else None
        how = link_whole(source, folder / item.name) if source is not None else None
        if how is not None:
            linked[item.name] = how
    return linked
