"""Real processes: who may be a node, what a step may take, and where a user's Hub token never is."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.fernet import Fernet
from hub.server import TestHub
from support.checkpoints import checkpoint, copy_of
from support.running import Service, Worker, free_port, until
from support.web_cases import Server

from planner.errors import Conflict, InvalidInput
from workers.jobs.jobs import Jobs
from workers.ledger.steps import ENDED, StepSpec
from workers.nodes.joining import Authority, Joining
from workers.nodes.registry import Registry
from workers.queue.bootsteps import _check_may
from workers.service.services import Services
from workers.settings import QueueSettings, Settings

pytestmark = pytest.mark.xdist_group("no-one-let-in")

NODES = {"one": (200e9, 4 << 30), "two": (100e9, 2 << 30)}
AUTHORITY = Authority()


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose nodes have join tokens."""
    directory = tmp_path_factory.mktemp("joined")
    env = {"HF_HOME": str(directory / "hf"), "FAIRSHARD_JOIN_KEY": AUTHORITY.join_key, "FAIRSHARD_STEP_TIME_S": "25"}
    made = Service(directory, nodes=NODES, env=env)
    for node_id, worker in made.workers.items():
        worker.env["FAIRSHARD_JOIN_TOKEN"] = AUTHORITY.token(node_id)
    with made as running:
        jobs = running.jobs()
        until(lambda: len(jobs.nodes()) == len(NODES), what=running.logs)
        yield running


def ended(service: Service, job_id: str) -> dict[str, Any]:
    jobs = service.jobs()

    def look() -> dict[str, Any] | None:
        view: dict[str, Any] = jobs.job(job_id)
        return view if view["state"] in ENDED else None

    return dict(until(look, what=lambda: json.dumps(jobs.job(job_id)) + service.logs(), timeout_s=120))


def test_a_job_of_joined_nodes_ends_as_any_other(hub: TestHub, joined: Service) -> None:
    hub.add_repo("tester/joined", checkpoint("llama"))
    jobs = joined.jobs()
    view = ended(joined, jobs.submit_request("tester/joined", process={})["job_id"])
    assert view["state"] == "done", (view, joined.logs())
    assert "proof" not in json.dumps(view)


@pytest.mark.parametrize(
    ("node_id", "queue", "token_of", "says"),
    [
        ("thief", "thief", "", "has none"),
        ("two", "two", "one", "has one for 'one'"),
        ("thief", "two", "thief", "can't serve the queue 'node.two'"),
    ],
)
def test_a_worker_that_is_no_node_of_ours_does_not_start(  # noqa: PLR0917
    joined: Service, tmp_path: Path, node_id: str, queue: str, token_of: str, says: str
) -> None:
    env = {**joined.env, "NODE_ID": node_id, "FAIRSHARD_FLOP_PER_S": "1e13", "FAIRSHARD_MEMORY_BYTES": "99000000000"}
    env["FAIRSHARD_DATA"] = str(tmp_path / "data")
    if token_of:
        env["FAIRSHARD_JOIN_TOKEN"] = AUTHORITY.token(token_of)
    worker = Worker("thief", f"compute,node.{queue}", env=env, directory=tmp_path).start()
    try:
        until(lambda: not worker.alive(), what=lambda: worker.log)
        assert says in worker.log
        assert worker.process is not None
        assert worker.process.returncode != 0
    finally:
        worker.kill()
    assert [node["node_id"] for node in joined.jobs().nodes()] == ["one", "two"]


def test_redis_password_alone_puts_nobody_into_a_plan(hub: TestHub, joined: Service) -> None:
    """The registry is written by hand: a machine larger than all others, and another machine in a node's place."""
    hub.add_repo("tester/coveted", checkpoint("llama"))
    huge = {"flop_per_s": 1e15, "memory_bytes": 2**40, "instance": "evil", "device": None}
    with joined.redis.client() as client:
        foreign = replace(Settings.from_env(joined.env), join_token=Authority().token("giant"))
        Registry(client, joining=Joining.from_settings(foreign), ttl_s=600).announce({"node_id": "giant", **huge})
        client.set("fairshard:node:two", json.dumps({"node_id": "two", **huge}))
        assert {info["node_id"] for info in Registry(client).alive()} >= {
            "giant"
        }  # who asks for no token believes it
        view = ended(joined, joined.jobs().submit_request("tester/coveted", process={})["job_id"])
    assert view["state"] == "done", (view, joined.logs())
    assert set(view["result"]["node_ids"]) <= {"one", "two"}
    until(lambda: len(joined.jobs().nodes()) == len(NODES), what="the true node announced itself over the false one")


def test_a_result_that_no_node_signed_ends_the_job(hub: TestHub, joined: Service) -> None:
    """Someone with Redis' password claims a node's step before it does, and says that it is done."""
    hub.add_repo("tester/prey", checkpoint("llama"))
    jobs = joined.jobs()
    assert ended(joined, jobs.submit_request("tester/prey")["job_id"])["state"] == "done"
    ledger = jobs._services.ledger
    steps = [
        StepSpec(name="publish", task="workers.publish_metadata", queue="nobody"),
        StepSpec(name="plan", task="planner.plan", queue="planner", after=("publish",)),
    ]
    params = {"model_name": "tester/prey", "process": {}}
    job_id = ledger.submit("request", model_name="tester/prey", params=params, steps=steps).job_id
    claimed = ledger.claim(job_id, "publish", owner="thief")
    assert not isinstance(claimed, str)
    assert ledger.commit(claimed, {"path": "profiles/evil.json", "commit": "0" * 40}) == "ok"
    view = ended(joined, job_id)
    assert view["state"] == "failed"
    assert view["error"]["code"] == "access_denied"
    assert "who is not a node here" in view["error"]["message"]


def test_a_planner_that_others_reach_asks_for_join_tokens() -> None:
    def made(url: str, key: str | None) -> Services:
        env = {"REDIS_URL": url, "NODE_ID": "a", "FAIRSHARD_SECRET": Fernet.generate_key().decode()} | (
            {"FAIRSHARD_JOIN_KEY": key} if key else {}
        )
        return Services(settings=Settings.from_env(env), queue=QueueSettings())

    far, near = "rediss://u:p@redis.example:6379/0", "redis://127.0.0.1:6379/0"
    with pytest.raises(InvalidInput, match="FAIRSHARD_JOIN_KEY"):
        _check_may(made(far, None), {"planner"})
    _check_may(made(far, "open"), {"planner"})
    _check_may(made(far, AUTHORITY.join_key), {"planner"})
    _check_may(made(near, None), {"planner", "compute", "node.a"})
    for queues in ({"compute"}, {"node.a"}):
        with pytest.raises(Conflict, match="join token"):
            _check_may(made(far, AUTHORITY.join_key), queues)


def test_a_step_that_takes_too_long_ends_with_its_limit(hub: TestHub, joined: Service) -> None:
    hub.add_repo("tester/slow", checkpoint("llama_deep"))
    jobs = joined.jobs()
    assert ended(joined, jobs.submit_request("tester/slow")["job_id"])["state"] == "done"
    hub.fault("trickle", path="*.safetensors", where="cdn", bytes_per_s=2_000, times=None)
    view = ended(joined, jobs.submit_process("tester/slow")["job_id"])
    hub.faults.clear()
    assert (view["state"], view["error"]["code"]) == ("failed", "node_failure"), view
    assert "FAIRSHARD_STEP_TIME_S" in view["error"]["message"]
    assert view["error"]["details"]["limit_s"] == 25
    assert jobs.metrics()["step_time_limit_total"] >= 1
    # The workers are well, and the same model goes through now.
    assert ended(joined, jobs.submit_process("tester/slow")["job_id"])["state"] == "done"


def test_a_step_that_takes_too_much_memory_ends_with_its_limit(hub: TestHub, joined: Service, tmp_path: Path) -> None:
    folder = copy_of("gemma2", tmp_path / "heavy")
    config = json.loads((folder / "config.json").read_text())
    # A setting that no other test has, or its trace may be cached: it must be traced.
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4321}))
    hub.add_repo("tester/heavy", folder)
    workers = list(joined.workers.values())
    for worker in workers:
        worker.stop()
        worker.env["FAIRSHARD_STEP_MEMORY_BYTES"] = "30000000"  # torch alone takes more
        worker.start()
    try:
        for worker in workers:
            until(worker.ready, what=lambda w=worker: w.log)
        once = QueueSettings.from_env(joined.env | {"FAIRSHARD_MAX_ATTEMPTS": "1"})
        view = ended(
            joined,
            Jobs.from_settings(Settings.from_env(joined.env), queue=once).submit_request("tester/heavy")["job_id"],
        )
        assert view["state"] == "failed", (view, joined.logs())
        # Python says what it could not get; C++ ends its process.
        assert view["error"]["code"] in {"node_failure", "worker_lost"}
        assert "FAIRSHARD_STEP_MEMORY_BYTES" in view["error"]["message"]
        assert "one@" in view["error"]["message"] or "two@" in view["error"]["message"]
        assert all(worker.alive() for worker in workers)
    finally:
        for worker in workers:
            del worker.env["FAIRSHARD_STEP_MEMORY_BYTES"]
            worker.stop()
            worker.start()
        for worker in workers:
            until(worker.ready, what=lambda w=worker: w.log)


def _get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read() + str(error.headers).encode()
    except OSError:
        return 0, b""


def _post(url: str, body: object, token: str) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json", "X-HF-Token": token}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_users_hub_token_is_nowhere_but_in_use(hub: TestHub, joined: Service, tmp_path: Path) -> None:
    token = hub.add_user("ann")
    hub.add_repo("tester/secret", checkpoint("llama"), private=True)
    hub.grant("tester/secret", "ann")
    forms = [token.encode(), base64.b64encode(token.encode()).rstrip(b"="), token.encode().hex().encode()]
    seen: dict[str, bytes] = {}
    with ExitStack() as stack:
        server = stack.enter_context(Server(joined.directory / "web", joined.env))
        flower_url = f"http://127.0.0.1:{free_port()}"
        log = stack.enter_context((joined.directory / "flower.log").open("wb"))
        flower = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "workers.celery_app", "flower", "--address=127.0.0.1",
             f"--port={flower_url.rpartition(':')[2]}"],
            env=joined.workers["one"].env | {"FLOWER_UNAUTHENTICATED_API": "true"}, stdout=log, stderr=log,
        )  # fmt: skip
        stack.callback(flower.wait)
        stack.callback(flower.kill)
        until(lambda: _get(f"{flower_url}/healthcheck")[0] == 200, what="Flower answers")
        until(lambda: b"one@" in _get(f"{flower_url}/api/workers?refresh=1")[1], what="Flower knows the workers")
        status, said = _post(f"{server.url}/api/request", {"model_name": "tester/secret", "process": True}, token)
        assert status == 202
        job_id = json.loads(said)["job_id"]
        view = ended(joined, job_id)
        assert view["state"] == "done", (view, joined.logs())  # the token was needed, and used
        assert any(token in (request.authorization or "") for request in hub.counters.log("*tester/secret*"))
        seen["accepted"] = said
        for name, body in {
            "no such model": {"model_name": "tester/nothing", "process": True},
            "no such name": {"model_name": "../x"},
            "no metadata": None,
        }.items():
            path = "/api/request" if body else "/api/process"
            status, seen[name] = _post(server.url + path, body or {"model_name": "tester/nowhere"}, token)
            if status == 202:
                failed = json.loads(seen[name])["job_id"]
                assert ended(joined, failed)["state"] == "failed"
                seen[f"{name}: job"] = _get(f"{server.url}/api/jobs/{failed}")[1]
        for path in (f"/api/jobs/{job_id}", f"/api/jobs/{job_id}/events", "/api/jobs", "/api/plans", "/api/nodes",
                     "/metrics"):  # fmt: skip
            seen[path] = _get(server.url + path)[1]
        tasks = until(
            lambda: (found := _get(f"{flower_url}/api/tasks")[1]) and b"planner.finish" in found and found,
            what="Flower has seen the tasks",
        )
        seen["flower tasks"] = tasks
        for task_id in json.loads(tasks):
            seen[f"flower {task_id}"] = _get(f"{flower_url}/api/task/info/{task_id}")[1]
            seen[f"flower page {task_id}"] = _get(f"{flower_url}/task/{task_id}")[1]
        for path in ("/tasks", "/workers", "/metrics", "/api/workers", "/broker"):
            seen[f"flower {path}"] = _get(flower_url + path)[1]
        for pid in [flower.pid, *(w.process.pid for w in joined.all_workers if w.process)]:
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                seen[f"process {process.pid}"] = json.dumps([process.cmdline(), process.environ()]).encode()
    assert b"tester/secret" in tasks  # it is the job's task that Flower shows
    with joined.redis.client() as client:
        assert not list(client.scan_iter("fairshard:token:*"))
    # The append-only file (all that Redis was ever told), logs, the journal, shards, metadata, caches.
    files = [path for path in joined.directory.rglob("*") if path.is_file()]
    assert any(b"tester/secret" in path.read_bytes() for path in (joined.directory / "redis").rglob("*.aof"))
    assert any(path.name.startswith("journal.sqlite") for path in files)
    seen |= {str(path): path.read_bytes() for path in files}
    assert not [where for where, content in seen.items() if any(form in content for form in forms)]
