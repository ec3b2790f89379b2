"""marshmallow schemas of plans and of what is asked of them."""
# ruff: noqa: ARG002  (the signature of `_deserialize` is marshmallow's)

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validate

from planner.cluster import Link
from planner.limits import MAX_BATCH_SIZE, MAX_LAYERS, MAX_NODES, MAX_SEQUENCE_LENGTH
from planner.names import MOST_REVISION
from planner.plan import OBJECTIVES, PHASES, Hop, Megaphone, NodeReport, Plan, PlanOptions, Prediction, Stage
from planner.wire.clusters import ClusterSchema
from planner.wire.fields import (
    Flag,
    Free,
    Integer,
    Lenient,
    Many,
    ModelName,
    NodeId,
    Number,
    Text,
    missing_names,
    seconds,
    shown,
)
from planner.wire.write import SCHEMA_VERSION

_PLAN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SLACK = 1e-6


class PlanId(Text):
    """A plan's id; it names folders and keys."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        if isinstance(value, str) and _PLAN_ID.fullmatch(value):
            return value
        raise ValidationError(f"must be 1 to 64 letters, digits, '_' or '-', got {shown(value)}")


def _names(**kwargs: Any) -> fields.List[str]:
    return fields.List(Text(), required=True, **kwargs)


class StageSchema(Lenient):
    """Contiguous layers on one node."""

    rank = Integer(required=True)
    node_id = NodeId(required=True)
    start = Integer(required=True)
    end = Integer(required=True)
    layer_names = _names()

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> Stage:
        """The value."""
        expected, got = data["end"] - data["start"], len(data["layer_names"])
        if expected != got or not got:
            raise ValidationError(f"must name the {expected} layers from start to end, got {got}", "layer_names")
        return Stage(**{**data, "layer_names": tuple(data["layer_names"])})


class PredictionSchema(Lenient):
    """What the plan should cost."""

    value = Prediction
    bottleneck_s = Number(required=True)
    latency_s = Number(required=True)
    lower_bound_s = Number(required=True)
    gap = Number(low=-_SLACK, required=True)
    exact = Flag(required=True)


class NodeReportSchema(Lenient):
    """One node's part and why."""

    value = NodeReport
    node_id = NodeId(required=True)
    used = Flag(required=True)
    reason = Text(longest=4096, required=True)
    limit = Text(longest=64, load_default=None, allow_none=True)
    flop = Number(load_default=0.0)
    seconds = Number(load_default=0.0)
    memory_used_bytes = Integer(load_default=0)
    memory_free_bytes = Integer(load_default=0)
    compute_power = Number(load_default=0.0)
    compute_utilization = Number(high=1.0 + _SLACK, load_default=0.0)


class HopLinkSchema(Lenient):
    """A link."""

    value = Link
    latency_s = seconds(load_default=0.0)
    bytes_per_s = Number(positive=True, load_default=None, allow_none=True)


class HopSchema(Lenient):
    """One step of the chain."""

    value = Hop
    step = Integer(required=True)
    node_id = NodeId(required=True)
    layer_names = _names()
    next_nodes = fields.List(NodeId(), required=True)
    payload_bytes = Integer(load_default=0)
    shared_kv_bytes = Integer(load_default=0)
    transfer_s = Number(load_default=0.0)
    compute_s = Number(load_default=0.0)
    link = fields.Nested(HopLinkSchema, load_default=None, allow_none=True)
    check = Free(load_default=dict)


class MegaphoneSchema(Lenient):
    """The chain and its announcement."""

    value = Megaphone
    start_node = NodeId(required=True)
    chain = Many(HopSchema, shortest=1, longest=MAX_LAYERS, required=True)
    text_chain = fields.List(NodeId(), load_default=list)
    announcement = Free(load_default=dict)


class ShareSchema(Lenient):
    """One node's entry in split_plan; its other fields are repeated in `nodes`."""

    layer_names = _names(validate=validate.Length(max=MAX_LAYERS))


class TotalsSchema(Lenient):
    """The model in three figures."""

    total_layers = Integer(low=1, high=MAX_LAYERS, required=True)
    total_compute = Number(required=True)
    model_type = Text(longest=128, load_default=None, allow_none=True)


class EditedPlanSchema(Lenient):
    """What somebody who edits a plan decides; all else in the file follows from it and is not read."""

    model_name = ModelName(required=True)
    revision = Text(longest=MOST_REVISION, load_default=None, allow_none=True)
    strategy = Text(longest=64, load_default="greedy")
    objective = Text(choices=OBJECTIVES, load_default="throughput")
    phase = Text(choices=PHASES, load_default="prefill")
    batch_size = Integer(low=1, high=MAX_BATCH_SIZE, load_default=1)
    sequence_length = Integer(low=1, high=MAX_SEQUENCE_LENGTH, load_default=512)
    split_plan = fields.Dict(
        keys=NodeId(), values=fields.Nested(ShareSchema), required=True, validate=validate.Length(1, MAX_NODES)
    )
    generated_at = Text(longest=64, load_default=None, allow_none=True)


class PlanSchema(EditedPlanSchema):
    """A plan as the API answers it and as it is published."""

    schema_version = Integer(low=1, high=10**6, load_default=1, validate=validate.Range(max=SCHEMA_VERSION))
    plan_id = PlanId(required=True)
    unit = Text(choices=("layer", "tensor"), load_default="layer")
    strategy = Text(longest=64, required=True)
    time_budget_s = Number(required=True)
    metadata = fields.Nested(TotalsSchema, required=True)
    stages = Many(StageSchema, shortest=1, longest=MAX_LAYERS, required=True)
    predicted = fields.Nested(PredictionSchema, required=True)
    nodes = Many(NodeReportSchema, shortest=1, longest=MAX_NODES, required=True)
    megaphone_plan = fields.Nested(MegaphoneSchema, required=True)
    approximate = fields.List(Text(longest=4096), load_default=list)
    missing_tensors = missing_names()
    cluster = fields.Nested(ClusterSchema, load_default=None, allow_none=True)
    options = fields.Nested(
        lambda: OptionsSchema(),  # noqa: PLW0108  (it is defined below)
        load_default=None,
        allow_none=True,
    )
    metadata_digest = Text(longest=128, load_default=None, allow_none=True)

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> Plan:
        """The value, once its parts agree on who holds what."""
        totals = data.pop("metadata")
        allocation = {node: tuple(share["layer_names"]) for node, share in data.pop("split_plan").items()}
        del data["schema_version"]
        data.update(totals, allocation=allocation, megaphone=data.pop("megaphone_plan"))
        for name in ("stages", "nodes", "approximate", "missing_tensors"):
            data[name] = None if data[name] is None else tuple(data[name])
        plan = Plan(**data)
        _check_agreement(plan)
        return plan


def _check_agreement(plan: Plan) -> None:
    """Each layer is on one node, and the stages say the same as the allocation."""
    owner: dict[str, str] = {}
    for node_id, names in plan.allocation.items():
        for name in names:
            if name in owner:
                raise ValidationError(f"{shown(name)} is on {owner[name]} and on {node_id}", "split_plan")
            owner[name] = node_id
    if len(owner) != plan.total_layers:
        raise ValidationError(f"holds {len(owner)} of {plan.total_layers} layers", "split_plan")
    at = 0
    for rank, stage in enumerate(plan.stages):
        where = f"stages[{rank}]"
        if stage.rank != rank or stage.start != at:
            raise ValidationError(
                f"must have rank {rank} and start at {at}, where the one before ends; "
                f"got rank {stage.rank} and start {stage.start}",
                where,
            )
        wrong = next((name for name in stage.layer_names if owner.get(name) != stage.node_id), None)
        if wrong is not None:
            raise ValidationError(f"has {shown(wrong)} on {stage.node_id}; split_plan has it elsewhere", where)
        at = stage.end
    if at != plan.total_layers:
        raise ValidationError(f"end at layer {at} of {plan.total_layers}", "stages")
    reported = [report.node_id for report in plan.nodes]
    if len(set(reported)) != len(reported) or not set(plan.allocation) <= set(reported):
        raise ValidationError("must have one entry for each node of split_plan", "nodes")


class OptionsSchema(Schema):
    """What the user asks of a plan: `planner.plan.PlanOptions` as JSON; a typing error must not pass unseen."""

    class Meta(Schema.Meta):
        """marshmallow's options."""

        unknown = RAISE

    strategy = Text(longest=64)
    objective = Text(choices=OBJECTIVES)
    phase = Text(choices=PHASES)
    time_budget_s = Number(positive=True, allow_none=True)
    pins = fields.Dict(keys=Text(), values=NodeId())
    without = fields.List(NodeId(), data_key="exclude", validate=validate.Length(max=MAX_NODES))
    max_memory_share = fields.Dict(keys=NodeId(), values=Number(high=1.0))
    max_compute_share = fields.Dict(keys=NodeId(), values=Number(high=1.0))
    reserve_bytes = Integer()
    count_activations = Flag()
    use_compute_min = Flag()
    allow_missing = Flag()

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> PlanOptions:
        """The value."""
        if "without" in data:  # a schema has an attribute `exclude` of its own
            data["exclude"] = frozenset(data.pop("without"))
        return PlanOptions(**data)
