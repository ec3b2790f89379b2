"""Where metadata and plans are published: a Hub repository (`owner/name`) or a folder.

Both keep history: `write` adds one commit for all its files and returns its id, and `read` takes that id as
`revision`, so that a message can name exactly what was published. Writing what is there already adds nothing, nor
does removing what is not; what was removed is still read by the commits that had it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from planner.errors import IntegrityError, InvalidInput, NodeFailure, NotFound
from workers.disk.durable import sync, write_whole
from workers.metadata_store.base import check_path

#: What a folder's history lies in, below the store; names that begin with a dot are never published.
_HISTORY = ".history"


@dataclass(frozen=True, slots=True)
class FolderStore:
    """A folder: the newest content of each file under its own name, all earlier content below `.history`.

    A commit's id is the hash of its files' digests and of its parent's id. Processes of one machine (or of one file
    system with locks) may write at the same time. A file that was put there by other means is read like any other.
    """

    root: Path

    @property
    def spec(self) -> str:
        """The folder's absolute path."""
        return str(self.root)

    def read(self, path: str, *, revision: str | None = None) -> bytes:
        """See `MetadataStore.read`."""
        try:
            if revision is None:
                return self._place(path).read_bytes()
            digest = self._digest_at(check_path(path), revision)
            content = self._object(digest).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            where = f"{self.root}" if revision is None else f"{self.root} at {revision}"
            raise NotFound(f"{where} has no file {path}", details={"path": path, "revision": revision}) from None
        except OSError as error:
            raise NodeFailure(f"{self.root / path} cannot be read: {error}", details={"path": path}) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise IntegrityError(
                f"{self._object(digest)} is not what was written: its sha256 differs from its name",
                details={"path": path, "revision": revision, "sha256": digest},
            )
        return content

    def write(self, files: Mapping[str, bytes | None], *, message: str) -> str:
        """See `MetadataStore.write`."""
        digests = {
            check_path(path): None if content is None else hashlib.sha256(content).hexdigest()
            for path, content in sorted(files.items())
        }
        try:
            with self._locked():
                head = self._head()
                changed = [path for path in digests if not self._has(path, files[path])]
                if head is not None and not changed:
                    return head
                for path, digest in digests.items():
                    content = files[path]
                    if digest and content is not None and not self._object(digest).exists():
                        write_whole(self._object(digest), content)
                stamp = datetime.now(UTC).isoformat(timespec="seconds")
                identity = json.dumps({"parent": head, "files": digests}, sort_keys=True)
                commit = hashlib.sha256(identity.encode()).hexdigest()[:40]
                record = {"parent": head, "files": digests, "message": message, "date": stamp}
                write_whole(self._commit(commit), json.dumps(record, indent=1).encode())
                for path in changed:
                    _put(self._place(path), files[path])
                # Last: whoever reads the head finds all of the above.
                write_whole(self.root / _HISTORY / "head", commit.encode())
                return commit
        except OSError as error:
            raise NodeFailure(
                f"{self.root} cannot be written: {error}; choose another folder, or free its disk",
                details={"path": str(self.root), "errno": error.errno},
            ) from error

    def list(self, prefix: str = "") -> list[str]:
        """See `MetadataStore.list`."""
        start = self.root / check_path(prefix.rstrip("/")) if prefix.rstrip("/") else self.root
        found = []
        for folder, folders, names in os.walk(start):
            folders[:] = [name for name in folders if not name.startswith(".")]
            here = PurePosixPath(Path(folder).relative_to(self.root).as_posix())
            found += [str(here / name) for name in names if not name.startswith(".")]
        return sorted(found)

    def _place(self, path: str) -> Path:
        place = self.root / check_path(path)
        if not place.resolve().is_relative_to(self.root.resolve()):
            raise InvalidInput(f"{path!r:.80} leads out of {self.root} by a link", details={"path": path})
        return place

    def _has(self, path: str, content: bytes | None) -> bool:
        try:
            return self._place(path).read_bytes() == content
        except FileNotFoundError:
            return content is None

    def _object(self, digest: str) -> Path:
        return self.root / _HISTORY / "objects" / digest[:2] / digest

    def _commit(self, commit: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise NotFound(f"{self.root} has no commit {commit!r:.80}", details={"revision": commit})
        return self.root / _HISTORY / "commits" / f"{commit}.json"

    def _head(self) -> str | None:
        try:
            return (self.root / _HISTORY / "head").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _digest_at(self, path: str, revision: str) -> str:
        """sha256 of `path` as of `revision`, found by walking back; FileNotFoundError if it was not there."""
        commit: str | None = revision
        digest = None
        while commit is not None:
            try:
                record = json.loads(self._commit(commit).read_bytes())
                if path in record["files"]:
                    digest = record["files"][path]
                    break
                commit = record["parent"]
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(f"{self._commit(str(commit))} is damaged: {error}") from error
        if digest is None:
            raise FileNotFoundError(path)
        return str(digest)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        (self.root / _HISTORY).mkdir(parents=True, exist_ok=True)
        with (self.root / _HISTORY / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _put(path: Path, content: bytes | None) -> None:
    if content is not None:
        write_whole(path, content)
    elif path.exists():
        path.unlink()
        sync(path.parent)
