"""Versioned JSON <-> values: published metadata, plans, nodes files."""

from planner.wire.documents import dumps, load_file
from planner.wire.read import (
    cluster_from_json,
    links_from_json,
    node_from_json,
    options_from_json,
    plan_from_json,
    profile_from_json,
)
from planner.wire.write import (
    cluster_to_json,
    node_to_json,
    options_to_json,
    plan_to_json,
    profile_to_json,
)

__all__ = [
    "cluster_from_json",
    "cluster_to_json",
    "dumps",
    "links_from_json",
    "load_file",
    "node_from_json",
    "node_to_json",
    "options_from_json",
    "options_to_json",
    "plan_from_json",
    "plan_to_json",
    "profile_from_json",
    "profile_to_json",
]
