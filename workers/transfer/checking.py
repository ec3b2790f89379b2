"""How output files are checked, and the thread that does it while others fill them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from workers.transfer.digests import Digests
from workers.transfer.threads import ThreadGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
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
        """Tensors of output `name` with another digest than the known one; all, if the file's sha256 is another."""
        stated = self.stated_sha256.get(name)
        if stated is not None and found.sha256 != stated:
            return list(found.tensors) or [name]
        return [tensor for tensor, digest in found.tensors.items() if self.known.get(tensor, digest) != digest]


class Digester:
    """One thread that does what is submitted, in that order."""

    def __init__(self, threads: ThreadGroup) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threads.on_stop(self.close)
        threads.start(self._work)

    def submit(self, work: Callable[[], None]) -> None:
        """Do `work` after all that was submitted before."""
        self._queue.put(work)

    def close(self) -> None:
        """End after what was submitted so far."""
        self._queue.put(None)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
