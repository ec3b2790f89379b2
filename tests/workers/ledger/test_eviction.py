"""A Redis that evicts: each job comes back from the journal, or ends and says why; none stays unfinished for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.ledger_clock import Clocked, chain, splits
from support.running import RedisProcess

from planner.errors import NotFound
from workers.jobs.jobs import Jobs
from workers.ledger.steps import ENDED, Claimed
from workers.queue.reconciler import Reconciler
from workers.settings import QueueSettings, Settings


@pytest.fixture
def clocked(server: RedisProcess) -> Clocked:
    return Clocked(server.client())


def run(clocked: Clocked, job_id: str) -> dict[str, Any]:
    """The job, once it ended: workers take what is due, and what the reconciler sends again."""
    ledger = clocked.ledger
    for _ in range(40):
        view = ledger.views.job(job_id)
        if view["state"] in ENDED:
            return view
        for step in view["steps"]:
            claimed = ledger.claim(job_id, step["name"], owner="n#1")
            if isinstance(claimed, Claimed):
                ledger.commit(claimed, {"step": step["name"]})
        clocked.advance(30)
        ledger.wake_overdue()
    raise AssertionError(view)


def assert_evicted(view: dict[str, Any]) -> None:
    assert view["state"] == "failed"
    assert (view["error"]["code"], view["error"]["details"]) == ("unavailable", {"evicted": True})
    assert "set it to noeviction" in view["error"]["message"]
    assert {step["state"] for step in view["steps"]} <= {"cancelled", "done", "waiting"}


@pytest.mark.parametrize("lost", ["download", "profile"])
@pytest.mark.parametrize("found_by", ["claim", "commit", "mend"])
def test_a_job_that_lost_a_step_ends_and_says_why(clocked: Clocked, lost: str, found_by: str) -> None:
    ledger = clocked.ledger
    job_id = ledger.submit("request", model_name="a/b", params={}, steps=chain("download", "profile")).job_id
    claimed = ledger.claim(job_id, "download", owner="n#1")
    assert isinstance(claimed, Claimed)
    if found_by == "claim":
        ledger.commit(claimed, {})
    clocked.client.delete(f"fairshard:step:{job_id}:{lost}")
    if found_by == "claim":
        assert ledger.claim(job_id, "profile", owner="n#1") == "closed"
    elif found_by == "commit":
        assert ledger.commit(claimed, {}) in {"fenced", "unknown"}
        assert ledger.mend() == (lost == "download")
    else:
        assert ledger.mend() == 1
    assert_evicted(ledger.views.job(job_id))
    assert ledger.submit("request", model_name="a/b", params={}, steps=chain("plan")).created


@pytest.mark.parametrize(
    "lost", ["due", "unfinished", "at:a", "nodes_in_use", "jobs", "flight", "submitters", "counters"]
)
def test_what_only_lists_jobs_is_made_anew(clocked: Clocked, lost: str) -> None:
    ledger = clocked.ledger
    job_id = ledger.submit(
        "process", model_name="a/b", params={}, steps=chain("plan"), single_flight="x", submitter="me"
    ).job_id
    claimed = ledger.claim(job_id, "plan", owner="n#1")
    assert isinstance(claimed, Claimed)
    ledger.commit(claimed, {}, add=splits("a", "b"))
    clocked.client.delete(f"fairshard:{lost}")
    assert ledger.mend() == 0
    assert ledger.nodes_in_use() == {"a", "b"}
    assert run(clocked, job_id)["state"] == "done"


def test_who_waits_is_let_go_or_ends_too(clocked: Clocked) -> None:
    ledger = clocked.ledger
    jobs = []
    for name in ("done", "gone"):
        request = ledger.submit("request", model_name=f"a/{name}", params={}, steps=chain("download")).job_id
        waiting = ledger.submit(
            "process", model_name=f"a/{name}", params={}, steps=chain("plan"), waits_for=request
        ).job_id
        jobs.append((request, waiting))
        clocked.client.delete(f"fairshard:waiters:{request}")
    (done, first), (gone, second) = jobs
    assert run(clocked, done)["state"] == "done"
    clocked.client.delete(f"fairshard:job:{gone}")
    assert ledger.mend() == 1
    assert run(clocked, first)["state"] == "done"
    assert_evicted(ledger.views.job(second))


def test_a_node_that_dies_after_its_job_was_evicted_leaves_no_half_of_one(clocked: Clocked) -> None:
    ledger = clocked.ledger
    job_id = ledger.submit("process", model_name="a/b", params={}, steps=splits("a")[:1]).job_id
    clocked.client.delete(f"fairshard:job:{job_id}")
    ledger.lose_node("a")
    assert ledger.states([job_id]) == [None]
    assert ledger.submit("process", model_name="a/b", params={}, steps=chain("plan"), job_id=job_id).created
    assert run(clocked, job_id)["state"] == "done"


def test_none_of_many_stays_unfinished_while_redis_evicts(tmp_path: Path) -> None:
    with RedisProcess(tmp_path / "redis") as server:
        client: Any = server.client()
        env = {"REDIS_URL": server.url, "FAIRSHARD_DATA": str(tmp_path / "data"), "NODE_ID": "web"}
        jobs = Jobs.from_settings(Settings.from_env(env), journal=True, queue=QueueSettings())
        ledger, journal = jobs._services.ledger, jobs._journal
        assert journal is not None
        job_ids = [jobs.submit_request(f"tester/m{n}")["job_id"] for n in range(80)]
        client.config_set("maxmemory-policy", "allkeys-random")
        client.config_set("maxmemory", int(client.info("memory")["used_memory"]) - 150_000)
        for n in range(80):
            job_ids.append(jobs.submit_request(f"tester/n{n}")["job_id"])
        assert client.info("stats")["evicted_keys"] > 20
        client.config_set("maxmemory", 0)
        # The moment has passed in which an entry may still be on its way to Redis.
        journal._db.execute("UPDATE jobs SET entry = json_replace(entry, '$.created_at', 1)")
        jobs.replay()
        Reconciler(ledger, jobs._services.registry).once()
        states: dict[str, dict[str, Any]] = {}
        for _ in range(5):
            for job_id in job_ids:
                try:
                    states[job_id] = ledger.views.job(job_id)
                except NotFound:
                    raise AssertionError(f"{job_id} did not come back") from None
                for step in states[job_id]["steps"]:
                    claimed = ledger.claim(job_id, step["name"], owner="n#1")
                    if isinstance(claimed, Claimed):
                        ledger.commit(claimed, {})
        assert {view["state"] for view in states.values()} <= ENDED
        for view in states.values():
            if view["state"] != "done":
                assert_evicted(view)
