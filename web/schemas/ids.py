"""What an id in a path looks like, for routing and for the document."""

from __future__ import annotations

from typing import Any

from flask import Flask
from werkzeug.routing import BaseConverter

JOB_ID = "job_id"
PLAN_ID = "plan_id"
BATCH_ID = "batch_id"
INVITATION_ID = "invitation_id"
RUN_ID = "run_id"


class _Id(BaseConverter):
    """Hex digits, as all our ids are: no file name, key or header can be broken with them."""

    regex = "[0-9a-f]{8,64}"


def _schema(converter: BaseConverter) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^{converter.regex}$", "minLength": 8, "maxLength": 64}


def init_app(app: Flask, api: Any) -> None:
    """Know the ids in the routes of `app` and in the document."""
    for name in (JOB_ID, PLAN_ID, BATCH_ID, INVITATION_ID, RUN_ID):
        kind = type(name, (_Id,), {})
        app.url_map.converters[name] = kind
        api.register_converter(kind, _schema)
