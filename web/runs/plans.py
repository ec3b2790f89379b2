"""POST /api/plans/<id>/runs, GET and DELETE /api/runs/<id>, POST and DELETE /api/plans/<id>/deployment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flask import Response, jsonify, make_response, request, url_for

from planner.errors import NotFound
from web.audit import changed
from web.guard import needs
from web.runs.waiting import ended, failed, streamed
from web.schemas import answers
from web.schemas import runs as schemas
from web.schemas.ids import PLAN_ID, RUN_ID
from web.schemas.openapi import LOCATION, Blueprint, header
from web.services import services
from web.views.prefer import waiting
from web.views.process import DEFAULT_WAIT_S
from workers.ledger.steps import ENDED

blp = Blueprint(
    "runs", __name__, url_prefix="/api", description="Run a plan: text or tokens in, text and tokens out."
)

_PREFER = header(
    "Prefer", "`wait=N` waits N seconds for the end (default 30); `respond-async` not at all (RFC 7240)."
)


@blp.post(f"/plans/<{PLAN_ID}:plan_id>/runs")
@blp.doc(parameters=[_PREFER])
@blp.arguments(schemas.RunIn)
@blp.response(200, schemas.RunOut, description="What the model said; with `stream`, server-sent events instead.")
@blp.alt_response(202, schema=schemas.RunOut, description="It takes longer.", headers=LOCATION)
@blp.alt_response(404, schema=answers.ErrorOut)
@blp.alt_response(409, schema=answers.ErrorOut, description="A node of the plan is not alive.")
def run_plan(given: dict[str, Any], plan_id: str) -> Response:
    """Run the model over the plan's nodes; what isn't loaded is loaded first."""
    made = services()
    stream = given.pop("stream", False)
    run_id = made.jobs.runs.submit(made.jobs.plan(plan_id), given)
    changed("run", plan_id=plan_id, run_id=run_id)
    if stream:
        return streamed(run_id, _event)
    return _answer(run_id)


@blp.get(f"/runs/<{RUN_ID}:run_id>")
@blp.response(200, schemas.RunOut)
@blp.alt_response(404, schema=answers.ErrorOut)
def show_run(run_id: str) -> Response:
    """A run: its state, and once it is done what came of it. Runs are forgotten an hour after their end."""
    return jsonify(_flat(services().jobs.runs.view(run_id)))


@blp.delete(f"/runs/<{RUN_ID}:run_id>")
@blp.response(200, schemas.RunOut)
@blp.alt_response(404, schema=answers.ErrorOut)
def cancel_run(run_id: str) -> Response:
    """End a run; one that has ended stays as it is."""
    view = services().jobs.runs.cancel(run_id)
    changed("cancel", run_id=run_id)
    return jsonify(_flat(view))


@blp.post(f"/plans/<{PLAN_ID}:plan_id>/deployment")
@blp.doc(parameters=[_PREFER])
@blp.response(200, schemas.RunOut, description="All nodes hold their layers; `nodes` says how many bytes each.")
@blp.alt_response(202, schema=schemas.RunOut, description="It takes longer.", headers=LOCATION)
@blp.alt_response(404, schema=answers.ErrorOut)
@blp.alt_response(409, schema=answers.ErrorOut, description="A node of the plan is not alive.")
def deploy_plan(plan_id: str) -> Response:
    """Have the plan's nodes load their layers and keep them until it is undeployed."""
    made = services()
    run_id = made.jobs.runs.submit(made.jobs.plan(plan_id), {"deploy": True})
    changed("deploy", plan_id=plan_id, run_id=run_id)
    return _answer(run_id)


@blp.delete(f"/plans/<{PLAN_ID}:plan_id>/deployment")
@blp.response(200, schemas.UndeployedOut)
@blp.alt_response(404, schema=answers.ErrorOut)
@needs("submit")
def undeploy_plan(plan_id: str) -> Response:
    """Let the plan's nodes unload their layers once nobody runs them."""
    if not services().jobs.runs.undeploy(plan_id):
        raise NotFound(f"plan {plan_id} is not deployed", details={"plan_id": plan_id})
    changed("undeploy", plan_id=plan_id)
    return jsonify(success=True, plan_id=plan_id)


def _answer(run_id: str) -> Response:
    made = services()
    wanted = waiting(request.headers.getlist("Prefer"), default_s=DEFAULT_WAIT_S, longest_s=made.web.max_wait_s)
    view = ended(run_id, timeout_s=wanted.seconds)
    if view["state"] in ENDED and view["state"] != "done":
        raise failed(view)
    headers = {"Preference-Applied": wanted.applied} if wanted.applied else {}
    if view["state"] != "done":
        headers["Location"] = url_for("runs.show_run", run_id=run_id)
    return make_response(jsonify(_flat(view)), 200 if view["state"] == "done" else 202, headers)


def _flat(view: dict[str, Any]) -> dict[str, Any]:
    """The run with what came of it beside its ids."""
    return {name: value for name, value in view.items() if name != "result"} | (view.get("result") or {})


def _event(event: dict[str, Any]) -> Iterator[str]:
    said = _flat(event)
    yield f"event: {said.pop('event')}\ndata: {json.dumps(said)}\n\n"
