"""GET and DELETE /api/jobs: what runs, how far it is, and cancelling it."""

from __future__ import annotations

from typing import Any

from flask import Response, jsonify, make_response, request, url_for

from web.audit import changed
from web.schemas import answers
from web.schemas import bodies as schemas
from web.schemas.ids import JOB_ID
from web.schemas.openapi import Blueprint, header
from web.services import services
from web.views.events import EVENT, stream

blp = Blueprint("jobs", __name__, url_prefix="/api/jobs", description="What runs, and how far it is.")

_LAST = header("Last-Event-ID", "The last event that was seen; those after it follow.")


def accepted(said: dict[str, Any], message: str | None = None, *, status: int = 202) -> Response:
    """An answer that names its job: `said`, whose `job_id` goes on, and what to tell the caller."""
    body = {**said, "success": True, **({"message": message} if message else {})}
    return make_response(jsonify(body), status, {"Location": url_for("jobs.show_job", job_id=said["job_id"])})


@blp.get("")
@blp.arguments(schemas.JobsQuery, location="query")
@blp.response(200, answers.JobsOut)
def list_jobs(query: dict[str, Any]) -> Response:
    """Jobs, newest first, without their steps."""
    return jsonify(jobs=services().jobs.jobs(**query))


@blp.get(f"/<{JOB_ID}:job_id>")
@blp.response(200, answers.JobOut)
@blp.alt_response(404, schema=answers.ErrorOut)
def show_job(job_id: str) -> Response:
    """A job: its state, the step that runs, and how far each step is."""
    return jsonify(services().jobs.job(job_id))


@blp.delete(f"/<{JOB_ID}:job_id>")
@blp.response(200, answers.JobOut)
@blp.alt_response(404, schema=answers.ErrorOut)
def cancel_job(job_id: str) -> Response:
    """Cancel a job; one that ended stays as it is."""
    job = services().jobs.cancel(job_id)
    changed("cancel", model_name=job.get("model_name"), job_id=job_id)
    return jsonify(job)


@blp.get(f"/<{JOB_ID}:job_id>/events")
@blp.doc(parameters=[_LAST])
@blp.response(200, EVENT, content_type="text/event-stream", description="Server-sent events.")
@blp.alt_response(204, description="The job ended, and its last event was seen.")
@blp.alt_response(404, schema=answers.ErrorOut)
@blp.alt_response(503, schema=answers.ErrorOut, description="All places are taken; poll the job instead.")
def job_events(job_id: str) -> Response:
    """What happens in a job, as it happens: claimed, progress, step, retry, ..., and last `ended`."""
    return stream(job_id, after=request.headers.get("Last-Event-ID", ""))
