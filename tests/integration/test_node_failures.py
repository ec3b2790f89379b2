"""A node without memory, time, disk or leave to write: its job says which node it was and why, and others go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import Service, until

from workers.ledger.steps import ENDED

_CHAOS = Path(__file__).resolve().parents[1] / "chaos"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Node "poor" cuts shards and nothing else; whatever it lacks, the profiles are made by "rich"."""
    directory = tmp_path_factory.mktemp("poor")
    env = {
        "HF_HOME": str(directory / "hf"),
        "PYTHONPATH": os.pathsep.join((str(_CHAOS), str(_CHAOS.parents[1]))),
        "FAIRSHARD_LEASE_S": "4",
    }
    nodes = {"poor": (100e9, 2 << 30), "rich": (200e9, 4 << 30)}
    running = Service(directory, nodes=nodes, env=env, app="deadly_app")
    running.workers["poor"].queues = "node.poor"
    with running:
        yield running


def ended(service: Service, job_id: str) -> dict[str, Any]:
    jobs = service.jobs()

    def look() -> dict[str, Any] | None:
        view: dict[str, Any] = jobs.job(job_id)
        return view if view["state"] in ENDED else None

    return dict(until(look, what=lambda: json.dumps(jobs.job(job_id), indent=1) + service.logs(), timeout_s=100))


def profiled(service: Service, hub: TestHub, name: str) -> str:
    hub.add_repo(name, checkpoint("llama_deep"))
    assert ended(service, service.jobs().submit_request(name)["job_id"])["state"] == "done"
    return name


def check_blames_poor(service: Service, name: str, *words: str) -> None:
    """The job fails for the node's sake; another job, without that node, is done at the same time."""
    jobs = service.jobs()
    job_id = jobs.submit_process(name)["job_id"]
    other = jobs.submit_process(name, options={"exclude": ["poor"]})["job_id"]
    view = ended(service, job_id)
    assert view["state"] == "failed", view
    assert view["error"]["code"] == "node_failure", view
    assert view["error"]["details"]["node_id"] == "poor"
    for word in ("poor@", *words):
        assert word in view["error"]["message"], view["error"]
    assert view["step"] == "split:poor"
    assert ended(service, other)["state"] == "done"
    assert all(worker.alive() for worker in service.all_workers)


class Changed:
    """The node "poor" with other settings, for a while."""

    def __init__(self, service: Service, **env: str) -> None:
        self.service, self.env = service, env
        self.worker = service.workers["poor"]

    def __enter__(self) -> None:
        self.worker.env |= self.env
        self._restart()

    def __exit__(self, *_: object) -> None:
        for name in self.env:
            del self.worker.env[name]
        self._restart()

    def _restart(self) -> None:
        self.worker.kill()
        self.worker.start()
        until(self.worker.ready, what=lambda: self.worker.log)
        until(lambda: len(self.service.jobs().nodes()) == 2, what="both nodes are there")


def test_a_step_without_memory_is_named(hub: TestHub, service: Service) -> None:
    name = profiled(service, hub, "tester/memory")
    with Changed(service, FAIRSHARD_STEP_MEMORY_BYTES="200000"):
        check_blames_poor(service, name, "memory", "FAIRSHARD_STEP_MEMORY_BYTES")
    # The limit was the step's: nothing of it is left.
    assert ended(service, service.jobs().submit_process(name)["job_id"])["state"] == "done"


def test_a_step_without_time_is_named(hub: TestHub, service: Service) -> None:
    name = profiled(service, hub, "tester/time")
    with Changed(service, FAIRSHARD_STEP_TIME_S="5"):
        # "rich" has all the time that its part takes; then the Hub is fast again.
        hub.fault("trickle", path="*.safetensors", where="cdn", bytes_per_s=100, times=None)
        job_id = service.jobs().submit_process(name)["job_id"]
        view = ended(service, job_id)
    hub.faults.clear()
    assert view["state"] == "failed", view
    assert view["error"]["details"] == {"limit_s": 5.0, "node_id": "poor"}
    assert "took longer than 5 s (FAIRSHARD_STEP_TIME_S)" in view["error"]["message"]
    assert ended(service, service.jobs().submit_process(name)["job_id"])["state"] == "done"


def test_a_model_that_ends_every_process_that_touches_it_is_given_up(hub: TestHub, service: Service) -> None:
    """What the system's memory killer does to a child: it is gone, without a word."""
    hub.add_repo("tester/deadly", checkpoint("llama"))
    hub.add_repo("tester/harmless", checkpoint("llama"))
    jobs = service.jobs()
    pids = {worker.name: worker.process.pid for worker in service.all_workers if worker.process}
    job_id = jobs.submit_request("tester/deadly")["job_id"]
    harmless = jobs.submit_request("tester/harmless")["job_id"]
    view = ended(service, job_id)
    assert view["state"] == "failed", view
    assert view["error"]["code"] == "worker_lost"
    assert "after 3 attempts" in view["error"]["message"]
    assert "rich@" in view["error"]["message"]
    assert "memory" in view["error"]["message"]
    assert view["steps"][0]["attempts"] == 3
    assert ended(service, harmless)["state"] == "done"
    # Children died, workers did not.
    assert {worker.name: worker.process.pid for worker in service.all_workers if worker.process} == pids
    assert all(worker.alive() for worker in service.all_workers)


@pytest.fixture
def small_disk(service: Service) -> Iterator[Path]:
    """The folder for "poor"'s shards is a filesystem of 64 KiB, where this user may mount one."""
    place = service.data / "nodes" / "poor" / "shards"
    place.mkdir(parents=True, exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("a full disk is made with mount, which is not here")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk is made by mounting a small one, and here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_and_a_read_only_disk_are_named(hub: TestHub, service: Service, small_disk: Path) -> None:
    name = profiled(service, hub, "tester/disk")
    check_blames_poor(service, name, "disk")
    until(lambda: not list(small_disk.glob(".*.partial-*")), what="what the full disk left half-written is removed")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    check_blames_poor(service, name, "Read-only")
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    try:
        assert ended(service, service.jobs().submit_process(name)["job_id"])["state"] == "done"
    finally:
        # The fixture takes one away.
        subprocess.run(["mount", "-t", "tmpfs", "none", str(small_disk)], check=True)
