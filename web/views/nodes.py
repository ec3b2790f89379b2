"""GET /api/nodes: the machines that are alive."""

from __future__ import annotations

from typing import Any

from flask import Response, jsonify

from web.schemas import answers
from web.schemas import bodies as schemas
from web.schemas.openapi import Blueprint
from web.services import services

blp = Blueprint("nodes", __name__, url_prefix="/api/nodes", description="The machines that are alive.")


@blp.get("")
@blp.arguments(schemas.NodesQuery, location="query")
@blp.response(200, answers.NodesOut)
def list_nodes(query: dict[str, Any]) -> Response:
    """The nodes that are alive, by id, with what they offer, what they run and what waits for them."""
    jobs = services().jobs
    return jsonify(nodes=jobs.nodes(**query), total=jobs.node_count())
