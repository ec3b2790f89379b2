"""A checkpoint in a folder, such as one of the Hub's cache. Loads nothing but the standard library."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from planner.errors import InvalidCheckpoint, NodeFailure, NotFound
from workers.checkpoint.base import CheckpointFile, file_of

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_CONFIGS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "modules.json")
#: safetensors refuses longer headers, and so do we before a single byte is read.
MAX_HEADER_BYTES = 100_000_000
#: Written by `mark_downloaded`.
_NOTE = ".fairshard.json"
_SAMPLES = 8
_SAMPLE_BYTES = 4096
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderCheckpoint:
    """A folder with the layout of a repository; made by `open_folder`."""

    folder: Path
    model_name: str
    revision: str
    files: Mapping[str, CheckpointFile]

    def local_path(self, name: str) -> Path | None:
        """Where the file lies; always on this machine.

        Raises:
            NotFound: If the folder has no such file.
        """
        return self.folder / file_of(self, name).name

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) of the file.

        Raises:
            NotFound: If the folder has no such file.
            InvalidCheckpoint: If the range lies beyond the file's end.
            NodeFailure: If the file cannot be read.
        """
        return read_local(self.folder / name, file_of(self, name), begin, end)


def open_folder(folder: Path, *, model_name: str | None = None, revision: str | None = None) -> FolderCheckpoint:
    """The checkpoint in `folder`.

    Args:
        folder: A folder with config.json and weight files; links to it and within it are followed.
        model_name: `owner/name`; default the one that a Hub cache's path spells, else the folder's last two parts.
        revision: What the files are; default the commit in a Hub cache's path, else `folder_revision`.

    Raises:
        NotFound: If there is no such folder.
        NodeFailure: If a file in it cannot be read.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 - a name that is too long is no folder, and no error of its own
        raise NotFound(f"there is no folder {str(folder)[:200]}", details={"folder": str(folder)[:200]})
    try:
        return _opened(folder, model_name, revision)
    except OSError as error:
        raise NodeFailure(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _opened(folder: Path, model_name: str | None, revision: str | None) -> FolderCheckpoint:
    files = {file.name: file for file in _walk(folder)}
    snapshot = _SNAPSHOT.search(folder.absolute().as_posix())
    if snapshot:
        model_name = model_name or f"{snapshot['owner']}/{snapshot['name']}"
        revision = revision or snapshot["commit"]
    elif revision is None:
        origin = _downloaded(folder, files)
        model_name, revision = model_name or origin[0], origin[1]
    return FolderCheckpoint(
        folder=folder,
        model_name=model_name or _name_of(folder),
        revision=revision or folder_revision(folder, files),
        files=files,
    )


def mark_downloaded(folder: Path, *, model_name: str, revision: str) -> None:
    """Note in `folder` which commit its files were downloaded from; once a file changes, the note is ignored."""
    note = {"model_name": model_name, "revision": revision, "files": _stamps(folder, (f.name for f in _walk(folder)))}
    (folder / _NOTE).write_text(json.dumps(note), encoding="utf-8")


def _downloaded(folder: Path, files: Mapping[str, CheckpointFile]) -> tuple[str | None, str | None]:
    """Model name and commit that `mark_downloaded` noted, if the files are still as they were then."""
    try:
        note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        if note["files"] == _stamps(folder, files):
            return str(note["model_name"]), str(note["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None, None


def _stamps(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    stats = {name: (folder / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def read_local(path: Path, file: CheckpointFile, begin: int, end: int | None) -> bytes:
    """Bytes [begin, end) of the local file at `path`.

    Raises:
        InvalidCheckpoint: If the range lies beyond the file's end, or the file shrank.
        NodeFailure: If the file cannot be read.
    """
    stop = check_range(file, begin, end)
    try:
        with path.open("rb", buffering=0) as source:
            source.seek(begin)
            data = b"".join(_exactly(source.read, stop - begin))
    except OSError as error:
        raise NodeFailure(f"{path} cannot be read: {error.strerror}", details={"path": str(path)}) from error
    if len(data) != stop - begin:
        raise InvalidCheckpoint(
            f"{file.name}: {len(data)} bytes at {begin}, expected {stop - begin}; it shrank after it was listed",
            details={"file": file.name},
        )
    return data


def check_range(file: CheckpointFile, begin: int, end: int | None) -> int:
    """The end of the range [begin, end) in `file`.

    Raises:
        InvalidCheckpoint: If it lies beyond the file's end.
    """
    stop = file.size_bytes if end is None else end
    if not 0 <= begin <= stop <= file.size_bytes:
        raise InvalidCheckpoint(
            f"{file.name} has {file.size_bytes} bytes; [{begin}, {stop}) was asked for: truncated, or a wrong header",
            details={"file": file.name, "size_bytes": file.size_bytes, "begin": begin, "end": stop},
        )
    return stop


def folder_revision(folder: Path, files: Mapping[str, CheckpointFile]) -> str:
    """A revision for a folder that has no commit: 40 hex digits, the same for equal copies on other machines.

    A hash of the config, of every weight file's name, size and header, and of a few samples of its data, so that
    fine-tuned weights of the same shapes get another revision. It reads some 40 KB a file.
    """
    digest = hashlib.sha256(b"fairshard folder 1")
    for name in sorted(files):
        size = files[name].size_bytes
        if name.rpartition("/")[2] in _CONFIGS:
            _add(digest, name, size, read_local(folder / name, files[name], 0, None))
        elif name.endswith(_WEIGHTS):
            _add(digest, name, size, *_samples(folder / name, size))
    return digest.hexdigest()[:40]


def _add(digest: hashlib._Hash, name: str, size: int, *parts: bytes) -> None:
    digest.update(f"\0{name}\0{size}\0".encode())
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)


def _samples(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as source:
        start = 0
        if path.name.endswith(".safetensors") and size >= 8:
            (length,) = struct.unpack("<Q", source.read(8))
            if length <= min(size - 8, MAX_HEADER_BYTES):
                start = 8 + length
                yield b"".join(_exactly(source.read, length))
        for index in range(_SAMPLES + 1):
            source.seek(start + max(0, size - start - _SAMPLE_BYTES) * index // _SAMPLES)
            yield source.read(_SAMPLE_BYTES)


def _exactly(read: Callable[[int], bytes | None], count: int) -> Iterator[bytes]:
    while count > 0:
        data = read(count)
        if not data:
            return
        count -= len(data)
        yield data


def _walk(folder: Path) -> Iterator[CheckpointFile]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                yield CheckpointFile(name=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size)


def _name_of(folder: Path) -> str:
    parts = [re.sub(r"[^A-Za-z0-9_.]+|\.\.+", "-", part).strip("-.") for part in folder.absolute().parts[-2:]]
    named = [re.sub(r"--+", "-", part)[:96].strip("-.") for part in parts if part]
    named = [part for part in named if part] or ["model"]
    return "/".join(named if len(named) == 2 else ["local", named[0]])
