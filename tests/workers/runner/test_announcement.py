"""Runs in Redis: who may announce one, whose answers count, and how one ends whose leader is gone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.running import RedisProcess, until

from planner.errors import Conflict, NotFound
from workers.nodes.joining import Authority
from workers.runner import announcement
from workers.runner.announcement import announce, answer, check_announcement, next_answer
from workers.runner.herald import Herald
from workers.runner.runs import Runs
from workers.service.services import Services
from workers.settings import QueueSettings, Settings

RUN = "0123456789abcdef"
PLAN: dict[str, Any] = {
    "plan_id": "feedfeedfeedfeed",
    "model_name": "a/b",
    "revision": "main",
    "megaphone_plan": {"start_node": "a", "chain": [{"node_id": "a"}, {"node_id": "b"}]},
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


@pytest.fixture
def nodes(redis: RedisProcess, tmp_path: Path) -> dict[str, Runs]:
    """What three nodes of a service that asks for join tokens have of it."""
    with redis.client() as client:
        client.flushall()
    authority = Authority()
    made = {}
    for node_id in ("a", "b", "c"):
        settings = Settings.from_env(
            {
                "REDIS_URL": redis.url,
                "FAIRSHARD_DATA": str(tmp_path),
                "NODE_ID": node_id,
                "FAIRSHARD_JOIN_KEY": authority.join_key,
                "FAIRSHARD_JOIN_TOKEN": authority.token(node_id),
            }
        )
        made[node_id] = Runs(Services(settings=settings, queue=QueueSettings()))
    return made


def told(runs: Runs, node_id: str) -> dict[str, Any]:
    redis: Any = runs.services.redis
    return dict(json.loads(redis.lpop(f"fairshard:runner:{node_id}")))


def test_only_the_start_node_announces_and_only_just_now(
    nodes: dict[str, Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"run_id": RUN, "plan_id": PLAN["plan_id"], "from": "a", "to": ["b"], "batch": 1}
    announce(nodes["a"], body)
    message = told(nodes["b"], "b")
    check_announcement(nodes["b"], message, start_node="a")
    with pytest.raises(Conflict, match="only the plan's start node, 'c', may"):
        check_announcement(nodes["b"], message, start_node="c")
    with pytest.raises(Conflict, match="without its signature"):
        check_announcement(nodes["b"], {**message, "body": {**message["body"], "batch": 2}}, start_node="a")
    announce(nodes["c"], body)
    with pytest.raises(Conflict, match="without its signature"):
        check_announcement(nodes["b"], told(nodes["b"], "b"), start_node="a")
    monkeypatch.setattr(announcement, "clock", lambda _: message["body"]["signed_at"] + 100)
    with pytest.raises(Conflict, match="announced 100 s ago"):
        check_announcement(nodes["b"], message, start_node="a")


def test_an_answer_counts_if_its_node_gave_it(nodes: dict[str, Runs]) -> None:
    answer(nodes["b"], RUN, state="ready", url="http://b:1")
    said = next_answer(nodes["a"], RUN, timeout_s=1)
    assert said == {"node_id": "b", "run_id": RUN, "state": "ready", "url": "http://b:1"}
    forger = Runs(replace(nodes["c"].services, settings=replace(nodes["c"].services.settings, node_id="b")))
    answer(forger, RUN, state="ready", url="http://evil:1")
    assert next_answer(nodes["a"], RUN, timeout_s=1) is None
    assert next_answer(nodes["a"], RUN, timeout_s=0.1) is None


def alive(nodes: dict[str, Runs]) -> None:
    for node_id, runs in nodes.items():
        runs.services.registry.announce({"node_id": node_id, "instance": node_id})


def test_a_run_whose_leader_goes_silent_has_failed(nodes: dict[str, Runs], redis: RedisProcess) -> None:
    runs = nodes["c"]
    with pytest.raises(Conflict, match=r"node a is not alive \(2 of 2 are not\)"):
        runs.submit(PLAN, {"prompt": "x"})
    alive(nodes)
    run_id = runs.submit(PLAN, {"prompt": "x"})
    assert told(nodes["a"], "a") == {"what": "run", "run_id": run_id}
    assert runs.view(run_id)["state"] == "queued"
    assert nodes["a"].beat(run_id, for_s=0.05) is None
    nodes["a"].state(run_id, "running")
    nodes["a"].tokens(run_id, [[7]], ["w7"])
    view = runs.wait(run_id, timeout_s=10)
    assert view["state"] == "failed"
    assert view["error"]["message"] == "node a, which leads the run, went silent"
    assert nodes["a"].beat(run_id) == "failed", "its leader hears of it, should it come back"
    nodes["a"].end(run_id, "done", result={"token_ids": [[7]]})
    assert runs.view(run_id)["state"] == "failed", "who ends it first is believed"
    events = [event[1] for event in runs.follow(run_id) if event is not None]
    assert [event["event"] for event in events] == ["running", "tokens", "ended"]
    with pytest.raises(NotFound):
        runs.view("f" * 16)


def test_a_runner_that_dies_says_so_through_its_worker_and_one_without_work_ends(
    nodes: dict[str, Runs], redis: RedisProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alive(nodes)
    for name, value in {"REDIS_URL": redis.url, "FAIRSHARD_DATA": str(tmp_path), "NODE_ID": "a"}.items():
        monkeypatch.setenv(name, value)
    with Herald(nodes["a"].services) as herald:
        run_id = nodes["c"].submit(PLAN, {"prompt": "x"})
        until(lambda: herald._runner is not None, what="the runner starts", timeout_s=10)
        assert herald._runner is not None
        herald._runner.kill()
        view = nodes["c"].wait(run_id, timeout_s=10)
        assert view["error"]["message"] == "the runner of node a died (status -9)"
    monkeypatch.setenv("FAIRSHARD_RUNNER_IDLE_S", "0.1")
    with subprocess.Popen([sys.executable, "-m", "workers.runner"], stdin=subprocess.PIPE) as idle:
        assert idle.wait(timeout=30) == 0
    monkeypatch.delenv("FAIRSHARD_RUNNER_IDLE_S")
    with subprocess.Popen([sys.executable, "-m", "workers.runner"], stdin=subprocess.PIPE) as orphan:
        assert orphan.stdin is not None
        orphan.stdin.close()
        assert orphan.wait(timeout=30) == 0, "its worker is gone"


def test_a_run_is_cancelled_and_a_plan_deployed(nodes: dict[str, Runs]) -> None:
    alive(nodes)
    runs = nodes["c"]
    run_id = runs.submit(PLAN, {"prompt": "x"})
    runs.cancel(run_id)
    assert nodes["a"].beat(run_id) == "cancelled"
    nodes["a"].end(run_id, "cancelled")
    assert runs.wait(run_id, timeout_s=5)["state"] == "cancelled"
    assert not runs.undeploy(PLAN["plan_id"])
    nodes["a"].deploy(PLAN["plan_id"], {"a": 5, "b": 7})
    assert runs.deployed() == {PLAN["plan_id"]: {"a": 5, "b": 7}}
    assert runs.undeploy(PLAN["plan_id"])
