from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from support.ledger_clock import Clocked, chain, splits
from support.running import RedisProcess

from planner.errors import Conflict, InvalidInput, NodeFailure, Unavailable
from workers.jobs.journal import Accepted
from workers.ledger.ledger import Ledger
from workers.ledger.steps import Claimed
from workers.nodes.registry import Registry
from workers.queue.claims import Claim, explained, run_step
from workers.queue.reconciler import Reconciler
from workers.service.tokens import Tokens, secret_key
from workers.settings import Settings


@pytest.fixture
def clocked(server: RedisProcess) -> Iterator[Clocked]:
    with server.client() as client:
        yield Clocked(client)


INFO = {"node_id": "a", "instance": "one", "host": "h", "pid": 1, "flop_per_s": 1e9, "memory_bytes": 1}


def planned(clocked: Clocked) -> str:
    """A job whose node `a` has a split to do."""
    job_id = clocked.ledger.submit("process", model_name="a/b", params={}, steps=chain("plan")).job_id
    claimed = clocked.ledger.claim(job_id, "plan", owner="p@h#1")
    assert isinstance(claimed, Claimed)
    clocked.ledger.commit(claimed, {}, add=splits("a"))
    return job_id


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_one_of_two_reconcilers_works_and_the_other_takes_over(clocked: Clocked) -> None:
    registry = Registry(clocked.client)
    one, two = Reconciler(clocked.ledger, registry), Reconciler(clocked.ledger, registry)
    assert one.holds_lock()
    assert not two.holds_lock()
    assert one.holds_lock()
    assert one.next_in_s == 1.0
    assert 4 < two.next_in_s <= 6, "it asks when the lock may be free, not each second"
    assert 0 < clocked.client.pttl("fairshard:reconciler") <= 5000
    clocked.client.delete("fairshard:reconciler")  # as its expiry does when `one` has died
    assert two.holds_lock()
    assert not one.holds_lock()


def test_a_silent_node_is_given_up_and_a_living_one_is_not(clocked: Clocked) -> None:
    clock, registry = Clock(), Registry(clocked.client, ttl_s=15)
    reconciler = Reconciler(clocked.ledger, registry, now=clock)
    job_id = planned(clocked)
    registry.announce(INFO)
    for _ in range(30):
        clock.now += 1
        reconciler.once()
    assert clocked.ledger.nodes_in_use() == {"a"}
    registry.leave("a", instance="one")
    for _ in range(4):
        clock.now += 1
        reconciler.once()
    assert clocked.ledger.nodes_in_use() == frozenset()
    assert {step["name"]: step["state"] for step in clocked.ledger.views.job(job_id)["steps"]}["plan"] == "queued"


def test_after_redis_was_away_every_node_has_its_turn_first(clocked: Clocked) -> None:
    clock, registry = Clock(), Registry(clocked.client, ttl_s=15)
    reconciler = Reconciler(clocked.ledger, registry, now=clock)
    planned(clocked)
    # All nodes have expired when the first pass comes, and announce themselves within five seconds.
    for _ in range(5):
        clock.now += 1
        reconciler.once()
    registry.announce(INFO)
    for _ in range(10):
        clock.now += 1
        reconciler.once()
    assert clocked.ledger.nodes_in_use() == {"a"}
    registry.leave("a", instance="one")
    clock.now += 60  # no pass meanwhile: Redis was away
    for _ in range(5):
        clock.now += 1
        reconciler.once()
    assert clocked.ledger.nodes_in_use() == {"a"}


def test_two_machines_cannot_be_the_same_node(clocked: Clocked) -> None:
    registry = Registry(clocked.client)
    registry.announce(INFO)
    registry.announce(INFO)
    with pytest.raises(Conflict, match="give this one another NODE_ID"):
        registry.announce(INFO | {"instance": "two", "host": "elsewhere"})
    assert [info["host"] for info in registry.alive()] == ["h"]
    registry.leave("a", instance="two")
    assert registry.alive_ids() == {"a"}


def test_entries_of_many_threads_and_processes_are_all_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journals = [Accepted(path), Accepted(path)]

    def record(n: int) -> None:
        journals[n % 2].record({f"job{n}": {"n": n}})
        # On disk when it returns: another connection sees it.
        assert (journals[1 - n % 2].get(f"job{n}") or {})["n"] == n

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(record, range(400)))
    assert len(journals[0]) == 400
    for journal in journals:
        journal.close()
    broken = Accepted(path)
    broken.close()
    with pytest.raises(Unavailable, match="journal"):
        broken.record({"job": {}})


def test_accepted_jobs_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "data" / "journal.sqlite"
    journal = Accepted(path)
    for n in range(5):
        journal.record({f"job{n}": {"kind": "request", "n": n}})
    journal.forget(["job1", "job3"])
    journal.close()
    again = Accepted(path)
    assert len(again) == 3
    assert (again.get("job2") or {})["n"] == 2
    assert again.get("job1") is None
    first = [job_id for job_id, _ in again.least_recent(2)]
    second = [job_id for job_id, _ in again.least_recent(2)]
    assert set(first) | set(second) == {"job0", "job2", "job4"}
    again.close()


def test_tokens_are_encrypted_expire_and_need_the_same_key(clocked: Clocked) -> None:
    tokens = Tokens(clocked.client, key=Fernet.generate_key())
    tokens.put("j", "hf_secret")
    assert tokens.get("j") == "hf_secret"
    assert "hf_secret" not in clocked.client.get("fairshard:token:j")
    assert clocked.client.pttl("fairshard:token:j") > 0
    with pytest.raises(InvalidInput, match="FAIRSHARD_SECRET"):
        Tokens(clocked.client, key=Fernet.generate_key()).get("j")
    tokens.drop("j")
    assert tokens.get("j") is None
    with pytest.raises(InvalidInput, match="Fernet"):
        Tokens(clocked.client, key=b"short")


def test_the_secret_is_made_once_and_is_private(tmp_path: Path) -> None:
    settings = Settings.from_env({"FAIRSHARD_DATA": str(tmp_path), "NODE_ID": "n"})
    key = secret_key(settings)
    assert secret_key(settings) == key
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def submit(ledger: Ledger) -> str:
    return ledger.submit("process", model_name="a/b", params={}, steps=chain("plan")).job_id


def test_a_step_s_work_hears_of_a_cancel_at_its_next_progress(clocked: Clocked) -> None:
    ledger = clocked.ledger
    job_id = submit(ledger)
    calls = []

    def work(claim: Claim) -> dict[str, int]:
        ledger.cancel(job_id)
        claim.beat()
        calls.append("before")
        claim.progress(1, 2)
        calls.append("after")
        return {}

    assert run_step(ledger, job_id, "plan", work, owner="w") is None
    assert calls == ["before"]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (NodeFailure("disk full"), "failed", "node_failure"),
        (MemoryError(), "failed", "node_failure"),
        (OSError(28, "No space left on device", "/x"), "failed", "node_failure"),
        (Unavailable("hub away"), "queued", "unavailable"),
        (ConnectionResetError(104, "reset"), "queued", "error"),
        (ZeroDivisionError("oops"), "queued", "error"),
    ],
)
def test_what_may_pass_is_tried_again_and_what_cannot_is_not(
    clocked: Clocked, error: Exception, state: str, code: str
) -> None:
    job_id = submit(clocked.ledger)

    def work(claim: Claim) -> dict[str, int]:
        raise error

    if state == "failed":
        with pytest.raises(NodeFailure):
            run_step(clocked.ledger, job_id, "plan", work, owner="w")
    else:
        assert run_step(clocked.ledger, job_id, "plan", work, owner="w") is None
    (step,) = clocked.ledger.views.job(job_id)["steps"]
    assert (step["state"], step["error"]["code"]) == (state, code)
    assert "Traceback" not in json.dumps(step)
    assert str(explained(error))


def test_an_outcome_waits_for_a_redis_without_room_on_its_disk(tmp_path: Path) -> None:
    with RedisProcess(tmp_path / "redis") as redis, redis.client() as client:
        ledger = Ledger(client)
        job_id = submit(ledger)

        def work(claim: Claim) -> dict[str, int]:
            redis.lose_disk()
            threading.Timer(1.0, redis.find_disk).start()
            return {"done": 1}

        assert run_step(ledger, job_id, "plan", work, owner="w") == {"done": 1}
        assert ledger.views.job(job_id)["state"] == "done"
