"""Batches of good and bad entries, in pages; and plans that are deleted while a job uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.ledger_clock import splits
from support.running import RedisProcess

from planner.errors import Conflict, InvalidInput
from workers.celery_app import create_app
from workers.jobs.jobs import Jobs
from workers.ledger.steps import Claimed
from workers.settings import QueueSettings, Settings


@pytest.fixture
def jobs(server: RedisProcess, tmp_path: Path) -> Jobs:
    with server.client() as client:
        client.flushall()
    env = {"REDIS_URL": server.url, "FAIRSHARD_DATA": str(tmp_path / "data"), "NODE_ID": "web"}
    return Jobs.from_settings(Settings.from_env(env), journal=True, queue=QueueSettings())


def test_a_refused_entry_is_one_failed_entry_and_equal_ones_are_one_job(jobs: Jobs) -> None:
    refused = ("5", InvalidInput("must be 'owner/name' or an object, got 5"))
    entries: list[Any] = [
        {"model_name": "own/a"},
        {"model_name": "../../x"},
        {"model_name": "own/a"},
        refused,
        {"model_name": "own/a", "sequence_length": 64},
        {"model_name": "own/b", "process": {"strategy": "none"}},
    ]
    batch = jobs.batches.submit(entries)
    assert [line["state"] for line in batch["jobs"]] == ["queued", "failed", "queued", "failed", "queued", "failed"]
    assert batch["counts"] == {"queued": 3, "failed": 3}
    first, _, again, five, other, unknown = batch["jobs"]
    assert first["job_id"] == again["job_id"] != other["job_id"]
    assert five["error"]["message"] == str(refused[1])
    assert "process has unknown fields" in unknown["error"]["message"]
    assert jobs.batches.get(batch["batch_id"]) == batch
    # Who asks once more for the same gets the same jobs.
    assert jobs.batches.submit(entries)["jobs"][0]["job_id"] == first["job_id"]


def test_a_batch_is_shown_in_pages(jobs: Jobs) -> None:
    batch_id = jobs.batches.submit([{"model_name": f"own/m{n}"} for n in range(450)])["batch_id"]
    seen: list[str] = []
    cursor: int | None = 0
    while cursor is not None:
        page = jobs.batches.get(batch_id, cursor=cursor)
        assert (page["total"], page["counts"], page["state"]) == (450, {"queued": 450}, "queued")
        seen += [line["model_name"] for line in page["jobs"]]
        cursor = page["next_cursor"]
    assert seen == [f"own/m{n}" for n in range(450)]
    assert [line["model_name"] for line in jobs.batches.get(batch_id, limit=2, cursor=449)["jobs"]] == ["own/m449"]
    assert jobs.batches.get(batch_id, cursor=450)["jobs"] == []


def test_the_web_has_no_result_backend() -> None:
    """It costs each message a round trip and a subscription; nobody there waits for Celery."""
    assert create_app(Settings.from_env({}), QueueSettings(), results=False).conf.result_backend is None
    assert create_app(Settings.from_env({}), QueueSettings()).conf.result_backend


def test_a_plan_that_a_job_uses_is_deleted_only_by_force(jobs: Jobs) -> None:
    ledger, plans = jobs._services.ledger, jobs._services.plans
    made = {"plan_id": "abc", "model_name": "own/model", "split_plan": {"a": {}}}
    plans.save(made)
    job_id = ledger.submit("process", model_name="own/model", params={}, steps=splits("a")[:1]).job_id
    other = ledger.submit("process", model_name="own/other", params={}, steps=splits("a")[:1]).job_id
    assert not ledger.using_plan("abc")
    with ledger.redis.pipeline() as pipeline:  # as the plan step's commit has it
        pipeline.hset(f"fairshard:job:{job_id}", "result", '{"plan_id": "abc"}')
        pipeline.hset(f"fairshard:job:{other}", "result", '{"plan_id": "other"}')
        pipeline.execute()
    with pytest.raises(Conflict, match=f"job {job_id} is using plan abc") as caught:
        jobs.submit_delete("abc")
    assert caught.value.details["job_ids"] == [job_id]
    deletion = jobs.submit_delete("abc", force=True)
    assert jobs.job(job_id)["state"] == "cancelled"
    assert jobs.job(other)["state"] == "queued"
    assert (deletion["kind"], deletion["state"]) == ("delete", "queued")
    # Once the job has ended nothing stands in the way.
    assert isinstance(ledger.claim(deletion["job_id"], "forget", owner="n#1"), Claimed)
    assert jobs.submit_delete("abc")["job_id"] == deletion["job_id"]


def test_a_process_asks_for_the_profile_of_its_moment(jobs: Jobs) -> None:
    services = jobs._services
    services.profile_published("own/model", {"path": "profiles/one.json", "commit": "1"})
    first = jobs.submit_process("own/model")
    assert first["params"]["profile"] == {"path": "profiles/one.json", "commit": "1"}
    assert jobs.submit_process("own/model")["job_id"] == first["job_id"]
    services.profile_published("own/model", {"path": "profiles/one.json", "commit": "2"})
    second = jobs.submit_process("own/model")
    assert second["job_id"] != first["job_id"]
    request = jobs.submit_request("own/model")["job_id"]
    third = jobs.submit_process("own/model")
    assert (third["waits_for"], third["params"]["waits_for"]) == (request, request)
    assert third["job_id"] not in {first["job_id"], second["job_id"]}
