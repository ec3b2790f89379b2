"""Copies between files of this machine, in the cheapest way that the kernel and the filesystem allow."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from planner.errors import IntegrityError

#: From linux/fs.h: share the extents of another file, or of a range of it.
_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_PAGE_BYTES = 4096
_STEP_BYTES = 8 * 1024 * 1024
_PIECE_BYTES = 256 * 1024
#: The kernel or the filesystem does not do this; another way will.
_CANNOT = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EBADF, errno.ETXTBSY}
)


@contextlib.contextmanager
def own(path: Path) -> Iterator[int]:
    """Open `path` to read and write, and make it if it is missing.

    A hard link that an interrupted call left is replaced by a new file: writing to it would change the checkpoint.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(descriptor).st_nlink != 1:
            path.unlink()
            linked, descriptor = descriptor, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            os.close(linked)
        yield descriptor
    finally:
        os.close(descriptor)


def copy_range(
    source: int, target: int, begin: int, end: int, at: int, *, each: Callable[[int], None] = lambda _: None
) -> None:
    """Copy bytes [begin, end) of descriptor `source` to offset `at` of `target`.

    By copy_file_range, which stays in the kernel (and shares extents where it can); where that is refused, through a
    buffer, which takes as long as `cp` (0.95 of its time with 256 KiB, 3.9 with 8 MiB).

    Args:
        source: Read from here.
        target: Written to; its own position may change.
        begin: First byte.
        end: One past the last.
        at: Where the first byte goes.
        each: Called with the bytes of each step; may raise to stop.

    Raises:
        OSError: If the source is shorter, or the target cannot take it.
    """
    copy: Callable[[int, int, int, int, int], int] = (
        os.copy_file_range if hasattr(os, "copy_file_range") else _by_buffer
    )
    while begin < end:
        try:
            count = copy(source, target, min(end - begin, _STEP_BYTES), begin, at)
        except OSError as error:
            if error.errno not in _CANNOT or copy is _by_buffer:
                raise
            copy = _by_buffer
            continue
        if count == 0:
            raise OSError(errno.EIO, f"the source ends at byte {begin}, {end - begin} bytes early")
        begin += count
        at += count
        each(count)


def _by_buffer(source: int, target: int, count: int, begin: int, at: int) -> int:
    data = os.pread(source, min(count, _PIECE_BYTES), begin)
    return write_all(target, data, at)


def read_pieces(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """Bytes [begin, end) of a file, a few at a time.

    Raises:
        IntegrityError: If the file ends before.
    """
    with path.open("rb", buffering=0) as file:
        while begin < end:
            data = os.pread(file.fileno(), min(end - begin, _PIECE_BYTES), begin)
            if not data:
                raise IntegrityError(f"{path} ends at byte {begin:,}, {end - begin:,} bytes early")
            yield data
            begin += len(data)


def write_all(target: int, data: bytes | memoryview, at: int) -> int:
    """Write all of `data` at offset `at`; returns its length."""
    view = memoryview(data)
    written = 0
    while written < len(view):
        written += os.pwrite(target, view[written:], at + written)
    return written


def reserve(target: int, size_bytes: int) -> None:
    """Allocate a file's blocks: a full disk shows now, not after an hour, and 16 writers do not fragment the file."""
    if size_bytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(target, 0, size_bytes)


def send_to_disk(target: int, begin: int, count: int) -> None:
    """Let the disk begin to write what was just written, so that fsync has little left to wait for.

    Measured: 0.8 GB copied and on the disk in 0.67 of the time that it takes without. The advice means "I shall
    not need it": Linux answers by starting the writing, and keeps dirty pages in memory until they are written.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(target, begin, count, os.POSIX_FADV_DONTNEED)


def link_whole(source: Path, target: Path) -> str | None:
    """Make `target` be `source` without copying: "reflink", "link", or None where neither can be.

    A reflink is its own file, so it is tried first; a hard link shares what either name is written with.
    """
    real = source.resolve()
    if clone_range(real, target, 0, real.stat().st_size, 0, whole=True):
        return "reflink"
    with contextlib.suppress(OSError):
        target.unlink(missing_ok=True)
        os.link(real, target)
        return "link"
    return None


def clone_range(source: Path, target: Path, begin: int, end: int, at: int, *, whole: bool = False) -> bool:
    """Share the extents of bytes [begin, end) of `source` with `target` at `at`; False where that cannot be.

    Begin and target offset must lie on page borders, and so must the end unless it is the source's own.
    """
    try:
        with source.open("rb") as from_, open(os.open(target, os.O_RDWR | os.O_CREAT, 0o644), "rb+") as to:  # noqa: PTH123
            if whole:
                fcntl.ioctl(to.fileno(), _FICLONE, from_.fileno())
            else:
                fcntl.ioctl(to.fileno(), _FICLONERANGE, struct.pack("qQQQ", from_.fileno(), begin, end - begin, at))
    except OSError:
        return False
    return True


def clone_run(source: Path, target: Path, begin: int, end: int, at: int) -> bool:
    """Share what can be shared of bytes [begin, end), and copy the edges that lie on no page border.

    False, with nothing done, where begin and `at` lie differently within their pages, or nothing can be shared.
    """
    if cloned_bytes(begin, end, at) is None:
        return False
    first, last = _pages(begin, end)
    if last > first and not clone_range(source, target, first, last, at + first - begin):
        return False
    with source.open("rb", buffering=0) as from_, target.open("rb+", buffering=0) as to:
        for edge, stop in ((begin, min(first, end)), (max(last, min(first, end)), end)):
            if edge < stop:
                write_all(to.fileno(), os.pread(from_.fileno(), stop - edge, edge), at + edge - begin)
    return True


def cloned_bytes(begin: int, end: int, at: int) -> int | None:
    """Bytes of [begin, end) that `clone_run` can share at `at`; None where all would have to be copied."""
    first, last = _pages(begin, end)
    return None if (begin - at) % _PAGE_BYTES else max(0, last - first)


def _pages(begin: int, end: int) -> tuple[int, int]:
    """The first and the last page border within [begin, end)."""
    return -(-begin // _PAGE_BYTES) * _PAGE_BYTES, end // _PAGE_BYTES * _PAGE_BYTES


def can_clone(source: Path, folder: Path) -> bool:
    """Whether files in `folder` can share extents with `source`."""
    probe = folder / ".clone-probe"
    try:
        return source.stat().st_size >= _PAGE_BYTES and clone_range(source, probe, 0, _PAGE_BYTES, 0)
    finally:
        probe.unlink(missing_ok=True)
