"""What callers send: one schema a body, unknown fields refused, the williw protocol's field names kept."""

from __future__ import annotations

from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate, validates_schema

from planner.limits import MAX_BATCH_SIZE, MAX_SEQUENCE_LENGTH
from planner.plan import OBJECTIVES, PHASES, STRATEGIES
from planner.wire.fields import Flag, Integer, NodeId, Number, Text, seconds, unknown_field
from web.schemas.fields import (
    Either,
    Model,
    ModelName,
    Replicas,
    RepoId,
    Revision,
    Subfolder,
    Timestamp,
    Variant,
)

STATES = ("queued", "running", "done", "failed", "cancelled")
KINDS = ("request", "process", "delete")
KV_DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I8", "I4")
#: Nodes in one body; the planner takes 1,000 × 1,000 in well under a second.
MAX_BODY_NODES = 1_000
#: Nodes in a matrix of links: about as many links as `pairs` may have.
MAX_MATRIX_NODES = 316


def batch_size(**kwargs: Any) -> Integer:
    """A field of sequences in one pass."""
    return Integer(low=1, high=MAX_BATCH_SIZE, metadata={"description": "Sequences in one pass."}, **kwargs)


def sequence_length(**kwargs: Any) -> Integer:
    """A field of tokens in one sequence."""
    return Integer(low=1, high=MAX_SEQUENCE_LENGTH, metadata={"description": "Tokens of each sequence."}, **kwargs)


def kv_dtype() -> Text:
    """A field of what the KV cache is kept in."""
    return Text(choices=KV_DTYPES, metadata={"description": "Type of the KV cache; default: the model's."})


def kv_bytes_per_token() -> Integer:
    """A field of what a user knows of a KV cache."""
    about = "Bytes a token takes in all layers together whose KV cache is not known (null in the metadata)."
    return Integer(high=2**40 - 1, metadata={"description": about})


def subfolder() -> Subfolder:
    """A field of where in the repository the model lies."""
    return Subfolder(allow_none=True, metadata={"description": "Folder of the repository that holds the model."})


def variant() -> Variant:
    """A field of which weights are meant."""
    about = "Which of several weights: `bf16` of `model.bf16.safetensors`."
    return Variant(allow_none=True, metadata={"description": about})


class Strict(Schema):
    """A body in which a typing error must not pass unseen."""

    class Meta(Schema.Meta):
        """marshmallow's options."""

        unknown = RAISE

    def handle_error(self, error: ValidationError, data: Any, *, many: bool, **kwargs: Any) -> None:  # noqa: ARG002
        """Where a field is not known, name the nearest that is."""
        known = [field.data_key or name for name, field in self.load_fields.items()]
        found: Any = error.messages
        for messages in found.values() if many else (found,):
            for name, said in messages.items():
                if said == [self.error_messages["unknown"]]:
                    messages[name] = [unknown_field(name, known)]


class NodeIn(Strict):
    """A machine: in our form (`flop_per_s`, `memory_bytes`), in the williw form (`gpu_name`, ...), or by `device`."""

    node_id = NodeId()
    id = NodeId(metadata={"description": "The williw protocol's other name for `node_id`."})
    flop_per_s = Number(positive=True, allow_none=True, metadata={"description": "Sustained FLOP/s."})
    memory_bytes = Integer(allow_none=True, metadata={"description": "For weights and KV cache."})
    memory_bytes_per_s = Number(positive=True, allow_none=True)
    load_ = Number(
        high=1.0,
        allow_none=True,
        data_key="load",
        attribute="load",
        metadata={"description": "Fraction that others already use."},
    )
    device = Text(longest=256, allow_none=True, metadata={"description": "A name of the device catalogue."})
    gpu_available = Flag(allow_none=True)
    gpu_name = Text(longest=256, allow_none=True)
    gpu_usage_percent = Number(high=100.0, allow_none=True)
    cpu_cores = Integer(low=1, high=65_536, allow_none=True)

    @validates_schema
    def has_an_id(self, data: dict[str, Any], **_: Any) -> None:
        """One of both names is there."""
        if "node_id" not in data and "id" not in data:
            raise ValidationError("is required", "node_id")


class PairIn(Strict):
    """The directed link between two nodes."""

    source = NodeId(data_key="from", attribute="from", required=True)
    target = NodeId(data_key="to", attribute="to", required=True)
    latency_s = seconds()
    bytes_per_s = Number(positive=True, allow_none=True)


def _matrix(entry: fields.Field[Any]) -> fields.List[Any]:
    side = validate.Length(max=MAX_MATRIX_NODES)
    return fields.List(fields.List(entry, validate=side), validate=side, allow_none=True)


class MatrixIn(Strict):
    """Row: from; column: to; in the order of `available_nodes`. null: the default's; the diagonal is not read."""

    latency_s = _matrix(seconds(allow_none=True))
    bytes_per_s = _matrix(Number(allow_none=True))


class LinksIn(Strict):
    """The link that any two nodes have, and the pairs that differ from it."""

    latency_s = seconds()
    bytes_per_s = Number(positive=True, allow_none=True)
    pairs = fields.List(fields.Nested(PairIn), validate=validate.Length(max=100_000))
    matrix = fields.Nested(MatrixIn, allow_none=True)


class PlanFields(Strict):
    """What may be asked of a plan; `OPTIONS` of these are the planner's own."""

    OPTIONS = (
        "strategy", "objective", "phase", "time_budget_s", "pins", "exclude", "max_memory_share",
        "max_compute_share", "reserve_bytes", "count_activations", "use_compute_min",
        "allow_missing",
    )  # fmt: skip

    strategy = Text(choices=STRATEGIES, metadata={"description": "Default greedy."})
    objective = Text(choices=OBJECTIVES, metadata={"description": "Default throughput."})
    phase = Text(choices=PHASES, metadata={"description": "Default prefill."})
    time_budget_s = Number(
        positive=True,
        high=31_536_000.0,
        allow_none=True,
        metadata={"description": "Seconds a node's part of one pass may take; default: the smallest that works."},
    )
    pins = fields.Dict(
        keys=Text(), values=NodeId(), metadata={"description": "Layer name to the node that must hold it."}
    )
    exclude_ = fields.List(
        NodeId(),
        data_key="exclude",
        attribute="exclude",
        validate=validate.Length(max=MAX_BODY_NODES),
        metadata={"description": "Nodes left out."},
    )
    max_memory_share = fields.Dict(keys=NodeId(), values=Number(high=1.0))
    max_compute_share = fields.Dict(keys=NodeId(), values=Number(high=1.0))
    reserve_bytes = Integer(metadata={"description": "Bytes kept free on every node."})
    count_activations = Flag()
    use_compute_min = Flag()
    allow_missing = Flag(
        metadata={"description": "Plan a checkpoint that lacks tensors of its model; refused otherwise, naming them."}
    )
    available_nodes = fields.List(
        fields.Nested(NodeIn),
        validate=validate.Length(1, MAX_BODY_NODES),
        metadata={"description": "Plan for these machines; default: the nodes that are alive."},
    )
    links = fields.Nested(LinksIn)

    @validates_schema
    def has_the_nodes_of_a_matrix(self, data: dict[str, Any], **_: Any) -> None:
        """The nodes that are alive have no order."""
        if data.get("links", {}).get("matrix") is not None and "available_nodes" not in data:
            raise ValidationError({"links": {"matrix": ["needs available_nodes, in whose order it is"]}})


class ProcessOptions(PlanFields):
    """How to plan and split, beside the model."""

    batch_size = batch_size()
    sequence_length = sequence_length()
    kv_bytes_per_token = kv_bytes_per_token()
    split = Flag(
        metadata={"description": "Cut the shards as well. Default: true, if every planned node is registered."}
    )
    on_node_loss = Text(
        choices=("replan", "wait"), metadata={"description": "When a node dies before its shard is cut."}
    )
    paranoid = Flag(metadata={"description": "Have every byte of the shards fetched twice and compared."})


class ProcessIn(ProcessOptions):
    """POST /api/process."""

    model_name = ModelName(required=True)
    node_id = NodeId(allow_none=True)
    metadata_repo = RepoId(
        metadata={"description": "Hub repository to read the metadata from; default: the service's own profile."}
    )
    timestamp = Timestamp(allow_none=True)
    revision = Revision()
    subfolder = subfolder()
    variant = variant()


def process(about: str) -> Either:
    """A field of whether, and how, to go on to plan and split."""
    plain: dict[bool, Any] = {True: {}, False: None}
    return Either(ProcessOptions, plain=plain, says="true, false", metadata={"description": about})


class RequestIn(Strict):
    """POST /api/request."""

    model_name = ModelName(required=True)
    node_id = NodeId(allow_none=True)
    timestamp = Timestamp(allow_none=True)
    revision = Revision(metadata={"description": "Branch, tag or commit; default: the repository's main."})
    subfolder = subfolder()
    variant = variant()
    batch_size = batch_size(load_default=1)
    sequence_length = sequence_length(load_default=512)
    kv_dtype = kv_dtype()
    download = Text(
        choices=("headers", "full"),
        load_default="headers",
        metadata={"description": "`full` fetches the whole checkpoint to the node's cache first."},
    )
    process = process("Go on to plan and split: true, or the options of it.")


class BatchIn(Strict):
    """POST /api/batches."""

    models = fields.List(Model(RequestIn), required=True, validate=validate.Length(min=1))
    process = process("For every entry that does not say it itself.")


class GetPlanIn(Strict):
    """POST /api/get-plan."""

    model_name = ModelName(required=True)
    node_id = NodeId(required=True)
    timestamp = Timestamp(allow_none=True)


class PreviewIn(PlanFields):
    """POST /api/plans/preview: a plan for machines that need not exist; nothing is stored."""

    model_name = ModelName(metadata={"description": "A model whose metadata is published here; or give `metadata`."})
    revision = Revision()
    subfolder = subfolder()
    variant = variant()
    metadata = fields.Dict(
        keys=fields.String(), metadata={"description": "Published metadata, in our form or the williw form."}
    )
    batch_size = batch_size()
    sequence_length = sequence_length()
    kv_dtype = kv_dtype()
    kv_bytes_per_token = kv_bytes_per_token()
    compare = Flag(metadata={"description": "What every strategy would give."})
    max_context = Flag(metadata={"description": "The longest sequence for which there is a plan as well."})
    replicas = Replicas(
        low=1,
        high=MAX_BODY_NODES,
        metadata={"description": "Several chains as well, each of the whole model: so many, or as many as are best."},
    )

    @validates_schema
    def has_a_model(self, data: dict[str, Any], **_: Any) -> None:
        """Exactly one of both sources is named."""
        if ("model_name" in data) == ("metadata" in data):
            raise ValidationError("exactly one of model_name and metadata is required", "model_name")


class Page(Schema):
    """How much of a list."""

    limit = fields.Integer(load_default=50, validate=validate.Range(1, 500))
    offset = fields.Integer(load_default=0, validate=validate.Range(0, 10_000_000))


class DeleteQuery(Schema):
    """DELETE /api/plans/<id>?..."""

    force = fields.Boolean(load_default=False, metadata={"description": "End the jobs that use it first."})


class BatchQuery(Schema):
    """GET /api/batches/<id>?..."""

    limit = fields.Integer(load_default=200, validate=validate.Range(1, 1000))
    cursor = fields.Integer(load_default=0, validate=validate.Range(0, 10_000_000))


class PlansQuery(Page):
    """GET /api/plans?..."""

    model_name = RepoId()


class NodesQuery(Page):
    """GET /api/nodes?..."""

    limit = fields.Integer(load_default=100, validate=validate.Range(1, 500))


class JobsQuery(Page):
    """GET /api/jobs?..."""

    state = fields.String(validate=validate.OneOf(STATES))
    kind = fields.String(validate=validate.OneOf(KINDS))
    model_name = RepoId()


def plan_options(given: dict[str, Any]) -> dict[str, Any]:
    """Of a body's fields those that are `PlanOptions`, as JSON."""
    return {name: given[name] for name in PlanFields.OPTIONS if name in given}


def process_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `Jobs.submit_process` that a body's fields mean."""
    result: dict[str, Any] = {"options": plan_options(given)}
    for name in (
        "batch_size", "sequence_length", "available_nodes", "links", "split", "on_node_loss", "paranoid",
        "kv_bytes_per_token",
    ):  # fmt: skip
        if name in given:
            result[name] = given[name]
    return result
