"""Real processes are killed, stopped, cut off and restarted while they work; every accepted job ends all the same."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import BlackHole, RedisProcess, Service, Worker, until

from planner.errors import NotFound, Unavailable
from workers.celery_app import create_app
from workers.downloader import resolve
from workers.ledger.steps import ENDED
from workers.queue.bootsteps import install
from workers.settings import QueueSettings, Settings
from workers.splitter import verify

#: One process runs them all: they share their services.
pytestmark = pytest.mark.xdist_group("nothing-lost")

#: Leases and expiries short enough for a test, long enough for a loaded machine.
SHORT = {"FAIRSHARD_LEASE_S": "4", "FAIRSHARD_NODE_TTL_S": "6", "FAIRSHARD_GRACE_S": "20"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("killed")
    with Service(directory, env=SHORT | {"HF_HOME": str(directory / "hf")}) as running:
        yield running


@pytest.fixture
def killed(service: Service) -> Iterator[Service]:
    """The service; what a test killed lives again for the next one."""
    yield service
    for worker in service.all_workers:
        if not worker.alive():
            worker.start()
    for worker in service.all_workers:
        until(worker.ready, what=f"{worker.name} is ready again")
    jobs = service.jobs()
    until(lambda: len(jobs.nodes()) == len(service.nodes), what="the nodes are back")


def ended(service: Service, job_id: str, *, timeout_s: float = 100) -> dict[str, Any]:
    jobs = service.jobs()

    def look() -> dict[str, Any] | None:
        view: dict[str, Any] = jobs.job(job_id)
        return view if view["state"] in ENDED else None

    return dict(
        until(look, what=lambda: json.dumps(jobs.job(job_id), indent=1) + service.logs(), timeout_s=timeout_s)
    )


def step(service: Service, job_id: str, name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [s for s in service.jobs().job(job_id)["steps"] if s["name"] == name]
    return found[0] if found else {"state": "none"}


def splitting(service: Service, hub: TestHub, name: str, *, bytes_per_s: int = 8_000) -> str:
    """A job whose nodes are all cutting their shards, slowly until the Hub's faults are cleared."""
    hub.add_repo(name, checkpoint("llama_deep"))
    jobs = service.jobs()
    assert ended(service, jobs.submit_request(name)["job_id"])["state"] == "done"
    hub.fault("trickle", path="*.safetensors", where="cdn", bytes_per_s=bytes_per_s, times=None)
    job_id = str(jobs.submit_process(name)["job_id"])
    for node_id in service.nodes:
        until(
            lambda n=node_id: step(service, job_id, f"split:{n}")["state"] == "running",  # type: ignore[misc]
            what=lambda: json.dumps(jobs.job(job_id)) + service.logs(),
        )
    return job_id


def check_whole(service: Service, view: dict[str, Any]) -> None:
    """The shards together are the checkpoint, and nothing half-written lies about."""
    assert view["state"] == "done", (view, service.logs())
    folders = [Path(shard["path"]) for shard in view["result"]["shards"]]
    manifest = json.loads((folders[0] / "manifest.json").read_bytes())
    report = verify(folders, checkpoint=resolve(view["model_name"], revision=manifest["revision"]))
    assert report.ok, report
    assert report.complete
    # What a killed split left of a plan that was given up goes with the node's next sign of life.
    living = [service.data / "nodes" / node_id for node_id, worker in service.workers.items() if worker.alive()]
    until(
        lambda: not [path for folder in living for path in folder.rglob("*.partial*")],
        what=lambda: str(list(service.data.rglob("*.partial*"))),
    )


def test_a_killed_child_costs_one_attempt(hub: TestHub, killed: Service) -> None:
    job_id = splitting(killed, hub, "tester/child")
    for pid in killed.workers["mid"].children():
        psutil.Process(pid).kill()
    hub.faults.clear()
    view = ended(killed, job_id)
    check_whole(killed, view)
    assert step(killed, job_id, "split:mid")["attempts"] == 2
    assert step(killed, job_id, "split:big")["attempts"] == 1
    assert killed.workers["mid"].alive()


def test_a_dead_node_s_part_is_planned_again_over_the_others(hub: TestHub, killed: Service) -> None:
    job_id = splitting(killed, hub, "tester/dead")
    plan_id = killed.jobs().job(job_id)["result"]["plan_id"]
    killed.workers["big"].kill()
    hub.faults.clear()
    view = ended(killed, job_id)
    check_whole(killed, view)
    assert view["result"]["plan_id"] != plan_id
    assert view["result"]["node_ids"] == ["mid", "small"]
    assert step(killed, job_id, "split:big")["state"] == "lost"
    assert "big" in step(killed, job_id, "split:big")["error"]["message"]


def test_a_node_that_left_with_its_shard_done_is_not_planned_for_again(hub: TestHub, killed: Service) -> None:
    """Named by the request, and not one that the job lost: it held nothing unfinished when it went."""
    hub.add_repo("tester/named", checkpoint("llama_deep"))
    jobs = killed.jobs()
    assert ended(killed, jobs.submit_request("tester/named")["job_id"])["state"] == "done"
    named = [{"node_id": n, "flop_per_s": f, "memory_bytes": m} for n, (f, m) in killed.nodes.items()]
    for pid in killed.workers["mid"].children():
        psutil.Process(pid).suspend()
    job_id = jobs.submit_process("tester/named", available_nodes=named)["job_id"]
    for node_id in ("small", "big"):
        until(
            lambda n=node_id: step(killed, job_id, f"split:{n}")["state"] == "done",  # type: ignore[misc]
            what=lambda: json.dumps(jobs.job(job_id)) + killed.logs(),
        )
    killed.workers["small"].stop()
    killed.workers["mid"].kill()
    view = ended(killed, job_id)
    check_whole(killed, view)
    assert view["result"]["node_ids"] == ["big"]


def test_a_job_whose_nodes_are_all_gone_waits_for_one(hub: TestHub, killed: Service) -> None:
    job_id = splitting(killed, hub, "tester/all-gone")
    for worker in killed.workers.values():
        worker.kill()
    hub.faults.clear()
    until(lambda: step(killed, job_id, "plan")["attempts"] == 0, what="it is planned again", timeout_s=60)
    time.sleep(12)  # three attempts would be over
    assert killed.jobs().job(job_id)["state"] == "running"
    killed.workers["big"].start()
    check_whole(killed, ended(killed, job_id))


def test_a_job_may_wait_for_its_node(hub: TestHub, killed: Service) -> None:
    hub.add_repo("tester/patient", checkpoint("llama"))
    jobs = killed.jobs()
    assert ended(killed, jobs.submit_request("tester/patient")["job_id"])["state"] == "done"
    hub.fault("trickle", path="*.safetensors", where="cdn", bytes_per_s=8_000, times=None)
    job_id = jobs.submit_process("tester/patient", on_node_loss="wait")["job_id"]
    until(lambda: step(killed, job_id, "split:big")["state"] == "running", what="the split runs")
    killed.workers["big"].kill()
    until(lambda: "big" not in {n["node_id"] for n in jobs.nodes()}, what="big is missed", timeout_s=30)
    hub.faults.clear()
    killed.workers["big"].start()
    view = ended(killed, job_id)
    check_whole(killed, view)
    assert "big" in view["result"]["node_ids"]


def test_a_poisonous_step_stops_after_its_attempts(hub: TestHub, killed: Service) -> None:
    hub.add_repo("tester/poison", checkpoint("llama"))
    hub.fault("hang", path="*/config.json", seconds=60, times=None)
    jobs = killed.jobs()
    job_id = jobs.submit_request("tester/poison")["job_id"]
    deaths = 0
    while jobs.job(job_id)["state"] not in ENDED:
        assert deaths <= 3
        running = [owner for job, _, owner in jobs._services.ledger.running() if job == job_id]
        if running and any(s["state"] == "running" and s["attempts"] > deaths for s in jobs.job(job_id)["steps"]):
            for pid in killed.workers[running[0].partition("@")[0]].children():
                psutil.Process(pid).kill()
            deaths += 1
        time.sleep(0.1)
    view = jobs.job(job_id)
    assert view["state"] == "failed"
    assert view["error"]["code"] == "worker_lost"
    assert "3 attempts" in view["error"]["message"]
    assert all(worker.alive() for worker in killed.all_workers)
    hub.faults.clear()
    hub.add_repo("tester/fine", checkpoint("llama"))
    assert ended(killed, jobs.submit_request("tester/fine")["job_id"])["state"] == "done"


def test_redis_restarts_while_late_acknowledged_tasks_run(hub: TestHub, killed: Service) -> None:
    job_id = splitting(killed, hub, "tester/restart")
    pids = {worker.name: worker.process.pid for worker in killed.all_workers if worker.process}
    # appendfsync everysec: what was written a second ago is on disk.
    time.sleep(1.2)
    killed.redis.kill()
    time.sleep(1)
    killed.redis.start()
    hub.faults.clear()
    view = ended(killed, job_id)
    check_whole(killed, view)
    assert {worker.name: worker.process.pid for worker in killed.all_workers if worker.process} == pids
    assert all(worker.alive() for worker in killed.all_workers)
    hub.faults.clear()
    hub.add_repo("tester/after", checkpoint("llama"))
    assert ended(killed, killed.jobs().submit_request("tester/after", process={})["job_id"])["state"] == "done"


def test_a_wiped_redis_gets_the_accepted_jobs_back(hub: TestHub, killed: Service) -> None:
    jobs = killed.jobs(journal=True)
    for name in ("one", "two", "three"):
        hub.add_repo(f"tester/{name}", checkpoint("llama"))
    hub.fault("hang", path="*/config.json", seconds=2, times=3)
    job_ids = [jobs.submit_request(f"tester/{name}", process={})["job_id"] for name in ("one", "two", "three")]
    killed.redis.kill()
    shutil.rmtree(killed.redis.directory)
    with pytest.raises(Unavailable):
        jobs.job(job_ids[0])
    killed.redis.start()
    # Accepted is accepted: nobody is told that there is no such job.
    assert [jobs.job(job_id)["state"] for job_id in job_ids] == ["queued"] * 3

    def all_are_back() -> bool:
        jobs.replay()
        return all(jobs._services.ledger.states(job_ids))

    until(all_are_back, what="the journal is replayed")
    for job_id in job_ids:
        check_whole(killed, ended(killed, job_id))
    until(lambda: jobs.replay() == 0 and jobs.metrics()["journal_jobs"] == 0, what="the journal is empty")


def test_a_wiped_redis_gets_plans_and_metadata_back_and_no_deleted_plan(hub: TestHub, killed: Service) -> None:
    jobs, plan_ids = killed.jobs(journal=True), {}
    for name in ("tester/kept", "tester/dropped"):
        hub.add_repo(name, checkpoint("llama"))
        view = ended(killed, jobs.submit_request(name, process={})["job_id"])
        check_whole(killed, view)
        plan_ids[name] = view["result"]["plan_id"]
    kept, dropped = plan_ids.values()
    assert ended(killed, jobs.submit_delete(dropped)["job_id"])["state"] == "done"
    killed.redis.kill()
    shutil.rmtree(killed.redis.directory)
    killed.redis.start()

    def given_back() -> bool:
        with contextlib.suppress(NotFound, Unavailable):
            assert all(jobs.profile(name)["model_name"] == name for name in plan_ids)
            return bool(jobs.latest_plan("tester/kept") == jobs.plan(kept))
        return False

    until(given_back, what="the planner gives back what it kept")
    assert kept in [plan["plan_id"] for plan in jobs.plans(limit=500)]
    assert jobs.profile("tester/kept")["model_name"] == "tester/kept"
    with pytest.raises(NotFound):
        jobs.plan(dropped)
    with pytest.raises(NotFound):
        jobs.latest_plan("tester/dropped")
    # Made again from the metadata that is there, it is a plan like any other, in Redis or not.
    until(lambda: len(jobs.nodes()) == len(killed.nodes), what="the nodes are back")
    view = ended(killed, jobs.submit_process("tester/dropped")["job_id"])
    check_whole(killed, view)
    assert view["result"]["plan_id"] == dropped
    with killed.redis.client() as client:
        client.delete(f"fairshard:plan:{dropped}")
    assert jobs.latest_plan("tester/dropped") == jobs.plan(dropped)
    assert ended(killed, jobs.submit_delete(dropped)["job_id"])["state"] == "done"
    assert not [path for node_id in killed.nodes if (path := killed.shards(node_id, dropped)).exists()]


def test_sigterm_lets_a_step_finish(hub: TestHub, killed: Service) -> None:
    job_id = splitting(killed, hub, "tester/finish")
    small = killed.workers["small"]
    small.signal(signal.SIGTERM)
    until(lambda: "Soft Shutdown" in small.log, what=lambda: small.log)
    assert step(killed, job_id, "split:small")["state"] == "running"
    hub.faults.clear()
    assert small.process is not None
    assert small.process.wait(timeout=60) == 0
    # It waited for its step, and no longer: the grace period is not over.
    assert "handed back" not in small.log
    small.start()
    check_whole(killed, ended(killed, job_id))
    assert step(killed, job_id, "split:small")["attempts"] == 1


def test_a_node_that_is_ended_as_soon_as_it_is_seen_ends_well(killed: Service, tmp_path: Path) -> None:
    late = Worker(
        "late", "compute,node.late", env=killed.workers["big"].env | {"NODE_ID": "late"}, directory=tmp_path
    )
    late.start()
    try:
        until(lambda: "late" in {n["node_id"] for n in killed.jobs().nodes()}, what=lambda: late.log, every_s=0.001)
        assert late.stop() == 0, late.log
        assert "Traceback" not in late.log
        assert "late" not in {n["node_id"] for n in killed.jobs().nodes()}
    finally:
        late.kill()


def test_workers_end_while_redis_is_away(killed: Service) -> None:
    killed.redis.kill()
    try:
        for worker in killed.all_workers:
            worker.signal(signal.SIGTERM)
        for worker in killed.all_workers:
            assert worker.process is not None
            worker.process.wait(timeout=60)
    finally:
        killed.redis.start()


def test_an_event_waits_for_no_redis(tmp_path: Path) -> None:
    """What kept a worker from ending while Redis was away, in the one moment of its shutdown in which it sent one."""
    redis = RedisProcess(tmp_path)
    redis.start()
    app = create_app(Settings.from_env({"REDIS_URL": redis.url}), QueueSettings.from_env({}))
    install(app)
    connected, away = threading.Event(), threading.Event()

    def send() -> None:
        with app.connection_for_write() as connection:
            dispatcher = app.events.Dispatcher(connection, hostname="a-worker", enabled=True)
            dispatcher.send("worker-heartbeat", retry=True)
            connected.set()
            away.wait()
            dispatcher.send("worker-heartbeat", retry=True)

    sender = threading.Thread(target=send, daemon=True)
    try:
        sender.start()
        assert connected.wait(20)
    finally:
        redis.kill()
        away.set()
    sender.join(20)
    assert not sender.is_alive()


def test_redis_that_is_away_or_deaf_is_said_within_five_seconds(killed: Service) -> None:
    jobs = killed.jobs()
    jobs.metrics()
    process = killed.redis.process
    assert process is not None
    for number in (signal.SIGSTOP, signal.SIGKILL):
        process.send_signal(number)
        begin = time.monotonic()
        with pytest.raises(Unavailable, match="Redis"):
            jobs.submit_request("tester/any")
        assert time.monotonic() - begin < 5
    killed.redis.kill()
    killed.redis.start()


def test_a_newer_message_is_refused_by_name_and_the_step_still_runs(hub: TestHub, killed: Service) -> None:
    from celery import Celery

    hub.add_repo("tester/newer", checkpoint("llama"))
    app = Celery(broker=killed.redis.url, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": "fairshard:celery:"}
    app.send_task("workers.download", args=["0" * 32, "download"], kwargs={"version": 99}, queue="compute")
    until(
        lambda: any("speaks message version 1 and was sent 99" in worker.log for worker in killed.workers.values()),
        what=killed.logs,
    )
    assert ended(killed, killed.jobs().submit_request("tester/newer")["job_id"])["state"] == "done"


def test_a_full_node_is_named_and_others_go_on(hub: TestHub, killed: Service) -> None:
    hub.add_repo("tester/full", checkpoint("llama_deep"))
    jobs = killed.jobs()
    small = killed.workers["small"]
    small.stop()
    small.env["FAIRSHARD_DISK_QUOTA"] = "1000"
    small.start()
    until(small.ready, what="small is ready")
    until(lambda: len(jobs.nodes()) == 3, what="three nodes")
    try:
        view = ended(killed, jobs.submit_request("tester/full", process={})["job_id"])
        assert view["state"] == "failed"
        assert view["error"]["code"] == "node_failure"
        assert view["error"]["details"]["node_id"] == "small"
        assert "small@" in view["error"]["message"]
        assert "quota" in view["error"]["message"]
        assert view["step"] == "split:small"
        only = {"exclude": ["small"]}
        check_whole(killed, ended(killed, jobs.submit_process("tester/full", options=only)["job_id"]))
    finally:
        del small.env["FAIRSHARD_DISK_QUOTA"]
        small.stop()


def test_a_user_s_token_is_nowhere(hub: TestHub, killed: Service) -> None:
    token = hub.add_user("ann")
    hub.add_repo("tester/secret", checkpoint("llama"), private=True)
    hub.grant("tester/secret", "ann")
    jobs = killed.jobs(journal=True)
    job_id = jobs.submit_request("tester/secret", process={}, hub_token=token)["job_id"]
    view = ended(killed, job_id)
    assert view["state"] == "done", view
    failed = ended(killed, jobs.submit_request("tester/nothing", hub_token=token)["job_id"])
    assert failed["state"] == "failed"
    needle = token.encode()
    # The append-only file, logs, journal, ledger, results and shards.
    for path in killed.directory.rglob("*"):
        if path.is_file():
            assert needle not in path.read_bytes(), path
    assert token not in json.dumps([view, failed, jobs.events(job_id)])


def test_a_half_open_connection_is_noticed(hub: TestHub, killed: Service, tmp_path: Path) -> None:
    """Packets are swallowed in both directions, as by a firewall that forgot the connection."""
    hub.add_repo("tester/hole", checkpoint("llama"))
    with BlackHole(killed.redis.port) as hole:
        killed.planner.kill()
        env = killed.planner.env | {"REDIS_URL": f"redis://127.0.0.1:{hole.port}/0"}
        planner = Worker("planner-behind", "planner", env=env, directory=tmp_path)
        try:
            with killed.redis.client() as client:
                client.config_set("maxmemory-policy", "volatile-lru")
                until(planner.start().ready, what=lambda: planner.log)
                client.config_set("maxmemory-policy", "noeviction")
            assert "maxmemory-policy is volatile-lru" in planner.log, "a role warns of a Redis that evicts"
            jobs = killed.jobs()
            assert ended(killed, jobs.submit_request("tester/hole", process={})["job_id"])["state"] == "done"
            hole.swallow()
            begin = time.monotonic()
            view = ended(killed, jobs.submit_process("tester/hole", batch_size=2)["job_id"])
            assert view["state"] == "done", (view, planner.log)
            assert time.monotonic() - begin < 60
            assert planner.alive()
        finally:
            planner.kill()


def test_a_job_whose_token_went_with_redis_says_so(hub: TestHub, killed: Service) -> None:
    token = hub.add_user("bob")
    hub.add_repo("tester/lost-token", checkpoint("llama"), private=True)
    hub.grant("tester/lost-token", "bob")
    hub.fault("hang", path="/api/models/tester/lost-token*", seconds=2, times=1)
    jobs = killed.jobs(journal=True)
    job_id = jobs.submit_request("tester/lost-token", hub_token=token)["job_id"]
    killed.redis.kill()
    shutil.rmtree(killed.redis.directory)
    killed.redis.start()

    def is_back() -> bool:
        jobs.replay()
        return bool(jobs._services.ledger.states([job_id])[0])

    until(is_back, what="the journal is replayed")
    view = ended(killed, job_id)
    assert view["state"] == "failed"
    assert view["error"]["code"] == "access_denied"
    assert "send the request again, with the token" in view["error"]["message"]
    assert ended(killed, jobs.submit_request("tester/lost-token", hub_token=token)["job_id"])["state"] == "done"


def test_nodes_that_die_or_run_out_of_time_to_stop_with_the_settings_as_delivered(
    hub: TestHub, tmp_path: Path
) -> None:
    """Handed back when the grace period is over; missed within twenty seconds when dead."""
    with Service(tmp_path, env={"HF_HOME": str(tmp_path / "hf"), "FAIRSHARD_GRACE_S": "1"}) as running:
        job_id = splitting(running, hub, "tester/default", bytes_per_s=4_000)
        jobs = running.jobs()
        running.workers["small"].kill()
        died = time.time()
        running.workers["mid"].stop(timeout_s=30)
        state = step(running, job_id, "split:mid")
        assert (state["state"], state["attempts"]) == ("queued", 0), (state, running.workers["mid"].log[-3000:])
        running.workers["mid"].start()

        def lost() -> list[dict[str, Any]]:
            events = [event for _, event in jobs.events(job_id, limit=1000) if event["event"] == "lost"]
            return [event for event in events if event["node_id"] == "small"]

        (event,) = until(lost, what=lambda: json.dumps(jobs.job(job_id)), timeout_s=60)
        assert datetime.fromisoformat(event["at"]).timestamp() - died < 20
        hub.faults.clear()
        check_whole(running, ended(running, job_id))
