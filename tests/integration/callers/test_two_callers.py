"""Two callers who ask for one model at the same time: each gets what it asked for, and the disk one copy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import Service, until

from web.app import create_app
from workers.disk.space import used_bytes
from workers.downloader import resolve
from workers.ledger.steps import ENDED
from workers.settings import Settings
from workers.shards.folder import finished_shards
from workers.splitter import verify

pytestmark = pytest.mark.xdist_group("main-job")

NAME = "tester/two-callers"
LENGTHS = (64, 512)
ROUNDS = 15


@pytest.fixture
def app(hub: TestHub, service: Service) -> Flask:
    """The API of a service that has profiled the model."""
    hub.add_repo(NAME, checkpoint("llama"))
    app = create_app(Settings.from_env(service.env | {"NODE_ID": "web"}), background=False)
    done(app, app.test_client().post("/api/request", json={"model_name": NAME}).get_json()["job_id"])
    return app


def done(app: Flask, job_id: str) -> dict[str, Any]:
    client = app.test_client()
    job: dict[str, Any] = until(
        lambda: (found := client.get(f"/api/jobs/{job_id}").get_json())["state"] in ENDED and found, what="the job"
    )
    assert job["state"] == "done", job
    return job


def process(app: Flask, length: int, **more: Any) -> dict[str, Any]:
    body = {"model_name": NAME, "sequence_length": length, **more}
    answer = app.test_client().post("/api/process", json=body, headers={"Prefer": "wait=60"})
    assert answer.status_code == 200, answer.get_json()
    plan: dict[str, Any] = answer.get_json()
    return plan


def test_each_gets_the_plan_that_it_asked_for(app: Flask) -> None:
    client, documents, jobs = app.test_client(), dict[str, Any](), set[str]()
    with ThreadPoolExecutor(len(LENGTHS)) as callers:
        for _ in range(ROUNDS):
            plans = list(callers.map(lambda length: process(app, length, split=False), LENGTHS))
            assert [plan["sequence_length"] for plan in plans] == list(LENGTHS)
            jobs |= {plan["job_id"] for plan in plans}
            for plan in plans:
                stored = client.get(f"/api/plans/{plan['plan_id']}").get_json()
                assert documents.setdefault(plan["plan_id"], stored) == stored, "a stored plan changed"
                assert plan == stored | {"job_id": plan["job_id"]}
    assert len(documents) == len(LENGTHS)
    assert len(jobs) == ROUNDS * len(LENGTHS)


def test_plans_with_the_same_layers_share_their_shards(app: Flask, service: Service) -> None:
    # All costs double, so that the layers stay where they are.
    plans = [process(app, 512, batch_size=size, split=True) for size in (1, 2)]
    one, two = (plan["plan_id"] for plan in plans)
    assert one != two
    for plan in plans:
        done(app, plan["job_id"])
    layers = [{node: share["layer_names"] for node, share in plan["split_plan"].items()} for plan in plans]
    assert layers[0] == layers[1], "or nothing is tested"
    nodes, shards = list(layers[0]), service.data / "nodes"
    first, second = ([service.shards(node, plan_id) for node in nodes] for plan_id in (one, two))
    assert inodes(first) == inodes(second)

    def delete(plan_id: str) -> None:
        answer = app.test_client().delete(f"/api/plans/{plan_id}")
        done(app, answer.get_json()["job_id"])
        assert not any(
            path.name == plan_id for node in nodes for path, _ in finished_shards(shards / node / "shards")
        )

    delete(one)
    assert verify(second, checkpoint=resolve(NAME)).ok
    held = used_bytes(shards)
    delete(two)
    assert used_bytes(shards) < held


def inodes(folders: list[Path]) -> set[int]:
    return {path.stat().st_ino for folder in folders for path in folder.glob("*.safetensors")}
