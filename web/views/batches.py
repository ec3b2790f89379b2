"""POST and GET /api/batches: many models in one call."""

from __future__ import annotations

from typing import Any

from flask import Response, jsonify, make_response, url_for

from planner.errors import InvalidInput
from web.audit import changed
from web.guard import caller_name, hub_token
from web.schemas import answers
from web.schemas import bodies as schemas
from web.schemas.ids import BATCH_ID
from web.schemas.openapi import LOCATION, Blueprint
from web.services import services
from web.views.requests import request_arguments

blp = Blueprint("batches", __name__, url_prefix="/api/batches", description="Many models in one call.")


@blp.post("")
@blp.arguments(schemas.BatchIn)
@blp.response(202, answers.BatchOut, headers=LOCATION)
def submit_batch(given: dict[str, Any]) -> Response:
    """Request many models at once, each by name or with the fields of a request.

    An entry that is refused is in the answer with its reason; the others go on. If Redis goes away in the middle,
    what was accepted stays so, and the rest is in the answer as refused.
    """
    made = services()
    entries, most = given["models"], made.web.max_batch
    if len(entries) > most:
        raise InvalidInput(
            f"a batch holds at most {most} models, got {len(entries)}; send several",
            details={"largest": most, "got": len(entries), "setting": "FAIRSHARD_MAX_BATCH"},
        )
    shared = given.get("process")
    submissions: list[dict[str, Any] | tuple[str, InvalidInput]] = []
    for entry in entries:
        if "refused" in entry:
            submissions.append((entry["model_name"], InvalidInput(entry["refused"])))
        else:
            whole = {**entry, "process": entry.get("process", shared)}
            submissions.append({"model_name": entry["model_name"], **request_arguments(whole)})
    batch = made.jobs.batches.submit(submissions, hub_token=hub_token(), submitter=caller_name())
    changed("batch", batch_id=batch["batch_id"], models=len(entries))
    return make_response(jsonify(batch), 202, {"Location": url_for("batches.show_batch", batch_id=batch["batch_id"])})


@blp.get(f"/<{BATCH_ID}:batch_id>")
@blp.arguments(schemas.BatchQuery, location="query")
@blp.response(200, answers.BatchOut)
@blp.alt_response(404, schema=answers.ErrorOut)
def show_batch(query: dict[str, Any], batch_id: str) -> Response:
    """The state of a batch and of each of its models, a page at a time, failures with their reasons."""
    return jsonify(services().jobs.batches.get(batch_id, **query))
