"""What is read of many jobs: which steps run, and lists by state, model and kind, in parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.ledger_clock import Clocked, chain, splits
from support.running import RedisProcess

from planner.errors import NodeFailure
from workers.ledger.steps import Claimed
from workers.nodes.registry import Registry


@pytest.fixture(scope="module")
def clocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clocked]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as server, server.client() as client:
        yield Clocked(client)


def test_what_runs_is_known_through_every_transition(clocked: Clocked) -> None:
    ledger = clocked.ledger
    job_id = ledger.submit("process", model_name="a/b", params={}, steps=chain("plan")).job_id

    def claimed(step: str, owner: str) -> Claimed:
        found = ledger.claim(job_id, step, owner=owner)
        assert isinstance(found, Claimed)
        return found

    assert ledger.running() == []
    plan = claimed("plan", "planner@h#1")
    assert ledger.running() == [(job_id, "plan", "planner@h")]
    ledger.fail(plan, NodeFailure("once"), delay_s=1.0)
    assert ledger.running() == []
    clocked.advance(2)
    plan = claimed("plan", "planner@h#2")
    ledger.defer(plan)
    assert ledger.running() == []
    clocked.advance(2)
    ledger.commit(claimed("plan", "planner@h#3"), {}, add=splits("a", "b"))
    assert ledger.running() == []
    claimed("split:a", "a@h#1")
    claimed("split:b", "b@h#1")
    assert sorted(ledger.running()) == [(job_id, "split:a", "a@h"), (job_id, "split:b", "b@h")]
    ledger.hand_back(job_id, "split:a", owner="a@h")
    assert ledger.running() == [(job_id, "split:b", "b@h")]
    ledger.lose_node("b")
    assert ledger.running() == []
    claimed("split:a", "a@h#2")
    ledger.cancel(job_id)
    assert ledger.running() == []


def test_jobs_of_one_state_are_found_among_thousands(clocked: Clocked) -> None:
    clocked.client.flushall()
    clocked.advance(0)
    ledger = clocked.ledger
    first = [ledger.submit("request", model_name="a/b", params={}, steps=chain("download")).job_id for _ in range(3)]
    ledger.cancel(first[1])
    for number in range(1100):
        clocked.client.zadd("fairshard:jobs", {f"newer-{number}": 2e12 + number})
        clocked.client.hset(f"fairshard:job:newer-{number}", mapping={"state": "done", "model_name": "c/d"})
    assert [view["job_id"] for view in ledger.views.jobs(state="cancelled")] == [first[1]]
    assert [view["job_id"] for view in ledger.views.jobs(state="queued", limit=1, offset=1)] == [
        view["job_id"] for view in ledger.views.jobs(model_name="a/b") if view["state"] == "queued"
    ][1:]
    assert ledger.views.jobs(state="queued", kind="delete") == []


def test_nodes_are_read_in_pages(clocked: Clocked) -> None:
    registry = Registry(clocked.client)
    for name in "cab":
        registry.announce({"node_id": name, "instance": name, "host": "h", "pid": 1})
    assert [info["node_id"] for info in registry.alive(limit=2)] == ["a", "b"]
    assert [info["node_id"] for info in registry.alive(limit=2, offset=2)] == ["c"]
    assert registry.alive(limit=2, offset=3) == []
    assert registry.count() == 3
