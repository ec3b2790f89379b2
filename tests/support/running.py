"""Real Redis servers and real Celery workers for tests: started, killed, stopped and restarted as processes."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import redis

from workers.up.redis_server import _version, find_binary


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(
    condition: Callable[[], Any], *, what: str | Callable[..., str], timeout_s: float = 60.0, every_s: float = 0.05
) -> Any:
    """Poll until `condition()` is true, and return it; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what() if callable(what) else what}"
        time.sleep(every_s)


@functools.cache
def _traces() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fairshard-traces-")


def share_traces(data: Path) -> Path:
    """Have the service with this data folder find the traces of this test process's other services.

    A model is traced by the first that profiles it; the others' processes need not load torch.
    """
    data.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (data / "traces").symlink_to(_traces().name)
    return data


class RedisProcess:
    """A Redis of one's own; the port stays the same over restarts."""

    def __init__(self, directory: Path, *, appendonly: bool = False) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None
        self._appendonly = appendonly
        self._binary, _ = find_binary()
        #: More of redis-server's options.
        self.options: list[str] = []

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", ""]
        arguments += self.options
        arguments += ["--appendonly", "yes" if self._appendonly else "no", "--appendfsync", "everysec"]
        if _version(self._binary) >= (7,):
            arguments += ["--enable-protected-configs", "local"]  # `find_disk` names the folder anew
        with (self.directory / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([str(self._binary), *arguments], stdout=log, stderr=log)
        with self.client() as client:
            until(lambda: _pings(client), what="Redis answers", timeout_s=30)
        return self

    def client(self) -> redis.Redis:
        """A client that decodes."""
        return redis.Redis.from_url(self.url, decode_responses=True)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, *, timeout_s: float = 30.0) -> int:
        """SIGTERM, and the exit code; the append-only file is whole then."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(timeout=timeout_s)
        self.process = None
        return code

    def lose_disk(self) -> None:
        """Let it find that it can't write to its disk: it refuses to change anything then."""
        shutil.rmtree(self.directory)
        with self.client() as client:
            client.config_set("save", "3600 1")
            client.bgsave()
            until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", what="Redis misses its disk")

    def find_disk(self) -> None:
        """It can write again."""
        self.directory.mkdir()
        with self.client() as client:
            client.config_set("dir", str(self.directory))
            client.bgsave()
            until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok", what="Redis has its disk")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


class BlackHole:
    """A TCP proxy that, when told, swallows what its connections carry; connections made after that work."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        #: Pairs of sockets that carry a connection.
        self._open: set[tuple[socket.socket, socket.socket]] = set()
        self._holes: set[tuple[socket.socket, socket.socket]] = set()
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._listener.close()
        with self._lock:
            pairs = list(self._open)
        for pair in pairs:
            self._close(pair)

    def swallow(self) -> int:
        """From now on nothing passes on the connections that exist, and nobody is told; how many they are."""
        with self._lock:
            self._holes |= self._open
            return len(self._open)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            pair = (near, far)
            with self._lock:
                self._open.add(pair)
            for source, target in (pair, (far, near)):
                threading.Thread(target=self._pump, args=(pair, source, target), daemon=True).start()

    def _pump(self, pair: tuple[socket.socket, socket.socket], source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if pair not in self._holes:
                    target.sendall(data)
        # An end that was swallowed is not told that the other went; it finds out by itself.
        if pair not in self._holes or source is pair[0]:
            self._close(pair)

    def _close(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._open.discard(pair)
            self._holes.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Role:
    """A process of the service, with those that it started."""

    process: subprocess.Popen[bytes] | None

    def kill(self) -> None:
        """kill -9 to the whole group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self, *, timeout_s: float = 60.0) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=timeout_s)
        self.kill()
        return code


class Worker(Role):
    """A Celery worker process of the service; its log is one file over restarts."""

    def __init__(
        self, name: str, queues: str, *, env: Mapping[str, str], directory: Path, app: str = "workers.celery_app"
    ) -> None:
        self.name = name
        self.queues = queues
        self.app = app
        self.env = dict(os.environ) | dict(env) | {"REMAP_SIGTERM": "SIGQUIT"}
        self.log_path = directory / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._log_begin = 0

    def start(self) -> Self:
        """Start it, without waiting."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_begin = self.log_path.stat().st_size if self.log_path.exists() else 0
        arguments = ["-A", self.app, "worker", "-Q", self.queues, "-n", f"{self.name}@%h", "-c", "1"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", *arguments, "--loglevel", "INFO"],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def log(self) -> str:
        """What it said since its last start."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_begin)
            return file.read().decode(errors="replace")

    def ready(self) -> bool:
        """Whether it consumes, and has announced itself (celery's own "ready" comes before that)."""
        assert self.alive(), f"{self.name} died:\n{self.log[-3000:]}"
        return " serving " in self.log

    def alive(self) -> bool:
        """Whether its main process lives."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the main process."""
        assert self.process is not None
        self.process.send_signal(number)

    def children(self) -> list[int]:
        """Pids of its pool processes."""
        import psutil

        assert self.process is not None
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


class Web(Role):
    """The API, served by gunicorn as it is delivered; the port stays the same over restarts."""

    def __init__(self, *, env: Mapping[str, str], directory: Path, app: str = "web.wsgi:app") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = dict(os.environ) | dict(env) | {"FAIRSHARD_BIND": f"127.0.0.1:{self.port}"}
        self.log_path = directory / "web.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._app = app

    def start(self) -> Self:
        """Start it, without waiting."""
        arguments = ["-c", "python:web.gunicorn_conf", "--no-control-socket", self._app]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *arguments],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float = 20.0) -> tuple[int, Any]:
        """Status and JSON of an answer; 0 where there was none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return int(answer.status), json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except (OSError, http.client.HTTPException):
            return 0, None

    def ready(self) -> bool:
        """Whether it answers."""
        assert self.process is not None
        assert self.process.poll() is None, self.log_path.read_text()[-3000:]
        return self.ask("GET", "/api/health/live")[0] == 200

    def __enter__(self) -> Self:
        self.start()
        until(self.ready, what=lambda: self.log_path.read_text()[-3000:])
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Service:
    """Redis, a planner and nodes of stated, unequal size, with one data folder."""

    #: node_id -> (FLOP/s, bytes).
    NODES: Mapping[str, tuple[float, int]] = {
        "big": (300e9, 8 << 30),
        "mid": (200e9, 4 << 30),
        "small": (100e9, 2 << 30),
    }

    def __init__(
        self,
        directory: Path,
        *,
        models_dir: Path | None = None,
        nodes: Mapping[str, tuple[float, int]] | None = None,
        env: Mapping[str, str] | None = None,
        appendonly: bool = True,
        app: str = "workers.celery_app",
    ) -> None:
        self.directory = directory
        self.data = share_traces(directory / "data")
        self.redis = RedisProcess(directory / "redis", appendonly=appendonly)
        self.nodes = dict(self.NODES if nodes is None else nodes)
        self.env = {
            "REDIS_URL": self.redis.url,
            "FAIRSHARD_DATA": str(self.data),
            "FAIRSHARD_MODELS_DIR": str(models_dir or self.data / "models"),
        } | dict(env or {})
        self.app = app
        self.planner = Worker("planner", "planner", env=self.env, directory=directory / "logs", app=app)
        self.workers = {node_id: self._node(node_id) for node_id in self.nodes}

    def _node(self, node_id: str) -> Worker:
        flop_per_s, memory_bytes = self.nodes[node_id]
        env = self.env | {
            "NODE_ID": node_id,
            "FAIRSHARD_FLOP_PER_S": repr(flop_per_s),
            "FAIRSHARD_MEMORY_BYTES": str(memory_bytes),
        }
        return Worker(node_id, f"compute,node.{node_id}", env=env, directory=self.directory / "logs", app=self.app)

    @property
    def redis_url(self) -> str:
        """How the processes reach Redis."""
        return self.env["REDIS_URL"]

    @redis_url.setter
    def redis_url(self, url: str) -> None:
        for env in (self.env, *(worker.env for worker in self.all_workers)):
            env["REDIS_URL"] = url

    @property
    def all_workers(self) -> list[Worker]:
        """Planner and nodes."""
        return [self.planner, *self.workers.values()]

    def __enter__(self) -> Self:
        self.redis.start()
        for worker in self.all_workers:
            worker.start()
        for worker in self.all_workers:
            until(worker.ready, what=lambda w=worker: f"{w.name} is ready:\n{w.log[-2000:]}", timeout_s=120)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all_workers:
            worker.kill()
        self.redis.kill()

    def jobs(self, *, journal: bool = False) -> Any:
        """The service's jobs, as the web process sees them."""
        from workers.jobs.jobs import Jobs
        from workers.settings import QueueSettings, Settings

        return Jobs.from_settings(
            Settings.from_env(self.env), queue=QueueSettings.from_env(self.env), journal=journal
        )

    def shards(self, node_id: str, plan_id: str) -> Path:
        """Where a node's shard of a plan lies."""
        return self.data / "nodes" / node_id / "shards" / plan_id

    def logs(self) -> str:
        """The end of every worker's log, for a failed test's message."""
        return "\n".join(f"---- {w.name}\n{w.log[-2500:]}" for w in self.all_workers if w.log_path.exists())
