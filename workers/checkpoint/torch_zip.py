"""Zip archives of `torch.save`, read by ranges: the directory, the pickle, and where each storage's bytes begin."""

from __future__ import annotations

import io
import itertools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from planner.errors import InvalidCheckpoint
from workers.checkpoint.base import Checkpoint

_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER_BYTES = 30
#: Read at once from the end: the directory of some hundred storages.
_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Archive:
    """A torch archive whose directory was read."""

    checkpoint: Checkpoint
    file: str
    #: Path in the archive -> its entry.
    entries: Mapping[str, zipfile.ZipInfo]
    #: Path in the archive -> where the next entry, or the directory, begins.
    ends: Mapping[str, int]
    #: Folder of the archive ("archive", "pytorch_model").
    root: str

    def pickle_bytes(self, largest: int) -> bytes:
        """The pickle that describes the tensors.

        Raises:
            InvalidCheckpoint: If it is not there, compressed, or larger than `largest`.
        """
        entry = self._entry(f"{self.root}/data.pkl")
        if entry.file_size > largest:
            raise InvalidCheckpoint(
                f"{self.file}: the pickle is {entry.file_size:,} bytes; at most {largest:,} are read"
            )
        begin = self._begin(entry)
        return self.checkpoint.read(self.file, begin, begin + entry.file_size)

    def place(self, key: str, size_bytes: int) -> int:
        """First byte in the file of the storage `key`, which must hold `size_bytes`.

        Raises:
            InvalidCheckpoint: If the archive has none, or of another size.
        """
        entry = self._entry(f"{self.root}/data/{key}")
        if entry.file_size != size_bytes:
            raise InvalidCheckpoint(
                f"{self.file}: storage {key} holds {entry.file_size:,} bytes, but the pickle says {size_bytes:,}"
            )
        return self._begin(entry)

    def _entry(self, path: str) -> zipfile.ZipInfo:
        entry = self.entries.get(path)
        if entry is None:
            raise InvalidCheckpoint(f"{self.file}: the archive has no {path[:80]!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise InvalidCheckpoint(f"{self.file}: {path[:80]!r} is compressed, which torch never does")
        return entry

    def _begin(self, entry: zipfile.ZipInfo) -> int:
        """Where the entry's data begins.

        torch aligns it to 64 bytes and at most a descriptor of 16 or 24 bytes follows it, so that no more than one
        place is possible; where none is, the local header, whose length only it tells, is read.
        """
        at = entry.header_offset
        least = at + _LOCAL_HEADER_BYTES + len(entry.filename.encode())
        last = self.ends[entry.filename] - entry.file_size
        places = [last - descriptor for descriptor in (0, 16, 24) if (last - descriptor) % 64 == 0]
        if len(places) == 1 and least <= places[0] < least + 256 and self.checkpoint.local_path(self.file) is None:
            return places[0]
        header = self.checkpoint.read(self.file, at, at + _LOCAL_HEADER_BYTES)
        if header[:4] != _MAGIC:
            raise InvalidCheckpoint(f"{self.file}: no entry begins at byte {at:,}, as the directory says")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        begin: int = at + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        return begin


def is_zip(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the file begins as a zip archive does."""
    size = checkpoint.files[name].size_bytes
    return size >= 4 and checkpoint.read(name, 0, 4) == _MAGIC


def read_archive(checkpoint: Checkpoint, name: str) -> Archive:
    """Read the directory of a torch archive.

    Raises:
        InvalidCheckpoint: If the file is no such archive.
    """
    try:
        with zipfile.ZipFile(_Ranges(checkpoint, name)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            offsets = [*sorted(entry.header_offset for entry in entries.values()), archive.start_dir]
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, struct.error) as error:
        raise InvalidCheckpoint(f"{name} is no zip archive of torch.save, or is cut short: {error}") from error
    pickles = [path for path in entries if path.endswith("/data.pkl") and path.count("/") == 1]
    if len(pickles) != 1:
        raise InvalidCheckpoint(f"{name} is a zip archive, but not of torch.save: it has {len(pickles)} data.pkl")
    after = dict(itertools.pairwise(offsets))
    ends = {path: after[entry.header_offset] for path, entry in entries.items()}
    return Archive(checkpoint, name, entries, ends, pickles[0].partition("/")[0])


class _Ranges(io.RawIOBase):
    """A file of a checkpoint as `zipfile` wants it; keeps its end in memory, where the directory is."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        super().__init__()
        self._checkpoint, self._name = checkpoint, name
        self._size = checkpoint.files[name].size_bytes
        self._at = 0
        self._tail_begin = max(0, self._size - _TAIL_BYTES)
        self._tail = checkpoint.read(name, self._tail_begin, self._size)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("before the file's beginning")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        begin, self._at = min(self._at, end), end
        if begin >= self._tail_begin:
            return self._tail[begin - self._tail_begin : end - self._tail_begin]
        return self._checkpoint.read(self._name, begin, end) if begin < end else b""
