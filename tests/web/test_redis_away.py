"""Redis stopped, frozen, wiped: clear answers soon, and what was accepted comes back."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakeredis import FakeRedis
from flask.testing import FlaskClient
from support.running import RedisProcess, until
from support.web_cases import NODES, WILLIW_METADATA, error_of

from planner.wire.documents import dumps
from web.app import create_app
from web.replayer import Replayer
from workers.ledger.connection import eviction
from workers.metadata_store.base import plan_path
from workers.metadata_store.open import open_store
from workers.settings import Settings

#: The promise is five seconds; a loaded machine gets some more before we call it broken.
SOON_S = 15.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis without a disk, to be taken away."""
    with RedisProcess(tmp_path / "redis") as redis:
        yield redis


@pytest.fixture
def own(redis: RedisProcess, tmp_path: Path) -> Settings:
    """Settings over it."""
    return Settings.from_env({"REDIS_URL": redis.url, "FAIRSHARD_DATA": str(tmp_path / "data"), "NODE_ID": "web"})


def _calls(client: FlaskClient) -> None:
    for path, body in (
        ("/api/request", {"model_name": "a/b"}),
        ("/api/process", {"model_name": "a/b"}),
        ("/api/batches", {"models": ["a/b"]}),
        ("/api/get-plan", {"model_name": "a/b", "node_id": "n"}),
    ):
        begun = time.monotonic()
        answer = client.post(path, json=body)
        assert time.monotonic() - begun < SOON_S
        assert answer.status_code == 503, path
        error = error_of(answer)
        assert error["code"] == "unavailable"
        assert "Redis" in error["error"]
        assert int(answer.headers["Retry-After"]) > 0


def test_without_redis_posts_are_503_soon(own: Settings, redis: RedisProcess) -> None:
    client = create_app(own, background=False).test_client()
    redis.kill()
    _calls(client)
    assert client.get("/api/jobs").status_code == 503
    health = client.get("/api/health")
    assert health.status_code == 503
    assert health.get_json() | {"timestamp": "", "version": ""} == {
        "status": "degraded",
        "live": True,
        "ready": False,
        "reason": "Redis does not answer, or refuses writes (its memory or its disk is full)",
        "warnings": [],
        "checks": {"redis": False, "planner": False, "nodes": False, "journal": True},
        "version": "",
        "timestamp": "",
    }
    assert client.get("/api/health/live").status_code == 200
    assert "fairshard_redis_up 0.0" in client.get("/metrics").get_data(as_text=True)
    assert client.get("/", headers={"Accept": "text/html"}).status_code == 200
    # And it needs no restart to find Redis again.
    redis.start()
    assert client.post("/api/request", json={"model_name": "a/b"}).status_code == 202


def test_a_frozen_redis_is_like_none(own: Settings, redis: RedisProcess) -> None:
    client = create_app(own, background=False).test_client()
    assert client.post("/api/request", json={"model_name": "a/b"}).status_code == 202
    assert redis.process is not None
    redis.process.send_signal(signal.SIGSTOP)
    try:
        _calls(client)
    finally:
        redis.process.send_signal(signal.SIGCONT)
    assert client.get("/api/jobs").status_code == 200


def test_a_redis_without_room_on_its_disk_is_like_none(own: Settings, redis: RedisProcess) -> None:
    client = create_app(own, background=False).test_client()
    job_id = client.post("/api/request", json={"model_name": "a/b"}).get_json()["job_id"]
    redis.lose_disk()
    for path, body in (("/api/request", {"model_name": "a/c"}), ("/api/batches", {"models": ["a/c"]})):
        answer = client.post(path, json=body)
        assert answer.status_code == 503, path
        assert "Redis refuses writes: " in error_of(answer)["error"]
        assert int(answer.headers["Retry-After"]) > 0
    assert client.delete(f"/api/jobs/{job_id}").status_code == 503
    assert client.get("/api/health").status_code == 503
    assert client.get(f"/api/jobs/{job_id}").get_json()["state"] == "queued"
    redis.find_disk()
    assert client.get("/api/health").get_json()["ready"]
    assert client.post("/api/request", json={"model_name": "a/c"}).status_code == 202
    assert len(client.get("/api/jobs").get_json()["jobs"]) == 2


def test_a_full_redis_is_not_ready_and_says_so(own: Settings, redis: RedisProcess) -> None:
    client = create_app(own, background=False).test_client()
    assert client.post("/api/request", json={"model_name": "a/b"}).status_code == 202
    with redis.client() as full:
        full.config_set("maxmemory", "1")  # a byte: less than it takes already
        answer = client.post("/api/request", json={"model_name": "a/c"})
        assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
        health = client.get("/api/health")
        assert (health.status_code, health.get_json()["ready"]) == (503, False)
        assert "memory" in health.get_json()["reason"]
        text = client.get("/metrics").get_data(as_text=True)
        assert "fairshard_accepts_jobs 0.0" in text
        assert "fairshard_redis_up 1.0" in text
        assert "fairshard_jobs_unfinished 1.0" in text
        full.config_set("maxmemory", "0")
    assert client.get("/api/health").get_json()["ready"]
    assert "fairshard_accepts_jobs 1.0" in client.get("/metrics").get_data(as_text=True)
    assert client.post("/api/request", json={"model_name": "a/c"}).status_code == 202


def test_a_redis_that_evicts_is_warned_of(
    own: Settings, redis: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(own, background=False)
    client = app.test_client()
    assert client.get("/api/health").get_json()["warnings"] == []
    with redis.client() as evicting:
        evicting.config_set("maxmemory-policy", "allkeys-lru")
    health = client.get("/api/health").get_json()
    (warning,) = health["warnings"]
    assert health["ready"]
    assert "allkeys-lru" in warning
    assert "noeviction" in warning
    replayer = Replayer(app.extensions["fairshard"].jobs, period_s=0.1)
    with caplog.at_level("WARNING", logger="fairshard.web"):
        replayer.ensure()
        until(lambda: warning in caplog.text, what="the log warns at the start", timeout_s=10)
    replayer.stop()
    # The stand-in of a system without Redis does not know INFO.
    assert eviction(FakeRedis()) is None


def test_without_a_journal_that_can_be_written_it_is_not_ready(own: Settings, redis: RedisProcess) -> None:
    client = create_app(own, background=False).test_client()
    assert client.get("/api/health").get_json()["reason"] is None
    other = sqlite3.connect(own.data_dir / "journal.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    # What was written a moment ago counts for a moment.
    until(lambda: client.get("/api/health").status_code == 503, what="the journal is missed", timeout_s=SOON_S)
    health = client.get("/api/health").get_json()
    assert (health["ready"], health["checks"]["redis"], health["checks"]["journal"]) == (False, True, False)
    assert "FAIRSHARD_DATA" in health["reason"]
    assert str(own.data_dir) not in health["reason"]
    assert client.get("/api/health/live").get_json()["reason"] is None
    answer = client.post("/api/request", json={"model_name": "a/b"})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    other.close()
    assert client.get("/api/health").get_json()["ready"]
    assert client.post("/api/request", json={"model_name": "a/b"}).status_code == 202


def test_the_rate_is_still_limited(own: Settings, redis: RedisProcess) -> None:
    client = create_app(own, background=False, rate_limit="3/hour").test_client()
    redis.kill()
    statuses = [client.get("/docs").status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]


def test_a_stored_plan_is_answered_from_the_store(own: Settings, redis: RedisProcess) -> None:
    client = create_app(own, background=False).test_client()
    made = client.post("/api/plans/preview", json={"metadata": WILLIW_METADATA, "available_nodes": NODES}).get_json()
    plan = {name: value for name, value in made.items() if name != "explanation"}
    open_store(own.store_dir).write({plan_path(plan["plan_id"]): dumps(plan)}, message="A plan")
    redis.kill()
    answer = client.get(f"/api/plans/{plan['plan_id']}")
    assert answer.status_code == 200
    assert answer.get_json() == plan | {"source": "store"}
    # One that the store has not either: it is Redis that is missing, not certainly the plan.
    other = client.get("/api/plans/00000000ffffffff")
    assert other.status_code == 503
    error_of(other)


def test_an_accepted_job_is_queued_even_when_redis_forgot_it(own: Settings, redis: RedisProcess) -> None:
    app = create_app(own, background=False)
    client = app.test_client()
    job_id = client.post("/api/request", json={"model_name": "a/b", "batch_size": 2}).get_json()["job_id"]
    redis.kill()
    redis.start()  # without a disk: it knows nothing
    job = client.get(f"/api/jobs/{job_id}")
    assert job.status_code == 200
    assert (job.get_json()["state"], job.get_json()["model_name"]) == ("queued", "a/b")
    replayer = Replayer(app.extensions["fairshard"].jobs, period_s=0.1)
    replayer.ensure()
    try:
        until(lambda: client.get("/api/jobs").get_json()["jobs"], what="the job is back", timeout_s=60)
    finally:
        replayer.stop()
    (entry,) = client.get("/api/jobs").get_json()["jobs"]
    assert (entry["job_id"], entry["params"]["batch_size"]) == (job_id, 2)
