"""The forms of REDIS_URL beside a plain address: a socket of this machine, and Sentinels, whose server may change."""

from __future__ import annotations

import contextlib
import gc
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hub.server import TestHub
from redis.sentinel import MasterNotFoundError
from support.checkpoints import checkpoint
from support.redis_roles import counted, waiting
from support.running import RedisProcess, Service, free_port, until

from workers.celery_app import create_app
from workers.ledger.connection import connect, is_local
from workers.ledger.steps import ENDED
from workers.settings import QueueSettings, Settings
from workers.up.redis_server import find_binary

PASSWORD = "p/a@s#s?"


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # celery's
def test_broker_backend_ledger_limiter_and_flower_reach_redis_by_its_socket(tmp_path: Path) -> None:
    service = Service(tmp_path, nodes={})
    service.redis.options = ["--unixsocket", str(tmp_path / "socket"), "--requirepass", PASSWORD]
    service.redis.url = f"unix://:{quote(PASSWORD, safe='')}@{tmp_path}/socket?db=0"
    service.redis_url = service.redis.url.replace("db=0", "db=2")
    assert is_local(service.redis_url)
    with service.redis:
        app = create_app(Settings.from_env(service.env), QueueSettings())
        with app.connection() as connection, connection.SimpleQueue("planner") as queue:
            queue.put({"a": 1})
            message = queue.get(timeout=5)
            assert message.payload == {"a": 1}
            message.ack()
        app.backend.store_result("one", {"b": 2}, "SUCCESS")
        assert app.AsyncResult("one").get(timeout=5) == {"b": 2}
        assert counted(service, limits="9/minute") == 1
        assert connect(service.redis_url).info("keyspace").keys() == {"db2"}
        # Flower looks into a socket's first database alone.
        service.redis_url = service.redis.url
        app = create_app(Settings.from_env(service.env), QueueSettings())
        with app.connection() as connection, connection.SimpleQueue("planner") as queue:
            queue.put({"a": 1})
            assert waiting(service) == [{"name": "planner", "messages": 1}]


class Sentinels(RedisProcess):
    """A Redis with a replica, and a Sentinel that makes the replica the master once the Redis is gone."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "master")
        login = ["--requirepass", PASSWORD, "--masterauth", PASSWORD]
        self.replica = RedisProcess(directory / "replica")
        self.options = login
        self.replica.options = [*login, "--replicaof", "127.0.0.1", str(self.port)]
        for server in (self, self.replica):
            server.url = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/0"
        self.sentinel_port = free_port()
        self.config = directory / "sentinel.conf"
        self.sentinel: subprocess.Popen[bytes] | None = None

    def start(self) -> Sentinels:
        super().start()
        self.replica.start()
        self.config.write_text(
            f"bind 127.0.0.1\nport {self.sentinel_port}\ndir {self.config.parent}\n"
            f"sentinel monitor mine 127.0.0.1 {self.port} 1\nsentinel auth-pass mine {PASSWORD}\n"
            "sentinel down-after-milliseconds mine 1000\nsentinel failover-timeout mine 3000\n"
        )
        command = [str(find_binary()[0]), str(self.config), "--sentinel"]
        self.sentinel = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        asked: Any = connect(f"redis://127.0.0.1:{self.sentinel_port}")
        until(lambda: asked.execute_command("SENTINEL", "REPLICAS", "mine"), what="the Sentinel knows the replica")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        for server in (self, self.replica):
            server.kill()
        if self.sentinel is not None:
            self.sentinel.kill()
            self.sentinel.wait()


def master(service: Service) -> tuple[str, int]:
    pool: Any = connect(service.redis_url).connection_pool
    found: tuple[str, int] = pool.get_master_address()
    return found


def done(service: Service, model: str) -> dict[str, Any]:
    jobs = service.jobs()
    job_id = jobs.submit_request(model)["job_id"]
    view: dict[str, Any] = until(
        lambda: (found := jobs.job(job_id))["state"] in ENDED and found, what=service.logs, timeout_s=120
    )
    assert view["state"] == "done", (view, service.logs())
    return view


# redis-py leaves the socket open with which it reached a server that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.deep
def test_a_service_outlives_the_server_that_its_sentinel_replaces(hub: TestHub, tmp_path: Path) -> None:
    hub.add_repo("tester/after", checkpoint("llama"))
    service = Service(tmp_path, nodes={"one": (1e11, 2 << 30)}, env={"HF_HOME": str(tmp_path / "hf")})
    service.redis = chain = Sentinels(tmp_path)
    # A Sentinel that is gone is asked first.
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{chain.sentinel_port}"
    service.redis_url = f"sentinel://:{quote(PASSWORD, safe='')}@{hosts}/0?master=mine"
    try:
        with service:
            chain.kill()

            def replaced() -> bool:
                with contextlib.suppress(MasterNotFoundError):
                    return bool(master(service)[1] == chain.replica.port)
                return False

            until(replaced, what="the replica is the master")
            done(service, "tester/after")
            assert counted(service, limits="9/minute") == 1
            # Flower asks the first Sentinel alone.
            service.redis_url = service.redis_url.replace(hosts, hosts.partition(",")[2])
            assert [queue["name"] for queue in waiting(service)] == ["planner"]
    finally:
        chain.end()
        gc.collect()
