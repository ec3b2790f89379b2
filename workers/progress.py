"""How long-running work reports its progress, and is told to stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

#: Seconds that a rate looks back over: long enough to be calm, short enough to follow a server's moods.
_WINDOW_S = 15.0


class Progress(Protocol):
    """Called often by long work; whoever passes it in limits how often it acts.

    A call may raise (`planner.errors.Cancelled`, say): the work then stops at once and leaves nothing half written.
    """

    def __call__(self, done: int, total: int | None, /, *, what: str = "") -> None:
        """`done` of `total` (None: not known) units, usually bytes, of `what`."""


def silent(done: int, total: int | None, /, *, what: str = "") -> None:
    """Reports to nobody."""


class Watch(Protocol):
    """Whoever runs the work of this context: shows what it waits for, and can end the wait."""

    def stoppable(self, why: str, until_s: float | None) -> AbstractContextManager[None]:
        """A block of work that may be ended at any point by an exception of the watch's own.

        Args:
            why: What it waits for, to be shown; "": nothing.
            until_s: Until when, in seconds since the epoch; None: not known.
        """


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(by: Watch) -> Iterator[None]:
    """Have `by` watch what runs within the block; threads are watched if they run in a copy of its context."""
    token = _watch.set(by)
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def stoppable(why: str = "", *, until_s: float | None = None) -> Iterator[None]:
    """A block that can be left at any point, such as a request: it ends at once when the work is to stop.

    Nothing within may need to be finished once it is begun. Without a watch it is a block like any other.
    """
    watch = _watch.get()
    if watch is None:
        yield
        return
    with watch.stoppable(why, until_s):
        yield


def wait(seconds: float, why: str, *, pause: Callable[[float], object] = time.sleep) -> None:
    """Sleep, and say for what; ends at once when the work is to stop.

    Args:
        seconds: How long.
        why: What is waited for: "the Hub asks to wait 100 s (HTTP 429)".
        pause: Sleeps; may raise to stop.
    """
    with stoppable(why, until_s=time.time() + seconds):
        pause(seconds)


class Pace:
    """The rate of some work over the last seconds, and how long the rest will take at that rate."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what = ""
        #: (time, units done by then), oldest first.
        self._told: deque[tuple[float, int]] = deque()

    def figures(self, done: int, total: int | None, what: str) -> dict[str, float | None]:
        """`{rate_per_s, eta_s}`: units a second, and seconds; None where there is nothing to tell it by yet."""
        now = self._clock()
        if self._told and (what != self._what or done < self._told[-1][1]):
            self._told.clear()
        self._what = what
        self._told.append((now, done))
        while len(self._told) > 2 and now - self._told[1][0] >= _WINDOW_S:
            self._told.popleft()
        began, before = self._told[0]
        if now <= began:
            return {"rate_per_s": None, "eta_s": None}
        rate = (done - before) / (now - began)
        left = None if total is None or not rate else round(max(0, total - done) / rate, 1)
        return {"rate_per_s": round(rate, 1), "eta_s": left}
