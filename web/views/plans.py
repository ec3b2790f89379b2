"""GET and DELETE /api/plans, POST /api/plans/preview."""

from __future__ import annotations

from typing import Any

from flask import Response, jsonify

from planner.errors import NotFound, Unavailable
from planner.wire.documents import loads_json
from web.audit import changed
from web.guard import caller_name, needs
from web.schemas import answers
from web.schemas import bodies as schemas
from web.schemas.ids import PLAN_ID
from web.schemas.openapi import LOCATION, Blueprint
from web.services import services
from web.views.jobs import accepted
from web.views.preview import preview
from workers.metadata_store.base import plan_path

blp = Blueprint("plans", __name__, url_prefix="/api/plans", description="Who holds what, and why.")


@blp.get("")
@blp.arguments(schemas.PlansQuery, location="query")
@blp.response(200, answers.PlansOut)
def list_plans(query: dict[str, Any]) -> Response:
    """Plans, newest first."""
    return jsonify(plans=services().jobs.plans(**query))


@blp.get(f"/<{PLAN_ID}:plan_id>")
@blp.response(200, answers.PlanOut)
@blp.alt_response(404, schema=answers.ErrorOut)
def show_plan(plan_id: str) -> Response:
    """A plan; where Redis does not answer, as the metadata store has it (`source` says so)."""
    made = services()
    try:
        return jsonify({"success": True, **made.jobs.plan(plan_id)})
    except Unavailable as unreachable:
        # Plans are published for good: the store has them while Redis is away.
        try:
            stored = loads_json(made.store().read(plan_path(plan_id)), source="the stored plan")
        except NotFound:
            raise unreachable from None
        return jsonify({"success": True, **stored, "source": "store"})


@blp.delete(f"/<{PLAN_ID}:plan_id>")
@blp.arguments(schemas.DeleteQuery, location="query")
@blp.response(202, answers.AcceptedOut, headers=LOCATION)
@blp.alt_response(404, schema=answers.ErrorOut)
@blp.alt_response(409, schema=answers.ErrorOut, description="An unfinished job uses it; the error names the job.")
@needs("admin")
def delete_plan(query: dict[str, Any], plan_id: str) -> Response:
    """Have a plan forgotten, in the metadata store as well, and its shard deleted by each node."""
    job = services().jobs.submit_delete(plan_id, **query, submitter=caller_name())
    changed("delete", plan_id=plan_id, job_id=job["job_id"])
    return accepted(job, "The plan is forgotten, then its nodes delete their shards.")


def _takes_metadata(view: Any) -> Any:
    view.takes_metadata = True
    return view


@blp.post("/preview")
@blp.arguments(schemas.PreviewIn)
@blp.response(200, answers.PreviewOut)
@blp.alt_response(404, schema=answers.ErrorOut, description="The model's metadata is not published here.")
@blp.alt_response(409, schema=answers.ErrorOut, description="No plan exists; says by how much.")
@needs("read")
@_takes_metadata
def preview_plan(given: dict[str, Any]) -> Response:
    """What the plan would be, for machines that need not exist; nothing is stored and nothing is split."""
    return jsonify(preview(given))
