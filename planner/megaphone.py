"""The Megaphone: the start node tells everyone what is coming, runs its part, and each part hands on to the next.

The chain is in execution order and has one step for each run of neighbouring layers on one node, so that it can be
executed as written whatever the strategy: a node that holds layers 0-3 and 8-11 has two steps. Tensors that no layer
uses have a holder but no step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from planner.cluster import Cluster
from planner.errors import Conflict
from planner.plan import Allocation, Hop, Megaphone, Phase, Stage
from planner.profile import Layer, ModelProfile

#: `layer_type` of tensors that no layer uses.
UNUSED = "unused"


def runs(profile: ModelProfile, allocation: Allocation) -> tuple[Stage, ...]:
    """The stages of an allocation: each run of neighbouring layers on one node, in execution order.

    Args:
        profile: The model.
        allocation: node_id -> indices of its layers; each layer exactly once.
    """
    owner = {index: node_id for node_id, indices in allocation.items() for index in indices}
    stages: list[Stage] = []
    begin = 0
    for end in range(1, len(profile.layers) + 1):
        if end == len(profile.layers) or owner[end] != owner[begin]:
            stages.append(
                Stage(
                    rank=len(stages),
                    node_id=owner[begin],
                    start=begin,
                    end=end,
                    layer_names=tuple(layer.name for layer in profile.layers[begin:end]),
                )
            )
            begin = end
    return tuple(stages)


def payload_bytes(profile: ModelProfile, layer: Layer, *, phase: Phase) -> int:
    """Bytes that `layer` hands to the next: for the whole prompt, or for one token of each sequence."""
    if phase == "decode":
        shared = _shared_kv_bytes(profile, layer)
        return -(-(layer.activation_bytes - shared) // profile.sequence_length) + shared
    return layer.activation_bytes


def runs_in_pass(layer: Layer) -> bool:
    """Whether the profiled pass runs the layer: not what nobody uses, nor what takes other inputs."""
    return layer.layer_type != UNUSED and layer.idle_in != "profile"


def _shared_kv_bytes(profile: ModelProfile, layer: Layer) -> int:
    """Those of the whole context, in each pass: a generated token's layers read all of them."""
    tokens = profile.batch_size * min(profile.sequence_length, profile.longest_sequence or profile.sequence_length)
    return min(layer.activation_bytes, tokens * layer.shared_kv_bytes_per_token)


def _text_chain(steps: Sequence[tuple[str, Sequence[Layer]]]) -> tuple[str, ...]:
    """The nodes by which a request of text alone goes; empty where those are the chain's."""
    left = [node_id for node_id, layers in steps if any(not layer.idle_in for layer in layers)]
    chain = tuple(node_id for node_id, _ in groupby(left))
    return () if chain == tuple(node_id for node_id, _ in steps) else chain


def megaphone(
    profile: ModelProfile,
    cluster: Cluster,
    stages: Sequence[Stage],
    *,
    plan_id: str,
    phase: Phase,
    compute_s: Sequence[float],
) -> Megaphone:
    """The chain over `stages` and what the start node announces.

    Args:
        profile: The model, at the batch size and sequence length of the plan.
        cluster: The nodes' links.
        stages: Runs of layers in execution order, all layers once.
        plan_id: The plan's id, which every receiver compares with its shard's.
        phase: Whether a pass carries the whole prompt or one token.
        compute_s: Seconds that each stage takes, one for each of `stages`.
    """
    steps = [
        (stage, seconds, [layer for layer in profile.layers[stage.start : stage.end] if runs_in_pass(layer)])
        for stage, seconds in zip(stages, compute_s, strict=True)
    ]
    steps = [step for step in steps if step[2]] or [
        (stage, seconds, list(profile.layers[stage.start : stage.end]))
        for stage, seconds in zip(stages, compute_s, strict=True)
    ]
    chain: list[Hop] = []
    arriving = 0
    sender: str | None = None
    for number, (stage, seconds, layers) in enumerate(steps):
        target = steps[number + 1][0].node_id if number + 1 < len(steps) else None
        leaving = payload_bytes(profile, layers[-1], phase=phase) if target else 0
        link = cluster.link(stage.node_id, target) if target else None
        names = tuple(layer.name for layer in layers)
        chain.append(
            Hop(
                step=number + 1,  # the williw protocol counts from 1
                node_id=stage.node_id,
                layer_names=names,
                next_nodes=(target,) if target else (),
                payload_bytes=leaving,
                shared_kv_bytes=_shared_kv_bytes(profile, layers[-1]) if target else 0,
                transfer_s=link.transfer_s(leaving) if link else 0.0,
                compute_s=seconds,
                link=link,
                check={
                    "plan_id": plan_id,
                    "revision": profile.revision,
                    "from": sender,
                    "payload_bytes": arriving,
                    "layers_digest": digest(names),
                },
            )
        )
        arriving, sender = leaving, stage.node_id
    start = chain[0].node_id
    return Megaphone(
        start_node=start,
        chain=tuple(chain),
        text_chain=_text_chain([(stage.node_id, layers) for stage, _, layers in steps]),
        announcement=_announcement(profile, chain, [stage.node_id for stage in stages], plan_id=plan_id, phase=phase),
    )


def named(chain: Megaphone, plan_id: str) -> Megaphone:
    """The same chain, of the plan `plan_id`."""
    body = {name: value for name, value in chain.announcement.items() if name != "digest"} | {"plan_id": plan_id}
    return replace(
        chain,
        chain=tuple(replace(hop, check={**hop.check, "plan_id": plan_id}) for hop in chain.chain),
        announcement={**body, "digest": digest(body)},
    )


def digest(value: object) -> str:
    """`sha256:<hex>` of the value's JSON in one fixed spelling."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def check_arrival(
    hop: Hop, *, plan_id: str, revision: str | None, sender: str | None, payload: int, layer_names: Sequence[str]
) -> None:
    """What a receiver checks before it runs `hop` on what arrived.

    Args:
        hop: The receiver's own step, from the announcement.
        plan_id: The plan id that came with the payload.
        revision: The revision of the receiver's shard.
        sender: node_id that the payload came from; None at the start of the chain.
        payload: Its size in bytes.
        layer_names: Layers of this step that the receiver's shard holds, in execution order.

    Raises:
        Conflict: If any of it is not what the plan says; the message names what was expected and what came.
    """
    came: Mapping[str, Any] = {
        "plan_id": plan_id,
        "revision": revision,
        "from": sender,
        "payload_bytes": payload,
        "layers_digest": digest(tuple(layer_names)),
    }
    for name, expected in hop.check.items():
        if came[name] != expected:
            raise Conflict(
                f"step {hop.step} on {hop.node_id} expects {name} {expected}, got {came[name]}",
                details={"step": hop.step, "field": name, "expected": expected, "got": came[name]},
            )


def _announcement(
    profile: ModelProfile, chain: Sequence[Hop], holders: Sequence[str], *, plan_id: str, phase: Phase
) -> dict[str, Any]:
    """Whom the start node tells, and what: each node its steps, whom it hears from and whom it tells."""
    start = chain[0].node_id
    parts: dict[str, list[dict[str, Any]]] = {}
    for hop in chain:
        parts.setdefault(hop.node_id, []).append(
            {
                "step": hop.step,
                "layer_names": list(hop.layer_names),
                "from": hop.check["from"],
                "next_nodes": list(hop.next_nodes),
                "receives_bytes": hop.check["payload_bytes"],
                "sends_bytes": hop.payload_bytes,
            }
        )
    body: dict[str, Any] = {
        "from": start,
        "to": [node_id for node_id in dict.fromkeys([*parts, *holders]) if node_id != start],
        "plan_id": plan_id,
        "model_name": profile.model_name,
        "revision": profile.revision,
        "phase": phase,
        "batch_size": profile.batch_size,
        "sequence_length": profile.sequence_length,
        "steps": len(chain),
        "parts": parts,
    }
    return {**body, "digest": digest(body)}
