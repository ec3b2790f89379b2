"""`gunicorn -c python:web.gunicorn_conf web.wsgi:app`: a few processes of threads, since most requests wait.

A request that waits for a plan and an event stream hold a thread each; `WebSettings.waiters` and `.listeners`
together leave threads over for everyone else.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

from web.services import stop_when
from workers.settings import WebSettings

_web = WebSettings.from_env()

bind = _web.bind
worker_class = "web.gunicorn_worker.Worker"
workers = 2
threads = _web.waiters + _web.listeners + 8
#: A worker that says nothing for so long is replaced; threads that wait do not count as silence.
timeout = 60
graceful_timeout = 30
keepalive = 5
#: Heartbeats in memory, where there is such a folder (Linux): a slow disk must not look like a dead worker.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nosec B108  # noqa: S108
#: Request lines are bounded before any of our code sees them.
limit_request_line = 4094
limit_request_fields = 64
accesslog = None
errorlog = "-"

#: Seconds that a request under way may say nothing: it holds a thread until it was read.
_SILENCE_S = 10


def post_worker_init(worker: Any) -> None:
    """Let event streams and waits end when the process is asked to: else it stays for the whole grace period."""
    stop_when(worker.wsgi, lambda: not worker.alive)
    for listener in worker.sockets:
        # The system's own limit, which connections inherit: gunicorn has none once it began to read.
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _SILENCE_S, 0))
