"""Nodes of a real service hand each other what a new plan moves; the Hub sends no weight twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.faults import Request
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import Service, free_port, until
from support.shard_cases import raw_tensors

from workers.ledger.steps import ENDED
from workers.shards.manifest import Manifest, read_manifest
from workers.splitter import verify

pytestmark = pytest.mark.xdist_group("peers-job")
WEIGHTS = "*.safetensors"


@pytest.fixture
def service(hub: TestHub, tmp_path: Path) -> Iterator[Service]:
    """Three nodes that serve their shards to each other."""
    made = Service(tmp_path, env={"HF_HOME": str(tmp_path / "hf"), "FAIRSHARD_PEER_TOKEN": "between-nodes"})
    for worker in made.workers.values():
        worker.env["FAIRSHARD_PEER_URL"] = f"http://127.0.0.1:{free_port()}"
    with made:
        yield made


def done(service: Service, job_id: str) -> dict[str, Any]:
    jobs = service.jobs()
    view = until(
        lambda: (view := jobs.job(job_id))["state"] in ENDED and view,
        what=lambda: json.dumps(jobs.job(job_id), indent=1) + service.logs(),
        timeout_s=90,
    )
    assert view["state"] == "done", (view, service.logs())
    return dict(view)


def manifests(service: Service, view: dict[str, Any]) -> dict[str, Manifest]:
    plan_id = view["result"]["plan_id"]
    return {node: read_manifest(service.shards(node, plan_id)) for node in view["result"]["node_ids"]}


def check(service: Service, view: dict[str, Any]) -> None:
    folders = [service.shards(node, view["result"]["plan_id"]) for node in view["result"]["node_ids"]]
    report = verify(folders)
    assert report.complete, report
    assert report.proven, "put together they have the Hub's sha256"
    assert raw_tensors(*folders) == raw_tensors(checkpoint("llama_deep"))


def data_begins(shards: dict[str, Manifest]) -> dict[str, int]:
    """Checkpoint file -> bytes before its tensors."""
    return {name: file.header_bytes for manifest in shards.values() for name, file in manifest.source_files.items()}


def end_of(request: Request) -> int:
    """One past the last byte that was asked for."""
    assert request.range is not None
    return int(request.range.rpartition("-")[2]) + 1


def test_a_replan_moves_tensors_between_nodes_and_not_from_the_hub(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/moves", checkpoint("llama_deep"))
    jobs = service.jobs()
    assert {node["peer_url"] for node in jobs.nodes()} == {
        worker.env["FAIRSHARD_PEER_URL"] for worker in service.workers.values()
    }
    first = done(service, jobs.submit_request("tester/moves", process={})["job_id"])
    check(service, first)
    before = manifests(service, first)
    assert set(before) == {"big", "mid", "small"}

    hub.counters.clear()
    second = done(service, jobs.submit_process("tester/moves", options={"exclude": ["small"]})["job_id"])
    after = manifests(service, second)
    assert set(after) == {"big", "mid"}
    moved = {
        tensor.name
        for node, manifest in after.items()
        for tensor in manifest.tensors
        if tensor.name not in {held.name for held in before[node].tensors}
    }
    assert moved >= {tensor.name for tensor in before["small"].tensors}
    # Headers are read again, to check the metadata; of the tensors themselves the Hub sends not a byte.
    headers = hub.counters.log(WEIGHTS, where="cdn")
    begins = data_begins(before)
    assert all(end_of(request) <= begins[request.path.rpartition("/")[2]] for request in headers)
    check(service, second)

    # A node that is gone is not asked; what only it held comes from the Hub.
    service.workers["mid"].signal(signal.SIGTERM)
    until(lambda: {node["node_id"] for node in jobs.nodes()} == {"big", "small"}, what="mid has left")
    hub.counters.clear()
    third = done(service, jobs.submit_process("tester/moves", options={"exclude": ["big"]})["job_id"])
    assert set(manifests(service, third)) == {"small"}
    missing = {t.name: t.end - t.begin for t in after["mid"].tensors}
    for tensor in (*before["small"].tensors, *after["big"].tensors, *before["big"].tensors):
        missing.pop(tensor.name, None)
    assert missing, "or nothing is tested"
    begins = data_begins(after)
    data = [r for r in hub.counters.log(WEIGHTS, where="cdn") if end_of(r) > begins[r.path.rpartition("/")[2]]]
    # (A file that is wanted whole is asked for with its header.)
    assert 0 <= sum(request.sent_bytes for request in data) - sum(missing.values()) <= sum(begins.values())
    check(service, third)
