"""A cancelled job frees its node within seconds, whatever the step waits for; and a step says what it waits for."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import Service, until

#: step, what is said while it waits, and the fault that makes it wait.
WAITS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "asked-to-wait": (
        "download",
        r"tester/{model} asks to wait 10\d s: HTTP 429",
        {"kind": "status", "path": "/api/models/tester/{model}*", "code": 429, "retry_after": 100},
    ),
    "no-answer": (
        "download",
        r"waits for .*tester/{model}",
        {"kind": "hang", "path": "/api/models/tester/{model}*", "where": "hub"},
    ),
    "no-bytes": ("profile", r"waits for .*tester/{model}", {"kind": "hang", "path": "*.safetensors"}),
    "conflicts": (
        "publish",
        r"HTTP 412 from tester/metadata: another commit came first, attempt \d+",
        {"kind": "status", "path": "*/commit/*", "code": 412},
    ),
    "busy-repository": (
        "publish",
        r"tester/metadata",
        {"kind": "status", "path": "*/commit/*", "code": 429, "retry_after": 100},
    ),
    "plan-not-published": (
        "plan",
        r"tester/metadata asks to wait 10\d s: HTTP 503",
        {"kind": "status", "path": "*/commit/*", "code": 503, "retry_after": 100, "skip": 1},
    ),
    "shard-not-sent": (
        "split",
        r"tester/{model}.* asks to wait 10\d s: HTTP 429",
        {"kind": "status", "path": "*.safetensors", "code": 429, "retry_after": 100},
    ),
    "shard-hangs": ("split", r"", {"kind": "hang", "path": "*.safetensors"}),
}


def state(view: dict[str, Any], step: str) -> list[str]:
    return [found["state"] for found in view["steps"] if found["name"].partition(":")[0] == step]


@pytest.mark.parametrize("case", WAITS)
def test_a_cancel_frees_the_node_whatever_the_step_waits_for(hub: TestHub, hub_service: Service, case: str) -> None:
    step, said, fault = WAITS[case]
    model = f"waits-{case}"
    hub.add_repo(f"tester/{model}", checkpoint("llama"))
    jobs = hub_service.jobs()
    fault = fault | {"path": fault["path"].format(model=model), "times": None}
    if step != "split":
        hub.fault(**fault)
    job_id = jobs.submit_request(f"tester/{model}", process={})["job_id"]
    if step == "split":  # the steps before it read the same file
        until(lambda: "running" in state(jobs.job(job_id), "plan"), what=hub_service.logs, every_s=0.005)
        hub.fault(**fault)

    def waiting() -> dict[str, Any] | None:
        steps = [s for s in jobs.job(job_id)["steps"] if s["name"].startswith(step) and s["state"] == "running"]
        told = [s["progress"] for s in steps if s["progress"]]
        return next((at for at in told if re.search(said.format(model=model), at["what"])), None)

    at = until(waiting, what=lambda: f"{jobs.job(job_id)}\n{hub_service.logs()}", timeout_s=60)
    if "asks to wait" in at["what"]:
        assert at["waits_until"].endswith("Z")
    jobs.cancel(job_id)
    began = time.monotonic()
    stopped = re.compile(rf"job {job_id}, step {step}\S*: stopped: job {job_id} was cancelled")
    until(lambda: stopped.search(hub_service.logs()), what=hub_service.logs, timeout_s=5)
    assert time.monotonic() - began < 5
