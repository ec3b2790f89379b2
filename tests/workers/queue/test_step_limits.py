"""What a step may take: over its limit it fails with the setting's name, and is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from support.running import RedisProcess

from planner.errors import NodeFailure
from workers.ledger.steps import StepSpec
from workers.queue.step_task import memory_limit, step_task
from workers.service.services import Services
from workers.settings import QueueSettings, Settings


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with RedisProcess(tmp_path / "redis") as redis:
        settings = Settings.from_env({"REDIS_URL": redis.url, "NODE_ID": "n", "FAIRSHARD_DATA": str(tmp_path)})
        yield Services(settings=settings, queue=QueueSettings(step_memory_bytes=50_000_000, step_time_s=7))


def _take_memory(*_: Any) -> dict[str, Any]:
    return {"got": len(bytearray(400_000_000))}


def _take_time(*_: Any) -> dict[str, Any]:
    raise SoftTimeLimitExceeded  # what Celery's signal raises wherever the step is


@pytest.mark.parametrize(
    ("work", "setting", "metric"),
    [
        (_take_memory, "FAIRSHARD_STEP_MEMORY_BYTES", "step_memory_limit_total"),
        (_take_time, "FAIRSHARD_STEP_TIME_S", "step_time_limit_total"),
    ],
)
def test_a_step_over_its_limit_fails_with_the_setting_s_name(
    services: Services, monkeypatch: pytest.MonkeyPatch, work: Callable[..., Any], setting: str, metric: str
) -> None:
    monkeypatch.setattr("workers.queue.step_task.current", lambda: services)
    task = step_task(f"test.{metric}")(work)
    steps = [StepSpec(name="big", task=task.name, queue="q")]
    job_id = services.ledger.submit("request", model_name="a/b", params={}, steps=steps).job_id
    with pytest.raises(NodeFailure, match=setting):
        task.run(job_id, "big")
    view = services.ledger.views.job(job_id)
    assert (view["state"], view["error"]["code"]) == ("failed", "node_failure")
    assert setting in view["error"]["message"]
    assert services.ledger.metrics()[metric] == 1


def test_the_limit_ends_with_its_step() -> None:
    with pytest.raises(MemoryError), memory_limit(50_000_000):
        bytearray(400_000_000)
    assert len(bytearray(400_000_000)) == 400_000_000
    with memory_limit(None):
        assert len(bytearray(400_000_000)) == 400_000_000


def test_a_step_of_another_node_is_left_to_it(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.queue.step_task.current", lambda: services)
    task = step_task("test.other")(_take_time)
    steps = [StepSpec(name="split:m", task=task.name, queue="node.m", node_id="m")]
    job_id = services.ledger.submit("process", model_name="a/b", params={}, steps=steps).job_id
    with pytest.raises(Exception, match="which is node m's to run"):
        task.run(job_id, "split:m")
    assert services.ledger.views.job(job_id)["steps"][0]["state"] == "queued"
