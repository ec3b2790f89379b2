"""GET /api/nodes: the machines that are alive."""

from __future__ import annotations

from typing import Any

from flask import Response, jsonify

from web.guard import needs
from web.schemas import answers
from web.schemas import bodies as schemas
from web.schemas.openapi import Blueprint
from web.services import services
from workers.nodes.invitations import sealed

blp = Blueprint("nodes", __name__, url_prefix="/api/nodes", description="The machines that are alive.")


@blp.get("")
@blp.arguments(schemas.NodesQuery, location="query")
@blp.response(200, answers.NodesOut)
def list_nodes(query: dict[str, Any]) -> Response:
    """The nodes that are alive, by id, with what they offer, what they run and what waits for them."""
    jobs = services().jobs
    return jsonify(nodes=jobs.nodes(**query), total=jobs.node_count())


@blp.get("/invitations/<invitation_id:invitation_id>")
@blp.response(200, answers.InvitationOut)
@blp.doc(security=[])
@needs(None)
def invitation(invitation_id: str) -> Response:
    """An invitation that `fairshard up --coordinator` made, sealed: `fairshard join` opens it with its token."""
    folder = services().settings.data_dir / "coordinator" / "invitations"
    return jsonify(sealed=sealed(folder, invitation_id))
