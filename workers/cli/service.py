"""fairshard submit, jobs, nodes, delete: talking to the service."""

from __future__ import annotations

import argparse
import urllib.parse
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from planner.errors import Infeasible, InvalidInput, NotFound
from workers.cli.io import adder, assignment, emit, progress, say, shown_bytes, table

if TYPE_CHECKING:
    from workers.cli.api_client import Client

_SUBMIT = """\
examples:
  fairshard submit sentence-transformers/all-MiniLM-L6-v2                  profile it and publish its metadata
  fairshard submit owner/name --process --wait                             plan and split it too, and see it through
  fairshard submit owner/name --process --option strategy=pipeline --option time_budget_s=0.5
  fairshard submit owner/a owner/b owner/c --process                       a batch
"""
_JOBS = """\
examples:
  fairshard jobs                      the newest
  fairshard jobs --state failed       those that failed, with the cause
  fairshard jobs JOB --wait           one job, until it has ended
  fairshard jobs JOB --cancel
"""
_NODES = """\
examples:
  fairshard nodes                     who they are, what they offer, whether they work
  fairshard nodes --json
"""
_DELETE = """\
example:
  fairshard delete 649a951fe5f32dda   the plan's id, as `fairshard jobs JOB` shows it
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    add = adder(commands, common)

    command = add("submit", submit, "have models profiled, and with --process planned and split", _SUBMIT)
    command.add_argument("models", nargs="+", metavar="MODEL", help="owner/name")
    command.add_argument("--revision", metavar="R", help="branch, tag or commit")
    command.add_argument("--batch-size", type=int, metavar="N", help="sequences in one pass (default 1)")
    command.add_argument("--sequence-length", type=int, metavar="N", help="tokens of each (default 512)")
    command.add_argument("--full", action="store_true", help="fetch the whole checkpoint to the node's cache first")
    command.add_argument("--process", action="store_true", help="plan it and cut the shards as well")
    command.add_argument(
        "--option", type=assignment, action="append", default=[], metavar="NAME=VALUE",
        help="of the plan: strategy, objective, phase, time_budget_s, ...",
    )  # fmt: skip
    command.add_argument("--wait", action="store_true", help="follow the job until it has ended")

    command = add("jobs", jobs, "what runs, and how far it is", _JOBS)
    command.add_argument("job_id", nargs="?", metavar="JOB", help="one job with its steps")
    command.add_argument("--state", choices=("queued", "running", "done", "failed", "cancelled"))
    command.add_argument("--limit", type=int, default=20, metavar="N", help="how many (default 20)")
    command.add_argument("--cancel", action="store_true", help="cancel JOB")
    command.add_argument("--wait", action="store_true", help="follow JOB until it has ended")

    add("nodes", nodes, "the machines that are alive", _NODES)

    command = add("delete", delete, "forget a plan; the nodes delete its shards", _DELETE)
    command.add_argument("plan_id", metavar="PLAN", help="the plan's id")


def _client() -> Client:
    from workers.cli.api_client import Client
    from workers.settings import ClientSettings

    return Client(ClientSettings.from_env())


def _hub_token() -> dict[str, str]:
    """The user's own Hub token as the header that the service keeps encrypted, if there is one."""
    from workers.settings import HubSettings

    token = HubSettings.from_env().token
    return {"X-HF-Token": token} if token else {}


def submit(args: argparse.Namespace) -> int:
    """Fairshard submit."""
    from planner.names import check_model_name

    body: dict[str, Any] = {"timestamp": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")}
    for name in ("revision", "batch_size", "sequence_length"):
        if getattr(args, name) is not None:
            body[name] = getattr(args, name)
    if args.full:
        body["download"] = "full"
    options = {name: _value(text) for name, text in args.option}
    if options and not args.process:
        raise InvalidInput("--option is of the plan; give --process too")
    if args.process:
        body["process"] = options or True
    client = _client()
    entries = [{"model_name": check_model_name(name), **body} for name in args.models]
    if len(entries) == 1:
        answer = client.call("POST", "/api/request", entries[0], headers=_hub_token())
        if not args.wait:
            emit(args, answer, [f"job {answer['job_id']}: {answer['message']}"])
            return 0
        say(args, f"job {answer['job_id']}")
        return _finished(args, _followed(args, client, answer["job_id"]))
    batch = client.call("POST", "/api/batches", {"models": entries}, headers=_hub_token())
    if args.wait:
        for entry in batch["jobs"]:
            if entry.get("job_id"):
                say(args, f"{entry['model_name']}: job {entry['job_id']}")
                _followed(args, client, entry["job_id"])
        batch = client.call("GET", f"/api/batches/{_quoted(batch['batch_id'])}")
    rows = [
        (entry["model_name"], entry.get("job_id") or "–", entry["state"], _message(entry)) for entry in batch["jobs"]
    ]
    emit(args, batch, [f"batch {batch['batch_id']}", *table(("model", "job", "state", "error"), rows)])
    return 1 if any(entry["state"] in {"failed", "cancelled"} for entry in batch["jobs"]) else 0


def _value(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except ValueError:
        return text


def jobs(args: argparse.Namespace) -> int:
    """Fairshard jobs."""
    client = _client()
    if args.job_id is None:
        if args.cancel or args.wait:
            raise InvalidInput("--cancel and --wait need a JOB")
        query = {"limit": args.limit, **({"state": args.state} if args.state else {})}
        answer = client.call("GET", f"/api/jobs?{urllib.parse.urlencode(query)}")
        rows = [
            (job["job_id"], job["kind"], job["model_name"], job["state"], job.get("step") or "", _message(job))
            for job in answer["jobs"]
        ]
        emit(args, answer, table(("job", "kind", "model", "state", "step", "error"), rows))
        return 0
    try:
        if args.wait:
            return _finished(args, _followed(args, client, args.job_id))
        job = client.call("DELETE" if args.cancel else "GET", f"/api/jobs/{_quoted(args.job_id)}")
    except NotFound as error:
        raise NotFound(f"there is no job {args.job_id}", details=error.details) from None
    emit(args, job, _job_lines(job))
    return 0


def _followed(args: argparse.Namespace, client: Client, job_id: str) -> dict[str, Any]:
    shown = progress(args)
    last: Mapping[str, Any] = {}
    job: dict[str, Any] = {}
    for job in client.follow(job_id):
        states = {step["name"]: step["state"] for step in job.get("steps") or ()}
        for name, state in states.items():
            if last.get(name) != state and state != "waiting":
                say(args, f"  {name}: {state}")
        last = states
        for step in job.get("steps") or ():
            at = step.get("progress")
            if step["state"] == "running" and at and at.get("total"):
                shown(int(at["done"]), int(at["total"]), what=step["name"])
    return job


def _finished(args: argparse.Namespace, job: dict[str, Any]) -> int:
    emit(args, job, _job_lines(job))
    if job["state"] == "done":
        return 0
    return 3 if (job.get("error") or {}).get("code") == Infeasible.code else 1


def _job_lines(job: Mapping[str, Any]) -> list[str]:
    lines = [f"job {job['job_id']}: {job['kind']} {job['model_name']}: {job['state']}"]
    if job.get("error"):
        lines.append(f"error: {_message(job)}")
    plan_id = (job.get("result") or {}).get("plan_id")
    if plan_id:
        lines.append(f"plan {plan_id}")
    steps = job.get("steps") or ()
    if steps:
        rows = [
            (
                step["name"],
                step["state"],
                step.get("attempts") or 0,
                step.get("node_id") or "",
                _far(step),
                _message(step),
            )
            for step in steps
        ]
        lines += ["", *table(("step", "state", "attempts", "node", "progress", "error"), rows, right="  r")]
    return lines


def _far(step: Mapping[str, Any]) -> str:
    at = step.get("progress") or {}
    if not at.get("total"):
        return ""
    left = f", {at['eta_s']:.0f} s left" if step["state"] == "running" and at.get("eta_s") is not None else ""
    return f"{at['done'] / at['total']:.0%} of {shown_bytes(at['total'])}{left}"


def _message(entry: Mapping[str, Any]) -> str:
    error = entry.get("error")
    if not error:
        return ""
    return str(error.get("error") or error.get("message") or error) if isinstance(error, Mapping) else str(error)


def nodes(args: argparse.Namespace) -> int:
    """Fairshard nodes."""
    from workers.cli.plan_tables import node_lines

    answer = _client().call("GET", "/api/nodes")
    emit(
        args,
        answer,
        node_lines(answer["nodes"]) if answer["nodes"] else ["no node is alive (fairshard node starts one)"],
    )
    return 0


def delete(args: argparse.Namespace) -> int:
    """Fairshard delete."""
    try:
        answer = _client().call("DELETE", f"/api/plans/{_quoted(args.plan_id)}")
    except NotFound as error:
        raise NotFound(f"there is no plan {args.plan_id}", details=error.details) from None
    emit(args, answer, [f"job {answer['job_id']} forgets plan {args.plan_id} and deletes its shards"])
    return 0


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")
