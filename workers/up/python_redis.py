"""A stand-in for Redis in pure Python, for machines that have no redis-server: for trying out only.

    python -m workers.up.python_redis CONFIG      serves the port that a redis.conf names, on loopback

fakeredis keeps everything in this process's memory, so nothing survives a restart. It lets in whoever connects from
this machine: it does not insist on a password. Its Lua is the real one (lupa); the ledger's scripts, Celery's queues
and whole jobs work on it, at about 1 ms a command.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from fakeredis import TcpFakeServer


class _Server(TcpFakeServer):
    # Every role opens its connections at once; socketserver's default keeps five of them waiting.
    request_queue_size = 128


def serve(config: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    said = dict(line.split(" ", 1) for line in config.read_text(encoding="utf-8").splitlines() if " " in line)
    server = _Server(("127.0.0.1", int(said["port"])), server_version=(7,))
    server.daemon_threads = True  # a client that stays connected must not keep it from ending
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
