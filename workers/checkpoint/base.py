"""A checkpoint as fairshard reads it: named files of known size, read by byte range.

The two kinds, a folder and a Hub repository at one commit, are made by `workers.downloader.resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from planner.errors import NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """One file of a checkpoint."""

    #: Path relative to the repository's root, with forward slashes.
    name: str
    size_bytes: int
    #: The Hub's ETag (git blob id, or sha256 of an LFS file); None for a folder.
    etag: str | None = None
    #: sha256 in hex where the Hub states it (LFS files).
    sha256: str | None = None


class Checkpoint(Protocol):
    """Where a checkpoint's bytes come from."""

    @property
    def model_name(self) -> str:
        """`owner/name`, or the folder's last two parts."""

    @property
    def revision(self) -> str:
        """Commit hash; for a folder the hash of its config and headers."""

    @property
    def files(self) -> Mapping[str, CheckpointFile]:
        """Every file of the checkpoint by name."""

    def local_path(self, name: str) -> Path | None:
        """Where the file lies on this machine, or None if its bytes come over the network."""

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) of the file; retried and checked.

        Raises:
            NotFound: If the checkpoint has no such file.
            InvalidCheckpoint: If the range lies beyond the file's end.
            Unavailable: If the server cannot be reached within the retries.
        """


def file_of(checkpoint: Checkpoint, name: str) -> CheckpointFile:
    """What is known of the checkpoint's file `name`.

    Raises:
        NotFound: If it has no such file.
    """
    file = checkpoint.files.get(name)
    if file is None:
        raise NotFound(
            f"{checkpoint.model_name} has no file {name!r} at {checkpoint.revision}", details={"file": name}
        )
    return file
