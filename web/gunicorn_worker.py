"""Gunicorn's threads, with an end to requests that never finish arriving.

Gunicorn waits for the rest of a request for as long as a byte comes now and then, and each such client holds a
thread.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from workers.settings import WebSettings


class Worker(ThreadWorker):
    """`ThreadWorker` that hears no more of a request once it took `WebSettings.max_arrival_s`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As gunicorn makes it."""
        super().__init__(*args, **kwargs)
        self._longest_s = WebSettings.from_env().max_arrival_s
        self._deadlines: dict[Any, float] = {}

    def handle(self, conn: Any) -> Any:
        """Read a request and answer it, in a thread of its own."""
        self._deadlines[conn] = time.monotonic() + self._longest_s
        try:
            return super().handle(conn)
        finally:
            del self._deadlines[conn]

    def notify(self) -> None:
        """Tell the arbiter that this process lives; called every second."""
        super().notify()
        now = time.monotonic()
        for conn, deadline in list(self._deadlines.items()):
            if now > deadline:
                # What was read whole is still answered: this ends reading alone.
                with contextlib.suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RD)
