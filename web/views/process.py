"""POST /api/process and /api/get-plan: the williw protocol's two other calls."""

from __future__ import annotations

import time
from typing import Any

from flask import Response, jsonify, request

from planner.errors import Unavailable
from web.audit import changed
from web.errors import job_failed
from web.guard import caller_name, hub_token, needs
from web.schemas import answers
from web.schemas import bodies as schemas
from web.schemas.openapi import LOCATION, Blueprint, header
from web.services import services, stopping
from web.views.jobs import accepted
from web.views.prefer import Waiting, waiting
from workers.ledger.steps import ENDED

blp = Blueprint("process", __name__, url_prefix="/api", description="Plan and split profiled models.")

#: Without a `Prefer` header, in seconds.
DEFAULT_WAIT_S = 30.0
#: Between two looks at whether the server wants to go, in seconds.
_SLICE_S = 2.0
_PREFER = header(
    "Prefer",
    "`wait=N` waits N seconds for the plan (default 30); `respond-async` not at all (RFC 7240).",
    examples={"wait": {"value": "wait=10"}, "async": {"value": "respond-async"}},
)


@blp.post("/process")
@blp.doc(parameters=[_PREFER])
@blp.arguments(schemas.ProcessIn)
@blp.response(200, answers.PlanOut, description="The plan; its shards follow as the job's next steps.")
@blp.alt_response(202, schema=answers.AcceptedOut, description="The plan takes longer.", headers=LOCATION)
@blp.alt_response(409, schema=answers.ErrorOut, description="No metadata and no request for it, or no plan exists.")
def process_model(given: dict[str, Any]) -> Response:
    """Plan a profiled model over the nodes, and have each cut its shard.

    With `metadata_repo` the metadata is looked for in that Hub repository, a williw client's
    `<owner>_<name>_metadata.json` at its root included; without it the service's own profile is used.
    """
    made = services()
    arguments = schemas.process_arguments(given)
    for name in ("metadata_repo", "revision", "subfolder", "variant"):
        if name in given:
            arguments[name] = given[name]
    wanted = waiting(request.headers.getlist("Prefer"), default_s=DEFAULT_WAIT_S, longest_s=made.web.max_wait_s)
    job = made.jobs.submit_process(given["model_name"], **arguments, hub_token=hub_token(), submitter=caller_name())
    changed("process", model_name=given["model_name"], job_id=job["job_id"])
    response = _when_planned(job, wanted)
    if wanted.applied:
        response.headers["Preference-Applied"] = wanted.applied
    return response


def _when_planned(job: dict[str, Any], wanted: Waiting) -> Response:
    jobs, places = services().jobs, services().waiters
    # A thread each: with all places taken, the caller gets 202 at once instead of blocking everyone else.
    if wanted.seconds > 0 and places.acquire(blocking=False):
        try:
            job = _wait(job, wanted.seconds)
            plan_id = (job.get("result") or {}).get("plan_id")
            if plan_id:
                return accepted(jobs.plan(plan_id) | {"job_id": job["job_id"]}, status=200)
            if job["state"] in {"failed", "cancelled"}:
                return job_failed(job)
        except Unavailable:
            pass  # the job is accepted and will go on; only the view of it is lost for now
        finally:
            places.release()
    return accepted(job, "The job goes on; Location says how far it is and names the plan.")


def _wait(job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The job once it is planned or over, or as it is after `seconds`, or when the server wants to go."""
    jobs, gone, deadline = services().jobs, stopping(), time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        job = jobs.wait(job["job_id"], step="plan", timeout_s=min(_SLICE_S, max(0.0, left)))
        planned = (job.get("result") or {}).get("plan_id")
        if planned or job["state"] in ENDED or left <= _SLICE_S or gone():
            return job


@blp.post("/get-plan")
@blp.arguments(schemas.GetPlanIn)
@blp.response(200, answers.PlanOut)
@blp.alt_response(404, schema=answers.ErrorOut, description="The model has no plan yet.")
@needs("read")
def get_plan(given: dict[str, Any]) -> Response:
    """The model's newest plan, whether or not `node_id` takes part in it."""
    return jsonify({"success": True, **services().jobs.latest_plan(given["model_name"])})
