"""What the test Hub stores: blobs, commits and repositories with their history."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath

#: What the Hub's default .gitattributes sends to LFS; anything above LFS_ABOVE_BYTES goes there as well.
LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".onnx", ".msgpack", ".gguf", ".npz"})
LFS_ABOVE_BYTES = 10 * 1024 * 1024
_BLOCK_BYTES = 1024 * 1024


class Blob:
    """The content of one file: bytes in memory, or a file on disk that is read where it lies."""

    def __init__(self, source: bytes | Path, *, cheap_digests: bool = False) -> None:
        self.source = source
        self.size = len(source) if isinstance(source, bytes) else source.stat().st_size
        #: Digests made up from path and size, for sparse files too large to hash in a benchmark.
        self._cheap = cheap_digests

    def blocks(self) -> Iterator[bytes]:
        """The content, block by block."""
        if isinstance(self.source, bytes):
            yield self.source
            return
        with self.source.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end)."""
        if isinstance(self.source, bytes):
            return self.source[begin:end]
        with self.source.open("rb") as file:
            return os.pread(file.fileno(), (self.size if end is None else end) - begin, begin)

    def _digest(self, algorithm: str, prefix: bytes = b"") -> str:
        digest = hashlib.new(algorithm, prefix, usedforsecurity=False)
        for block in [f"{self.source!r}".encode()] if self._cheap else self.blocks():
            digest.update(block)
        return digest.hexdigest()

    @cached_property
    def git_oid(self) -> str:
        """Git's blob id."""
        return self._digest("sha1", f"blob {self.size}\0".encode())

    @cached_property
    def sha256(self) -> str:
        """sha256 in hex: the LFS object id."""
        return self._digest("sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file in a commit."""

    path: str
    blob: Blob
    lfs: bool

    @property
    def etag(self) -> str:
        """The Hub's ETag: git's blob id, or the sha256 of an LFS file."""
        return self.blob.sha256 if self.lfs else self.blob.git_oid

    @property
    def lfs_json(self) -> dict[str, object]:
        """The LFS part of its metadata, under both names the Hub's endpoints use."""
        return {"oid": self.blob.sha256, "sha256": self.blob.sha256, "size": self.blob.size, "pointerSize": 134}


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A tree of files with its place in history."""

    oid: str
    parent: str | None
    title: str
    date: str
    entries: Mapping[str, Entry]


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub would keep this file in LFS."""
    return size > LFS_ABOVE_BYTES or PurePosixPath(path).suffix in LFS_SUFFIXES


@dataclass(slots=True, kw_only=True)
class Repo:
    """A repository: all its commits, and the branches and tags that name them."""

    repo_id: str
    kind: str = "model"
    private: bool = False
    gated: bool = False
    #: Users allowed into a gated repository, beside those who may write to it.
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch, tag or (shortened) commit hash names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid in self.commits:
            return self.commits[oid]
        matches = [c for known, c in self.commits.items() if len(oid) >= 7 and known.startswith(oid)]
        return matches[0] if len(matches) == 1 else None

    def commit(
        self,
        changes: Mapping[str, Blob | None],
        *,
        title: str = "update",
        branch: str = "main",
        lfs: frozenset[str] | None = None,
    ) -> Commit:
        """Add a commit to `branch`; None deletes a file. `lfs`: paths kept in LFS (default: the Hub's rule)."""
        with self.lock:
            parent = self.branches.get(branch)
            entries = dict(self.commits[parent].entries) if parent else {}
            for path, blob in changes.items():
                if blob is None:
                    entries.pop(path, None)
                else:
                    large = is_lfs(path, blob.size) if lfs is None else path in lfs
                    entries[path] = Entry(path=path, blob=blob, lfs=large)
            tree = "".join(f"{path}\0{entries[path].etag}\n" for path in sorted(entries))
            # Random bytes: two commits never share an id, so a client's cache of one test cannot serve the next.
            seed = f"{self.repo_id}\0{parent}\0{title}\0{tree}".encode() + os.urandom(8)
            oid = hashlib.sha1(seed, usedforsecurity=False).hexdigest()
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
            made = Commit(oid=oid, parent=parent, title=title, date=now, entries=entries)
            self.commits[oid] = made
            self.branches[branch] = oid
            return made

    def history(self, revision: str) -> list[Commit]:
        """The commits up to `revision`, newest first."""
        found: list[Commit] = []
        commit = self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found


def blobs_of(files: Path | Mapping[str, bytes | str | Path], *, cheap_digests: bool = False) -> dict[str, Blob]:
    """Blobs by repository path, from a folder or from path -> content (bytes, text, or a file to serve)."""
    if isinstance(files, Path):
        found = {p.relative_to(files).as_posix(): p for p in sorted(files.rglob("*")) if p.is_file()}
        return {name: Blob(path, cheap_digests=cheap_digests) for name, path in found.items() if ".git/" not in name}
    return {
        name: Blob(source.encode() if isinstance(source, str) else source, cheap_digests=cheap_digests)
        for name, source in files.items()
    }
