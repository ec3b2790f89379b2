"""A checkpoint in memory, for tests that damage it or count what is read of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from planner.errors import InvalidCheckpoint, NotFound
from workers.checkpoint.base import CheckpointFile


@dataclass
class Memory:
    """A checkpoint in memory that counts what is read of it."""

    contents: Mapping[str, bytes]
    model_name: str = "tiny/memory"
    revision: str = "0" * 40
    remote: bool = False
    read_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> Mapping[str, CheckpointFile]:
        return {name: CheckpointFile(name=name, size_bytes=len(data)) for name, data in self.contents.items()}

    def local_path(self, name: str) -> Path | None:
        return None if self.remote else Path("/nowhere") / name

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        if name not in self.contents:
            raise NotFound(name)
        end = len(self.contents[name]) if end is None else end
        if not 0 <= begin <= end <= len(self.contents[name]):
            raise InvalidCheckpoint(f"{name}: [{begin}, {end}) lies beyond the file's end")
        self.read_bytes[name] = self.read_bytes.get(name, 0) + end - begin
        return self.contents[name][begin:end]
