"""The main job through real processes: Redis, a planner worker, three unequal nodes and the test Hub."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub.server import TestHub
from support.cases import make as cases
from support.checkpoints import checkpoint, copy_of
from support.running import Service, until

from planner.errors import Conflict, NotFound
from planner.wire.read import dumps, profile_to_json
from workers.downloader import resolve
from workers.generator import generate
from workers.ledger.steps import ENDED
from workers.splitter import verify

#: One process runs them all: they share their services.
pytestmark = pytest.mark.xdist_group("main-job")


def finished(service: Service, job_id: str, *, timeout_s: float = 90) -> dict[str, Any]:
    jobs = service.jobs()
    return dict(
        until(
            lambda: (view := jobs.job(job_id))["state"] in ENDED and view,
            what=lambda: json.dumps(jobs.job(job_id), indent=1) + service.logs(),
            timeout_s=timeout_s,
        )
    )


def done(service: Service, job_id: str) -> dict[str, Any]:
    view = finished(service, job_id)
    assert view["state"] == "done", (view, service.logs())
    return view


def leftovers(data: Path) -> list[Path]:
    return [path for path in data.rglob("*") if ".partial" in path.name or path.name.endswith((".new", ".tmp"))]


def check_shards(service: Service, view: dict[str, Any]) -> None:
    """The shards of all nodes together are the checkpoint, bit for bit."""
    folders = [service.shards(node_id, view["result"]["plan_id"]) for node_id in view["result"]["node_ids"]]
    assert [Path(shard["path"]) for shard in view["result"]["shards"]] == folders
    model_name, revision = view["model_name"], view["result"]["metadata"]["revision"]
    report = verify(folders, checkpoint=resolve(model_name, revision=revision))
    assert report.ok, report
    assert leftovers(service.data) == []


def test_a_name_becomes_metadata_a_plan_and_verified_shards(hub: TestHub, hub_service: Service) -> None:
    source = checkpoint("llama_deep")
    commit = hub.add_repo("tester/deep", source)
    jobs = hub_service.jobs()
    view = done(hub_service, jobs.submit_request("tester/deep", process={})["job_id"])

    names = [step["name"] for step in view["steps"]]
    assert names == ["download", "profile", "publish", "plan", "split:big", "split:mid", "split:small", "finish"]
    metadata = view["result"]["metadata"]
    assert metadata["revision"] == commit
    from huggingface_hub import HfApi

    api = HfApi(token=hub.token)
    published = set(api.list_repo_files("tester/metadata"))
    assert {metadata["path"], "tester_deep_metadata.json", f"plans/{view['result']['plan_id']}.json"} <= published

    plan = jobs.plan(view["result"]["plan_id"])
    assert jobs.latest_plan("tester/deep") == plan
    assert plan["job_id"] == view["job_id"]
    assert [node["node_id"] for node in plan["selected_nodes"]] == ["big", "mid", "small"]
    compute = {node_id: part["total_compute"] for node_id, part in plan["split_plan"].items()}
    assert compute["big"] > compute["mid"] > compute["small"] > 0
    assert all(part["compute_utilization"] <= 1 for part in plan["split_plan"].values())
    check_shards(hub_service, view)


def test_the_planner_s_celery_result_is_the_plan(hub: TestHub, hub_service: Service) -> None:
    hub.add_repo("tester/result", checkpoint("llama"))
    jobs = hub_service.jobs()
    job_id = jobs.submit_request("tester/result", process={"split": False})["job_id"]
    view = done(hub_service, job_id)
    with hub_service.redis.client() as client:
        (key,) = client.scan_iter(f"*celery-task-meta-{job_id}-plan-*")
        meta = json.loads(str(client.get(key)))
    assert meta["status"] == "SUCCESS"
    assert meta["result"]["plan_id"] == view["result"]["plan_id"]
    assert meta["result"]["split_plan"]


def test_process_after_request_and_process_that_waits_for_it(hub: TestHub, service: Service) -> None:
    source = checkpoint("qwen2")
    hub.add_repo("tester/waits", source)
    jobs = service.jobs()
    with pytest.raises(Conflict, match="POST /api/request first"):
        jobs.submit_process("tester/waits")
    hub.fault("hang", path="*/config.json", seconds=1.5)
    request = jobs.submit_request("tester/waits")
    waiting = jobs.submit_process("tester/waits", options={"strategy": "pipeline"})
    assert waiting["waits_for"] == request["job_id"]
    assert waiting["state"] == "queued"
    planned = jobs.wait(waiting["job_id"], step="plan", timeout_s=60)
    assert planned["result"]["plan_id"]
    first = done(service, waiting["job_id"])
    assert done(service, request["job_id"])["ended_at"] <= first["started_at"]
    # A later one finds the metadata, plans the same plan and finds the shards.
    again = done(service, jobs.submit_process("tester/waits", options={"strategy": "pipeline"})["job_id"])
    assert again["job_id"] != first["job_id"]
    assert again["result"]["plan_id"] == first["result"]["plan_id"]


def test_a_checkpoint_that_lacks_a_tensor_is_planned_only_if_allowed(
    hub: TestHub, service: Service, tmp_path: Path
) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    cases.make("missing-one-tensor", tmp_path)
    hub.add_repo("tester/less", tmp_path)
    jobs = service.jobs()
    view = finished(service, jobs.submit_request("tester/less", process={})["job_id"])
    assert view["state"] == "failed"
    assert f"the checkpoint lacks 1 tensor of its model: {lost};" in view["error"]["message"]
    assert view["result"]["metadata"]["missing_tensors"] == [lost]
    view = done(service, jobs.submit_process("tester/less", options={"allow_missing": True})["job_id"])
    assert jobs.plan(view["result"]["plan_id"])["missing_tensors"] == [lost]
    folders = [service.shards(node_id, view["result"]["plan_id"]) for node_id in view["result"]["node_ids"]]
    report = verify(folders, checkpoint=resolve("tester/less"))
    assert (report.complete, report.missing_tensors) == (True, (lost,))


def test_a_variant_is_a_model_of_its_own_from_request_to_shards(
    hub: TestHub, service: Service, tmp_path: Path
) -> None:
    folder = copy_of("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model.bf16.safetensors")
    hub.add_repo("tester/variants", folder)
    jobs = service.jobs()
    view = finished(service, jobs.submit_request("tester/variants")["job_id"])
    assert "name one with --variant" in view["error"]["message"]
    hub.fault("hang", path="*/config.json", seconds=1.5)
    running = jobs.submit_request("tester/variants", variant="bf16")
    # Who asks for the whole does not wait for a part's profile.
    for which in ({}, {"variant": "fp16"}, {"subfolder": "x", "variant": "bf16"}):
        with pytest.raises(Conflict, match="POST /api/request first"):
            jobs.submit_process("tester/variants", **which)
    waiting = jobs.submit_process("tester/variants", variant="bf16")
    assert waiting["waits_for"] == running["job_id"]
    view = done(service, waiting["job_id"])
    plan = jobs.plan(view["result"]["plan_id"])
    assert plan["revision"].endswith("~variant=bf16")
    folders = [service.shards(node_id, plan["plan_id"]) for node_id in view["result"]["node_ids"]]
    assert verify(folders, checkpoint=resolve("tester/variants", revision=plan["revision"])).complete
    assert jobs.profile("tester/variants", revision="~variant=bf16")["revision"] == plan["revision"]
    with pytest.raises(NotFound, match="there is some of ~variant=bf16"):
        jobs.profile("tester/variants")


def test_the_same_submission_runs_once(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/once", checkpoint("llama"))
    hub.fault("hang", path="*/config.json", seconds=1.5)
    jobs = service.jobs()
    first = jobs.submit_request("tester/once", process={})
    assert jobs.submit_request("tester/once", process={})["job_id"] == first["job_id"]
    assert jobs.submit_request("tester/once", sequence_length=64)["job_id"] != first["job_id"]
    view = done(service, first["job_id"])
    shard = Path(view["result"]["shards"][0]["path"]) / "manifest.json"
    made = shard.stat().st_mtime_ns
    again = jobs.submit_request("tester/once", process={})
    assert again["job_id"] != first["job_id"]
    assert done(service, again["job_id"])["result"]["plan_id"] == view["result"]["plan_id"]
    # The shard that was there is right, and was kept.
    assert shard.stat().st_mtime_ns == made


def test_a_williw_client_s_own_metadata_is_planned(hub: TestHub, hub_service: Service) -> None:
    from huggingface_hub import HfApi

    source = checkpoint("llama")
    hub.add_repo("tester/williw", source)
    own = resolve(source)
    from workers.checkpoint.headers import read_headers

    layers: list[dict[str, Any]] = [
        {
            "name": tensor.name.removesuffix(".weight"),
            "shape": list(tensor.shape),
            "num_params": 1,
            "compute_required": tensor.size_bytes,
            "layer_type": "linear",
            "dtype": "float32",
        }
        for tensor in read_headers(own).tensors
    ]
    metadata = {
        "model_name": "tester/williw",
        "model_type": "llama",
        "layers": layers,
        "total_compute": sum(layer["compute_required"] for layer in layers),
        "total_layers": len(layers),
        "generated_at": "2026-01-01T00:00:00",
        "node_id": "client",
    }
    api = HfApi(token=hub.token)
    api.create_repo("tester/own-metadata", exist_ok=True)
    api.upload_file(
        path_or_fileobj=json.dumps(metadata).encode(),
        path_in_repo="tester_williw_metadata.json",
        repo_id="tester/own-metadata",
    )
    jobs = hub_service.jobs()
    job = jobs.submit_process("tester/williw", metadata_repo="tester/own-metadata")
    view = jobs.wait(job["job_id"], step="plan", timeout_s=60)
    plan = jobs.plan(view["result"]["plan_id"])
    assert plan["unit"] == "tensor"
    assert sorted(name for part in plan["split_plan"].values() for name in part["layer_names"]) == sorted(
        layer["name"] for layer in layers
    )
    assert finished(hub_service, job["job_id"])["state"] == "done"


# -- bad models


def _header(folder: Path, change: Callable[[dict[str, Any]], object], *, cut: int = 0) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    whole = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(whole[: len(whole) - cut])


def _overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _outside(header: dict[str, Any]) -> None:
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    last["data_offsets"] = [offset + 10**9 for offset in last["data_offsets"]]


def _twice(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip()
    name = next(name for name in json.loads(text) if name != "__metadata__")
    text = text[:-1] + f', "{name}": {json.dumps(json.loads(text)[name])}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


#: What is done to the folder, and what the job's error then says.
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-safetensors": (lambda f: (f / "model.safetensors").unlink(), "no weights that can be read"),
    "truncated": (lambda f: _header(f, lambda _: None, cut=4000), "4,000 bytes are missing"),
    "overlapping": (lambda f: _header(f, _overlap), "overlaps"),
    "outside-the-data": (lambda f: _header(f, _outside), "a hole of 1,000,000,000 bytes"),
    "key-twice": (_twice, "key written twice"),
    "header-beyond-the-file": (
        _file("model.safetensors", struct.pack("<Q", 1 << 20) + b"{}"), "goes beyond the file's 10 bytes",
    ),
    "header-over-100-mb": (
        _file("model.safetensors", struct.pack("<Q", 1 << 40) + b"{}"), "over the format's 100,000,000",
    ),
    "empty-file": (_file("model.safetensors", b""), "at least 8"),
    "config-without-layers": (
        _file("config.json", b'{"model_type": "llama", "num_hidden_layers": 0}'), "num_hidden_layers must be",
    ),
    "config-is-no-json": (_file("config.json", b"{"), "config.json"),
    "config-is-a-list": (_file("config.json", b"[]"), "config.json must be a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_model_is_a_failed_job_that_names_the_cause(
    hub: TestHub, service: Service, tmp_path: Path, kind: str
) -> None:
    spoil, says = BAD[kind]
    folder = copy_of("llama", tmp_path / "model")
    spoil(folder)
    hub.add_repo(f"tester/{kind}", folder)
    jobs = service.jobs()
    view = finished(service, jobs.submit_request(f"tester/{kind}", process={})["job_id"])
    assert view["state"] == "failed", view
    assert view["error"]["code"] == "invalid_checkpoint", view["error"]
    assert says in view["error"]["message"]
    assert "Traceback" not in json.dumps(view)
    assert [step["state"] for step in view["steps"] if step["state"] == "failed"] == ["failed"]
    # It was no use trying again, and nobody did.
    assert max(step["attempts"] for step in view["steps"]) == 1
    assert leftovers(service.data) == []
    assert all(worker.alive() for worker in service.all_workers)


def test_a_missing_file_of_several_is_named(hub: TestHub, service: Service, tmp_path: Path) -> None:
    folder = copy_of("llama_files", tmp_path / "model")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    hub.add_repo("tester/missing", folder)
    view = finished(service, service.jobs().submit_request("tester/missing")["job_id"])
    assert view["state"] == "failed"
    assert victim.name in view["error"]["message"]


def test_unknown_gated_and_private_models_say_so(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/gated", checkpoint("llama"), gated=True)
    hub.add_repo("tester/private", checkpoint("llama"), private=True)
    jobs = service.jobs()
    codes = {}
    for name in ("unknown", "gated", "private"):
        view = finished(service, jobs.submit_request(f"tester/{name}")["job_id"])
        assert view["state"] == "failed"
        codes[name] = view["error"]["code"]
    # The Hub itself does not tell a private repository from none.
    assert codes["unknown"] in {"not_found", "access_denied"}
    assert codes["gated"] == "access_denied"
    assert codes["private"] in {"not_found", "access_denied"}
    # With the user's own token it is the user's to see, and the token is gone with the job's end.
    view = done(service, jobs.submit_request("tester/private", hub_token=hub.token)["job_id"])
    with service.redis.client() as client:
        assert list(client.scan_iter("*token*")) == []


def test_no_plan_is_a_failed_job_with_the_numbers(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/large", checkpoint("llama"))
    jobs = service.jobs()
    tiny = [{"node_id": "tiny", "flop_per_s": 1e9, "memory_bytes": 1000}]
    done(service, jobs.submit_request("tester/large")["job_id"])
    view = finished(service, jobs.submit_process("tester/large", available_nodes=tiny)["job_id"])
    assert view["state"] == "failed"
    assert view["error"]["code"] == "infeasible"
    empty = [{"node_id": "empty", "flop_per_s": 1e12, "memory_bytes": 0}]
    view = finished(service, jobs.submit_process("tester/large", available_nodes=empty)["job_id"])
    assert view["error"]["code"] == "infeasible"
    assert "no node has more than 0 B" in view["error"]["message"]
    assert view["error"]["details"]["limit"] == "memory"
    # Nodes that nobody registered are planned for, and no shards are cut.
    ample = [{"node_id": "far", "flop_per_s": 1e12, "memory_bytes": 1 << 40}]
    view = done(service, jobs.submit_process("tester/large", available_nodes=ample)["job_id"])
    assert view["result"]["split"] is False
    assert [step["name"] for step in view["steps"]] == ["plan"]
    view = finished(service, jobs.submit_process("tester/large", available_nodes=ample, split=True)["job_id"])
    assert view["error"]["code"] == "conflict"


def test_with_no_node_alive_the_job_says_so(hub: TestHub, tmp_path: Path) -> None:
    source = checkpoint("llama")
    hub.add_repo("tester/alone", source)
    metadata = dumps(profile_to_json(generate(resolve(source), compute=False)) | {"model_name": "tester/alone"})
    hub.add_repo("tester/alone-metadata", {"tester_alone_metadata.json": metadata})
    with Service(tmp_path, nodes={}, env={"HF_HOME": str(tmp_path / "hf")}) as service:
        job = service.jobs().submit_process("tester/alone", metadata_repo="tester/alone-metadata")
        view = finished(service, job["job_id"])
        assert service.planner.alive()
    assert view["state"] == "failed"
    assert view["error"]["code"] == "unavailable"
    assert "no compute node is alive: start one with 'fairshard node'" in view["error"]["message"]


# -- cancel

#: step -> what the Hub does meanwhile.
HOLD: dict[str, dict[str, Any]] = {
    "download": {"kind": "hang", "path": "/api/models/tester/cancel*", "seconds": 3},
    "profile": {"kind": "hang", "path": "*/cancel/*config.json", "seconds": 3},
    "publish": {"kind": "hang", "path": "*/metadata/commit/*", "seconds": 3},
    "plan": {
        "kind": "hang",
        "path": "*/metadata/*profiles/tester/cancel/*",
        "method": "GET",
        "seconds": 3,
        "skip": 1,
    },
    "split": {"kind": "trickle", "path": "*.safetensors", "where": "cdn", "bytes_per_s": 2000, "times": None},
}


@pytest.mark.parametrize("step", HOLD)
def test_cancel_works_at_each_step_and_leaves_nothing(hub: TestHub, hub_service: Service, step: str) -> None:
    hub.add_repo("tester/cancel", checkpoint("llama_deep"))
    jobs = hub_service.jobs()
    hold = dict(HOLD[step])
    if step == "split":
        # Headers and configs pass at full speed.
        done(hub_service, jobs.submit_request("tester/cancel")["job_id"])
    hub.fault(hold.pop("kind"), **hold)
    if step == "split":
        job_id = jobs.submit_process("tester/cancel")["job_id"]
    else:
        job_id = jobs.submit_request("tester/cancel", process={})["job_id"]

    def running() -> bool:
        view = jobs.job(job_id)
        assert view["state"] not in ENDED, view
        return any(found["name"].startswith(step) and found["state"] == "running" for found in view["steps"])

    until(running, what=lambda: json.dumps(jobs.job(job_id)), every_s=0.01)
    view = jobs.cancel(job_id)
    assert view["state"] == "cancelled"
    assert not {found["state"] for found in view["steps"]} & {"running", "queued", "waiting"}
    hub.faults.clear()
    # The workers are free again, and what they did meanwhile changed nothing.
    after = done(hub_service, jobs.submit_request("tester/cancel", process={})["job_id"])
    assert jobs.job(job_id)["state"] == "cancelled"
    check_shards(hub_service, after)
    for node_id in hub_service.nodes:
        shutil.rmtree(hub_service.data / "nodes" / node_id / "shards")


# -- the rest of what jobs can do


def test_progress_says_how_fast_and_how_long_still(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/pace", checkpoint("llama_deep"))
    jobs = service.jobs()
    done(service, jobs.submit_request("tester/pace")["job_id"])
    hub.fault("trickle", path="*.safetensors", where="cdn", bytes_per_s=30_000, times=None)
    job_id = jobs.submit_process("tester/pace")["job_id"]

    def paced() -> list[dict[str, Any]]:
        reports = [step["progress"] or {} for step in jobs.job(job_id)["steps"] if step["name"].startswith("split:")]
        return [report for report in reports if report.get("rate_per_s") and report["eta_s"]]

    report = until(paced, what=lambda: json.dumps(jobs.job(job_id)))[0]
    assert 0 < report["done"] < report["total"]
    assert report["eta_s"] == pytest.approx((report["total"] - report["done"]) / report["rate_per_s"], abs=0.2)
    hub.faults.clear()
    done(service, job_id)
    told: dict[str, list[int]] = {}
    for event_id, event in jobs.events(job_id):
        if event["event"] == "progress":
            assert {"done", "total", "what", "rate_per_s", "eta_s"} == event["progress"].keys() - {"waits_until"}
            told.setdefault(event["step"], []).append(int(event_id.partition("-")[0]))
    assert len([step for step in told if step.startswith("split:")]) == 3
    for times in told.values():
        assert len(times) <= 2 * (times[-1] - times[0]) / 1000 + 1, "at most twice a second"


def test_a_batch_shows_the_whole_and_each(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/good", checkpoint("llama"))
    jobs = service.jobs()
    entries = [{"model_name": "tester/good"}, {"model_name": "tester/none"}, {"model_name": "../../etc/passwd"}]
    batch = jobs.batches.submit(entries)
    assert [job["state"] for job in batch["jobs"]][2] == "failed"
    assert "owner/name" in batch["jobs"][2]["error"]["message"]
    ended = until(
        lambda: (view := jobs.batches.get(batch["batch_id"]))["state"] not in {"queued", "running"} and view,
        what="batch",
    )
    assert ended["state"] == "failed"
    assert ended["counts"] == {"done": 1, "failed": 2}
    with pytest.raises(NotFound):
        jobs.batches.get("0" * 32)


def planned_and_split(service: Service, model_name: str) -> tuple[str, list[Path]]:
    """The plan's id and the folders of its shards."""
    result = done(service, service.jobs().submit_request(model_name, process={})["job_id"])["result"]
    return result["plan_id"], [Path(shard["path"]) for shard in result["shards"]]


def test_a_deleted_plan_is_gone_with_its_shards(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/deleted", checkpoint("qwen3_moe"))
    jobs = service.jobs()
    plan_id, folders = planned_and_split(service, "tester/deleted")
    assert all(folder.is_dir() for folder in folders)
    done(service, jobs.submit_delete(plan_id)["job_id"])
    assert not any(folder.exists() for folder in folders)
    with pytest.raises(NotFound):
        jobs.plan(plan_id)
    with pytest.raises(NotFound):
        jobs.latest_plan("tester/deleted")
    assert plan_id not in [plan["plan_id"] for plan in jobs.plans()]


def test_a_plan_that_cannot_be_forgotten_keeps_its_shards(hub: TestHub, service: Service) -> None:
    hub.add_repo("tester/kept", checkpoint("llama"))
    jobs = service.jobs()
    plan_id, folders = planned_and_split(service, "tester/kept")
    head = jobs._services.settings.store_dir / ".history" / "head"
    head.rename(head.with_name("aside"))
    head.mkdir()
    try:
        deletion = jobs.submit_delete(plan_id)["job_id"]
        view = until(lambda: (view := jobs.job(deletion))["state"] not in {"queued", "running"} and view, what="job")
        assert view["state"] == "failed"
        assert "cannot be written" in view["error"]["message"]
        assert all(folder.is_dir() for folder in folders)
        assert jobs.plan(plan_id)["plan_id"] == plan_id
    finally:
        head.rmdir()
        head.with_name("aside").rename(head)
    done(service, jobs.submit_delete(plan_id)["job_id"])
    assert not any(folder.exists() for folder in folders)


def test_nodes_say_what_they_are(service: Service) -> None:
    nodes = {node["node_id"]: node for node in service.jobs().nodes()}
    assert list(nodes) == ["big", "mid", "small"]
    assert nodes["big"]["flop_per_s"] == 300e9
    assert nodes["small"]["memory_bytes"] == 2 << 30
    for node in nodes.values():
        assert node["disk_free_bytes"] > 0
        assert {"python", "torch", "transformers"} <= node["versions"].keys()
        assert node["device"]
    assert service.jobs().ready() == {"redis": True, "planner": True, "nodes": True}


def test_a_second_worker_of_the_same_name_is_refused(service: Service, tmp_path: Path) -> None:
    from support.running import Worker

    env = service.workers["big"].env | {"FAIRSHARD_DATA": str(tmp_path / "elsewhere")}
    twin = Worker("twin", "compute,node.big", env=env, directory=tmp_path).start()
    try:
        assert twin.process is not None
        assert twin.process.wait(timeout=60) != 0
        assert "give this one another NODE_ID" in twin.log
    finally:
        twin.kill()
    assert service.workers["big"].alive()
