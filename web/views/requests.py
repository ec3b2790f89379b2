"""POST /api/request: profile a model. It only acknowledges."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flask import Response

from web.audit import changed
from web.guard import caller_name, hub_token
from web.schemas import answers
from web.schemas import bodies as schemas
from web.schemas.openapi import LOCATION, Blueprint
from web.services import services
from web.views.jobs import accepted

blp = Blueprint("requests", __name__, url_prefix="/api", description="Profile models.")

_PROFILES = "The request was received; its job downloads and profiles the model. Then call /api/process."
_PLANS_TOO = "The request was received; its job downloads, profiles and plans the model."


def now() -> str:
    """The time as answers carry it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def request_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `Jobs.submit_request` that a body's fields mean, without the name."""
    found: dict[str, Any] = {
        name: given[name]
        for name in ("revision", "subfolder", "variant", "batch_size", "sequence_length", "kv_dtype", "download")
        if name in given
    }
    process = given.get("process")
    if process is not None:
        found["process"] = schemas.process_arguments(process)
    return found


@blp.post("/request")
@blp.arguments(schemas.RequestIn)
@blp.response(202, answers.RequestOut, headers=LOCATION)
def request_model(given: dict[str, Any]) -> Response:
    """Profile a model; with `process`, plan and split it too.

    The answer acknowledges; the job that `Location` names says how far it is. If an unfinished job has the same
    settings, you get that job. A gated or private model needs your Hub token in `X-HF-Token`.
    """
    job = services().jobs.submit_request(
        given["model_name"], **request_arguments(given), hub_token=hub_token(), submitter=caller_name()
    )
    changed("request", model_name=given["model_name"], job_id=job["job_id"])
    said = {"model_name": given["model_name"], "node_id": given.get("node_id"), "received_at": now()}
    return accepted(said | {"job_id": job["job_id"]}, _PLANS_TOO if given.get("process") is not None else _PROFILES)
