"""A plan for machines that need not exist: what-if without a cluster, nothing stored."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from planner.cluster import Cluster
from planner.errors import Conflict, InvalidInput
from planner.kv_dtype import with_kv_bytes, with_kv_dtype
from planner.names import join_revision
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.replicas.to_json import replicas_to_json
from planner.wire.read import cluster_from_json, options_from_json, plan_to_json, profile_from_json
from web.schemas.bodies import plan_options
from web.services import services
from workers.settings import HubSettings

#: Layers × nodes that one preview may plan; it runs in the server, not in a worker.
_LARGEST = 10_000_000
#: The same with what is searched for: replicas take thousands of plans' time, the longest context dozens.
_LARGEST_SEARCH = 20_000


def preview(given: dict[str, Any]) -> dict[str, Any]:
    """The plan's JSON with `explanation` and, if asked for, `comparison`, `max_context` and `replicas`.

    Raises:
        NotFound: If the named model's metadata is not published.
        InvalidInput: If metadata, nodes or options contradict themselves.
        Conflict: If no nodes are given and none is alive.
        Infeasible: If there is no plan.
    """
    # The planner brings numpy along; a process that previews nothing does without.
    from planner.explain.words import explain
    from planner.replicas.make import check_replicas, make_replicas
    from planner.strategies.make import compare, context_limit, make_plan, max_context

    profile = _profile(given)
    cluster = _cluster(given, profile)
    replicas = given.get("replicas")
    searched = "replicas" if replicas is not None else "max_context" if given.get("max_context") else None
    largest = _LARGEST_SEARCH if searched else _LARGEST
    if len(profile.layers) * len(cluster.nodes) > largest:
        raise InvalidInput(
            f"a preview {f'with {searched} ' if searched else ''}plans at most {largest:,} layers × nodes, got "
            f"{len(profile.layers):,} × {len(cluster.nodes):,}; use `fairshard plan`",
            details={"largest": largest, "layers": len(profile.layers), "nodes": len(cluster.nodes)},
        )
    options = options_from_json(plan_options(given))
    if replicas is not None:
        check_replicas(options, replicas)
    plan = make_plan(profile, cluster, options, generated_at=_now())
    url = HubSettings.from_env().url(plan.model_name)
    answer = {"success": True, **plan_to_json(plan, model_url=url), "job_id": None, "explanation": explain(plan)}
    if given.get("compare"):
        answer["comparison"] = {
            name: _outcome(outcome) for name, outcome in compare(profile, cluster, options).items()
        }
    if given.get("max_context"):
        longest = max_context(profile, cluster, options) or 0
        answer["max_context"] = {"max_sequence_length": longest, "limit": context_limit(profile, longest)}
    if replicas is not None:
        found = make_replicas(profile, cluster, options, replicas=replicas, generated_at=_now())
        answer["replicas"] = replicas_to_json(found)
    return answer


def _profile(given: dict[str, Any]) -> ModelProfile:
    if "metadata" in given:
        profile = profile_from_json(given["metadata"])
    else:
        revision = join_revision(
            given.get("revision"), subfolder=given.get("subfolder"), variant=given.get("variant")
        )
        profile = profile_from_json(services().jobs.profile(given["model_name"], revision=revision))
    if "kv_dtype" in given:
        profile = with_kv_dtype(profile, given["kv_dtype"])
    if "kv_bytes_per_token" in given:
        profile = with_kv_bytes(profile, given["kv_bytes_per_token"])
    return profile.at(
        batch_size=given.get("batch_size", profile.batch_size),
        sequence_length=given.get("sequence_length", profile.sequence_length),
    )


def _cluster(given: dict[str, Any], profile: ModelProfile) -> Cluster:
    nodes = given.get("available_nodes")
    if nodes is None:
        nodes = services().jobs.nodes()
        if not nodes:
            raise Conflict("no node is alive; start one with `fairshard node`, or name machines in available_nodes")
    whole: dict[str, Any] = {"nodes": nodes}
    if "links" in given:
        whole["links"] = given["links"]
    return cluster_from_json(whole, dtype=profile.dtype)


def _outcome(outcome: Plan | Exception) -> dict[str, Any]:
    if isinstance(outcome, Exception):
        return {"feasible": False, "error": str(outcome)}
    predicted = outcome.predicted
    return {
        "feasible": True,
        "bottleneck_s": predicted.bottleneck_s,
        "latency_s": predicted.latency_s,
        "lower_bound_s": predicted.lower_bound_s,
        "gap": predicted.gap,
        "nodes_used": sum(report.used for report in outcome.nodes),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
