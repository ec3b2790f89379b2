"""Digests of a file and of each tensor in it, taken while the file grows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from blake3 import blake3

_BUFFER_BYTES = 1024 * 1024

#: What to do when two nodes found different digests of one tensor.
WHICH_IS_WRONG = (
    "'fairshard verify SHARD --source MODEL' shows which one is wrong, 'fairshard delete PLAN' deletes it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """What a finished file's bytes are, as "blake3:<hex>"."""

    file: str
    tensors: dict[str, str]
    #: In hex, if it was asked for.
    sha256: str | None


class FileDigest:
    """Digests a file while it grows: each byte once, with one buffer, whatever the file's size.

    It reads back what was written (from memory, still): it proves the file, not what was meant to be in it.
    """

    def __init__(
        self, path: Path, spans: Iterable[tuple[str, int, int]], *, sha256: bool, buffer: memoryview | None = None
    ) -> None:
        """Begin before the first byte.

        Args:
            path: The file.
            spans: Its tensors' names, first bytes, and one past their last.
            sha256: Take the file's sha256 as well.
            buffer: To read through; default one of its own.
        """
        self._path = path
        self._buffer = buffer or memoryview(bytearray(_BUFFER_BYTES))
        self._spans = sorted(spans, key=itemgetter(1, 2))
        self._file = blake3()
        self._sha256 = hashlib.sha256() if sha256 else None
        self._at = 0
        self._next = 0
        self._tensor = blake3()
        self._found: dict[str, str] = {}
        self._close_tensors()

    def up_to(self, end: int) -> None:
        """Digest what is new up to byte `end`.

        Raises:
            OSError: If the file cannot be read, or is shorter.
        """
        if self._at >= end:
            return
        with self._path.open("rb", buffering=0) as file:  # not held open: a shard may have thousands of files
            while self._at < end:
                view = self._buffer[: min(len(self._buffer), end - self._at)]
                count = os.preadv(file.fileno(), [view], self._at)
                if not count:
                    raise OSError(f"the file ends at byte {self._at}, not at {end}")
                self._take(view[:count])

    def finish(self) -> Digests:
        """The digests of everything taken."""
        self._close_tensors()
        return Digests(
            file=f"blake3:{self._file.hexdigest()}",
            tensors=dict(self._found),
            sha256=self._sha256.hexdigest() if self._sha256 else None,
        )

    def _take(self, view: memoryview) -> None:
        self._file.update(view)
        if self._sha256:
            self._sha256.update(view)
        while view and self._next < len(self._spans):
            _, begin, end = self._spans[self._next]
            inside = self._at >= begin
            part = view[: (end if inside else begin) - self._at]
            if inside:
                self._tensor.update(part)
            self._at += len(part)
            view = view[len(part) :]
            self._close_tensors()
        self._at += len(view)

    def _close_tensors(self) -> None:
        """Close the tensors that end here; empty ones at once."""
        while self._next < len(self._spans) and self._at >= self._spans[self._next][2]:
            self._found[self._spans[self._next][0]] = f"blake3:{self._tensor.hexdigest()}"
            self._tensor = blake3()
            self._next += 1


def digest_of(data: bytes | memoryview) -> str:
    """The digest of bytes in memory."""
    return f"blake3:{blake3(data).hexdigest()}"
