"""Shards on this disk: finding finished ones, telling whether one was changed, deleting one."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.errors import Conflict, FairshardError, NotFound
from workers.disk.durable import explained
from workers.disk.space import used_bytes
from workers.shards.manifest import MANIFEST, Manifest, ShardFile, read_manifest
from workers.transfer.journal import discard_partials, install_lock

_log = logging.getLogger(__name__)


def finished_shards(folder: Path) -> Iterator[tuple[Path, Manifest]]:
    """Every finished shard directly in `folder`, by name; unreadable ones are skipped."""
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
    """Whether a file has its finished size, and its time or its digest; with `read` the digest is always compared."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRequest:
    """Which shard is asked for, and how thoroughly it is to be checked."""

    plan_id: str
    revision: str
    node_id: str
    max_shard_bytes: int
    #: A sha256 of each weight file.
    sha256: bool
    #: Every byte from the network read twice.
    paranoid: bool

    def find(self, folder: Path) -> Manifest | None:
        """The manifest of the shard in `folder`, if it is the one asked for and not written to since; else None."""
        try:
            found = read_manifest(folder)
        except NotFound:
            return None
        except FairshardError as error:
            _log.warning("%s is made anew: %s", folder, error)
            return None
        mine = (self.plan_id, self.revision, self.node_id, self.max_shard_bytes)
        if (found.plan_id, found.revision, found.node_id, found.max_shard_bytes) != mine:
            return None
        if self.sha256 and any(file.sha256 is None and file.digest is not None for file in found.files):
            return None
        if self.paranoid and not found.paranoid:
            return None
        files = (*found.files, *found.extras)
        return found if all(file_is_whole(folder, file, read=self.paranoid) for file in files) else None


def delete_shard(folder: Path) -> int:
    """Delete the shard in `folder` and what interrupted calls left of it.

    Returns:
        The bytes that were freed.

    Raises:
        Conflict: If `folder` holds something that is no shard.
        NodeFailure: If it cannot be removed.
    """
    if folder.exists() and not is_shard_folder(folder):
        raise Conflict(f"{folder} is not a shard of fairshard (it has no {MANIFEST}); nothing was deleted")
    with explained(folder):
        discard_partials(folder)
        if not folder.exists():
            return 0
        freed = used_bytes(folder)
        # Renamed first, so that an interrupted call never leaves half a shard under its name.
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
