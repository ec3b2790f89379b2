"""The shards in a folder: which are finished, what they take, room for one more, and their removal."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from planner.errors import Conflict, FairshardError, NodeFailure
from workers.digester import explained
from workers.journal import discard_partials, install_lock
from workers.layout import Layout
from workers.manifest import MANIFEST, Manifest, ShardFile, read_manifest

#: Room for index, manifest, config and the filesystem's own books.
_MARGIN_BYTES = 4 * 1024 * 1024


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


def used_bytes(folder: Path) -> int:
    """Bytes on disk of everything below `folder`, finished or not; a linked file counts where it is linked."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118 - many files
            except FileNotFoundError:
                continue
    return total


def check_room(folder: Path, layout: Layout, *, quota_bytes: int | None) -> None:
    """Check, before the first byte, that the shard fits on the disk and in the quota.

    Args:
        folder: Where it is being made; what it already takes counts as its own.
        layout: What it will hold.
        quota_bytes: What all shards beside it may take together; None: what the disk has.

    Raises:
        NodeFailure: If it does not fit; the message says by how much.
    """
    mine = used_bytes(folder)
    needed = layout.total_bytes + _MARGIN_BYTES - mine
    check_free(folder, needed)
    if quota_bytes is not None:
        used = used_bytes(folder.parent) - mine
        if used + mine + needed > quota_bytes:
            raise NodeFailure(
                f"the shards of this node take {used:,} bytes and this one {needed + mine:,} more, over the quota of "
                f"{quota_bytes:,} (FAIRSHARD_DISK_QUOTA); remove plans no longer needed (fairshard delete PLAN)",
                details={"used_bytes": used, "needed_bytes": needed + mine, "quota_bytes": quota_bytes},
            )


def check_free(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of `folder` has `needed_bytes` free.

    Raises:
        NodeFailure: If not; the message says by how much.
    """
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if needed_bytes > free:
        raise NodeFailure(
            f"the disk of {folder.parent} has {free:,} bytes free, {needed_bytes:,} are needed: "
            f"{needed_bytes - free:,} too few; remove plans no longer needed (fairshard delete PLAN), or add disk",
            details={"free_bytes": free, "needed_bytes": needed_bytes},
        )


def file_is_whole(folder: Path, file: ShardFile) -> bool:
    """Whether a shard's file is as it was finished: its size, and its time or else its digest."""
    from workers.verify import digest_file

    path = folder / file.name
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != file.size_bytes:
        return False
    return stat.st_mtime_ns == file.mtime_ns or (file.digest is not None and digest_file(path) == file.digest)


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
        shutil.rmtree(gone)
    return freed


def is_shard_folder(folder: Path) -> bool:
    """Whether `folder` is a finished shard, or empty."""
    return folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))
