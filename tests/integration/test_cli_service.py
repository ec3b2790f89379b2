"""submit, jobs, nodes, delete, node and up: the installed command against the service that it started."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.checkpoints import models_dir
from support.running import share_traces

from workers.settings import child_env

FAIRSHARD = Path(sys.executable).with_name("fairshard")

pytestmark = pytest.mark.slow


class Cli:
    """A service that `fairshard up` runs, and the command line that talks to it."""

    def __init__(self, data: Path) -> None:
        self.env = child_env(
            {"FAIRSHARD_DATA": str(data), "FAIRSHARD_MODELS_DIR": str(models_dir("gpt2", "llama", "qwen2"))}
        )
        self.log = data.parent / "up.log"
        self.url = ""
        self.pid = 0

    def __call__(self, *arguments: str, rc: int = 0) -> subprocess.CompletedProcess[str]:
        """Run it; the exit status must be `rc`."""
        env = {**self.env, "FAIRSHARD_URL": self.url}
        command = [str(FAIRSHARD), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
        assert done.returncode == rc, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: str, rc: int = 0) -> Any:
        """What it prints with --json."""
        return json.loads(self(*arguments, "--json", rc=rc).stdout)

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = 180.0) -> Any:
        """Wait for something that takes its time."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = condition()
            if found:
                return found
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {timeout_s:.0f} s\n{self.log.read_text()}")
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """The service with two nodes, on a free port."""
    data = share_traces(tmp_path_factory.mktemp("cli") / "data")
    made = Cli(data)
    with made.log.open("wb") as log:
        up = subprocess.Popen([str(FAIRSHARD), "up", "--port", "0", "--nodes", "2"], env=made.env, stderr=log)
    try:
        found = made.until(
            lambda: up.poll() is not None or re.search(r"page and API\s+(\S+)", made.log.read_text()), "ready"
        )
        assert up.poll() is None, made.log.read_text()
        made.url, made.pid = found[1], up.pid
        yield made
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(timeout=120) == 0


def test_a_model_is_submitted_planned_split_and_its_plan_deleted(cli: Cli) -> None:
    done = cli("submit", "tiny/llama", "--process", "--wait")
    assert "request tiny/llama: done" in done.stdout
    assert "split:node-1" in done.stdout
    assert "profile: done" in done.stderr
    job = cli.json("submit", "tiny/llama", "--process", "--wait", "--option", "strategy=pipeline")
    assert job["state"] == "done"
    plan_id = job["result"]["plan_id"]
    shown = cli("jobs", job["job_id"]).stdout
    assert f"plan {plan_id}" in shown
    assert job["job_id"] in cli("jobs").stdout
    assert [row["state"] for row in cli.json("jobs", "--state", "done", "--limit", "1")["jobs"]] == ["done"]

    data = Path(cli.env["FAIRSHARD_DATA"])
    shards = [path.parent for path in data.rglob(f"*{plan_id}*/**/manifest.json")]
    assert cli.json("verify", *map(str, shards), "--source", "tiny/llama")["complete"] is True
    answer = cli.json("delete", plan_id)
    if answer.get("job_id"):
        assert cli.json("jobs", answer["job_id"], "--wait")["state"] == "done"
    cli.until(lambda: not list(data.rglob(f"*{plan_id}*/**/manifest.json")), "the shards are deleted")
    assert f"there is no plan {plan_id}" in cli("delete", plan_id, rc=1).stderr


def test_what_fails_in_the_service_fails_here_with_its_reason(cli: Cli) -> None:
    job = cli.json("submit", "tester/none", "--wait", rc=1)
    assert job["state"] == "failed"
    assert "tester/none" in json.dumps(job["error"])
    assert "tester/none" in cli("jobs", job["job_id"], "--wait", rc=1).stdout
    # A plan that cannot be is told apart from other failures.
    arguments = ("submit", "tiny/llama", "--process", "--wait", "--option", "time_budget_s=1e-15")
    assert cli.json(*arguments, rc=3)["error"]["code"] == "infeasible"
    answer = cli.json("submit", "tiny/llama", "--process", "--option", "stratgy=greedy", rc=2)
    assert "stratgy" in answer["error"] + json.dumps(answer["details"])
    assert "there is no job none" in cli("jobs", "none", rc=1).stderr


def test_many_models_are_one_batch(cli: Cli) -> None:
    batch = cli.json("submit", "tiny/gpt2", "tester/none", "--wait", rc=1)
    assert {entry["model_name"]: entry["state"] for entry in batch["jobs"]} == {
        "tiny/gpt2": "done",
        "tester/none": "failed",
    }


def test_a_job_that_ended_stays_as_it_is_when_cancelled(cli: Cli) -> None:
    job = cli.json("submit", "tiny/qwen2", "--wait")
    assert cli.json("jobs", job["job_id"], "--cancel")["state"] == "done"


def test_a_node_joins_and_leaves(cli: Cli, tmp_path: Path) -> None:
    def ids() -> set[str]:
        return {node["node_id"] for node in cli.json("nodes")["nodes"]}

    assert ids() == {"node-1", "node-2"}
    assert "node-1" in cli("nodes").stdout
    # The service's Redis is private: its address is in the environment of its roles alone.
    ((redis, join_key),) = {
        (found["REDIS_URL"], found["FAIRSHARD_JOIN_KEY"])
        for child in psutil.Process(cli.pid).children(recursive=True)
        if "REDIS_URL" in (found := child.environ())
    }
    authority = str(Path(cli.env["FAIRSHARD_DATA"]) / "authority")
    command = [sys.executable, "-m", "workers.nodes.joining", "token", "extra", "--authority", authority]
    token = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    env = {**cli.env, "FAIRSHARD_JOIN_KEY": join_key, "FAIRSHARD_JOIN_TOKEN": token}
    arguments = ("node", "--node-id", "extra", "--redis", redis, "--flop-per-s", "2e12", "--memory", "1GiB")
    with (tmp_path / "node.log").open("wb") as log:
        node = subprocess.Popen([str(FAIRSHARD), *arguments, "--data", str(tmp_path)], env=env, stderr=log)
    try:
        cli.until(lambda: "extra" in ids(), "the node is alive")
        # Celery's start-up is not to be interrupted: its pool may not be there yet for the stop to stop.
        cli.until(lambda: " serving " in (tmp_path / "node.log").read_text(), "the node is ready")
        (entry,) = [entry for entry in cli.json("nodes")["nodes"] if entry["node_id"] == "extra"]
        assert (entry["flop_per_s"], entry["memory_bytes"]) == (2e12, 2**30)
    finally:
        node.terminate()
        assert node.wait(timeout=120) == 0, (tmp_path / "node.log").read_text()
    cli.until(lambda: "extra" not in ids(), "the node is gone")
