"""What the web's journal does when Redis has lost what it was told."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError
from support.running import RedisProcess, until

from planner.errors import LimitExceeded, NotFound, Unavailable
from workers.jobs.jobs import Jobs
from workers.jobs.journal import Accepted
from workers.ledger.steps import Claimed
from workers.settings import QueueSettings, Settings


class Web:
    """The jobs of a web process, over a Redis that can be wiped."""

    def __init__(self, server: RedisProcess, data: Path, *, job_ttl_s: float = 1000.0) -> None:
        self.server = server
        self.client: Any = server.client()
        self.client.flushall()
        env = {"REDIS_URL": server.url, "FAIRSHARD_DATA": str(data), "NODE_ID": "web"}
        queue = QueueSettings(job_ttl_s=job_ttl_s)
        self.jobs = Jobs.from_settings(Settings.from_env(env), journal=True, queue=queue)

    @property
    def journal(self) -> Accepted:
        assert self.jobs._journal is not None
        return self.jobs._journal

    def move(self, seconds: int, *job_ids: str) -> None:
        """Let entries of the journal (all, or those named) have been made, and cancelled, `seconds` later."""
        every = [row[0] for row in self.journal._db.execute("SELECT job_id FROM jobs").fetchall()]
        for job_id in job_ids or every:
            for name in ("created_at", "cancelled_at"):
                later = f"json_replace(entry, '$.{name}', json_extract(entry, '$.{name}') + ?)"
                self.journal._db.execute(
                    f"UPDATE jobs SET entry = {later} WHERE job_id = ?", (seconds * 1000, job_id)
                )

    def wipe(self) -> None:
        """Redis knows nothing any more, and what it was told is not of this moment."""
        self.client.flushall()
        self.move(-10)

    def states(self, job_id: str) -> dict[str, str]:
        view = self.jobs._services.ledger.views.job(job_id)
        return {"job": view["state"]} | {step["name"]: step["state"] for step in view["steps"]}


@pytest.fixture
def web(server: RedisProcess, tmp_path: Path) -> Web:
    return Web(server, tmp_path / "data")


def test_what_waited_for_a_request_waits_for_it_again(web: Web) -> None:
    pairs = []
    for n in range(8):
        request = web.jobs.submit_request(f"tester/m{n}")["job_id"]
        pairs.append((request, web.jobs.submit_process(f"tester/m{n}")["job_id"]))
    # A clock that was set back meanwhile: the order of time is not the order in which they need each other.
    web.move(-60, pairs[0][1])
    web.wipe()
    assert web.jobs.replay() == 16
    for request, process in pairs:
        assert web.states(request)["download"] == "queued"
        assert web.states(process) == {"job": "queued", "plan": "waiting"}
    assert web.jobs.replay() == 0


def test_jobs_come_back_in_the_order_in_which_they_were_accepted(web: Web) -> None:
    job_ids = [web.jobs.submit_request(f"tester/m{n}")["job_id"] for n in range(9)]
    for n, job_id in enumerate(job_ids):
        web.move(n, job_id)
    web.jobs.replay()  # all have been looked at in the same moment
    web.move(-20)
    web.wipe()
    web.jobs.replay()
    woken = list(reversed(web.client.lrange("fairshard:celery:compute", 0, -1)))
    assert [next(job_id for job_id in job_ids if job_id in message) for message in woken] == job_ids


def test_a_job_is_found_again_though_the_same_was_submitted_before_the_replay(web: Web) -> None:
    first = web.jobs.submit_request("tester/same")["job_id"]
    waiting = web.jobs.submit_process("tester/same")["job_id"]
    web.wipe()
    second = web.jobs.submit_request("tester/same")["job_id"]
    assert second != first
    web.jobs.replay()
    assert web.states(first)["job"] == web.states(second)["job"] == "queued"
    assert web.states(waiting)["plan"] == "waiting"
    assert web.jobs.job(waiting)["waits_for"] == first
    # Whoever asks once more shares the work of the one that stands for it.
    assert web.jobs.submit_request("tester/same")["job_id"] == second
    web.jobs.cancel(second)
    assert web.states(first)["job"] == "queued"
    assert web.journal.get(first) is not None


def test_a_job_whose_submission_was_repeated_stays_in_the_journal(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = web.jobs._services.ledger
    submit = ledger.submit

    def twice(*args: Any, **options: Any) -> Any:
        """As the client repeats a call whose answer was lost."""
        submit(*args, **options)
        return submit(*args, **options)

    monkeypatch.setattr(ledger, "submit", twice)
    job_id = web.jobs.submit_request("tester/twice", hub_token="hf_token")["job_id"]
    assert web.journal.get(job_id) is not None
    assert web.jobs._services.tokens.get(job_id) == "hf_token"


def test_what_was_cancelled_does_not_come_back_to_run(web: Web) -> None:
    request = web.jobs.submit_request("tester/gone")["job_id"]
    waiting = web.jobs.submit_process("tester/gone")["job_id"]
    other = web.jobs.submit_request("tester/other")["job_id"]
    assert web.jobs.cancel(request)["state"] == "cancelled"
    web.wipe()
    # Nothing of it in Redis, and cancelled all the same.
    assert web.jobs.cancel(other)["state"] == "cancelled"
    for _ in range(2):
        web.move(-10)
        assert web.jobs.replay() == 0
        views = [web.jobs.job(job_id) for job_id in (request, waiting, other)]
        assert [view["state"] for view in views] == ["cancelled"] * 3
        assert all(view["ended_at"] for view in views)
        assert {step["state"] for view in views for step in view["steps"]} == {"cancelled"}
    assert web.jobs.metrics()["journal_jobs"] == 0


def test_a_redis_that_forgot_only_the_cancel_is_told_again(web: Web) -> None:
    job_id = web.jobs.submit_request("tester/back")["job_id"]
    before = web.client.dump(f"fairshard:job:{job_id}")
    assert web.jobs.cancel(job_id)["state"] == "cancelled"
    web.client.restore(f"fairshard:job:{job_id}", 0, before, replace=True)
    assert web.states(job_id)["job"] == "queued"
    web.move(-10)
    web.jobs.replay()
    assert web.states(job_id)["job"] == "cancelled"
    web.jobs.replay()
    assert web.journal.get(job_id) is None


def models(count: int) -> list[dict[str, Any]]:
    return [{"model_name": f"tester/b{n}"} for n in range(count)]


def away_after(web: Web, accepted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis is killed once it has taken so many jobs."""
    ledger, taken = web.jobs._services.ledger, list[Any]()
    submit = ledger.submit

    def counted(*args: Any, **options: Any) -> Any:
        if len(taken) == accepted:
            web.server.kill()
        taken.append(submit(*args, **options))
        return taken[-1]

    monkeypatch.setattr(ledger, "submit", counted)


def test_a_batch_outlives_redis(web: Web) -> None:
    batch = web.jobs.batches.submit([*models(3), {"model_name": "no name"}, {"model_name": "tester/b0"}])
    assert batch["counts"] == {"queued": 4, "failed": 1}
    assert web.jobs.batches.get(batch["batch_id"]) == batch
    web.wipe()
    assert web.jobs.batches.get(batch["batch_id"]) == batch
    web.jobs.replay()
    assert web.jobs.batches.get(batch["batch_id"]) == batch
    assert len({job["job_id"] for job in batch["jobs"]}) == 4
    web.jobs.cancel(batch["jobs"][0]["job_id"])
    assert web.jobs.batches.get(batch["batch_id"])["counts"] == {"queued": 2, "failed": 1, "cancelled": 2}


def test_a_batch_is_forgotten_with_its_jobs(web: Web) -> None:
    journal = web.journal
    journal.record_batch("old", {"jobs": []}, keep_s=-1)
    assert journal.batch("old") == {"jobs": []}
    journal.record_batch("new", {"jobs": []}, keep_s=1000)
    assert journal.batch("old") is None
    assert journal.batch("new") == {"jobs": []}


def test_a_redis_that_goes_away_in_the_middle_of_a_batch_leaves_what_was_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisProcess(tmp_path / "redis") as server:
        web = Web(server, tmp_path / "data")
        away_after(web, 3, monkeypatch)
        batch = web.jobs.batches.submit(models(200))
        assert batch["counts"] == {"queued": 3, "failed": 197}
        assert {job["error"]["code"] for job in batch["jobs"][3:]} == {"unavailable"}
        assert all("Redis" in job["error"]["message"] for job in batch["jobs"][3:])
        assert len(web.journal) == 3
        server.start()
        assert web.jobs.batches.get(batch["batch_id"]) == batch


def test_a_batch_of_which_nothing_was_accepted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisProcess(tmp_path / "redis") as server:
        web = Web(server, tmp_path / "data")
        away_after(web, 0, monkeypatch)
        with pytest.raises(Unavailable, match="Redis"):
            web.jobs.batches.submit([{"model_name": "no name"}, *models(5)])
        with pytest.raises(Unavailable, match="Redis"):
            web.jobs.batches.submit(models(5))
        assert len(web.journal) == 0
        assert web.journal._db.execute("SELECT count(*) FROM batches").fetchone() == (0,)


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_was_set_holds_nothing_back(web: Web, hours: int) -> None:
    job_id = web.jobs.submit_request("tester/clock")["job_id"]
    web.client.flushall()
    web.move(3600 * hours)
    assert web.jobs.replay() == 1
    assert web.states(job_id)["job"] == "queued"


def test_what_was_looked_at_in_the_future_has_its_turn(web: Web) -> None:
    first, second = (web.jobs.submit_request(f"tester/{n}")["job_id"] for n in range(2))
    web.journal._db.execute("UPDATE jobs SET checked_at = checked_at + 3600000 WHERE job_id = ?", (first,))
    assert [job_id for job_id, _ in web.journal.least_recent(1)] == [first]
    assert [job_id for job_id, _ in web.journal.least_recent(1)] == [second]


def test_what_ended_and_is_forgotten_does_not_run_again(server: RedisProcess, tmp_path: Path) -> None:
    web = Web(server, tmp_path / "data", job_ttl_s=0.1)
    ledger = web.jobs._services.ledger
    looked_at, unseen = (web.jobs.submit_request(f"tester/{n}")["job_id"] for n in range(2))
    for job_id in (looked_at, unseen):
        for name in ("download", "profile", "publish"):
            claimed = ledger.claim(job_id, name, owner="n#1")
            assert isinstance(claimed, Claimed)
            assert ledger.commit(claimed, {}) == "ok"
    until(
        lambda: not web.client.exists(*(f"fairshard:job:{job_id}" for job_id in (looked_at, unseen))), what="expiry"
    )
    web.move(-10, looked_at)
    assert web.jobs.replay() == 0
    # Nor by a look that began before that and had found nothing of it.
    assert not ledger.submit("request", model_name="tester/0", params={}, steps=(), job_id=looked_at).created
    # The web was away for a week.
    web.move(-7 * 86400, unseen)
    assert web.jobs.replay() == 0
    assert web.client.exists(f"fairshard:job:{looked_at}", f"fairshard:job:{unseen}") == 0
    assert len(web.journal) == 0


@contextlib.contextmanager
def locked(web: Web) -> Iterator[None]:
    """Another writer holds the journal."""
    other = sqlite3.connect(web.jobs._services.settings.data_dir / "journal.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


def test_a_journal_that_another_holds_is_said_within_five_seconds(web: Web) -> None:
    job_id = web.jobs.submit_request("tester/before")["job_id"]
    begun = time.monotonic()
    with locked(web), pytest.raises(Unavailable, match="journal cannot be used: database is locked"):
        web.jobs.submit_request("tester/locked")
    assert time.monotonic() - begun < 5
    with locked(web), pytest.raises(Unavailable, match="journal"):
        web.jobs.replay()
    assert web.client.zcard("fairshard:unfinished") == len(web.journal) == 1
    web.wipe()
    assert web.jobs.replay() == 1
    assert web.states(job_id)["job"] == "queued"


def test_a_full_disk_refuses_jobs_and_keeps_those_that_were_accepted(web: Web) -> None:
    web.jobs.submit_request("tester/before")
    (pages,) = web.journal._db.execute("PRAGMA page_count").fetchone()
    web.journal._db.execute(f"PRAGMA max_page_count = {pages}")
    full = pytest.raises(Unavailable, match="journal cannot be used: database or disk is full")
    with full:
        web.jobs.batches.submit(models(200))
    accepted = 1
    with full:
        for n in range(50):
            web.jobs.submit_request(f"tester/m{n}")
            accepted += 1
    assert web.client.zcard("fairshard:unfinished") == len(web.journal) == accepted
    web.journal._db.execute("PRAGMA max_page_count = 1000")
    assert web.jobs.batches.submit(models(2))["counts"] == {"queued": 2}


def test_a_journal_that_cannot_be_opened_is_said(server: RedisProcess, tmp_path: Path) -> None:
    (tmp_path / "folder" / "journal.sqlite").mkdir(parents=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "journal.sqlite").write_bytes(b"not a database " * 1000)
    for data in (tmp_path / "folder", tmp_path / "broken"):
        web = Web(server, data)
        with pytest.raises(Unavailable, match="journal cannot be used"):
            web.jobs.submit_request("tester/any")
        assert web.client.zcard("fairshard:unfinished") == 0
        assert "journal_jobs" not in web.jobs.metrics()


def test_what_was_refused_never_runs_whatever_refused_it(web: Web) -> None:
    web.client.set("fairshard:unfinished", "not what it should be")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        web.jobs.submit_request("tester/odd")
    web.wipe()
    assert web.jobs.replay() == 0


def test_what_was_refused_while_the_journal_was_held_is_forgotten_later(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, held = web.jobs._services.ledger, contextlib.ExitStack()

    def refuse(*args: Any, **options: Any) -> None:
        held.enter_context(locked(web))
        raise LimitExceeded

    with monkeypatch.context() as patched, held:
        patched.setattr(ledger, "submit", refuse)
        with pytest.raises(LimitExceeded):
            web.jobs.submit_request("tester/refused")
        (job_id,) = web.journal._db.execute("SELECT job_id FROM jobs").fetchone()
        with pytest.raises(NotFound):
            web.jobs.job(job_id)
    web.wipe()
    assert web.jobs.replay() == 0
    assert len(web.journal) == 0
