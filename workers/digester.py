"""The thread that digests, syncs and checks files behind those that fill them."""

from __future__ import annotations

import errno
import os
import queue
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from planner.errors import NodeFailure
from workers.crew import Crew
from workers.digests import Digests

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the user's quota on this disk is used up",
    errno.EROFS: "the filesystem is read-only",
    errno.EACCES: "this user may not",
    errno.EPERM: "this user may not",
    errno.EFBIG: "the file is larger than the filesystem or the process's limit allows",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "this process has too many open files",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How output files are to be checked."""

    #: Digest what is copied; what is fetched always is.
    digests: bool = True
    #: A sha256 of every file as well.
    sha256: bool = False
    #: Read every fetched byte a second time, over another connection, and compare.
    paranoid: bool = False
    #: Tensor -> digest, as other nodes or earlier plans of the same revision found it.
    known: Mapping[str, str] = field(default_factory=dict)
    #: Output file -> sha256 that the Hub states for it.
    stated_sha256: Mapping[str, str] = field(default_factory=dict)

    def wrong(self, name: str, found: Digests) -> list[str]:
        """Tensors of output `name` whose digest is not the known one; all of them where the file's sha256 is not."""
        stated = self.stated_sha256.get(name)
        if stated is not None and found.sha256 != stated:
            return list(found.tensors) or [name]
        return [tensor for tensor, digest in found.tensors.items() if self.known.get(tensor, digest) != digest]


class Digester:
    """Does what is submitted, in order, in one thread of the crew."""

    def __init__(self, crew: Crew) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        crew.on_stop(self.close)
        crew.start(self._work, name="digest")

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` after all that was submitted before."""
        self._queue.put(work)

    def close(self) -> None:
        """End after what was submitted so far."""
        self._queue.put(None)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work()


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
