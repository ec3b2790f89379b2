"""The planner's tasks: a shell, though it lives with what it runs; it loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from celery import shared_task

from planner.cluster import Cluster
from planner.errors import Conflict, FairshardError, IntegrityError, InvalidInput, Unavailable
from planner.kv_dtype import with_kv_bytes
from planner.names import check_model_name, split_revision
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.strategies.make import make_plan
from planner.wire.read import cluster_from_json, links_from_json, options_from_json, plan_from_json, plan_to_json
from workers.ledger.steps import StepSpec
from workers.nodes.registry import to_node
from workers.progress import stoppable
from workers.queue.claims import Claim, HandedBack
from workers.queue.messages import PLANNER, node_queue
from workers.queue.process import current
from workers.queue.step_task import step_task
from workers.runner.runs import Runs
from workers.service.services import Services
from workers.settings import HubSettings

#: Seconds until a re-plan that found no node looks again.
_NODES_AWAY_S = 5.0


@step_task("planner.plan")
def plan(services: Services, claim: Claim) -> dict[str, Any]:
    """Read the metadata back, plan, publish the plan, and have each chosen node cut its shard.

    Run again when a node dies: over the others, with the metadata of the first time.

    Returns:
        The plan's JSON, which Celery's result backend shows.
    """
    from workers.uploader import publish_plan

    job_id = claim.claimed.job_id
    asked = claim.params.get("process") or claim.params
    token = services.user_token(job_id, claim.params)
    before = claim.result("plan")
    where = before.get("profile") or _profile_source(claim, asked)
    profile = services.plan_profile(where, token=token)
    if asked.get("kv_bytes_per_token") is not None:
        profile = with_kv_bytes(profile, asked["kv_bytes_per_token"])
    used = Runs(services).deployed_bytes()
    alive = {info["node_id"]: _less(info, used) for info in services.registry.alive()}
    lost = claim.claimed.lost_nodes
    cluster = _cluster(asked, alive, lost, dtype=profile.dtype, splits=bool(before.get("split")))
    claim.check()
    with stoppable("plans"):
        made = _plan(services, profile, cluster, asked, before if lost else {})
    chosen = sorted(made.allocation)
    do_split = _wants_split(asked, chosen, alive)
    if do_split and made.revision is None:
        # Metadata that names no commit (the williw form): all nodes must cut from the same one.
        profile = replace(profile, revision=_resolve(services, made.model_name, token))
        made = _plan(services, profile, cluster, asked, before if lost else {})
    url = HubSettings.from_env().url(made.model_name)
    published = publish_plan(made, services.store(), model_url=url)
    view = plan_to_json(made, model_url=url) | {"job_id": job_id}
    services.plans.save(view, again=published.again)
    steps = _split_steps(made, where, paranoid=bool(asked.get("paranoid"))) if do_split else []
    dropped = [f"split:{node_id}" for node_id in before.get("node_ids", []) if node_id not in chosen]
    outcome = {
        "plan_id": made.plan_id,
        "plan_commit": published.commit,
        "split": do_split,
        "node_ids": chosen,
    }
    claim.then(add=steps, drop=dropped, job_result=claim.job_result() | outcome)
    claim.answer = view
    return {**outcome, "profile": where, "node_ids": chosen if do_split else []}


def _plan(
    services: Services, profile: ModelProfile, cluster: Cluster, asked: Mapping[str, Any], before: Mapping[str, Any]
) -> Plan:
    """The plan, or, after a node died, the one that moves the fewest bytes from what the others hold."""
    options = options_from_json(asked.get("options") or {})
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if before:
        from planner.replan.replanner import replan

        return replan(plan_from_json(services.plans.get(before["plan_id"])), profile, cluster, options).plan
    return make_plan(profile, cluster, options, generated_at=now)


def _profile_source(claim: Claim, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Where the metadata lies, for this step and for the nodes: the job's own profile, or what was asked for."""
    awaited = asked.get("waits_for") if split_revision(asked.get("revision"))[0] is None else None
    own = claim.result("publish") or (claim.result("publish", of=awaited) if awaited else asked.get("profile"))
    sizes = {"batch_size": asked.get("batch_size"), "sequence_length": asked.get("sequence_length")}
    if own:
        return {"model_name": claim.claimed.model_name, "path": own["path"], "commit": own["commit"], **sizes}
    return {
        "model_name": claim.claimed.model_name,
        "repo": asked.get("metadata_repo"),
        "revision": asked.get("revision"),
        **sizes,
    }


def _cluster(
    asked: Mapping[str, Any],
    alive: Mapping[str, Mapping[str, Any]],
    lost: frozenset[str],
    *,
    dtype: str | None,
    splits: bool,
) -> Cluster:
    """The nodes to plan for: those given, or the living. Once the job `splits`, of those given only the living."""
    given = asked.get("available_nodes")
    links = asked.get("links")
    if given:
        base = cluster_from_json({"nodes": list(given), **({"links": links} if links else {})}, dtype=dtype)
    else:
        base = links_from_json(links) if links else Cluster(nodes=())
    if given:
        nodes = tuple(n for n in base.nodes if n.node_id in alive or not (splits or n.node_id in lost))
    else:
        nodes = tuple(to_node(info) for _, info in sorted(alive.items()))
    if not nodes and splits:
        # All at once are rather restarted than gone for good; those who come back find what they had.
        raise HandedBack("no compute node is alive", delay_s=_NODES_AWAY_S)
    if not nodes:
        raise Unavailable(
            "no compute node is alive: start one with 'fairshard node' (GET /api/nodes shows those that are)"
        )
    return replace(base, nodes=nodes)


def _less(info: dict[str, Any], used: Mapping[str, int]) -> dict[str, Any]:
    """What a node offers beside the plans that it keeps loaded."""
    return info | {"memory_bytes": max(0, int(info["memory_bytes"]) - used.get(info["node_id"], 0))}


def _wants_split(asked: Mapping[str, Any], chosen: list[str], alive: Mapping[str, Any]) -> bool:
    absent = [node_id for node_id in chosen if node_id not in alive]
    wanted = asked.get("split")
    if wanted and absent:
        raise Conflict(
            f"shards were asked for, but {', '.join(absent)} of the plan are not registered nodes; "
            "leave available_nodes out, or set split to false",
            details={"absent": absent},
        )
    return not absent if wanted is None else bool(wanted)


def _split_steps(made: Plan, where: Mapping[str, Any], *, paranoid: bool) -> list[StepSpec]:
    arguments = {"plan_id": made.plan_id, "profile": dict(where), "revision": made.revision, "paranoid": paranoid}
    splits = [
        StepSpec(
            name=f"split:{node_id}",
            task="workers.split",
            queue=node_queue(node_id),
            node_id=node_id,
            after=("plan",),
            args=arguments,
        )
        for node_id in sorted(made.allocation)
    ]
    names = tuple(step.name for step in splits)
    return [*splits, StepSpec(name="finish", task="planner.finish", queue=PLANNER, after=names)]


def _resolve(services: Services, model_name: str, token: str | None) -> str:
    from workers.downloader import resolve

    return resolve(check_model_name(model_name), token=token, models_dir=services.settings.models_dir).revision


@shared_task(name="planner.submit", throws=(FairshardError,))
def submit(model_name: str, kind: str = "request", **fields: Any) -> dict[str, Any]:
    """Submit a job, for Celery clients: what POST /api/request does, or POST /api/process (`kind="process"`).

    Returns:
        The job as JSON, in the result backend.

    Raises:
        InvalidInput: If a field is wrong; `hub_token` is, for a message may be read by whoever reaches Redis.
        Conflict, LimitExceeded, Unavailable.
    """
    from workers.jobs.jobs import Jobs

    jobs = Jobs(current())
    kinds = {"request": jobs.submit_request, "process": jobs.submit_process}
    if kind not in kinds:
        raise InvalidInput(f"kind must be one of {', '.join(kinds)}, got {kind!r:.40}")
    unknown = sorted(fields.keys() & {"hub_token", "submitter", "batch_id", "job_id"})
    if unknown:
        raise InvalidInput(f"{', '.join(unknown)} cannot be sent in a message")
    try:
        return kinds[kind](model_name, **fields)
    except TypeError as error:
        raise InvalidInput(str(error).partition(" ")[2]) from None


@step_task("planner.finish")
def finish(services: Services, claim: Claim) -> dict[str, Any]:
    """See that all shards of the plan are there and whole."""
    planned = claim.result("plan")
    made = services.plans.get(planned["plan_id"])
    profile = services.plan_profile(planned["profile"], token=services.user_token(claim.claimed.job_id, claim.params))
    shards = [claim.result(f"split:{node_id}") for node_id in planned["node_ids"]]
    check_shards(made, profile, shards)
    claim.then(job_result=claim.job_result() | {"shards": shards})
    return {"plan_id": made["plan_id"], "shards": len(shards), "size_bytes": sum(s["size_bytes"] for s in shards)}


def check_shards(made: Mapping[str, Any], profile: ModelProfile, shards: list[dict[str, Any]]) -> None:
    """Check the nodes' reports against the plan: each layer where it belongs, each file with its digest.

    Raises:
        IntegrityError: If a shard is missing, of another plan, or not of the layers and bytes that were planned.
    """
    reports = {shard.get("node_id"): shard for shard in shards}
    weights = {layer.name: layer.weight_bytes for layer in profile.layers}
    for node_id, part in made["split_plan"].items():
        report = reports.get(node_id)
        if not report:
            raise IntegrityError(f"node {node_id} reported no shard", details={"node_id": node_id})
        if report["plan_id"] != made["plan_id"]:
            raise IntegrityError(f"node {node_id} holds a shard of plan {report['plan_id']}, not {made['plan_id']}")
        if set(report["layers"]) != set(part["layer_names"]):
            raise IntegrityError(
                f"node {node_id} holds {len(report['layers'])} layers, {len(part['layer_names'])} planned"
            )
        planned = sum(weights.get(name, 0) for name in part["layer_names"])
        if report["tensor_bytes"] < planned:
            raise IntegrityError(f"node {node_id} holds {report['tensor_bytes']} bytes of tensors, {planned} planned")
        undigested = [file["name"] for file in report["files"] if not file["digest"]]
        if undigested:
            raise IntegrityError(f"node {node_id} gave no digest for {', '.join(undigested)}")


@step_task("planner.forget")
def forget(services: Services, claim: Claim) -> dict[str, Any]:
    """Forget a plan, in the store and in Redis."""
    services.plans.delete(claim.args["plan_id"], claim.claimed.model_name)
    return {"plan_id": claim.args["plan_id"]}
