"""Versioned JSON <-> values: published metadata, plans, nodes files.

Writing loads nothing but the standard library, so that a profile from headers costs no more than Python's start;
reading loads marshmallow with the first thing that is read. Metadata and nodes may come from newer versions and from
other programs: fields that are not known are ignored there. Nothing that is read is trusted: numbers are finite and
bounded, names are printable, file names stay below their root.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from planner.cluster import Cluster, Node
from planner.errors import InvalidInput
from planner.plan import Plan, PlanOptions
from planner.profile import ModelProfile
from planner.wire.documents import dumps, load_file
from planner.wire.write import (
    SCHEMA_VERSION,
    cluster_to_json,
    node_to_json,
    options_to_json,
    plan_to_json,
    profile_to_json,
)

if TYPE_CHECKING:
    from marshmallow import Schema


__all__ = [
    "SCHEMA_VERSION", "cluster_from_json", "cluster_to_json", "dumps", "links_from_json", "load_file",
    "node_from_json", "node_to_json", "options_from_json", "options_to_json", "plan_from_json", "plan_to_json",
    "profile_from_json", "profile_to_json",
]  # fmt: skip


def profile_from_json(obj: object) -> ModelProfile:
    """The profile that metadata means, in our form or the williw form.

    Only `model_name` and each layer's `name` and `compute_required` are required. Byte counts that are missing come
    from `shape` and `dtype`, or are 0. Without a `schema_version` they are those of williw metadata:
    single tensors.

    Raises:
        InvalidMetadata: If it cannot be planned from; `details["errors"]` lists path and message.
    """
    from planner.wire.profiles import ProfileSchema, load

    profile: ModelProfile = load(ProfileSchema(), obj, what="metadata")
    return profile


def plan_from_json(obj: object) -> Plan:
    """The plan that `plan_to_json` wrote.

    Checks that its parts agree on who holds what, not that the nodes can hold it: that is
    `planner.strategies.imported.import_plan`'s to check.

    Raises:
        InvalidMetadata: If it is not a plan; `details["errors"]` lists path and message.
    """
    from planner.wire.plans import PlanSchema
    from planner.wire.profiles import load

    plan: Plan = load(PlanSchema(), obj, what="plan")
    return plan


def options_from_json(obj: object) -> PlanOptions:
    """What is asked of a plan; fields that are not known are refused, since they are typing errors.

    Raises:
        InvalidInput: If a field is wrong; `details["errors"]` lists path and message.
    """
    from planner.wire.plans import OptionsSchema
    from planner.wire.profiles import load

    options: PlanOptions = load(OptionsSchema(), obj, what="options", error=InvalidInput)
    return options


def node_from_json(obj: object, *, dtype: str | None = None) -> Node:
    """A node in our form, the williw form, or a mixture; what is missing comes from the catalogue.

    Args:
        obj: {node_id, flop_per_s, memory_bytes, ...} or {node_id|id, gpu_available, gpu_name, gpu_usage_percent,
            cpu_cores}.
        dtype: The model's, for the catalogue's FLOP/s; None: float16.

    Raises:
        InvalidInput: If a field is wrong, or its device is not in the catalogue and its figures are not given.
    """
    from planner.wire.clusters import NodeSchema

    node: Node = _load_for(dtype, NodeSchema(), obj, what="node")
    return node


def cluster_from_json(obj: object, *, dtype: str | None = None, strict: bool = False) -> Cluster:
    """The cluster that a nodes file means: {nodes: [...], links?: {...}}, or the list of nodes alone.

    Args:
        obj: The file's object.
        dtype: The model's, for the catalogue's FLOP/s; None: float16.
        strict: Refuse keys that are not known: a person wrote the file, and a typing error would change nothing.

    Raises:
        InvalidInput: If a field is wrong; `details["errors"]` lists path and message.
    """
    from planner.wire.clusters import ClusterSchema, unknown_keys

    whole = {"nodes": obj} if isinstance(obj, list) else obj
    schema = ClusterSchema()
    found = list(islice(unknown_keys(whole, schema), 20)) if strict else []
    if found:
        line = "; ".join(f"{item['path']} {item['message']}" for item in found[:3])
        raise InvalidInput(f"nodes file: {line}", details={"errors": found})
    cluster: Cluster = _load_for(dtype, schema, whole, what="nodes file")
    return cluster


def links_from_json(obj: object) -> Cluster:
    """A cluster without nodes with the links of {latency_s?, bytes_per_s?, pairs?: [...]}; pairs may name any node.

    Raises:
        InvalidInput: If a field is wrong; `details["errors"]` lists path and message.
    """
    from planner.wire.clusters import LinksAloneSchema
    from planner.wire.profiles import load

    cluster: Cluster = load(LinksAloneSchema(), {"links": obj}, what="links", error=InvalidInput)
    return cluster


def _load_for(dtype: str | None, schema: Schema, obj: object, *, what: str) -> Any:
    from planner.wire.clusters import MODEL_DTYPE
    from planner.wire.profiles import load

    token = MODEL_DTYPE.set(dtype)
    try:
        return load(schema, obj, what=what, error=InvalidInput)
    finally:
        MODEL_DTYPE.reset(token)
