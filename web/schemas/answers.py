"""What is answered: schemas that document it. Views answer JSON as it comes from the ledger and `planner.wire`."""

from __future__ import annotations

from typing import Any

from marshmallow import INCLUDE, Schema, fields, validate

from web.schemas.bodies import KINDS, STATES

Field = fields.Field[Any]


def answer(name: str, about: str, base: type[Schema] = Schema, /, **has: Field) -> type[Schema]:
    """A schema; an answer may hold more than is said in it: a newer release may add to it."""
    meta = type("Meta", (base.Meta,), {"unknown": INCLUDE})
    return type(name, (base,), {"__doc__": about, "Meta": meta, **has})


def _options(about: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, **options, **({"metadata": {"description": about}} if about else {})}


def text(about: str = "", *, choices: tuple[str, ...] = (), **options: Any) -> Field:
    """A string; of `choices` if there are any."""
    return fields.String(**_options(about, options), validate=validate.OneOf(choices) if choices else None)


def number(about: str = "", **options: Any) -> Field:
    """A number."""
    return fields.Float(**_options(about, options))


def whole(about: str = "", **options: Any) -> Field:
    """A whole number."""
    return fields.Integer(**_options(about, options))


def flag(about: str = "", **options: Any) -> Field:
    """True or false."""
    return fields.Boolean(**_options(about, options))


def many(of: Field | type[Schema], about: str = "", **options: Any) -> Field:
    """A list."""
    return fields.List(_field(of), **_options(about, options))


def mapping(of: Field | type[Schema] | None = None, about: str = "", **options: Any) -> Field:
    """An object with any names: of anything, or of `of`."""
    kinds: dict[str, Any] = {} if of is None else {"keys": fields.String(), "values": _field(of)}
    return fields.Dict(**kinds, **_options(about, options))


def _field(of: Field | type[Schema], **options: Any) -> Field:
    return of if isinstance(of, fields.Field) else fields.Nested(of, **options)


def may(of: Field | type[Schema]) -> Field:
    """A field that may be absent."""
    field = _field(of)
    field.required = False
    return field


def null(of: Field | type[Schema]) -> Field:
    """A field that may be null."""
    field = _field(of, required=True)
    field.allow_none = True
    return field


def maybe(about: str = "") -> Field:
    """A string that may be null or absent."""
    return may(null(text(about)))


# fmt: off
ErrorOut = answer(
    "ErrorOut", "Every error, whatever its status.",
    error=text("What is wrong, with the numbers and the remedy."), code=text("Machine-readable name."),
    details=mapping(about="The numbers as JSON."),
)
RequestOut = answer(
    "RequestOut", "The acknowledgement of a request; `Location` names the job.",
    success=flag(), message=text(), model_name=text(), node_id=null(text()), received_at=text("RFC 3339, UTC."),
    job_id=text(),
)

# -- plans
PlanMetadataOut = answer(
    "PlanMetadataOut", "The model in three numbers.",
    total_layers=whole(), total_compute=number("FLOP of one pass."), model_type=null(text()),
)
SelectedOut = answer(
    "SelectedOut", "A node that takes part.", node_id=text(), compute_power=number("GFLOP/s it offered."),
)
ShareOut = answer(
    "ShareOut", "One node's part.",
    layer_names=many(text()), total_compute=number("FLOP."),
    compute_utilization=number("total_compute ÷ (FLOP/s × time budget), at most 1."),
)
HopOut = answer(
    "HopOut", "A step of the chain.",
    node_id=text(), step=whole(), layer_names=many(text()), next_nodes=many(text()),
    payload_bytes=may(whole("Handed on to the next step.")),
    shared_kv_bytes=may(whole("Of them: keys and values that later layers share.")),
    transfer_s=may(number()), compute_s=may(number()),
    check=may(mapping(about="What the receiver checks before it runs.")),
)
MegaphoneOut = answer(
    "MegaphoneOut", "Who starts, whom it tells, and the order of execution.",
    start_node=text(), chain=many(HopOut),
    text_chain=may(many(text("node_id."), "Steps of a request without images, where it takes another way.")),
    announcement=may(mapping()),
)
StageOut = answer(
    "StageOut", "Contiguous layers [start, end) on one node.",
    rank=whole(), node_id=text(), start=whole(), end=whole(), layer_names=many(text()),
)
PredictedOut = answer(
    "PredictedOut", "What the plan should cost, and how far from the best it can be.",
    bottleneck_s=number("The slowest node's seconds for one pass."),
    latency_s=number("One pass through the chain, links included."),
    lower_bound_s=number("No plan on these nodes is better."), gap=number("objective ÷ bound − 1."),
    exact=flag("Whether the bound is reached; proven only where the plan's `approximate` is empty."),
)
NodeReportOut = answer(
    "NodeReportOut", "A node's part and the reason for it, used or not.",
    node_id=text(), used=flag(), reason=text(), limit=maybe("What stops it from taking more."), flop=may(number()),
    seconds=may(number()), memory_used_bytes=may(whole()), memory_free_bytes=may(whole()),
    compute_power=may(number()), compute_utilization=may(number()),
)
PlanOut = answer(
    "PlanOut", "A plan: the williw protocol's fields, and ours beside them.",
    success=flag(), model_name=text(), model_url=text(), plan_id=text(), generated_at=null(text()),
    metadata=_field(PlanMetadataOut, required=True), selected_nodes=many(SelectedOut), split_plan=mapping(ShareOut),
    megaphone_plan=_field(MegaphoneOut, required=True), revision=maybe(),
    unit=may(text(choices=("layer", "tensor"))), strategy=may(text()), objective=may(text()), phase=may(text()),
    batch_size=may(whole()), sequence_length=may(whole()), time_budget_s=may(number()), stages=many(StageOut),
    predicted=_field(PredictedOut, required=True), nodes=many(NodeReportOut),
    approximate=may(many(text(), "Why FLOP, KV cache or activations of the profile are estimates; what rests on them "
                                 "(seconds, bound, gap, utilization) is no better. Empty: all was counted.")),
    missing_tensors=may(null(many(text(), "The model's tensors that the checkpoint lacks. Null: not checked, which "
                                          "needs the model's class."))),
    cluster=may(null(mapping(about="The nodes as they were used, and their links, as a nodes file."))),
    options=may(null(mapping(about="What was asked of the planner."))),
    metadata_digest=may(null(text("Of the metadata that it was made from."))),
    job_id=maybe("The job whose next steps cut the shards."),
    source=may(text("`store` where Redis could not be asked.")),
)
PlanSummaryOut = answer(
    "PlanSummaryOut", "A plan in a list.",
    plan_id=text(), model_name=text(), revision=maybe(), strategy=may(text()), node_ids=may(many(text())),
    generated_at=maybe(), job_id=maybe(),
)
PlansOut = answer("PlansOut", "Plans, newest first.", plans=many(PlanSummaryOut))

# -- previews
OutcomeOut = answer(
    "OutcomeOut", "What a strategy would give, or why it gives nothing.",
    feasible=flag(), bottleneck_s=may(number()), latency_s=may(number()), lower_bound_s=may(number()),
    gap=may(number()), nodes_used=may(whole()), error=may(text()),
)
OneChainOut = answer(
    "OneChainOut", "One chain of all nodes, to compare with.",
    plan_id=text(), throughput_per_s=number(), nodes_used=whole(),
)
IdleOut = answer("IdleOut", "A node that is in no chain.", node_id=text(), reason=text())
ReplicasOut = answer(
    "ReplicasOut", "Several chains on disjoint nodes, each of the whole model.",
    chains=whole(), throughput_per_s=number("Passes a second of all chains together."),
    upper_bound_per_s=number("No division of these nodes makes more."), gap=number("bound ÷ throughput − 1."),
    exact=flag(), ratio=number("Throughput over that of one chain."), one_chain=_field(OneChainOut, required=True),
    idle=many(IdleOut), plans=many(PlanOut, "The fastest first."),
)
ContextOut = answer(
    "ContextOut", "The longest sequence for which there is a plan.",
    max_sequence_length=whole("Tokens; at least so many if `limit` is `search`."),
    limit=text("What ends it: the `nodes`; the `model`, which takes no more; the `search`, which goes no further.",
               choices=("nodes", "model", "search")),
)
PreviewOut = answer(
    "PreviewOut", "A plan that nobody stored.", PlanOut,
    explanation=may(text("The reasons as one paragraph.")), max_context=may(ContextOut),
    comparison=may(mapping(OutcomeOut)), replicas=may(ReplicasOut),
)

# -- jobs
ProgressOut = answer(
    "ProgressOut", "How far a step is.",
    done=may(number()), total=may(null(number())), what=maybe(), rate_per_s=may(null(number())),
    eta_s=may(null(number())), waits_until=maybe("Until when the step waits, for what `what` says then."),
)
JobErrorOut = answer(
    "JobErrorOut", "Why it failed.", code=may(text()), message=may(text()), details=may(null(mapping())),
)
StepOut = answer(
    "StepOut", "A step of a job.",
    name=text(), state=text(), attempts=may(whole()), progress=may(null(ProgressOut)), error=may(null(JobErrorOut)),
    node_id=maybe(),
    task_id=maybe("The Celery task that runs it, or ran it last: its result lies in the result backend for a day."),
    started_at=maybe(), ended_at=maybe(),
)
JobOut = answer(
    "JobOut", "A job.",
    job_id=text(), kind=text(choices=KINDS), state=text(choices=STATES),
    step=maybe("The step that runs, or the last that did."), steps=may(many(StepOut)), model_name=text(),
    params=may(mapping()), error=may(null(JobErrorOut)), result=may(null(mapping())), submitter=maybe(),
    batch_id=maybe(), waits_for=maybe(), created_at=maybe(), started_at=maybe(), ended_at=maybe(),
)
JobsOut = answer("JobsOut", "Jobs, newest first, without their steps.", jobs=many(JobOut))
AcceptedOut = answer("AcceptedOut", "A job that goes on after this answer.", JobOut, success=flag(), message=text())
BatchEntryOut = answer(
    "BatchEntryOut", "A model of a batch.",
    model_name=text(), job_id=maybe(), state=text(), step=maybe(), error=may(null(JobErrorOut)),
)
BatchOut = answer(
    "BatchOut", "The state of a batch and of each of its models.",
    batch_id=text(), state=text(), counts=mapping(fields.Integer(), "Of all entries."), created_at=maybe(),
    total=whole("Its entries."), jobs=many(BatchEntryOut, "A page of them."),
    next_cursor=null(whole("Where the next page begins; null on the last.")),
)

# -- the service
NodeOut = answer(
    "NodeOut", "A node that is alive.",
    node_id=text(), device=maybe(), flop_per_s=may(null(number())), memory_bytes=may(null(whole())),
    memory_bytes_per_s=may(null(number())), load_=may(null(number(data_key="load"))),
    disk_free_bytes=may(null(whole())), versions=may(mapping()), host=maybe(), started_at=maybe(), seen_at=maybe(),
    queue_length=may(whole()), running=may(many(fields.Dict())),
    wedged=may(flag("Alive, its queue not empty, and nothing claimed.")), shards=may(many(text())),
    deployed_bytes=may(whole("What it keeps loaded; plans count on the rest of its memory.")),
)
NodesOut = answer("NodesOut", "The nodes that are alive.", nodes=many(NodeOut), total=whole())
InvitationOut = answer(
    "InvitationOut", "All that a machine needs to join, encrypted under the token of its line.", sealed=text(),
)
HealthOut = answer(
    "HealthOut", "Whether the service lives, and whether it can do work.",
    status=text(choices=("healthy", "degraded")), live=flag(), ready=flag(),
    reason=null(text("Why it is not ready.")),
    warnings=many(text(), "Why jobs are refused (the queue is full) or can be lost (Redis evicts)."),
    checks=mapping(fields.Boolean()), version=text(), timestamp=text(),
)
