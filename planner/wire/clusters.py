"""marshmallow schemas of nodes files: our form and the williw protocol's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Any

from marshmallow import Schema, ValidationError, fields, post_load, pre_load, validate

from planner import devices
from planner.cluster import Cluster, Link, Node
from planner.errors import InvalidInput
from planner.limits import MAX_NODES, parse_bytes
from planner.wire.fields import Flag, Integer, Lenient, Many, NodeId, Number, Text, seconds, shown

#: What the reader knows beside the text: the model's dtype, which decides the catalogue's FLOP/s.
MODEL_DTYPE: ContextVar[str | None] = ContextVar("MODEL_DTYPE", default=None)


#: What GET /api/nodes tells of a node beside its size: its answer is a nodes file, too.
_ANNOUNCED = {
    "stated", "peer_url", "versions", "host", "pid", "instance", "started_at", "state", "disk_free_bytes", "shards",
    "seen_at", "signed_at",
}  # fmt: skip


class Bytes(Integer):
    """Bytes: 24e9, or with a unit as on the command line: "80MB", "24 GiB"."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        return super()._deserialize(_with_unit(value), attr, data, **kwargs)


class ByteRate(Number):
    """Bytes a second: 1e12, "40GB" or "40GB/s"."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> float:
        return super()._deserialize(_with_unit(value, "/s"), attr, data, **kwargs)


def _with_unit(value: Any, suffix: str = "") -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_bytes(value.removesuffix(suffix))
    except InvalidInput as error:
        raise ValidationError(str(error)) from None


class NodeSchema(Lenient):
    """A node in our form, in the williw form, or in a mixture: what is stated wins over what the catalogue says."""

    node_id = NodeId(required=True)
    flop_per_s = Number(positive=True, load_default=None, allow_none=True)
    memory_bytes = Bytes(load_default=None, allow_none=True)
    memory_bytes_per_s = ByteRate(positive=True, load_default=None, allow_none=True)
    busy = Number(high=1.0, data_key="load", load_default=None, allow_none=True)
    device = Text(longest=256, load_default=None, allow_none=True)
    # The williw protocol's.
    gpu_available = Flag(load_default=None, allow_none=True)
    gpu_name = Text(longest=256, load_default=None, allow_none=True)
    gpu_usage_percent = Number(high=100.0, load_default=None, allow_none=True)
    cpu_cores = Integer(low=1, high=65_536, load_default=None, allow_none=True)

    @pre_load
    def take_the_williw_id(self, data: Any, **_: Any) -> Any:
        """`id` stands for `node_id`."""
        if isinstance(data, Mapping) and "node_id" not in data and "id" in data:
            return {**data, "node_id": data["id"]}
        return data

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> Node:
        """The value; what is not stated comes from the catalogue of devices."""
        try:
            return devices.complete_node(dtype=MODEL_DTYPE.get(), load=data.pop("busy"), **data)
        except InvalidInput as error:
            raise ValidationError(str(error), str(error.details.get("field", "device"))) from None


class PairSchema(Lenient):
    """The directed link between two nodes; what is left out is the default's, a rate of null does not limit."""

    source = NodeId(data_key="from", required=True)
    target = NodeId(data_key="to", required=True)
    latency_s = seconds()
    bytes_per_s = ByteRate(positive=True, allow_none=True)


class MatrixSchema(Lenient):
    """Row: from; column: to; in the order of the nodes. null: the default's; the diagonal is not read."""

    latency_s = fields.List(fields.List(seconds(allow_none=True)), load_default=None, allow_none=True)
    bytes_per_s = fields.List(fields.List(ByteRate(allow_none=True)), load_default=None, allow_none=True)


class LinksSchema(Lenient):
    """The default link, and pairs that differ from it."""

    latency_s = seconds(load_default=0.0, allow_none=True)
    bytes_per_s = ByteRate(positive=True, load_default=None, allow_none=True)
    pairs = Many(PairSchema, longest=10**6, load_default=list)
    matrix = fields.Nested(MatrixSchema, load_default=None, allow_none=True)


class ClusterSchema(Lenient):
    """A nodes file."""

    nodes = fields.List(fields.Nested(NodeSchema), required=True, validate=validate.Length(1, MAX_NODES))
    links = fields.Nested(LinksSchema, load_default=None, allow_none=True)

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> Cluster:
        """The value, once its ids are unique and its links lead from node to node."""
        nodes: tuple[Node, ...] = tuple(data["nodes"])
        place: dict[str, int] = {}
        for position, node in enumerate(nodes):
            if place.setdefault(node.node_id, position) != position:
                message = f"{shown(node.node_id)} is nodes[{place[node.node_id]}]'s id too"
                raise ValidationError({"nodes": {position: {"node_id": [message]}}})
        links = data["links"]
        if links is None:
            return Cluster(nodes=nodes)
        for position, pair in enumerate(links["pairs"]):
            for key, end in (("from", pair["source"]), ("to", pair["target"])):
                if end not in place:
                    message = f"{shown(end)} is no node of this file"
                    raise ValidationError({"links": {"pairs": {position: {key: [message]}}}})
        default = _default(links)
        found = _from_matrix(links["matrix"], nodes, default) | _from_pairs(links["pairs"], default)
        return Cluster(nodes=nodes, default_link=default, links=found)


class LinksAloneSchema(Lenient):
    """The links between nodes that are not known yet: a pair may name any node, and there is no matrix."""

    links = fields.Nested(LinksSchema(exclude=("matrix",)), required=True)

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> Cluster:
        """A cluster without nodes."""
        default = _default(data["links"])
        return Cluster(nodes=(), default_link=default, links=_from_pairs(data["links"]["pairs"], default))


def unknown_keys(obj: object, schema: Schema, path: str = "") -> Iterator[dict[str, str]]:
    """{path, message} of each key of a nodes file that means nothing there: a typing error, which changes nothing."""
    if not isinstance(obj, Mapping):
        return  # the schema says what must be here
    known = {field.data_key or name: field for name, field in schema.load_fields.items()}
    also = {"id", *_ANNOUNCED} if isinstance(schema, NodeSchema) else set()
    for key, value in obj.items():
        where = f"{path}.{key}" if path else str(key)
        if key in known:
            field = known[key]
            inner = field.inner if isinstance(field, fields.List) else field
            nested = inner.schema if isinstance(inner, (fields.Nested, Many)) else None
            for position, item in enumerate(value if isinstance(value, list) else ()):
                if nested is not None:
                    yield from unknown_keys(item, nested, f"{where}[{position}]")
            if nested is not None:
                yield from unknown_keys(value, nested, where)
        elif key not in also:
            near = get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            yield {"path": where[:200], "message": f"is not a known field{hint}"}


def _default(links: Mapping[str, Any]) -> Link:
    return Link(latency_s=links["latency_s"] or 0.0, bytes_per_s=links["bytes_per_s"])


def _from_pairs(pairs: Iterable[Mapping[str, Any]], default: Link) -> dict[tuple[str, str], Link]:
    return {
        (pair["source"], pair["target"]): Link(
            latency_s=pair.get("latency_s", default.latency_s),
            bytes_per_s=pair.get("bytes_per_s", default.bytes_per_s),
        )
        for pair in pairs
    }


def _from_matrix(
    matrix: Mapping[str, Any] | None, nodes: tuple[Node, ...], default: Link
) -> dict[tuple[str, str], Link]:
    if matrix is None:
        return {}
    size = len(nodes)
    for name in ("latency_s", "bytes_per_s"):
        rows = matrix[name]
        if rows is not None and (len(rows) != size or any(len(row) != size for row in rows)):
            message = f"must be {size} rows of {size}, one for each node"
            raise ValidationError({"links": {"matrix": {name: [message]}}})
    latency, rate = matrix["latency_s"], matrix["bytes_per_s"]
    found: dict[tuple[str, str], Link] = {}
    for i, source in enumerate(nodes):
        for j, target in enumerate(nodes):
            if i != j:
                delay = latency[i][j] if latency else None
                speed = rate[i][j] if rate else None
                if speed == 0:
                    message = "must be above 0; leave a link that does not limit null"
                    raise ValidationError({"links": {"matrix": {"bytes_per_s": {i: {j: [message]}}}}})
                found[source.node_id, target.node_id] = Link(
                    latency_s=default.latency_s if delay is None else delay,
                    bytes_per_s=default.bytes_per_s if speed is None else speed,
                )
    return found
