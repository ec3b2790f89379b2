"""GET /api/health: does it live, and can it accept work."""

from __future__ import annotations

from importlib.metadata import version

from flask import Response, jsonify

from web.guard import needs
from web.schemas import answers
from web.schemas.openapi import Blueprint
from web.services import services
from web.views.requests import now

blp = Blueprint("health", __name__, url_prefix="/api/health", description="Does it live, can it accept work.")


#: What must be there for a job to be accepted and kept, and what it means where it is not. Planner and nodes may come
#: later. Anybody may ask, so it names no address and no path: the log and a refused POST do.
_NEEDED = {
    "redis": "Redis does not answer, or refuses writes (its memory or its disk is full)",
    "journal": "the journal of accepted jobs can't be written: is the disk of FAIRSHARD_DATA full?",
}


def _health(*, live_only: bool = False) -> Response:
    checks = {} if live_only else {name: bool(value) for name, value in services().jobs.ready().items()}
    reasons = [reason for name, reason in _NEEDED.items() if not checks.get(name, True)]
    ready = not reasons
    response = jsonify(
        status="healthy" if ready and all(checks.values()) else "degraded",
        live=True,
        ready=ready,
        reason="; ".join(reasons) or None,
        warnings=services().jobs.warnings() if checks.get("redis") else [],
        checks=checks,
        version=version("fairshard"),
        timestamp=now(),
    )
    if not ready:
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    return response


@blp.get("")
@blp.get("/ready")
@blp.response(200, answers.HealthOut)
@blp.alt_response(503, schema=answers.HealthOut, description="No job can be accepted; `reason` says why.")
@blp.doc(security=[])
@needs(None)
def health() -> Response:
    """Whether it can accept work: `ready` with Redis and the journal, `healthy` with a planner and a node as well."""
    return _health()


@blp.get("/live")
@blp.response(200, answers.HealthOut)
@blp.doc(security=[])
@needs(None)
def live() -> Response:
    """Whether this process answers at all; asks nobody else."""
    return _health(live_only=True)
