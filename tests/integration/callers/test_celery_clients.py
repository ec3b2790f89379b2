"""Celery's own tools on the queue: a client that knows nothing of fairshard, inspect, purge, and Flower.

The client is what docs/queue.md prints.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import RedisProcess, Service, free_port, until

from workers.jobs.jobs import Jobs
from workers.ledger.steps import ENDED
from workers.settings import QueueSettings, Settings

pytestmark = pytest.mark.xdist_group("main-job")

DOCS = Path(__file__).parents[3] / "docs" / "queue.md"
#: In order: the app, a job sent, a result fetched, what inspect shows.
APP, SEND, RESULT, INSPECT = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


def client(service: Service, *blocks: str, **names: str) -> Any:
    """What the documented blocks print, as JSON; run by a Python that never imports fairshard."""
    script = "".join(blocks)
    for name, value in names.items():
        assert name in script, name
        script = script.replace(name, value)
    script += "\nimport sys\nassert not {'workers', 'planner', 'web'} & sys.modules.keys()\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script.replace("redis://127.0.0.1:6379/0", service.redis.url)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr + service.logs()
    return json.loads(done.stdout)


def ended(service: Service, job_id: str) -> dict[str, Any]:
    jobs = service.jobs()
    job: dict[str, Any] = until(
        lambda: (view := jobs.job(job_id))["state"] in ENDED and view, what=lambda: json.dumps(jobs.job(job_id))
    )
    assert job["state"] == "done", job
    return job


def test_a_plain_celery_client_sends_a_job_and_gets_its_results(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/celery", checkpoint("llama"))
    sent = client(service, APP, SEND, **{"owner/name": "tester/celery"})
    assert sent["kind"] == "request"
    job = ended(service, sent["job_id"])
    steps = {step["name"]: step["task_id"] for step in job["steps"]}
    assert all(steps.values()), "each step says which task ran it"
    plan = client(service, APP, RESULT, TASK_ID=steps["plan"])
    assert plan == service.jobs().plan(job["result"]["plan_id"])
    split = client(service, APP, RESULT, TASK_ID=steps["split:big"])
    assert (split["node_id"], split["plan_id"]) == ("big", plan["plan_id"])


def test_a_job_that_cannot_be_is_refused_to_the_client(service: Service) -> None:
    refused = SEND.replace(".get(timeout=60)", ".get(timeout=60, propagate=False)")
    sent = ""
    for given, wrong in (
        ('"owner/name"', '"../../x"'),
        ('{"process"', '{"hub_token": "x", "process"'),
        ('{"process"', '{"proces": 1, "process"'),
    ):
        assert given in refused
        sent += refused.replace(given, wrong).replace("print(json.dumps(job))", "said.append(repr(job))\n")
    said = client(service, APP, "said = []\n", sent, "print(json.dumps(said))\n")
    for expected, answer in zip(("owner/name", "cannot be sent in a message", "unexpected"), said, strict=True):
        assert expected in answer


def test_inspect_shows_workers_tasks_and_what_runs(hub: TestHub, service: Service) -> None:
    shown = client(service, APP, INSPECT)
    names = {name.partition("@")[0] for name in shown["stats"]}
    assert names == {"planner", *service.nodes}
    for tasks in shown["registered"].values():
        assert {"planner.plan", "planner.submit", "workers.split", "workers.download"} <= set(tasks)
    assert set(shown["active"]) == set(shown["stats"])


def test_purged_messages_are_sent_again(tmp_path: Path) -> None:
    with RedisProcess(tmp_path / "redis") as server:
        env = {"REDIS_URL": server.url, "FAIRSHARD_DATA": str(tmp_path / "data"), "NODE_ID": "web"}
        jobs = Jobs.from_settings(Settings.from_env(env), queue=QueueSettings())
        job_id = jobs.submit_request("tester/purged")["job_id"]
        redis, ledger = server.client(), jobs._services.ledger
        (command,) = re.findall(r"^(celery .* purge .*)$", DOCS.read_text(), re.MULTILINE)
        argv = [sys.executable, "-m", *command.split()]
        purged = subprocess.run(argv, env=dict(env), capture_output=True, text=True, timeout=60, check=False)
        assert "1" in purged.stdout, purged
        assert redis.llen("fairshard:celery:compute") == 0
        assert jobs.job(job_id)["state"] == "queued"
        redis.zadd("fairshard:due", {f"{job_id}|download": 0})  # five seconds later
        assert ledger.wake_overdue() == 1
        assert redis.llen("fairshard:celery:compute") == 1


@pytest.fixture
def flower(service: Service, tmp_path: Path) -> Iterator[str]:
    """The real Flower beside the service; its address."""
    port = free_port()
    argv = ["-m", "celery", "-A", "workers.celery_app", "flower", "--address=127.0.0.1", f"--port={port}"]
    env = service.planner.env | {"FLOWER_UNAUTHENTICATED_API": "true"}
    with (tmp_path / "flower.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *argv], env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: get(f"{url}/healthcheck")[0] == 200, what=(tmp_path / "flower.log").read_text)
        until(lambda: "big@" in get(f"{url}/api/workers?refresh=1")[1], what="Flower knows the workers")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def test_flower_shows_queues_progress_and_no_ghosts(hub: TestHub, service: Service, flower: str) -> None:
    jobs = service.jobs()
    hub.add_repo("tester/flower", checkpoint("llama_deep"))
    ended(service, jobs.submit_request("tester/flower")["job_id"])
    hub.fault("trickle", path="*.safetensors", where="cdn", bytes_per_s=30_000, times=None)
    job_id = jobs.submit_process("tester/flower")["job_id"]

    def told() -> list[dict[str, Any]]:
        tasks = json.loads(get(f"{flower}/api/tasks?limit=1000")[1]).values()
        return [task for task in tasks if task["state"] == "PROGRESS" and "left" in (task["result"] or "")]

    (task, *_) = until(told, what=lambda: get(f"{flower}/api/tasks")[1], every_s=0.2)
    assert re.match(r"\d+ %, \d+ s left: ", task["result"]), task
    assert task["worker"].partition("@")[0] in service.nodes
    assert task["result"].partition(":")[0] in get(f"{flower}/task/{task['uuid']}")[1] or told()
    hub.faults.clear()
    job = ended(service, job_id)
    status, page = get(f"{flower}/broker")
    assert status == 200, page
    for queue in ("compute", "planner", "node.big"):
        assert re.search(rf"<td>{re.escape(queue)}</td>\s*<td[^>]*>0</td>", page), page
    workers = json.loads(get(f"{flower}/api/workers")[1])
    shown = get(f"{flower}/workers?json=1")[1]
    assert {name.partition("@")[0] for name in workers} == {"planner", *service.nodes}
    assert "gen" not in {name.partition("@")[0][:3] for name in re.findall(r'"([^"]+@[^"]+)"', shown)}
    split = next(step for step in job["steps"] if step["name"] == "split:big")
    until(
        lambda: json.loads(get(f"{flower}/api/task/info/{split['task_id']}")[1])["state"] == "SUCCESS",
        what="the end is shown too",
    )
