"""A group of threads: the first failure stops all, and progress is reported from the caller's thread."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from workers.progress import Progress

_TELL_S = 0.1
#: More than anyone asks for; a thread begins only when there is work for it.
_MOST_THREADS = 1024


class Stopped(Exception):
    """Ends a thread, because another one failed or the caller gave up."""


class ThreadGroup:
    """Threads that work on one thing; start them, then `wait`."""

    def __init__(self, *, total: int, progress: Progress, what: str) -> None:
        self._total = total
        self._progress = progress
        self._what = what
        self._done = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_MOST_THREADS, what)
        self._futures: list[Future[None]] = []
        self._wakers: list[Callable[[], None]] = []

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` in a thread; what it raises stops the group."""

        def run() -> None:
            with contextlib.suppress(Stopped):
                work()

        # In a copy of the caller's context: who watches the caller sees what its threads wait for.
        self._futures.append(self._pool.submit(contextvars.copy_context().run, run))

    def advance(self, count: int) -> None:
        """`count` more units are done.

        Raises:
            Stopped: If the group was stopped.
        """
        with self._lock:
            self._done += count
        self.check()

    def check(self) -> None:
        """Do nothing, unless the group was stopped.

        Raises:
            Stopped: If it was.
        """
        if self._stop.is_set():
            raise Stopped

    def pause(self, seconds: float) -> None:
        """Sleep, unless the group is stopped.

        Raises:
            Stopped: If it was, at once.
        """
        if self._stop.wait(seconds):
            raise Stopped

    def on_stop(self, wake: Callable[[], None]) -> None:
        """Call `wake` if the group is stopped, to end what a thread is blocked in."""
        self._wakers.append(wake)

    def wait(self) -> None:
        """Report progress until every thread has ended.

        Raises:
            BaseException: The first failure of a thread, or what `progress` raised; all threads have ended then.
        """
        try:
            while True:
                done, running = wait(tuple(self._futures), _TELL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                self._progress(self._done, self._total, what=self._what)
                if not running and len(done) == len(self._futures):
                    self._pool.shutdown()
                    return
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Have every thread end, and wait until it has."""
        self._stop.set()
        while wait(tuple(self._futures), 0.0).not_done:
            for wake in tuple(self._wakers):
                wake()
            wait(tuple(self._futures), 0.2)
        self._pool.shutdown()
