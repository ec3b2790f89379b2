"""Accepted jobs that Redis lost come back: the web process looks into its journal every few seconds."""

from __future__ import annotations

import logging
import os
import threading

from planner.errors import FairshardError
from workers.jobs.jobs import Jobs

#: Between two looks, in seconds.
PERIOD_S = 5.0

_log = logging.getLogger("fairshard.web")


class Replayer:
    """A daemon thread that calls `jobs.replay()`; one a process, also after a fork."""

    def __init__(self, jobs: Jobs, *, period_s: float = PERIOD_S) -> None:
        self._jobs, self._period_s = jobs, period_s
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._stop = threading.Event()

    def ensure(self) -> None:
        """Start the thread if this process has none."""
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                threading.Thread(target=self._run, name="journal", daemon=True).start()

    def stop(self) -> None:
        """End the thread at its next look."""
        self._stop.set()

    def _run(self) -> None:
        for warning in self._jobs.warnings():
            _log.warning("%s", warning)
        while not self._stop.is_set():
            try:
                if count := self._jobs.replay():
                    _log.warning("%d accepted jobs that Redis had lost were submitted again", count)
            except FairshardError as error:  # Redis away: the next look may find it
                _log.info("the journal waits: %s", error)
            except Exception:  # noqa: BLE001  (logged; the thread must outlive whatever one look meets)
                _log.exception("the journal could not be read")
            self._stop.wait(self._period_s)
