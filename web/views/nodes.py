"""GET /api/nodes: the machines that are alive."""

from __future__ import annotations

from flask import Response, jsonify

from web.schemas import answers
from web.schemas.openapi import Blueprint
from web.services import services

blp = Blueprint("nodes", __name__, url_prefix="/api/nodes", description="The machines that are alive.")


@blp.get("")
@blp.response(200, answers.NodesOut)
def list_nodes() -> Response:
    """The nodes that are alive, with what they offer, what they run and what waits for them."""
    return jsonify(nodes=services().jobs.nodes())
