"""Jobs and batches that were accepted: an SQLite file, written before Redis, so that a wiped Redis loses none.

WAL and synchronous=FULL: an entry is on disk when `record` returns. Hub tokens are never in it.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import Unavailable

#: How long another writer is waited for, in seconds; a caller shall hear within five.
_BUSY_S = 2.0
#: A write so many seconds ago shows that the file can be written.
_FRESH_S = 2.0


class _Entries:
    """Rows of one call on their way to the disk."""

    def __init__(self, rows: list[tuple[str, str, int]]) -> None:
        self.rows = rows
        self.written = False
        self.error: Unavailable | None = None


class Accepted:
    """Accepted jobs that have not been seen to end. Safe to use from threads and from several processes.

    A file that can't be written or read (a full disk, another writer that holds it) is `planner.errors.Unavailable`.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file `path`."""
        self._path = path
        self._lock = threading.Lock()
        #: Entries that threads wait to see on disk: whoever has the lock next writes them all at once.
        self._waiting: list[_Entries] = []
        self._queueing = threading.Lock()
        #: What was to be forgotten and could not yet.
        self._owed: set[str] = set()
        #: When something was last written, by the monotonic clock.
        self._written_s = -math.inf
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, timeout=_BUSY_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS jobs (job_id TEXT PRIMARY KEY, entry TEXT NOT NULL, "
                "checked_at INTEGER NOT NULL) WITHOUT ROWID"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS jobs_checked ON jobs (checked_at)")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS batches (batch_id TEXT PRIMARY KEY, record TEXT NOT NULL, "
                "until INTEGER NOT NULL) WITHOUT ROWID"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS checks (one INTEGER PRIMARY KEY, at REAL NOT NULL)")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise Unavailable(f"the journal cannot be used: {error} ({self._path}); is its disk full?") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it on disk, or nothing."""
        with self._explained():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
                self._written_s = time.monotonic()
            except BaseException:
                self._written_s = -math.inf
                with contextlib.suppress(sqlite3.Error):  # none is open where it could not begin, or ended with it
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._transaction() as db:
            yield db

    def _one(self, query: str, *values: str) -> Any:
        """The first column of the first row; None if there is none."""
        with self._lock, self._explained():
            row = self._db.execute(query, values).fetchone()
        return row and row[0]

    def record(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Write accepted jobs by their ids, all or none; on disk when this returns."""
        now = time.time_ns() // 1_000_000
        mine = _Entries(
            [(job_id, json.dumps({**entry, "created_at": now}), now) for job_id, entry in entries.items()]
        )
        with self._queueing:
            self._waiting.append(mine)
        with self._lock:
            if not mine.written:
                self._write_waiting()
        if mine.error is not None:
            raise mine.error

    def _write_waiting(self) -> None:
        """Write all that wait: a sync takes milliseconds, for one entry as for thirty."""
        with self._queueing:
            waiting, self._waiting = self._waiting, []
        error: Unavailable | None = None
        try:
            with self._transaction() as db:
                rows = (row for entries in waiting for row in entries.rows)
                db.executemany("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", rows)
        except Unavailable as failure:
            error = failure
        for entries in waiting:
            entries.written, entries.error = True, error

    def forget(self, job_ids: Sequence[str]) -> None:
        """Drop jobs that ended, or that were not accepted after all; what can't be dropped now goes with the next."""
        with self._lock:
            self._owed.update(job_ids)
            if not self._owed:
                return
            with contextlib.suppress(Unavailable):
                with self._transaction() as db:
                    db.executemany("DELETE FROM jobs WHERE job_id = ?", [(job_id,) for job_id in self._owed])
                self._owed.clear()

    def cancel(self, job_id: str) -> bool:
        """Note that a job was cancelled (`cancelled_at`, in milliseconds): it shall not run; whether it is here."""
        with self._writing() as db:
            marked = db.execute(
                "UPDATE jobs SET entry = json_set(entry, '$.cancelled_at', ?) WHERE job_id = ?",
                (time.time_ns() // 1_000_000, job_id),
            )
        return marked.rowcount == 1

    def get(self, job_id: str) -> dict[str, Any] | None:
        """A job's entry, with `created_at` in milliseconds."""
        text = self._one("SELECT entry FROM jobs WHERE job_id = ?", job_id)
        return json.loads(text) if text and job_id not in self._owed else None

    def least_recent(self, limit: int = 1000) -> list[tuple[str, dict[str, Any]]]:
        """The entries that were looked at longest ago; they now count as looked at."""
        now = time.time_ns() // 1_000_000
        with self._writing() as db:
            # Looked at in a future that the clock has been set back from: it would be the last for as long.
            db.execute("UPDATE jobs SET checked_at = 0 WHERE checked_at > ?", (now,))
            rows = db.execute("SELECT job_id, entry FROM jobs ORDER BY checked_at LIMIT ?", (limit,)).fetchall()
            db.executemany("UPDATE jobs SET checked_at = ? WHERE job_id = ?", [(now, row[0]) for row in rows])
        return [(job_id, json.loads(text)) for job_id, text in rows if job_id not in self._owed]

    def record_batch(self, batch_id: str, record: Mapping[str, Any], *, keep_s: float) -> None:
        """Write which jobs a batch has, for `keep_s`; on disk when this returns."""
        now = time.time()
        with self._writing() as db:
            db.execute("DELETE FROM batches WHERE until < ?", (round(now),))
            row = (batch_id, json.dumps(record), round(now + keep_s))
            db.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?)", row)

    def batch(self, batch_id: str) -> dict[str, Any] | None:
        """What `record_batch` wrote."""
        text = self._one("SELECT record FROM batches WHERE batch_id = ?", batch_id)
        return json.loads(text) if text else None

    def forget_batch(self, batch_id: str) -> None:
        """Drop a batch of which nothing was accepted; one that can't be dropped goes with its time."""
        with contextlib.suppress(Unavailable), self._writing() as db:
            db.execute("DELETE FROM batches WHERE batch_id = ?", (batch_id,))

    def __len__(self) -> int:
        """How many jobs it holds, those that were cancelled apart."""
        return int(self._one("SELECT count(*) FROM jobs WHERE json_extract(entry, '$.cancelled_at') IS NULL"))

    def check(self) -> None:
        """Write something, unless something was written in the last seconds.

        Raises:
            Unavailable: If it can't be written.
        """
        if time.monotonic() - self._written_s > _FRESH_S:
            with self._writing() as db:
                db.execute("INSERT OR REPLACE INTO checks VALUES (1, ?)", (time.time(),))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
