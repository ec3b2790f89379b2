"""The thread that digests, syncs and checks files behind those that fill them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from workers.transfer.digests import Digests
from workers.transfer.threads import Crew


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
