"""Jobs and batches that were accepted: an SQLite file, written before Redis, so that a wiped Redis loses none.

WAL and synchronous=FULL: an entry is on disk when `record` returns. Hub tokens are never in it.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class _Entry:
    """A row on its way to the disk."""

    def __init__(self, row: tuple[str, str, int]) -> None:
        self.row = row
        self.written = False
        self.error: sqlite3.Error | None = None


class Accepted:
    """Accepted jobs that have not been seen to end. Safe to use from threads and from several processes."""

    def __init__(self, path: Path) -> None:
        """Open or make the file `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        #: Entries that threads wait to see on disk: whoever has the lock next writes them all at once.
        self._waiting: list[_Entry] = []
        self._queueing = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, timeout=10, isolation_level=None)
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

    def record(self, job_id: str, entry: Mapping[str, Any]) -> None:
        """Write an accepted job; on disk when this returns."""
        now = time.time_ns() // 1_000_000
        mine = _Entry((job_id, json.dumps({**entry, "created_at": now}), now))
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
            batch, self._waiting = self._waiting, []
        error: sqlite3.Error | None = None
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", [entry.row for entry in batch])
            self._db.execute("COMMIT")
        except sqlite3.Error as failure:
            error = failure
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        for entry in batch:
            entry.written, entry.error = True, error

    def forget(self, job_ids: Sequence[str]) -> None:
        """Drop jobs that ended, or that were not accepted after all."""
        if not job_ids:
            return
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM jobs WHERE job_id = ?", [(job_id,) for job_id in job_ids])
            self._db.execute("COMMIT")

    def cancel(self, job_id: str) -> bool:
        """Note that a job was cancelled (`cancelled_at`, in milliseconds): it shall not run; whether it is here."""
        with self._lock:
            marked = self._db.execute(
                "UPDATE jobs SET entry = json_set(entry, '$.cancelled_at', ?) WHERE job_id = ?",
                (time.time_ns() // 1_000_000, job_id),
            )
        return marked.rowcount == 1

    def get(self, job_id: str) -> dict[str, Any] | None:
        """A job's entry, with `created_at` in milliseconds."""
        with self._lock:
            row = self._db.execute("SELECT entry FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return json.loads(row[0]) if row else None

    def least_recent(self, limit: int = 1000) -> list[tuple[str, dict[str, Any]]]:
        """The entries that were looked at longest ago; they now count as looked at."""
        now = time.time_ns() // 1_000_000
        with self._lock:
            # Looked at in a future that the clock has been set back from: it would be the last for as long.
            self._db.execute("UPDATE jobs SET checked_at = 0 WHERE checked_at > ?", (now,))
            rows = self._db.execute("SELECT job_id, entry FROM jobs ORDER BY checked_at LIMIT ?", (limit,)).fetchall()
            if rows:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("UPDATE jobs SET checked_at = ? WHERE job_id = ?", [(now, r[0]) for r in rows])
                self._db.execute("COMMIT")
        return [(job_id, json.loads(text)) for job_id, text in rows]

    def record_batch(self, batch_id: str, record: Mapping[str, Any], *, keep_s: float) -> None:
        """Write which jobs a batch has, for `keep_s`; on disk when this returns."""
        now = time.time()
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("DELETE FROM batches WHERE until < ?", (round(now),))
            row = (batch_id, json.dumps(record), round(now + keep_s))
            self._db.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?)", row)
            self._db.execute("COMMIT")

    def batch(self, batch_id: str) -> dict[str, Any] | None:
        """What `record_batch` wrote."""
        with self._lock:
            row = self._db.execute("SELECT record FROM batches WHERE batch_id = ?", (batch_id,)).fetchone()
        return json.loads(row[0]) if row else None

    def forget_batch(self, batch_id: str) -> None:
        """Drop a batch of which nothing was accepted."""
        with self._lock:
            self._db.execute("DELETE FROM batches WHERE batch_id = ?", (batch_id,))

    def __len__(self) -> int:
        """How many jobs it holds, those that were cancelled apart."""
        unfinished = "SELECT count(*) FROM jobs WHERE json_extract(entry, '$.cancelled_at') IS NULL"
        with self._lock:
            return int(self._db.execute(unfinished).fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
