"""GET /: the page for browsers, the williw protocol's health answer for everyone else."""

from __future__ import annotations

from importlib.metadata import version

from flask import Blueprint, Flask, Response, jsonify, make_response, render_template, request

from web.guard import needs
from web.services import services
from web.views.requests import now

blp = Blueprint("page", __name__)

#: The three calls of the williw protocol, by its names.
_APIS = (
    ("request_inference", "POST", "/api/request", "Profile a model."),
    ("process_metadata", "POST", "/api/process", "Plan a profiled model over the nodes; answers the plan."),
    ("get_plan", "POST", "/api/get-plan", "The model's newest plan."),
)


def _wants_html() -> bool:
    accepted = request.accept_mimetypes
    return accepted.quality("text/html") > accepted.quality("application/json")


@blp.get("/")
@needs(None)
def index() -> Response:
    """The page, or what williw clients expect here."""
    if _wants_html():
        made = services()
        response = make_response(
            render_template(
                "page.html",
                asks_for_token=made.tokens is not None,
                flower_url=made.web.flower_url,
                version=version("fairshard"),
            )
        )
    else:
        apis = [dict(zip(("name", "method", "path", "description"), api, strict=True)) for api in _APIS]
        response = jsonify(
            status="healthy",
            message="fairshard: divides a model over unequal machines",
            timestamp=now(),
            version=version("fairshard"),
            apis=apis,
        )
    response.vary.add("Accept")
    return response


def init_app(app: Flask) -> None:
    """Serve the page of `app`."""
    app.register_blueprint(blp)
