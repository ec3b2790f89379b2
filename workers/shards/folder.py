"""The shards in a folder: which are finished, whether one is as it was finished, and its removal."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

from planner.errors import Conflict, FairshardError
from workers.disk.durable import explained
from workers.disk.space import used_bytes
from workers.shards.manifest import MANIFEST, Manifest, ShardFile, read_manifest
from workers.transfer.journal import discard_partials, install_lock


def finished_shards(folder: Path) -> Iterator[tuple[Path, Manifest]]:
    """Every finished shard right below `folder`, by name; unreadable ones are passed over."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            continue
        try:
            yield path, read_manifest(path)
        except (FairshardError, OSError):
            continue


def file_is_whole(folder: Path, file: ShardFile, *, read: bool = False) -> bool:
    """Whether a shard's file is as it was finished: its size, and its time or (with `read`, and) its digest."""
    from workers.shards.verify import digest_file

    path = folder / file.name
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != file.size_bytes:
        return False
    if stat.st_mtime_ns == file.mtime_ns and not (read and file.digest):
        return True
    return file.digest is not None and digest_file(path) == file.digest


def delete_shard(folder: Path) -> int:
    """Remove the shard in `folder` and what interrupted calls left of it; the bytes that were freed.

    Raises:
        Conflict: If `folder` holds something that is no shard.
        NodeFailure: If it cannot be removed.
    """
    if folder.exists() and not is_shard_folder(folder):
        raise Conflict(f"{folder} is no shard of fairshard's: it has no {MANIFEST}; nothing was removed")
    with explained(folder):
        discard_partials(folder)
        if not folder.exists():
            return 0
        freed = used_bytes(folder)
        # Renamed first, so that an interrupted removal never leaves half a shard under its name.
        gone = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
        with install_lock(folder):
            if not folder.exists():
                return 0
            folder.rename(gone)
        discard_partials(folder)  # under the lock: a split of the same plan must not begin in it meanwhile
    return freed


def is_shard_folder(folder: Path) -> bool:
    """Whether `folder` is a finished shard, or empty."""
    return folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))
