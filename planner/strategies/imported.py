"""Plans that leave and come back: edited by hand, and as accelerate's device map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from planner.cluster import Cluster
from planner.errors import Conflict, InvalidInput, InvalidMetadata
from planner.megaphone import UNUSED
from planner.plan import Plan, PlanOptions
from planner.profile import ModelProfile
from planner.wire.identity import plan_id
from planner.wire.read import plan_from_json


def import_plan(
    obj: object,
    profile: ModelProfile | None = None,
    cluster: Cluster | None = None,
    options: PlanOptions | None = None,
) -> Plan:
    """The plan in a file that somebody may have edited, once it is valid.

    What an editor changes is `split_plan`: who holds which layer. All else follows from it, so with a profile and a
    cluster the plan is made anew from that: its stages, chain, predictions and id. Without a cluster only a plan that
    is as it was written is accepted, since nobody can tell whether the nodes can hold an edited one.

    Args:
        obj: What `plan_to_json` wrote, perhaps edited.
        profile: The model at the plan's revision; None: not at hand.
        cluster: The nodes; None: not at hand.
        options: What the plan must meet; None: what the plan itself says of phase and objective.

    Raises:
        InvalidMetadata: If it is not a plan, or is edited and there is nothing to check it against.
        InvalidInput: If a layer is missing, there twice or unknown, or a node is.
        Conflict: If it is a plan for another model or revision.
        Infeasible: If a node is over its memory or the time budget.
    """
    if profile is None or cluster is None:
        return _untouched(obj, profile)
    head = _head(obj)
    _check_pinned(head["model_name"], head["revision"], profile)
    allocation = _indices(head["split_plan"], profile)
    if options is None:
        options = PlanOptions(
            strategy=head["strategy"], objective=head["objective"], phase=head["phase"], time_budget_s=None
        )
    from planner.strategies.make import plan_for  # numpy, which a plan that is only read does not need

    at = profile.at(batch_size=head["batch_size"], sequence_length=head["sequence_length"])
    return plan_for(at, cluster, options, allocation, generated_at=head["generated_at"])


def made_for(obj: object) -> dict[str, Any]:
    """What the plan in a file was made for: `strategy`, `objective`, `phase`, `batch_size` and `sequence_length`.

    Raises:
        InvalidMetadata: If it is not a plan.
    """
    head = _head(obj)
    return {name: head[name] for name in ("strategy", "objective", "phase", "batch_size", "sequence_length")}


def device_map(plan: Plan, profile: ModelProfile, devices: Mapping[str, int | str] | None = None) -> dict[str, Any]:
    """The plan as the `device_map` that accelerate's `dispatch_model` and transformers' `from_pretrained` take.

    Args:
        plan: The plan.
        profile: The model that it is for; its tensors name the modules that lie beside a layer (the final norm).
        devices: node_id -> GPU index, "cpu" or "disk"; None: the nodes' GPUs counted from 0 in the chain's order.

    Returns:
        Module path -> device; where one path lies below another, the deeper says more. `""` is the model itself (a
        parameter of its own beside its modules).

    Raises:
        Conflict: If the plan is for another model or revision.
        InvalidInput: If `devices` lacks a node of the plan.
    """
    _check_pinned(plan.model_name, plan.revision, profile)
    if devices is None:
        order = dict.fromkeys([*(hop.node_id for hop in plan.megaphone.chain), *plan.allocation])
        devices = {node_id: rank for rank, node_id in enumerate(order)}
    layers = {layer.name: layer for layer in profile.layers if layer.layer_type != UNUSED}
    result: dict[str, Any] = {}
    for stage in plan.stages:
        if stage.node_id not in devices:
            raise InvalidInput(f"no device is named for node {stage.node_id}", details={"node_id": stage.node_id})
        for name in stage.layer_names:
            if name in layers:
                result.update(dict.fromkeys(layers[name].module_paths, devices[stage.node_id]))
    return result


def _untouched(obj: object, profile: ModelProfile | None) -> Plan:
    plan = plan_from_json(obj)
    if profile is not None:
        _check_pinned(plan.model_name, plan.revision, profile)
        _indices({node: {"layer_names": list(names)} for node, names in plan.allocation.items()}, profile)
    expected = plan_id(plan) if plan.metadata_digest else _earlier_id(plan)
    if plan.plan_id != expected:
        raise InvalidMetadata(
            f"plan {plan.plan_id} was edited: what it says now has the id {expected}; give the nodes file as well "
            "(fairshard plan --import PLAN --nodes FILE), so that it can be checked and predicted anew",
            details={"plan_id": plan.plan_id, "expected": expected},
        )
    return plan


def _earlier_id(plan: Plan) -> str:
    """The id that plans had which hold no digest of their inputs: of the model, its revision and the allocation."""
    parts = {node_id: list(names) for node_id, names in sorted(plan.allocation.items()) if names}
    text = json.dumps([plan.model_name, plan.revision, plan.unit, parts], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _head(obj: object) -> dict[str, Any]:
    """The fields of an edited plan that are not derived from others, checked."""
    from planner.wire.plans import EditedPlanSchema
    from planner.wire.profiles import load

    head: dict[str, Any] = load(EditedPlanSchema(), obj, what="plan")
    return head


def _check_pinned(model_name: str, revision: str | None, profile: ModelProfile) -> None:
    if model_name != profile.model_name and "/" in model_name:
        raise Conflict(
            f"the plan is for {model_name}, this is {profile.model_name}",
            details={"expected": model_name, "got": profile.model_name},
        )
    if revision != profile.revision and revision is not None:
        raise Conflict(
            f"the plan is for revision {revision} of {model_name}, this is {profile.revision}; "
            "give that revision, or plan anew",
            details={"expected": revision, "got": profile.revision},
        )


def _indices(shares: Mapping[str, Mapping[str, Any]], profile: ModelProfile) -> dict[str, tuple[int, ...]]:
    place = {layer.name: layer.index for layer in profile.layers}
    owner: dict[str, str] = {}
    for node_id, share in shares.items():
        for name in share["layer_names"]:
            if name not in place:
                raise InvalidInput(
                    f"the plan has a layer {name!r} on {node_id} that {profile.model_name} has not",
                    details={"layer": name, "node_id": node_id},
                )
            if name in owner:
                raise InvalidInput(
                    f"the plan has {name!r} twice, on {owner[name]} and on {node_id}",
                    details={"layer": name, "nodes": [owner[name], node_id]},
                )
            owner[name] = node_id
    missing = [layer.name for layer in profile.layers if layer.name not in owner]
    if missing:
        raise InvalidInput(
            f"the plan has {len(missing)} of {len(place)} layers on no node: {', '.join(missing[:3])}",
            details={"layers": missing[:100]},
        )
    found: dict[str, list[int]] = {}
    for name, node_id in owner.items():
        found.setdefault(node_id, []).append(place[name])
    return {node_id: tuple(sorted(indices)) for node_id, indices in found.items()}
