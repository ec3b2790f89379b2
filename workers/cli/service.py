"""fairshard submit, jobs, nodes, run, chat, deploy, undeploy, delete: talking to the service."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from planner.errors import FairshardError, Infeasible, InvalidInput, NotFound, Unavailable
from workers.cli.arguments import adder, assignment
from workers.cli.console import Table, emit, far, harmless, say, shown_bytes
from workers.cli.models import add_part

if TYPE_CHECKING:
    from workers.network.api_client import Client

_SUBMIT = """\
examples:
  fairshard submit sentence-transformers/all-MiniLM-L6-v2                  profile it and publish its metadata
  fairshard submit owner/name --process --wait                             plan and split it too; wait for the end
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
  fairshard nodes                     their names, what they offer, what they do now
  fairshard nodes --json
"""
_RUN = """\
examples:
  fairshard run owner/name --prompt "Once upon a time"        by the model's newest plan, over its nodes
  fairshard run owner/name --prompt Hello --json              with token ids and timings
"""
_CHAT = """\
examples:
  fairshard chat owner/name           Ctrl-C stops an answer, Ctrl-D ends
"""
_DEPLOY = """\
examples:
  fairshard deploy owner/name         the nodes of its newest plan load it, until fairshard undeploy owner/name
"""
_DELETE = """\
example:
  fairshard delete 649a951fe5f32dda   the plan's id, as `fairshard jobs JOB` shows it
"""
_ENDED = frozenset({"done", "failed", "cancelled"})


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    add = adder(commands, common)

    command = add("submit", submit, "profile models on the service; with --process, plan and split them too", _SUBMIT)
    command.add_argument("models", nargs="+", metavar="MODEL", help="owner/name")
    command.add_argument("--revision", metavar="R", help="branch, tag or commit")
    add_part(command)
    command.add_argument("--batch-size", type=int, metavar="N", help="sequences in one pass (default 1)")
    command.add_argument("--sequence-length", type=int, metavar="N", help="tokens of each (default 512)")
    command.add_argument("--full", action="store_true", help="fetch the whole checkpoint to the node's cache first")
    command.add_argument("--process", action="store_true", help="plan it and split it, too")
    command.add_argument(
        "--option", type=assignment, action="append", default=[], metavar="NAME=VALUE",
        help="of the plan: strategy, objective, phase, time_budget_s, ...",
    )  # fmt: skip
    command.add_argument("--wait", action="store_true", help="show the job until it ends")

    command = add("jobs", jobs, "show which jobs there are, and how far they are", _JOBS)
    command.add_argument("job_id", nargs="?", metavar="JOB", help="one job with its steps")
    command.add_argument("--state", choices=("queued", "running", "done", "failed", "cancelled"))
    command.add_argument("--limit", type=int, default=20, metavar="N", help="how many (default 20)")
    command.add_argument("--cancel", action="store_true", help="cancel JOB")
    command.add_argument("--wait", action="store_true", help="show JOB until it ends")

    add("nodes", nodes, "list the nodes that are alive", _NODES)

    command = add("run", run, "run a plan: text in, text out", _RUN)
    command.add_argument("plan", metavar="PLAN|MODEL", help="a plan's id, or owner/name for its newest plan")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what the model goes on from")
    _add_run_options(command)

    command = add("chat", chat, "talk with a model", _CHAT)
    command.add_argument("plan", metavar="MODEL|PLAN", help="owner/name, or a plan's id")
    command.add_argument("--system", metavar="TEXT", help="what the model is told first")
    _add_run_options(command)

    for name, does, about in (
        ("deploy", deploy, "load a plan, and keep it loaded"),
        ("undeploy", undeploy, "let go"),
    ):
        command = add(name, does, f"have a plan's nodes {about}", _DEPLOY)
        command.add_argument("plan", metavar="MODEL|PLAN", help="owner/name, or a plan's id")

    command = add("delete", delete, "delete a plan, and its shards on the nodes", _DELETE)
    command.add_argument("plan_id", metavar="PLAN", help="the plan's id")


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tokens", type=int, metavar="N", help="new tokens at most (default 256)")
    command.add_argument("--temperature", type=float, metavar="T", help="0 (default): the likeliest token each time")
    command.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest of so much together")
    command.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens")


def _client(*, timeout_s: float = 60.0) -> Client:
    from workers.network.api_client import Client
    from workers.settings import ClientSettings

    return Client(ClientSettings.from_env(), timeout_s=timeout_s)


def _hub_token() -> dict[str, str]:
    """The user's own Hub token as the header that the service keeps encrypted, if there is one."""
    from workers.settings import HubSettings

    token = HubSettings.from_env().token
    return {"X-HF-Token": token} if token else {}


def submit(args: argparse.Namespace) -> int:
    """Fairshard submit."""
    from planner.names import check_asked_name

    body: dict[str, Any] = {"timestamp": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")}
    for name in ("revision", "subfolder", "variant", "batch_size", "sequence_length"):
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
    entries = [{"model_name": check_asked_name(name), **body} for name in args.models]
    if len(entries) == 1:
        answer = client.call("POST", "/api/request", entries[0], headers=_hub_token())
        if not args.wait:
            emit(args, answer, [f"job {answer['job_id']}: {answer['message']}"])
            return 0
        say(args, f"job {answer['job_id']}")
        return finished(args, followed(args, client, [answer["job_id"]]))
    batch = client.call("POST", "/api/batches", {"models": entries}, headers=_hub_token())
    if args.wait:
        followed(args, client, [entry["job_id"] for entry in batch["jobs"] if entry.get("job_id")])
        batch = client.call("GET", f"/api/batches/{_quoted(batch['batch_id'])}")
    rows = [(entry["model_name"], entry.get("job_id") or "", _state(entry)) for entry in batch["jobs"]]
    emit(args, batch, [f"batch {batch['batch_id']}", Table(("model", "job", "state"), rows, whole=("job",))])
    return 1 if any(entry["state"] in {"failed", "cancelled"} for entry in batch["jobs"]) else 0


def _value(text: str) -> Any:
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
        rows = [(job["job_id"], job["kind"], job["model_name"], _state(job)) for job in answer["jobs"]]
        emit(args, answer, [Table(("job", "kind", "model", "state"), rows, whole=("job",))])
        return 0
    try:
        if args.wait:
            return finished(args, followed(args, client, [args.job_id]))
        job = client.call("DELETE" if args.cancel else "GET", f"/api/jobs/{_quoted(args.job_id)}")
    except NotFound as error:
        raise NotFound(f"there is no job {args.job_id}", details=error.details) from None
    emit(args, job, _job_shown(job))
    return 0


def followed(
    args: argparse.Namespace, client: Client, job_ids: Sequence[str], **options: Callable[[], None]
) -> dict[str, Any]:
    """Show the steps of jobs until all have ended; the last job. `options` are those of `Client.follow`.

    Raises:
        KeyboardInterrupt: On Ctrl-C, with what becomes of the jobs.
    """
    job: dict[str, Any] = {}
    ended: set[str] = set()
    left = list(job_ids)
    try:
        for job_id in job_ids:
            for job in client.follow(job_id, **options):
                name = f"{job['model_name']} " if len(job_ids) > 1 else ""
                for step in () if args.quiet else job.get("steps") or ():
                    place = name + step["name"]
                    if place in ended or step["state"] in {"waiting", "queued"}:
                        continue
                    over = step["state"] if step["state"] in _ENDED else ""
                    args.bars.show(place, step.get("progress") or {}, ended=over)
                    if over:
                        ended.add(place)
            left.remove(job_id)
    except KeyboardInterrupt:
        goes = f"job {left[0]} goes on" if len(left) == 1 else f"{len(left)} jobs go on: {', '.join(left)}"
        raise KeyboardInterrupt(
            f"{goes}. To watch: fairshard jobs {left[0]} --wait. To cancel: fairshard jobs {left[0]} --cancel"
        ) from None
    return job


def finished(args: argparse.Namespace, job: dict[str, Any]) -> int:
    """Show the job; the exit status that its end means."""
    emit(args, job, _job_shown(job))
    if job["state"] == "done":
        return 0
    return 3 if (job.get("error") or {}).get("code") == Infeasible.code else 1


def _job_shown(job: Mapping[str, Any]) -> list[str | Table]:
    shown: list[str | Table] = [f"job {job['job_id']}: {job['kind']} {job['model_name']}: {job['state']}"]
    if job.get("error"):
        shown.append(f"error: {_message(job)}")
    plan_id = (job.get("result") or {}).get("plan_id")
    if plan_id:
        shown.append(f"plan {plan_id}")
    rows = [
        (
            step["name"],
            step["state"],
            step.get("attempts", 0),
            step.get("node_id") or "",
            _far(step),
            _message(step),
        )
        for step in job.get("steps") or ()
    ]
    head = ("step", "state", "attempts", "node", "progress", "error")
    return [*shown, "", Table(head, rows, right=("attempts",))] if rows else shown


def _far(step: Mapping[str, Any]) -> str:
    at = step.get("progress") or {}
    if step["state"] == "done":  # its last report may have come before its last byte
        return f"100% of {shown_bytes(at['total'])}" if at.get("total") else ""
    return far(at) if step["state"] == "running" else ""


def _state(job: Mapping[str, Any]) -> str:
    """A job's state, with its step or its error."""
    more = _message(job) or (job.get("step") if job["state"] == "running" else "")
    return f"{job['state']}: {more}" if more else str(job["state"])


def _message(entry: Mapping[str, Any]) -> str:
    error = entry.get("error")
    if not error:
        return ""
    return str(error.get("error") or error.get("message") or error) if isinstance(error, Mapping) else str(error)


def nodes(args: argparse.Namespace) -> int:
    """Fairshard nodes."""
    from workers.cli.plan_tables import nodes_table

    client = _client()
    answer = client.call("GET", "/api/nodes?limit=500")
    while len(answer["nodes"]) < answer["total"]:
        more = client.call("GET", f"/api/nodes?limit=500&offset={len(answer['nodes'])}")["nodes"]
        if not more:  # nodes died meanwhile
            break
        answer["nodes"] += more
    none = "no node is alive (fairshard node starts one)"
    emit(args, answer, [nodes_table(answer["nodes"])] if answer["nodes"] else [none])
    return 0


#: A service that says nothing for so long is gone: a stream says every ten seconds that it is there.
_RUN_S = 150.0


def _plan_id(client: Client, name: str) -> str:
    """The plan that a person means: an id, or a model's newest."""
    if re.fullmatch("[0-9a-f]{8,64}", name):
        return name
    return str(client.call("POST", "/api/get-plan", {"model_name": name, "node_id": "cli"})["plan_id"])


def _run_options(args: argparse.Namespace) -> dict[str, Any]:
    names = {"tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed"}
    return {name: getattr(args, of) for of, name in names.items() if getattr(args, of) is not None}


def run(args: argparse.Namespace) -> int:
    """Fairshard run."""
    client = _client(timeout_s=_RUN_S)
    path = f"/api/plans/{_plan_id(client, args.plan)}/runs"
    result = _streamed(args, client, path, {"prompt": args.prompt, **_run_options(args)}, quiet=args.json)
    emit(args, result)  # with --json; else it is shown already
    times = result["timings"]
    speed = f", then {times['decode_s_per_token'] * 1000:.1f} ms each" if times["decode_s_per_token"] else ""
    took = f"loaded in {times['load_s']:.1f} s, the first after {times['prefill_s'] * 1000:.0f} ms{speed}"
    say(args, f"{len(result['token_ids'][0])} tokens: {took}")
    return 0


def _streamed(
    args: argparse.Namespace, client: Client, path: str, body: Mapping[str, Any], *, quiet: bool = False
) -> dict[str, Any]:
    """Show what a run says as it comes; how it ended."""
    from workers.network.api_client import run_done

    for name, said in client.events("POST", path, {**body, "stream": True}):
        if name == "loading":
            say(args, "the nodes load the model ...")
        elif name == "tokens" and not quiet:
            print(harmless("".join(said["text"])), end="", flush=True)
        elif name == "ended":
            print(end="" if quiet else "\n")
            return run_done(said)
    raise Unavailable("the service hung up before the run ended")


def chat(args: argparse.Namespace) -> int:
    """Fairshard chat."""
    client = _client(timeout_s=_RUN_S)
    path = f"/api/plans/{_plan_id(client, args.plan)}/runs"
    history = [{"role": "system", "content": args.system}] if args.system else []
    say(args, "Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            if line := input("> " if sys.stdin.isatty() else "").strip():
                asked = [*history, {"role": "user", "content": line}]
                result = _streamed(args, client, path, {"messages": asked, **_run_options(args)})
                history = [*asked, {"role": "assistant", "content": result["text"]}]
        except KeyboardInterrupt:
            print()
        except EOFError:
            return 0
        except FairshardError as error:
            if not sys.stdin.isatty():
                raise
            say(args, f"fairshard chat: {error}")


def deploy(args: argparse.Namespace) -> int:
    """Fairshard deploy."""
    from workers.network.api_client import run_done

    client = _client(timeout_s=_RUN_S)
    plan_id = _plan_id(client, args.plan)
    answer = client.call("POST", f"/api/plans/{plan_id}/deployment", headers={"Prefer": "wait=120"})
    while answer["state"] not in _ENDED:
        time.sleep(0.5)
        answer = client.call("GET", f"/api/runs/{answer['run_id']}")
    rows = [(node_id, shown_bytes(taken)) for node_id, taken in run_done(answer)["nodes"].items()]
    emit(args, answer, [f"plan {plan_id} is loaded", Table(("node", "weights"), rows, right=("weights",))])
    return 0


def undeploy(args: argparse.Namespace) -> int:
    """Fairshard undeploy."""
    client = _client()
    answer = client.call("DELETE", f"/api/plans/{_plan_id(client, args.plan)}/deployment")
    emit(args, answer, [f"plan {answer['plan_id']} is no longer kept loaded"])
    return 0


def delete(args: argparse.Namespace) -> int:
    """Fairshard delete."""
    try:
        answer = _client().call("DELETE", f"/api/plans/{_quoted(args.plan_id)}")
    except NotFound as error:
        raise NotFound(f"there is no plan {args.plan_id}", details=error.details) from None
    emit(args, answer, [f"job {answer['job_id']} deletes plan {args.plan_id} and its shards"])
    return 0


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")
