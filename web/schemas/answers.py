"""What is answered: schemas that document it. Views answer JSON as it comes from the ledger and `planner.wire`."""

from __future__ import annotations

from typing import Any

from marshmallow import INCLUDE, Schema, fields, validate

from web.schemas.bodies import KINDS, STATES


def text(description: str = "", **kwargs: Any) -> fields.String:
    """A string with its description."""
    return fields.String(metadata={"description": description} if description else {}, **kwargs)


def maybe(description: str = "") -> fields.String:
    """A string or null."""
    return text(description, allow_none=True)


def number(description: str = "", **kwargs: Any) -> fields.Float:
    """A number with its description."""
    return fields.Float(metadata={"description": description} if description else {}, **kwargs)


def whole(description: str = "", **kwargs: Any) -> fields.Integer:
    """A whole number with its description."""
    return fields.Integer(metadata={"description": description} if description else {}, **kwargs)


class Answer(Schema):
    """An answer may hold more than is said here: a newer release may add to it."""

    class Meta(Schema.Meta):
        """marshmallow's options."""

        unknown = INCLUDE


class ErrorOut(Answer):
    """Every error, whatever its status."""

    error = text("What is wrong, with the numbers and the remedy.", required=True)
    code = text("Machine-readable name.", required=True)
    details = fields.Dict(required=True, metadata={"description": "The numbers as JSON."})


class RequestOut(Answer):
    """The acknowledgement of a request; `Location` names the job."""

    success = fields.Boolean(required=True)
    message = text(required=True)
    model_name = text(required=True)
    node_id = fields.String(required=True, allow_none=True)
    received_at = text("RFC 3339, UTC.", required=True)
    job_id = text(required=True)


class PlanMetadataOut(Answer):
    """The model in three numbers."""

    total_layers = whole(required=True)
    total_compute = number("FLOP of one pass.", required=True)
    model_type = fields.String(required=True, allow_none=True)


class SelectedOut(Answer):
    """A node that takes part."""

    node_id = text(required=True)
    compute_power = number("GFLOP/s it offered.", required=True)


class ShareOut(Answer):
    """One node's part."""

    layer_names = fields.List(fields.String(), required=True)
    total_compute = number("FLOP.", required=True)
    compute_utilization = number("total_compute ÷ (FLOP/s × time budget), at most 1.", required=True)


class HopOut(Answer):
    """A step of the chain."""

    node_id = text(required=True)
    step = whole(required=True)
    layer_names = fields.List(fields.String(), required=True)
    next_nodes = fields.List(fields.String(), required=True)
    payload_bytes = whole("Handed on to the next step.")
    transfer_s = number()
    compute_s = number()
    check = fields.Dict(metadata={"description": "What the receiver checks before it runs."})


class MegaphoneOut(Answer):
    """Who starts, whom it tells, and the order of execution."""

    start_node = text(required=True)
    chain = fields.List(fields.Nested(HopOut), required=True)
    announcement = fields.Dict()


class StageOut(Answer):
    """Contiguous layers [start, end) on one node."""

    rank = whole(required=True)
    node_id = text(required=True)
    start = whole(required=True)
    end = whole(required=True)
    layer_names = fields.List(fields.String(), required=True)


class PredictedOut(Answer):
    """What the plan should cost, and how far from the best it can be."""

    bottleneck_s = number("The slowest node's seconds for one pass.", required=True)
    latency_s = number("One pass through the chain, links included.", required=True)
    lower_bound_s = number("No plan on these nodes is better.", required=True)
    gap = number("objective ÷ bound − 1.", required=True)
    exact = fields.Boolean(required=True)


class NodeReportOut(Answer):
    """A node's part and the reason for it, used or not."""

    node_id = text(required=True)
    used = fields.Boolean(required=True)
    reason = text(required=True)
    limit = maybe("What stops it from taking more.")
    flop = number()
    seconds = number()
    memory_used_bytes = whole()
    memory_free_bytes = whole()
    compute_power = number()
    compute_utilization = number()


class PlanOut(Answer):
    """A plan: the seed's fields, and ours beside them."""

    success = fields.Boolean(required=True)
    model_name = text(required=True)
    model_url = text(required=True)
    plan_id = text(required=True)
    generated_at = fields.String(required=True, allow_none=True)
    metadata = fields.Nested(PlanMetadataOut, required=True)
    selected_nodes = fields.List(fields.Nested(SelectedOut), required=True)
    split_plan = fields.Dict(keys=fields.String(), values=fields.Nested(ShareOut), required=True)
    megaphone_plan = fields.Nested(MegaphoneOut, required=True)
    revision = maybe()
    unit = text(validate=validate.OneOf(["layer", "tensor"]))
    strategy = text()
    objective = text()
    phase = text()
    batch_size = whole()
    sequence_length = whole()
    time_budget_s = number()
    stages = fields.List(fields.Nested(StageOut), required=True)
    predicted = fields.Nested(PredictedOut, required=True)
    nodes = fields.List(fields.Nested(NodeReportOut), required=True)
    job_id = maybe("The job whose next steps cut the shards.")
    source = text("`store` where Redis could not be asked.")


class PlanSummaryOut(Answer):
    """A plan in a list."""

    plan_id = text(required=True)
    model_name = text(required=True)
    revision = maybe()
    strategy = text()
    node_ids = fields.List(fields.String())
    generated_at = maybe()
    job_id = maybe()


class PlansOut(Answer):
    """Plans, newest first."""

    plans = fields.List(fields.Nested(PlanSummaryOut), required=True)


class OutcomeOut(Answer):
    """What a strategy would give, or why it gives nothing."""

    feasible = fields.Boolean(required=True)
    bottleneck_s = number()
    latency_s = number()
    lower_bound_s = number()
    gap = number()
    nodes_used = whole()
    error = text()


class OneChainOut(Answer):
    """One chain of all nodes, to compare with."""

    plan_id = text(required=True)
    throughput_per_s = number(required=True)
    nodes_used = whole(required=True)


class IdleOut(Answer):
    """A node that is in no chain."""

    node_id = text(required=True)
    reason = text(required=True)


class ReplicasOut(Answer):
    """Several chains on disjoint nodes, each of the whole model."""

    chains = whole(required=True)
    throughput_per_s = number("Passes a second of all chains together.", required=True)
    upper_bound_per_s = number("No division of these nodes makes more.", required=True)
    gap = number("bound ÷ throughput − 1.", required=True)
    exact = fields.Boolean(required=True)
    ratio = number("Throughput over that of one chain.", required=True)
    one_chain = fields.Nested(OneChainOut, required=True)
    idle = fields.List(fields.Nested(IdleOut), required=True)
    plans = fields.List(fields.Nested(PlanOut), required=True, metadata={"description": "The fastest first."})


class ContextOut(Answer):
    """The longest sequence for which there is a plan."""

    max_sequence_length = whole("Tokens; at least so many if `limit` is `search`.", required=True)
    limit = text(
        "What ends it: the `nodes`; the `model`, which takes no more; the `search`, which goes no further.",
        required=True,
        validate=validate.OneOf(("nodes", "model", "search")),
    )


class PreviewOut(PlanOut):
    """A plan that nobody stored."""

    explanation = text("The reasons as one paragraph.")
    max_context = fields.Nested(ContextOut)
    comparison = fields.Dict(keys=fields.String(), values=fields.Nested(OutcomeOut))
    replicas = fields.Nested(ReplicasOut)


class ProgressOut(Answer):
    """How far a step is."""

    done = number()
    total = number(allow_none=True)
    what = maybe()
    rate_per_s = number(allow_none=True)
    eta_s = number(allow_none=True)


class JobErrorOut(Answer):
    """Why it failed."""

    code = text()
    message = text()
    details = fields.Dict(allow_none=True)


class StepOut(Answer):
    """A step of a job."""

    name = text(required=True)
    state = text(required=True)
    attempts = whole()
    progress = fields.Nested(ProgressOut, allow_none=True)
    error = fields.Nested(JobErrorOut, allow_none=True)
    node_id = maybe()
    started_at = maybe()
    ended_at = maybe()


class JobOut(Answer):
    """A job."""

    job_id = text(required=True)
    kind = text(required=True, validate=validate.OneOf(KINDS))
    state = text(required=True, validate=validate.OneOf(STATES))
    step = maybe("The step that runs, or the last that did.")
    steps = fields.List(fields.Nested(StepOut))
    model_name = text(required=True)
    params = fields.Dict()
    error = fields.Nested(JobErrorOut, allow_none=True)
    result = fields.Dict(allow_none=True)
    submitter = maybe()
    batch_id = maybe()
    waits_for = maybe()
    created_at = maybe()
    started_at = maybe()
    ended_at = maybe()


class JobsOut(Answer):
    """Jobs, newest first, without their steps."""

    jobs = fields.List(fields.Nested(JobOut), required=True)


class AcceptedOut(JobOut):
    """A job that goes on after this answer."""

    success = fields.Boolean(required=True)
    message = text(required=True)


class BatchEntryOut(Answer):
    """A model of a batch."""

    model_name = text(required=True)
    job_id = maybe()
    state = text(required=True)
    step = maybe()
    error = fields.Nested(JobErrorOut, allow_none=True)


class BatchOut(Answer):
    """The state of a batch and of each of its models."""

    batch_id = text(required=True)
    state = text(required=True)
    counts = fields.Dict(keys=fields.String(), values=fields.Integer(), required=True)
    created_at = maybe()
    jobs = fields.List(fields.Nested(BatchEntryOut), required=True)


class NodeOut(Answer):
    """A node that is alive."""

    node_id = text(required=True)
    device = maybe()
    flop_per_s = number(allow_none=True)
    memory_bytes = whole(allow_none=True)
    memory_bytes_per_s = number(allow_none=True)
    load_ = number(allow_none=True, data_key="load")
    disk_free_bytes = whole(allow_none=True)
    versions = fields.Dict()
    host = maybe()
    started_at = maybe()
    seen_at = maybe()
    queue_length = whole()
    running = fields.List(fields.Dict())
    wedged = fields.Boolean(metadata={"description": "Alive, its queue not empty, and nothing claimed."})
    shards = fields.List(fields.String())


class NodesOut(Answer):
    """The nodes that are alive."""

    nodes = fields.List(fields.Nested(NodeOut), required=True)


class HealthOut(Answer):
    """Whether the service lives, and whether it can do work."""

    status = text(required=True, validate=validate.OneOf(["healthy", "degraded"]))
    live = fields.Boolean(required=True)
    ready = fields.Boolean(required=True)
    reason = text("Why it is not ready.", required=True, allow_none=True)
    checks = fields.Dict(keys=fields.String(), values=fields.Boolean(), required=True)
    version = text(required=True)
    timestamp = text(required=True)
