"""Threads that work on one thing: the first failure stops all, and progress is told from the caller's thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from workers.progress import Progress

_TELL_S = 0.1


class Stopped(Exception):
    """Another thread failed or the caller gave up; says nothing of its own."""


class Crew:
    """A group of threads; use as a context, then `wait`."""

    def __init__(self, *, total: int, progress: Progress, what: str) -> None:
        self._total = total
        self._progress = progress
        self._what = what
        self._done = 0
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._stop = threading.Event()
        self._wakers: list[Callable[[], None]] = []

    def start(self, work: Callable[[], None], *, name: str) -> None:
        """Run `work` in a thread; what it raises stops the crew."""
        thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        with self._lock:
            self._threads.append(thread)
            self._running += 1
        thread.start()

    def advance(self, count: int) -> None:
        """`count` more units are done.

        Raises:
            Stopped: If the crew was stopped.
        """
        with self._lock:
            self._done += count
        self.check()

    def check(self) -> None:
        """Do nothing, unless the crew was stopped.

        Raises:
            Stopped: If it was.
        """
        if self._stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Sleep, unless the crew is stopped.

        Raises:
            Stopped: If it was, at once.
        """
        if self._stop.wait(seconds):
            raise Stopped

    def on_stop(self, wake: Callable[[], None]) -> None:
        """Call `wake` if the crew is stopped, to end what a thread is blocked in."""
        with self._lock:
            self._wakers.append(wake)

    def wait(self) -> None:
        """Tell progress until every thread has ended.

        Raises:
            BaseException: The first failure of a thread, or what `progress` raised; all threads have ended then.
        """
        try:
            while True:
                with self._changed:
                    if self._running and self._error is None:
                        self._changed.wait(_TELL_S)
                    running = self._running
                    done, error = self._done, self._error
                if error is not None:
                    raise error
                self._progress(done, self._total, what=self._what)
                if not running:
                    return
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Have every thread end, and wait until it has."""
        self._stop.set()
        while True:
            with self._lock:
                alive = [thread for thread in self._threads if thread.is_alive()]
                wakers = list(self._wakers)
            if not alive:
                return
            for wake in wakers:
                wake()
            alive[0].join(0.2)

    def _run(self, work: Callable[[], None]) -> None:
        error: BaseException | None = None
        try:
            with contextlib.suppress(Stopped):
                work()
        except BaseException as raised:  # noqa: BLE001 - handed to the caller's thread
            error = raised
        with self._changed:
            self._error = self._error or error
            self._running -= 1
            self._changed.notify_all()
