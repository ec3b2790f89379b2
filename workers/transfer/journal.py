"""The folder of an unfinished shard and its journal: one line of JSON for each segment that was written.

A line proves nothing: after a power cut it may name bytes that never reached the disk. The call that goes on with the
folder reads the bytes back and compares them with the line's digest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from planner.errors import Conflict, NodeFailure
from workers.disk.durable import explained, sync
from workers.transfer.outputs import Output

#: No file of a repository can be named so, for `workers.disk.paths` refuses a backslash.
STATE = ".fairshard\\journal.jsonl"


class Journal:
    """The journal of one unfinished shard's folder, held by one process at a time."""

    def __init__(self, folder: Path, descriptor: int, claims: dict[tuple[str, int, int], str]) -> None:
        self.folder = folder
        self._descriptor = descriptor
        self._claims = claims
        self._lock = threading.Lock()

    def claim(self, output: Output, begin: int, end: int) -> str | None:
        """The digest that bytes [begin, end) of `output` had when they were written, or None."""
        return self._claims.get((output.name, begin, end))

    def record(self, output: Output, begin: int, end: int, digest: str) -> None:
        """Bytes [begin, end) of `output` are written, and this is their digest."""
        line = json.dumps({"f": output.name, "b": begin, "e": end, "d": digest}) + "\n"
        with self._lock:
            os.write(self._descriptor, line.encode())

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Let go of the folder and remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def open_journal(target: Path, *, key: str) -> Journal:
    """Open the unfinished folder of `target` that an interrupted process left, or make one.

    It lies beside `target` as `.<name>.partial-<random>`. The folder of a live process is left alone: if two make the
    same shard, the first to finish wins.

    Args:
        target: The folder that it will become.
        key: What will be in it; a folder with another key is emptied first.

    Raises:
        NodeFailure: If no folder can be made there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with install_lock(target):
            for folder in sorted(target.parent.glob(f".{target.name}.partial-*")):
                with contextlib.suppress(OSError):  # another user's, or gone
                    journal = _take(folder, key)
                    if journal is not None:
                        return journal
            journal = None
            while journal is None:  # another process may take, or clear away, a folder before it is locked here
                folder = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
                folder.mkdir()
                journal = _take(folder, key)
    except OSError as error:
        raise NodeFailure(
            f"nothing can be written to {target}: {error.strerror}", details={"path": str(target)}
        ) from error
    return journal


@contextlib.contextmanager
def install_lock(target: Path) -> Iterator[None]:
    """Let one process at a time rename, reuse or delete folders beside `target`.

    Without it a folder whose owner just removed the journal, to rename the folder, would look abandoned.
    """
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def discard_partials(target: Path) -> None:
    """Delete the folders that interrupted processes left beside `target`; those of live processes stay."""
    folders = list(target.parent.glob(f".{target.name}.partial-*"))
    with install_lock(target) if folders else contextlib.nullcontext():
        for folder in folders:
            with contextlib.suppress(OSError):  # another user's, or on a disk that may not be written to
                journal = _take(folder, None)
                if journal is not None:
                    journal.remove()


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to fill; it is renamed to `out` on success. What killed calls left of it is deleted first.

    Raises:
        Conflict: If `out` holds something.
        NodeFailure: If it cannot be written.
    """
    check_new(out)
    out = out.resolve()
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        discard_partials(out)
    journal = open_journal(out, key=uuid.uuid4().hex)  # a key that nobody else goes on with
    try:
        with explained(out):
            yield journal.folder
            with install_lock(out):
                check_new(out)
                state_file(journal.folder).unlink()
                journal.folder.rename(out)
                sync(out.parent)
    finally:
        journal.remove()


def check_new(out: Path) -> None:
    """Check that `out` is not there yet, or is an empty folder.

    Raises:
        Conflict: If it holds something, or a folder beside it cannot be renamed to it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Conflict(f"{out} holds something already; name a folder that is new or empty")
    if out.resolve().is_mount():
        raise Conflict(
            f"a disk is mounted at {out}, so the finished folder cannot get that name; name a folder in it"
        )


def _take(folder: Path, key: str | None) -> Journal | None:
    if folder.is_symlink():
        return None  # not made here, and following it would empty another folder
    try:
        descriptor = os.open(folder / STATE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except FileNotFoundError:
        return None  # its owner has just finished
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    if not (folder / STATE).exists():
        os.close(descriptor)
        return None
    claims: dict[tuple[str, int, int], str] = {}
    head, *lines = (folder / STATE).read_bytes().split(b"\n")
    if key is not None and head != key.encode():
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != STATE:
                path.unlink()
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{key}\n".encode())
        lines = []
    if lines and lines[-1]:
        os.write(descriptor, b"\n")  # the last line was torn; the next must not be lost with it
    for line in lines:
        try:
            entry = json.loads(line)
            claims[str(entry["f"]), int(entry["b"]), int(entry["e"])] = str(entry["d"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # torn by the interruption
    return Journal(folder, descriptor, claims)


def state_file(folder: Path) -> Path:
    """The journal's own file, which a finished shard does not keep."""
    return folder / STATE
