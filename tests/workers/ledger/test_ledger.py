from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ledger_clock import Clocked, chain, splits
from support.running import RedisProcess

from planner.errors import AccessDenied, LimitExceeded, NodeFailure, NotFound, Unavailable
from workers.ledger.ledger import Ledger
from workers.ledger.steps import Claimed


@pytest.fixture
def clocked(server: RedisProcess) -> Iterator[Clocked]:
    with server.client() as client:
        yield Clocked(client, lease_s=15)


def submit(clocked: Clocked, *steps: str, **options: Any) -> str:
    given = {"model_name": "a/b", "params": {"x": 1}, "steps": chain(*(steps or ("plan",)))} | options
    return clocked.ledger.submit(given.pop("kind", "process"), **given).job_id


def claim(clocked: Clocked, job_id: str, step: str, owner: str = "w@h") -> Claimed:
    claimed = clocked.ledger.claim(job_id, step, owner=f"{owner}#{clocked.client.incr('owners')}")
    assert isinstance(claimed, Claimed), claimed
    return claimed


def refusal(clocked: Clocked, job_id: str, step: str) -> str:
    refused = clocked.ledger.claim(job_id, step, owner="other@h#1")
    assert isinstance(refused, str), refused
    return refused


def states(clocked: Clocked, job_id: str) -> dict[str, str]:
    view = clocked.ledger.views.job(job_id)
    return {"job": view["state"]} | {step["name"]: step["state"] for step in view["steps"]}


def left_over(clocked: Clocked) -> set[str]:
    """Keys that a service without unfinished jobs must not have."""
    kept = ("job:", "step:", "events:", "jobs", "ended", "over:", "counters")
    keys = {key.removeprefix("fairshard:") for key in clocked.client.scan_iter("fairshard:*")}
    return {key for key in keys if not key.startswith(kept)}


def test_steps_follow_each_other_and_the_job_ends_with_the_last(clocked: Clocked) -> None:
    job_id = submit(clocked, "download", "profile")
    assert clocked.taken() == ["download"]
    assert states(clocked, job_id) == {"job": "queued", "download": "queued", "profile": "waiting"}

    first = claim(clocked, job_id, "download")
    assert (first.attempt, first.params) == (1, {"x": 1})
    assert states(clocked, job_id)["job"] == "running"
    assert clocked.ledger.commit(first, {"revision": "abc"}) == "ok"
    assert clocked.taken() == ["profile"]
    assert clocked.ledger.result(job_id, "download") == {"revision": "abc"}

    assert clocked.ledger.commit(claim(clocked, job_id, "profile"), {}, job_result={"layers": 3}) == "ok"
    view = clocked.ledger.views.job(job_id)
    assert (view["state"], view["result"], view["step"]) == ("done", {"layers": 3}, "profile")
    assert left_over(clocked) == set()


def test_a_message_for_what_is_done_busy_closed_waiting_or_unknown_is_skipped(clocked: Clocked) -> None:
    job_id = submit(clocked, "download", "profile")
    assert refusal(clocked, job_id, "profile") == "waiting"
    first = claim(clocked, job_id, "download")
    assert refusal(clocked, job_id, "download") == "busy"
    clocked.ledger.commit(first, {})
    assert refusal(clocked, job_id, "download") == "done"
    clocked.ledger.cancel(job_id)
    assert refusal(clocked, job_id, "profile") == "closed"
    assert refusal(clocked, job_id, "none") == "unknown"
    assert refusal(clocked, "0" * 32, "profile") == "unknown"


def test_a_repeated_call_of_the_client_is_one_claim_and_one_commit(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    first = clocked.ledger.claim(job_id, "plan", owner="w@h#1")
    assert clocked.ledger.claim(job_id, "plan", owner="w@h#1") == first
    assert isinstance(first, Claimed)
    assert clocked.ledger.commit(first, {"n": 1}) == "ok"
    assert clocked.ledger.commit(first, {"n": 1}) == "ok"
    assert clocked.ledger.metrics()["steps_done_total"] == 1


def test_how_long_steps_took_is_a_histogram_by_kind(clocked: Clocked) -> None:
    for seconds in (1, 45, 10_000):
        job_id = submit(clocked, "split:a")
        first = claim(clocked, job_id, "split:a")
        clocked.advance(seconds)
        assert clocked.ledger.commit(first, {}) == "ok"
    clocked.ledger.cancel(submit(clocked, "plan"))  # was never run
    ((kind, (buckets, total)),) = clocked.ledger.step_seconds().items()
    assert (kind, total) == ("split", 10_046.0)
    assert dict(buckets) == {"0.1": 0, "0.5": 0, "2": 1, "10": 1, "60": 2, "300": 2, "1800": 2, "7200": 2, "+Inf": 3}


def test_the_same_submission_runs_once_until_it_ended(clocked: Clocked) -> None:
    one = submit(clocked, single_flight="k")
    assert submit(clocked, single_flight="k") == one
    assert submit(clocked, single_flight="other") != one
    clocked.ledger.commit(claim(clocked, one, "plan"), {})
    assert submit(clocked, single_flight="k") != one


def test_submitting_the_same_id_again_changes_nothing(clocked: Clocked) -> None:
    job_id = submit(clocked, job_id="1" * 32)
    clocked.taken()
    clocked.ledger.commit(claim(clocked, job_id, "plan"), {})
    assert submit(clocked, job_id=job_id) == job_id
    assert clocked.taken() == []
    assert states(clocked, job_id)["job"] == "done"


def test_a_vanished_worker_s_step_is_run_again_and_its_late_outcome_does_not_count(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    clocked.taken()
    late = claim(clocked, job_id, "plan")
    clocked.advance(14)
    assert clocked.ledger.wake_overdue() == 0
    clocked.advance(2)
    assert clocked.ledger.wake_overdue() == 1
    assert clocked.taken() == ["plan"]
    again = claim(clocked, job_id, "plan")
    assert again.attempt == 2
    assert again.fence > late.fence
    assert clocked.ledger.renew(late) == "fenced"
    assert clocked.ledger.commit(late, {"from": "late"}) == "fenced"
    assert clocked.ledger.fail(late, NotFound("x")) == "fenced"
    assert clocked.ledger.commit(again, {"from": "again"}) == "ok"
    assert clocked.ledger.result(job_id, "plan") == {"from": "again"}


def test_a_queue_that_nobody_empties_is_not_filled(clocked: Clocked) -> None:
    for _ in range(3):
        clocked.ledger.submit("request", model_name="a/b", params={}, steps=chain("download"))
    queue = "fairshard:celery:compute"
    for _ in range(60):
        for message in clocked.taken():
            clocked.client.rpush(queue, message)
        clocked.advance(600)
        clocked.ledger.wake_overdue()
    assert clocked.client.llen(queue) == 3
    clocked.client.delete(queue)  # lost, or taken by a worker that vanished
    clocked.advance(600)
    clocked.ledger.wake_overdue()
    assert clocked.taken() == ["download"] * 3


def test_a_renewed_lease_lasts(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    held = claim(clocked, job_id, "plan")
    for done in range(4):
        clocked.advance(14)
        assert clocked.ledger.renew(held, progress={"done": done, "total": 4, "what": "bytes"}) == "ok"
        assert clocked.ledger.wake_overdue() == 0
    assert clocked.ledger.views.job(job_id)["steps"][0]["progress"] == {"done": 3, "total": 4, "what": "bytes"}


def test_a_poisonous_step_stops_after_its_attempts(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan", "finish")
    for _ in range(3):
        claim(clocked, job_id, "plan", owner="victim@h")
        clocked.advance(16)
        clocked.ledger.wake_overdue()
    view = clocked.ledger.views.job(job_id)
    assert view["state"] == "failed"
    assert view["error"]["code"] == "worker_lost"
    assert "3 attempts" in view["error"]["message"]
    assert "victim@h" in view["error"]["message"]
    assert refusal(clocked, job_id, "plan") == "closed"
    assert left_over(clocked) == set()


def test_a_lost_message_is_sent_again_less_and_less_often(clocked: Clocked) -> None:
    submit(clocked, "plan")
    clocked.taken()
    gaps = []
    for _ in range(9):
        waited = 0
        while not clocked.taken():
            clocked.advance(1)
            waited += 1
            clocked.ledger.wake_overdue()
        gaps.append(waited)
    # 5 s, doubled to the last gap of ten minutes.
    assert gaps == [5, 10, 20, 40, 80, 160, 320, 600, 600]


def test_a_retry_waits_for_its_delay_whatever_messages_come(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    assert clocked.ledger.fail(claim(clocked, job_id, "plan"), Unavailable("down"), delay_s=4) == "retry"
    clocked.taken()
    assert refusal(clocked, job_id, "plan") == "early"
    clocked.advance(3)
    assert clocked.ledger.wake_overdue() == 0
    clocked.advance(1)
    assert clocked.ledger.wake_overdue() == 1
    assert clocked.taken() == ["plan"]
    assert clocked.ledger.views.job(job_id)["steps"][0]["error"]["code"] == "unavailable"
    claim(clocked, job_id, "plan")


def test_attempts_are_spent_or_an_error_is_final(clocked: Clocked) -> None:
    spent = submit(clocked, "plan")
    for expected in ("retry", "retry", "failed"):
        assert clocked.ledger.fail(claim(clocked, spent, "plan"), Unavailable("down"), delay_s=0) == expected
        clocked.advance(1)
    final = submit(clocked, "plan", "finish")
    error = AccessDenied("gated", details={"model": "a/b"})
    assert clocked.ledger.fail(claim(clocked, final, "plan"), error, final=True) == "failed"
    view = clocked.ledger.views.job(final)
    assert view["error"] == {"code": "access_denied", "message": "gated", "details": {"model": "a/b"}}
    assert states(clocked, final) == {"job": "failed", "plan": "failed", "finish": "cancelled"}
    assert left_over(clocked) == set()


def test_a_step_handed_back_costs_no_attempt(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    clocked.taken()
    for _ in range(5):
        assert clocked.ledger.defer(claim(clocked, job_id, "plan")) == "ok"
        assert clocked.taken() == ["plan"]
    held = claim(clocked, job_id, "plan", owner="going@h")
    assert held.attempt == 1
    assert not clocked.ledger.hand_back(job_id, "plan", owner="goin@h")
    assert clocked.ledger.hand_back(job_id, "plan", owner="going@h")
    assert clocked.ledger.commit(held, {}) == "fenced"
    assert claim(clocked, job_id, "plan").attempt == 1


def test_cancel_ends_the_job_and_tells_who_runs(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan", "finish", single_flight="k")
    held = claim(clocked, job_id, "plan")
    assert clocked.ledger.cancel(job_id)
    assert clocked.ledger.renew(held) == "cancelled"
    assert clocked.ledger.commit(held, {}) == "cancelled"
    assert states(clocked, job_id) == {"job": "cancelled", "plan": "cancelled", "finish": "cancelled"}
    assert not clocked.ledger.cancel(job_id)
    assert left_over(clocked) == set()
    with pytest.raises(NotFound):
        clocked.ledger.cancel("0" * 32)


def test_the_join_waits_for_every_split(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    clocked.ledger.commit(claim(clocked, job_id, "plan"), {}, add=splits("a", "b"))
    clocked.taken()
    assert clocked.ledger.nodes_in_use() == {"a", "b"}
    clocked.ledger.commit(claim(clocked, job_id, "split:b"), {})
    assert clocked.taken() == []
    clocked.ledger.commit(claim(clocked, job_id, "split:a"), {})
    assert clocked.taken() == ["finish"]
    assert clocked.ledger.nodes_in_use() == frozenset()
    clocked.ledger.commit(claim(clocked, job_id, "finish"), {})
    assert states(clocked, job_id)["job"] == "done"


def test_a_dead_node_s_job_is_planned_again(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    clocked.ledger.commit(claim(clocked, job_id, "plan"), {"plan": 1}, add=splits("a", "b", "c"))
    clocked.ledger.commit(claim(clocked, job_id, "split:a"), {})
    running = claim(clocked, job_id, "split:b")
    dead = claim(clocked, job_id, "split:c")
    clocked.taken()

    assert clocked.ledger.lose_node("c") == 1
    assert clocked.taken() == ["plan"]
    assert states(clocked, job_id) | {"job": ""} == {
        "job": "", "plan": "queued", "split:a": "done", "split:b": "running", "split:c": "lost", "finish": "waiting",
    }  # fmt: skip
    again = claim(clocked, job_id, "plan")
    assert again.lost_nodes == {"c"}
    assert clocked.ledger.result(job_id, "plan") == {"plan": 1}
    assert clocked.ledger.commit(again, {"plan": 2}, add=splits("a", "b"), drop=["split:c"]) == "ok"
    # The new plan's shards are other shards: whoever still cuts the old ones is fenced.
    assert clocked.ledger.commit(running, {}) == "fenced"
    assert clocked.ledger.commit(dead, {}) == "fenced"
    for node in ("a", "b"):
        assert clocked.ledger.commit(claim(clocked, job_id, f"split:{node}"), {}) == "ok"
    clocked.ledger.commit(claim(clocked, job_id, "finish"), {})
    assert states(clocked, job_id)["job"] == "done"
    assert left_over(clocked) == set()


@pytest.mark.parametrize(("policy", "expected"), [("wait", "queued"), ("skip", "lost")])
def test_a_job_may_wait_for_its_node_or_do_without(clocked: Clocked, policy: str, expected: str) -> None:
    job_id = submit(clocked, "plan", on_node_loss=policy)
    clocked.ledger.commit(claim(clocked, job_id, "plan"), {}, add=splits("a", "b"))
    clocked.ledger.lose_node("b")
    assert states(clocked, job_id)["split:b"] == expected
    assert states(clocked, job_id)["plan"] == "done"


def test_a_process_waits_for_the_request_and_shares_its_fate(clocked: Clocked) -> None:
    request = submit(clocked, "download", kind="request")
    assert clocked.ledger.running_request("a/b") == request
    waiting = submit(clocked, "plan", waits_for=request)
    assert clocked.taken() == ["download"]
    assert refusal(clocked, waiting, "plan") == "waiting"
    clocked.ledger.commit(claim(clocked, request, "download"), {})
    assert clocked.taken() == ["plan"]
    assert clocked.ledger.running_request("a/b") is None

    request = submit(clocked, "download", kind="request")
    waiting = submit(clocked, "plan", waits_for=request)
    clocked.ledger.fail(claim(clocked, request, "download"), NotFound("no such model"), final=True)
    view = clocked.ledger.views.job(waiting)
    assert view["state"] == "failed"
    assert view["error"]["code"] == "not_found"
    assert "no such model" in view["error"]["message"]
    assert request in view["error"]["message"]


def test_limits_refuse_with_their_numbers(clocked: Clocked) -> None:
    submit(clocked, submitter="ann")
    with pytest.raises(LimitExceeded, match="1 jobs are unfinished and the limit is 1"):
        submit(clocked, max_queued=1)
    with pytest.raises(LimitExceeded, match="1 of your jobs"):
        submit(clocked, submitter="ann", max_per_submitter=1)
    job_id = submit(clocked, submitter="bob", max_per_submitter=1)
    clocked.ledger.cancel(job_id)
    submit(clocked, submitter="bob", max_per_submitter=1)
    assert clocked.ledger.metrics()["jobs_refused_total"] == 2


def test_ended_jobs_expire(clocked: Clocked, server: RedisProcess) -> None:
    with server.client() as client:
        short = Clocked(client, job_ttl_s=0.2)
        job_id = submit(short, "plan")
        short.ledger.cancel(job_id)
        # Keys expire by the server's own clock, the list by the script's.
        for _ in range(200):
            if not client.exists(f"fairshard:job:{job_id}"):
                break
            client.execute_command("WAIT", "0", "20")
            client.blpop(["nothing"], timeout=0.02)
        short.advance(1)
        short.ledger.wake_overdue()
        with pytest.raises(NotFound, match="ended longer ago"):
            short.ledger.views.job(job_id)
        assert short.ledger.views.jobs() == []
        # All but that it ended, for who was told of it and did not look meanwhile.
        assert [key for key in client.scan_iter("fairshard:*") if job_id in key] == [f"fairshard:over:{job_id}"]
        assert client.ttl(f"fairshard:over:{job_id}") > 29 * 86400


def test_events_tell_the_story_from_any_point(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    held = claim(clocked, job_id, "plan")
    clocked.ledger.renew(held, progress={"done": 1, "total": 2, "what": "x"})
    clocked.ledger.commit(held, {})
    story = clocked.ledger.views.events(job_id)
    assert [event["event"] for _, event in story] == ["submitted", "claimed", "progress", "step", "ended"]
    assert story[2][1]["progress"] == {"done": 1, "total": 2, "what": "x"}
    assert clocked.ledger.views.events(job_id, after=story[2][0]) == story[3:]


def test_jobs_are_listed_newest_first_by_state_and_model(clocked: Clocked) -> None:
    ids = []
    for n in range(5):
        clocked.advance(1)
        ids.append(submit(clocked, "plan", model_name=f"a/{n % 2}"))
    clocked.ledger.cancel(ids[2])
    assert [view["job_id"] for view in clocked.ledger.views.jobs()] == ids[::-1]
    assert [view["job_id"] for view in clocked.ledger.views.jobs(state="cancelled")] == [ids[2]]
    assert [view["job_id"] for view in clocked.ledger.views.jobs(model_name="a/0", limit=2)] == [ids[4], ids[2]]
    assert [view["job_id"] for view in clocked.ledger.views.jobs(limit=2, offset=3)] == [ids[1], ids[0]]


def test_redis_away_is_unavailable(tmp_path: Path) -> None:
    with RedisProcess(tmp_path) as process:
        ledger = Ledger(process.client())
    with pytest.raises(Unavailable, match="Redis cannot be reached"):
        ledger.views.job("0" * 32)


def test_errors_with_odd_details_are_recorded(clocked: Clocked) -> None:
    job_id = submit(clocked, "plan")
    error = NodeFailure("disk full: 'ü' 99 %", details={"path": Path("/x"), "free": 0})
    clocked.ledger.fail(claim(clocked, job_id, "plan"), error, final=True)
    assert json.dumps(clocked.ledger.views.job(job_id)["error"])
    assert clocked.ledger.views.job(job_id)["error"]["message"] == "disk full: 'ü' 99 %"
