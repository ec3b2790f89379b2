"""`gunicorn -c python:web.gunicorn_conf web.wsgi:app`: a few processes of threads, since most requests wait.

A request that waits for a plan and an event stream hold a thread each; `WebSettings.waiters` and `.listeners`
together leave threads over for everyone else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from planner.errors import FairshardError
from web.services import stop_when
from workers.settings import WebSettings, check_environment

try:
    check_environment()
    _web = WebSettings.from_env()
except FairshardError as error:
    sys.exit(f"fairshard: {error}")  # gunicorn would show a traceback

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

#: Where the processes keep what they count, each in files of its own (prometheus_client's multi-process mode). In
#: memory as well: on a full disk, writing to a mapped file kills the process.
_counts = Path(worker_tmp_dir or tempfile.gettempdir()) / f"fairshard-counts-{os.getuid()}-{secrets.token_hex(8)}"
raw_env = [f"PROMETHEUS_MULTIPROC_DIR={_counts}"]

#: Seconds that a request under way may say nothing: it holds a thread until it was read.
_SILENCE_S = 10


def on_starting(_server: Any) -> None:
    """Make the folder of counts anew, and remove those of servers that were killed: nobody holds their lock."""
    for old in _counts.parent.glob(f"fairshard-counts-{os.getuid()}-*"):
        with contextlib.suppress(OSError):  # its server lives, or has just removed it
            handle = os.open(old, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
            finally:
                os.close(handle)
    made = _counts.with_name(f".{_counts.name}")  # by a name that no other server looks for, until it is locked
    made.mkdir(mode=0o700)
    fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_SH)  # until this process and its children are gone
    made.rename(_counts)


def child_exit(_server: Any, worker: Any) -> None:
    """A process ended: what it counted stays counted."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def on_exit(_server: Any) -> None:
    """Leave nothing behind."""
    shutil.rmtree(_counts, ignore_errors=True)


def post_worker_init(worker: Any) -> None:
    """Let event streams and waits end when the process is asked to: else it stays for the whole grace period."""
    stop_when(worker.wsgi, lambda: not worker.alive)
    for listener in worker.sockets:
        # The system's own limit, which connections inherit: gunicorn has none once it began to read.
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _SILENCE_S, 0))
