"""The API in front of a real planner and real nodes."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import Service, until
from support.web_cases import NODES, WILLIW_METADATA, Server, error_of

_ENDED = {"done", "failed", "cancelled"}


def _ended(client: FlaskClient, job_id: str, service: Service) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get(f"/api/jobs/{job_id}").get_json()
        return job if job["state"] in _ENDED else None

    found: dict[str, Any] = until(look, what=lambda: f"job {job_id} ends\n{service.logs()}", timeout_s=120)
    return found


def _done(client: FlaskClient, job_id: str, service: Service) -> dict[str, Any]:
    job = _ended(client, job_id, service)
    assert job["state"] == "done", (job["error"], service.logs())
    return job


def _events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "event" in fields:
            found.append((fields.get("id", ""), json.loads(fields["data"]) | {"event": fields["event"]}))
    return found


def test_the_whole_way_from_a_name_to_shards(live: FlaskClient, service: Service) -> None:
    answer = live.post("/api/request", json={"model_name": "tiny/llama", "node_id": "me", "timestamp": 1.5})
    assert answer.status_code == 202
    acknowledged = answer.get_json()
    assert {"success", "message", "model_name", "node_id", "received_at", "job_id"} == set(acknowledged)
    assert (acknowledged["success"], acknowledged["model_name"], acknowledged["node_id"]) == (
        True,
        "tiny/llama",
        "me",
    )
    assert answer.headers["Location"] == f"/api/jobs/{acknowledged['job_id']}"

    # It waits for the request that still runs, and for the plan, as long as it takes.
    answer = live.post("/api/process", json={"model_name": "tiny/llama"}, headers={"Prefer": "wait=120"})
    assert answer.status_code == 200, (answer.get_data(as_text=True), service.logs())
    assert answer.headers["Preference-Applied"] == "wait=120"
    plan = answer.get_json()
    assert plan["success"] is True
    assert plan["model_url"] == f"{os.environ['HF_ENDPOINT']}/tiny/llama"
    assert plan["metadata"]["total_layers"] == sum(len(part["layer_names"]) for part in plan["split_plan"].values())
    assert {node["node_id"] for node in plan["selected_nodes"]} == set(plan["split_plan"]) <= {"big", "small"}
    assert plan["megaphone_plan"]["chain"][0]["node_id"] == plan["megaphone_plan"]["start_node"]
    assert all(0 < part["compute_utilization"] <= 1 for part in plan["split_plan"].values())

    job = _done(live, plan["job_id"], service)
    assert {step["state"] for step in job["steps"]} == {"done"}
    for node_id in plan["split_plan"]:
        assert (service.shards(node_id, plan["plan_id"])).is_dir()

    same = live.post("/api/get-plan", json={"model_name": "tiny/llama", "node_id": "stranger"})
    assert same.status_code == 200
    assert same.get_json()["plan_id"] == plan["plan_id"]
    assert live.get(f"/api/plans/{plan['plan_id']}").get_json()["split_plan"] == plan["split_plan"]
    listed = live.get("/api/plans?model_name=tiny/llama").get_json()["plans"]
    assert plan["plan_id"] in {entry["plan_id"] for entry in listed}

    # Deleting it takes the shards along.
    answer = live.delete(f"/api/plans/{plan['plan_id']}")
    assert answer.status_code == 202
    _done(live, answer.get_json()["job_id"], service)
    assert not any(service.shards(node_id, plan["plan_id"]).exists() for node_id in plan["split_plan"])
    error_of(live.get(f"/api/plans/{plan['plan_id']}"))


def test_events_tell_it_in_order_and_go_on_where_one_left_off(live: FlaskClient, service: Service) -> None:
    job_id = live.post("/api/request", json={"model_name": "tiny/qwen2", "process": True}).get_json()["job_id"]
    stream = live.get(f"/api/jobs/{job_id}/events")  # reads to the end of the job
    assert stream.mimetype == "text/event-stream"
    events = _events(stream.get_data(as_text=True))
    kinds = [event["event"] for _, event in events]
    assert kinds[0] == "submitted"
    assert kinds[-1] == "ended"
    steps = [event["step"] for _, event in events if event["event"] == "step" and event.get("state") == "done"]
    assert steps[:4] == ["download", "profile", "publish", "plan"]
    assert steps[-1] == "finish"
    _done(live, job_id, service)

    middle = events[len(events) // 2][0]
    rest = live.get(f"/api/jobs/{job_id}/events", headers={"Last-Event-ID": middle})
    assert _events(rest.get_data(as_text=True)) == events[len(events) // 2 + 1 :]
    over = live.get(f"/api/jobs/{job_id}/events", headers={"Last-Event-ID": events[-1][0]})
    assert over.status_code == 204


def test_prefer_respond_async_answers_at_once_with_the_job(live: FlaskClient, service: Service) -> None:
    job_id = live.post("/api/request", json={"model_name": "tiny/gpt2"}).get_json()["job_id"]
    answer = live.post("/api/process", json={"model_name": "tiny/gpt2"}, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202
    assert answer.headers["Preference-Applied"] == "respond-async"
    body = answer.get_json()
    assert body["success"] is True
    assert answer.headers["Location"] == f"/api/jobs/{body['job_id']}"
    _done(live, job_id, service)
    job = _done(live, body["job_id"], service)
    assert live.get(f"/api/plans/{job['result']['plan_id']}").status_code == 200


def test_the_same_submission_twice_at_once_is_one_job(live: FlaskClient, service: Service) -> None:
    body = {"model_name": "tiny/bert", "batch_size": 3}
    first, second = (live.post("/api/request", json=body).get_json()["job_id"] for _ in range(2))
    assert first == second
    _done(live, first, service)
    # It ended: now it is a new job, which finds the metadata already right.
    third = live.post("/api/request", json=body).get_json()["job_id"]
    assert third != first
    _done(live, third, service)


def test_nodes_that_are_not_registered_give_a_plan_without_shards(live: FlaskClient, service: Service) -> None:
    nodes = [
        {"id": "node_001", "gpu_available": True, "gpu_name": "RTX 3080", "gpu_usage_percent": 20},
        {"node_id": "node_003", "gpu_available": False, "cpu_cores": 8},
    ]
    body = {"model_name": "tiny/llama_tied", "available_nodes": nodes}
    request = live.post("/api/request", json={"model_name": "tiny/llama_tied"})
    _done(live, request.get_json()["job_id"], service)
    answer = live.post("/api/process", json=body, headers={"Prefer": "wait=120"})
    assert answer.status_code == 200, answer.get_data(as_text=True)
    plan = answer.get_json()
    assert set(plan["split_plan"]) <= {"node_001", "node_003"}
    job = _done(live, plan["job_id"], service)
    assert not [step for step in job["steps"] if step["name"].startswith("split:")]


def test_a_plan_that_cannot_be_says_by_how_much(live: FlaskClient, service: Service) -> None:
    job_id = live.post("/api/request", json={"model_name": "tiny/mixtral"}).get_json()["job_id"]
    _done(live, job_id, service)
    nodes = [{"node_id": "tiny", "flop_per_s": 1e9, "memory_bytes": 1000}]
    answer = live.post(
        "/api/process", json={"model_name": "tiny/mixtral", "available_nodes": nodes}, headers={"Prefer": "wait=120"}
    )
    assert answer.status_code == 409
    error = error_of(answer)
    assert error["code"] == "infeasible"
    assert error["details"]["job_id"]


def test_a_batch_shows_the_whole_and_each_failures_with_their_reasons(live: FlaskClient, service: Service) -> None:
    models = ["tiny/phi3", {"model_name": "tiny/gemma2", "batch_size": 2}, "nobody/nothing"]
    answer = live.post("/api/batches", json={"models": models, "process": True})
    assert answer.status_code == 202
    batch_id = answer.get_json()["batch_id"]
    assert answer.headers["Location"] == f"/api/batches/{batch_id}"

    def look() -> dict[str, Any] | None:
        batch: dict[str, Any] = live.get(f"/api/batches/{batch_id}").get_json()
        return batch if all(entry["state"] in _ENDED for entry in batch["jobs"]) else None

    batch = until(look, what=lambda: f"the batch ends\n{service.logs()}", timeout_s=180)
    states = {entry["model_name"]: entry["state"] for entry in batch["jobs"]}
    assert states == {"tiny/phi3": "done", "tiny/gemma2": "done", "nobody/nothing": "failed"}
    (reason,) = [entry["error"] for entry in batch["jobs"] if entry["error"]]
    assert reason["message"]
    assert batch["counts"]["done"] == 2


def test_a_preview_plans_a_published_model_for_any_machines_and_stores_nothing(
    live: FlaskClient, service: Service
) -> None:
    job_id = live.post("/api/request", json={"model_name": "tiny/llama_deep"}).get_json()["job_id"]
    _done(live, job_id, service)
    before = live.get("/api/plans?limit=500").get_json()
    body = {"model_name": "tiny/llama_deep", "available_nodes": NODES, "sequence_length": 2048, "compare": True}
    answer = live.post("/api/plans/preview", json=body)
    assert answer.status_code == 200, answer.get_data(as_text=True)
    plan = answer.get_json()
    assert plan["sequence_length"] == 2048
    assert plan["explanation"]
    assert {"greedy", "pipeline"} <= set(plan["comparison"])
    assert plan["comparison"]["greedy"]["bottleneck_s"] == plan["predicted"]["bottleneck_s"]
    alive = live.post("/api/plans/preview", json={"model_name": "tiny/llama_deep"})
    assert set(alive.get_json()["split_plan"]) <= {"big", "small"}
    assert live.get("/api/plans?limit=500").get_json() == before


def test_nodes_show_what_is_alive(live: FlaskClient, service: Service) -> None:
    nodes = live.get("/api/nodes").get_json()["nodes"]
    assert [node["node_id"] for node in nodes] == ["big", "small"]
    assert nodes[0]["flop_per_s"] == 3e12
    health = live.get("/api/health").get_json()
    assert (health["status"], health["live"], health["ready"]) == ("healthy", True, True)


def test_cancel_ends_a_job_and_an_ended_one_stays(live: FlaskClient, service: Service) -> None:
    job_id = live.post("/api/request", json={"model_name": "tiny/deepseek_v3", "process": True}).get_json()["job_id"]
    assert live.delete(f"/api/jobs/{job_id}").status_code == 200
    state = _ended(live, job_id, service)["state"]
    assert state in {"cancelled", "done"}
    assert live.delete(f"/api/jobs/{job_id}").get_json()["state"] == state


class WilliwClient:
    """The three calls and the upload exactly as williw-workers 2.0.0 makes them; nothing else is known to it."""

    def __init__(self, worker_url: str, hub: TestHub, metadata_repo: str) -> None:
        from huggingface_hub import HfApi

        self.worker_url, self.metadata_repo, self.node_id = worker_url, metadata_repo, "big"
        self.hf_api, self.hf_token = HfApi(token=hub.token), hub.token

    def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        # requests.post(url, json=payload); response.raise_for_status(); return response.json()
        sent = urllib.request.Request(
            self.worker_url + path,
            data=json.dumps(payload).encode(),
            headers={"Content-Type": "application/json", "Accept": "*/*", "User-Agent": "python-requests/2.32.3"},
        )
        with urllib.request.urlopen(sent, timeout=180) as response:  # raises on 4xx and 5xx
            found: dict[str, Any] = json.load(response)
        return found

    def run(self, metadata: dict[str, Any], directory: Path) -> dict[str, Any]:
        model_name = metadata["model_name"]
        self.post("/api/request", {"model_name": model_name, "node_id": self.node_id, "timestamp": 1700000000.25})
        filename = model_name.replace("/", "_") + "_metadata.json"
        (directory / filename).write_text(json.dumps(metadata, indent=2))
        self.hf_api.upload_file(
            path_or_fileobj=str(directory / filename),
            path_in_repo=filename,
            repo_id=self.metadata_repo,
            repo_type="model",
            token=self.hf_token,
        )
        return self.post(
            "/api/process",
            {
                "model_name": model_name,
                "node_id": self.node_id,
                "metadata_repo": self.metadata_repo,
                "timestamp": 1700000001.75,
            },
        )


def _williw_metadata(folder: Path, model_name: str) -> dict[str, Any]:
    """Metadata as a williw client writes it: one entry a tensor, in the order of the state dict."""
    from safetensors import safe_open

    layers = []
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            tensor = file.get_tensor(name)
            entry = {
                "name": name,
                "shape": list(tensor.shape),
                "num_params": tensor.numel(),
                "dtype": str(tensor.dtype),
            }
            layers.append(entry | {"compute_required": tensor.numel() * 2.0, "layer_type": "linear"})
    return WILLIW_METADATA | {
        "model_name": model_name,
        "layers": layers,
        "total_compute": sum(layer["compute_required"] for layer in layers),
        "total_layers": len(layers),
    }


def test_a_williw_client_runs_unchanged(
    live: FlaskClient, server: Server, service: Service, hub: TestHub, tmp_path: Path
) -> None:
    hub.add_repo("williw/model", checkpoint("llama"))
    hub.add_repo("someone/metadata", {"README.md": "metadata"})
    metadata = _williw_metadata(checkpoint("llama"), "williw/model")
    result = WilliwClient(server.url, hub, "someone/metadata").run(metadata, tmp_path)
    assert result.get("success")
    plan: dict[str, Any] = {
        name: result.get(name) for name in ("model_name", "split_plan", "megaphone_plan", "selected_nodes")
    }
    assert plan["model_name"] == "williw/model"
    mine = plan["split_plan"].get("big", {}).get("layer_names", [])
    assert mine
    names = [name for part in plan["split_plan"].values() for name in part["layer_names"]]
    assert sorted(names) == sorted(layer["name"] for layer in metadata["layers"])
    assert {"node_id", "compute_power"} <= set(plan["selected_nodes"][0])
    assert plan["megaphone_plan"]["start_node"] in plan["split_plan"]
    for hop in plan["megaphone_plan"]["chain"]:
        assert {"node_id", "step", "layer_names", "next_nodes"} <= set(hop)
    assert result["unit"] == "tensor"
    again = live.post("/api/get-plan", json={"model_name": "williw/model", "node_id": "big"}).get_json()
    assert again["plan_id"] == result["plan_id"]
    _done(live, result["job_id"], service)


@pytest.mark.parametrize("name", ["nobody/nothing"])
def test_an_unknown_model_is_a_failed_job_that_says_so(live: FlaskClient, service: Service, name: str) -> None:
    job_id = live.post("/api/request", json={"model_name": name}).get_json()["job_id"]
    job = _ended(live, job_id, service)
    assert job["state"] == "failed"
    assert name in job["error"]["message"]
    assert "Traceback" not in json.dumps(job)
