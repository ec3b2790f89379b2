"""Disk space: what folders take, and whether files will fit, asked before the first byte is written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from planner.errors import NodeFailure

_BLOCK_BYTES = 4096
#: Folders, the journal of what is done, and the filesystem's own books; they grow a little with the files.
_MARGIN_BYTES = 32 * 1024
_MARGIN_SHARE = 4096
#: What index and manifest say of a tensor, beside its names and shape, at most.
_ENTRY_BYTES = 400
#: From linux/fiemap.h: a file's extents, 512 of them at once; one that other files share; the last one.
_FIEMAP = 0xC020660B
_EXTENTS = 512
_EXTENT = struct.Struct("=QQQ16xI12x")
_SHARED = 0x2000
_LAST = 0x1


def used_bytes(folder: Path) -> int:
    """Bytes that deleting `folder` would free.

    Links and reflinks of files that lie elsewhere too count nothing.
    """
    total = 0
    links: Counter[tuple[int, int]] = Counter()
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)  # noqa: PTH118 - many files
            with contextlib.suppress(FileNotFoundError):
                stat = os.lstat(path)
                links[stat.st_dev, stat.st_ino] += 1
                if links[stat.st_dev, stat.st_ino] == stat.st_nlink:
                    total += max(0, stat.st_blocks * 512 - _shared_bytes(path))
    return total


def _shared_bytes(path: str) -> int:
    """Bytes of a file that other files share, where the filesystem tells; a link's target is not looked at."""
    shared = at = 0
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            before, flags = -1, 0
            while at > before and not flags & _LAST:
                asked = struct.pack("=QQIIII", at, 2**64 - 1 - at, 0, 0, _EXTENTS, 0)
                answer = bytearray(asked + bytes(_EXTENT.size * _EXTENTS))
                fcntl.ioctl(descriptor, _FIEMAP, answer)
                count = int.from_bytes(answer[20:24], "little")
                before = at
                for number in range(count):
                    begin, _, length, flags = _EXTENT.unpack_from(answer, len(asked) + number * _EXTENT.size)
                    at = begin + length
                    shared += length if flags & _SHARED else 0
        finally:
            os.close(descriptor)
    return shared


def listing_bytes(entries: Sequence[object], *, others: object = None) -> int:
    """What index and manifest, or index and headers, take together, at most: both have a line for each entry."""
    return 2 * len(json.dumps(entries)) + _ENTRY_BYTES * (len(entries) + 1) + len(json.dumps(others))


def needed_bytes(folder: Path, sizes: Mapping[str, int]) -> int:
    """What files of these sizes will take in `folder`, beyond what they have there already; with the margin."""
    total = _MARGIN_BYTES + sum(sizes.values()) // _MARGIN_SHARE
    for name, size in sizes.items():
        taken = 0
        with contextlib.suppress(OSError):
            stat = os.lstat(folder / name)
            taken = stat.st_blocks * 512 if stat.st_nlink == 1 else 0
        total += max(0, -(-size // _BLOCK_BYTES) * _BLOCK_BYTES - taken)
    return total


def check_fits(out: Path, sizes: Mapping[str, int]) -> None:
    """Check that files of these sizes fit on the disk of the folder `out`, which need not exist.

    Raises:
        NodeFailure: If not; the message says by how much.
    """
    check_free(next(folder for folder in out.resolve().parents if folder.exists()), needed_bytes(out, sizes))


def check_free(folder: Path, needed: int) -> None:
    """Check that the disk of `folder` has `needed` bytes free.

    Raises:
        NodeFailure: If not; the message says by how much.
    """
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if needed > free:
        raise NodeFailure(
            f"the disk of {folder} has {free:,} bytes free, {needed:,} are needed: "
            f"{needed - free:,} too few; delete old plans (fairshard delete PLAN), or add disk space",
            details={"free_bytes": free, "needed_bytes": needed},
        )
