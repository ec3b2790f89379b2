"""Only one `fairshard up` may use a data folder: two Redis servers would ruin its append-only file."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Self

from planner.errors import Conflict

#: How long the processes of an `up` that was killed may take to end.
PATIENCE_S = 5.0


class DataLock:
    """Holds `<data>/up.lock` from `with` to its end.

    The lock belongs to the open file, so a process that inherits `fd` (our Redis does) holds it as well: after a
    kill -9 the folder is free only once that one has ended too.
    """

    def __init__(self, data: Path, *, patience_s: float = PATIENCE_S) -> None:
        self._path = data / "up.lock"
        self._data = data
        self._patience_s = patience_s
        self._fd: int | None = None

    @property
    def fd(self) -> int:
        """The descriptor to hand on."""
        assert self._fd is not None, "only within `with`"
        return self._fd

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            Conflict: If another service uses the folder; the message says which.
        """
        self._data.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def _take(self, fd: int) -> None:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder(fd)
                if _alive(holder.get("pid")) or time.monotonic() > deadline:
                    raise Conflict(
                        _refusal(self._data, holder), details={"data": str(self._data), **holder}
                    ) from None
                time.sleep(0.05)
            else:
                return

    @staticmethod
    def _holder(fd: int) -> dict[str, object]:
        try:
            said = json.loads(os.pread(fd, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return said if isinstance(said, dict) else {}

    def describe(self, *, url: str) -> None:
        """Write into the lock who holds it, for the one who is refused."""
        text = json.dumps({"pid": os.getpid(), "url": url}).encode()
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, text, 0)

    def __exit__(self, *exc: object) -> None:
        """Let go."""
        os.close(self.fd)
        self._fd = None


def _alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return True  # it holds the lock and has not said who it is: starting just now
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _refusal(data: Path, holder: dict[str, object]) -> str:
    pid = holder.get("pid")
    if not _alive(pid):
        return (
            f"{data} is still held by a process that 'fairshard up' (pid {pid}, killed) left behind; "
            "end its redis-server, or use another folder: --data DIR"
        )
    who = f" (pid {pid}, {holder.get('url')})" if pid else ""
    return f"another 'fairshard up'{who} uses {data}; end it, or use another folder: --data DIR"
