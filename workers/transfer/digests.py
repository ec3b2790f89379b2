"""Digests of an output file and of each tensor in it, taken while the file grows."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from workers.transfer.outputs import Output

_BUFFER_BYTES = 1024 * 1024

#: What to do where two nodes found different digests of one tensor.
WHICH_IS_WRONG = "'fairshard verify SHARD --source MODEL' tells whose is wrong, 'fairshard delete PLAN' removes it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """What a finished file's bytes are, as "blake3:<hex>"."""

    file: str
    tensors: dict[str, str]
    #: In hex, if it was asked for.
    sha256: str | None


class FileDigest:
    """Follows the filled front of a file and digests each byte once; keeps one buffer, whatever the size.

    It reads back what was written, so that it proves the file and not what was meant to be in it; the pages are
    in memory still.
    """

    def __init__(self, output: Output, path: Path, *, sha256: bool, buffer: memoryview | None = None) -> None:
        self._path = path
        self._buffer = buffer or memoryview(bytearray(_BUFFER_BYTES))
        self._tensors = sorted(output.placed, key=lambda placed: (placed.begin, placed.end))
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
        while view and self._next < len(self._tensors):
            tensor = self._tensors[self._next]
            if self._at < tensor.begin:
                skip = min(len(view), tensor.begin - self._at)
                self._at += skip
                view = view[skip:]
                continue
            part = view[: tensor.end - self._at]
            self._tensor.update(part)
            self._at += len(part)
            view = view[len(part) :]
            self._close_tensors()
        self._at += len(view)

    def _close_tensors(self) -> None:
        """Close the tensors that end here; empty ones at once."""
        while self._next < len(self._tensors) and self._at >= self._tensors[self._next].end:
            self._found[self._tensors[self._next].tensor.name] = f"blake3:{self._tensor.hexdigest()}"
            self._tensor = blake3()
            self._next += 1


def digest_of(data: bytes | memoryview) -> str:
    """The digest of bytes in memory."""
    return f"blake3:{blake3(data).hexdigest()}"
