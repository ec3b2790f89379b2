"""/metrics under a real gunicorn of two processes: one truth, whichever of them answers."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from support.running import RedisProcess, until
from support.web_cases import Server

Sample = tuple[str, frozenset[tuple[str, str]]]
#: Where `web.gunicorn_conf` has the processes count.
_COUNTS = Path("/dev/shm")


@pytest.fixture(scope="module")
def server(bare_redis: RedisProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The API over a Redis that nobody works for."""
    with bare_redis.client() as client:
        client.flushall()
    directory = tmp_path_factory.mktemp("metrics")
    with Server(directory, {"REDIS_URL": bare_redis.url, "FAIRSHARD_DATA": str(directory / "data")}) as server:
        yield server


def _sample(name: str, **labels: str) -> Sample:
    return name, frozenset(labels.items())


def _parsed(text: str) -> dict[Sample, float]:
    found: dict[Sample, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def _scrape(server: Server) -> dict[Sample, float]:
    status, body = server.get("/metrics")
    assert status == 200
    return _parsed(body.decode())


def _workers(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    return psutil.Process(server.process.pid).children()


def _folders(server: Server) -> set[Path]:
    return {
        path.parent for worker in _workers(server) for path in _COUNTS.glob(f"fairshard-counts-*/*_{worker.pid}.db")
    }


def test_counters_never_go_back_not_even_when_a_process_dies(server: Server) -> None:
    assert len(_workers(server)) == 2
    jobs = _sample("fairshard_http_responses_total", route="/api/jobs", method="GET", status="200")
    seconds = _sample("fairshard_http_response_seconds_count", route="/api/jobs", method="GET", status="2xx")
    before: dict[Sample, float] = {}
    for look in range(1, 31):
        assert server.get("/api/jobs")[0] == 200
        now = _scrape(server)
        assert now[jobs] == look
        back = {key for key, value in before.items() if "seconds_sum" not in key[0] and now.get(key, -1) < value}
        assert not back
        before = now
        if look == 15:
            old = {worker.pid for worker in _workers(server)}
            os.kill(min(old), signal.SIGKILL)

            def replaced(old: set[int] = old) -> bool:
                return len({worker.pid for worker in _workers(server)} - old) == 1

            until(replaced, what="it is replaced")
    assert before[seconds] == 30


def test_the_ledgers_numbers_are_there_once(server: Server) -> None:
    sent = urllib.request.Request(
        f"{server.url}/api/request", data=b'{"model_name": "a/b"}', headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(sent, timeout=30) as answer:
        assert answer.status == 202
    for _ in range(5):  # either process
        found = _scrape(server)
        assert found["fairshard_jobs_submitted_total", frozenset()] == 1
        assert found["fairshard_jobs_unfinished", frozenset()] == 1
        assert found["fairshard_redis_up", frozenset()] == 1
        assert found["fairshard_accepts_jobs", frozenset()] == 1


def test_strangers_cannot_make_labels(client: FlaskClient) -> None:
    for number in range(50):
        client.get(f"/nothing/{number}")
        client.get(f"/api/jobs/{number:08x}")
        client.open("/api/nodes", method=f"BREW{number}")
    text = client.get("/metrics").get_data(as_text=True)
    labels = [dict(labels) for name, labels in _parsed(text) if name == "fairshard_http_responses_total"]
    assert {(found["route"], found["method"]) for found in labels} == {
        ("unmatched", "GET"), ("/api/jobs/<job_id>", "GET"), ("unmatched", "other"),
    }  # fmt: skip


@pytest.mark.skipif(not _COUNTS.is_dir(), reason="counts lie in /dev/shm where there is one")
def test_a_killed_servers_counts_are_removed_by_the_next_one(server: Server, tmp_path: Path) -> None:
    env = {name: server.env[name] for name in ("REDIS_URL", "FAIRSHARD_DATA")}
    with Server(tmp_path, env) as first:
        assert first.process is not None
        (left,) = _folders(first)
        processes = [first.process.pid, *(worker.pid for worker in _workers(first))]
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        first.process.wait()
        until(lambda: not any(psutil.pid_exists(pid) for pid in processes[1:]), what="all are gone")
        assert left.is_dir()
        living = _folders(server)
    with Server(tmp_path, env) as second:
        assert not left.exists()
        assert all(folder.is_dir() for folder in living)
        (own,) = _folders(second)
    assert not own.exists()
