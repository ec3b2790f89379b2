"""The OpenAPI document, generated from the schemas that validate; and how this house's fields are written in it."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any, NoReturn, Protocol, TypeVar, cast

import flask
from flask import Flask, current_app, request
from flask_smorest import Api
from flask_smorest import Blueprint as SmorestBlueprint
from marshmallow import fields
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import RequestEntityTooLarge

from planner.errors import InvalidInput
from planner.wire import fields as wire_fields
from planner.wire.documents import loads_json
from planner.wire.fields import unknown_field
from web.errors import Refused
from web.schemas import fields as own
from web.schemas.answers import ErrorOut
from web.schemas.runs import SOURCES
from web.services import services_of

#: What holds of every call; in Markdown, for the document, Swagger UI and docs/api.md.
GENERAL = """\
Divides a Hugging Face model over unequal machines; each gets only its shard.

- A body is JSON. A field or a query parameter that isn't known is refused.
- Every error is `{"error": ..., "code": ..., "details": {...}}`: what is wrong, with the numbers; a name for
  programs; the numbers as JSON. No answer shows a stack trace.
- On loopback nobody asks for a token. Elsewhere each call needs `Authorization: Bearer <token>`: scope `read` to look
  and to preview, `submit` to submit and to cancel, `admin` to delete a plan; health, page and documentation are open.
  `python -m web.auth new NAME --scopes read,submit --file tokens.json` makes a token.
- `X-HF-Token` carries your own Hub token for gated or private models. It is kept encrypted until the job ends, and it
  is never an argument, a result or a line in a log.
- An answer with 429 or 503 says in `Retry-After` when to come back.
- Times are RFC 3339 in UTC. `compute_power` is GFLOP/s, `total_compute` and `compute_required` are FLOP.
"""
#: The header that names the job an answer started.
LOCATION = {"Location": {"description": "The job.", "schema": {"type": "string"}}}
_View = TypeVar("_View")
_NODE_ID = "^[A-Za-z0-9](?:\\.?[A-Za-z0-9_-])*\\.?$"
_PRINTABLE = "^[^\\u0000-\\u001f\\u007f-\\u009f\\u2028\\u2029]+$"


def header(name: str, about: str, **more: Any) -> dict[str, Any]:
    """A header that a caller may send, for the document."""
    return {
        "in": "header",
        "name": name,
        "required": False,
        "description": about,
        "schema": {"type": "string"},
        **more,
    }


class Decorator(Protocol):
    """A decorator that leaves the type of what it decorates as it is."""

    def __call__(self, view: _View, /) -> _View:
        """Decorate `view`."""


class StrictParser(FlaskParser):
    """Bodies by the house's JSON reader: duplicate keys, NaN and bottomless nesting are refused."""

    def _raw_load_json(self, req: flask.Request) -> Any:
        if not req.is_json:
            raise Refused(
                f"the body must be application/json, not {req.mimetype[:80] or 'without a Content-Type'}",
                status=415,
                code="unsupported_media_type",
            )
        body = req.get_data(cache=True)
        if req.content_length is None and len(body) >= (req.max_content_length or math.inf):
            # In chunks, without a length: werkzeug cuts the body at the limit and says nothing.
            raise RequestEntityTooLarge
        try:
            found = loads_json(body, source="the body")
        except InvalidInput as error:
            raise Refused(str(error), status=400, code="invalid_json") from None
        if not isinstance(found, dict):
            raise Refused("the body must be a JSON object", status=422, code="invalid_input")
        return found

    def handle_error(self, error: Any, req: Any, schema: Any, **kwargs: Any) -> NoReturn:
        """Raise the 422 that `web.errors` answers."""
        super().handle_error(error, req, schema, **kwargs)
        raise AssertionError  # the line above raises; mypy cannot see it


class Blueprint(SmorestBlueprint):  # type: ignore[misc]
    """A blueprint of the API; every operation may answer the errors that all share."""

    ARGUMENTS_PARSER = StrictParser()

    # flask-smorest has no types; these give its decorators theirs.
    def arguments(self, schema: Any, **options: Any) -> Decorator:
        """Validate a body or a query by `schema` and document it."""
        decorate = cast("Decorator", super().arguments(schema, **options))
        if options.get("location") != "query":
            return decorate

        def decorate_and_name(view: Any) -> Any:
            decorated = decorate(view)
            decorated.query_names = tuple(schema().load_fields)
            return decorated

        return decorate_and_name

    def response(self, status_code: int, schema: Any = None, **options: Any) -> Decorator:
        """Document the answer of success."""
        return cast("Decorator", super().response(status_code, schema, **options))

    def alt_response(self, status_code: int, response: Any = None, **options: Any) -> Decorator:
        """Document another answer."""
        return cast("Decorator", super().alt_response(status_code, response, **options))

    def doc(self, **options: Any) -> Decorator:
        """Document what marshmallow cannot say."""
        return cast("Decorator", super().doc(**options))

    def get(self, rule: str, **options: Any) -> Decorator:
        """Route GET."""
        return cast("Decorator", super().get(rule, **options))

    def post(self, rule: str, **options: Any) -> Decorator:
        """Route POST."""
        return cast("Decorator", super().post(rule, **options))

    def delete(self, rule: str, **options: Any) -> Decorator:
        """Route DELETE."""
        return cast("Decorator", super().delete(rule, **options))


class _Api(Api):  # type: ignore[misc]
    ERROR_SCHEMA = ErrorOut

    def _register_error_handlers(self) -> None:
        """None: `web.errors` answers all."""


def _types(field: fields.Field[Any], kind: str) -> str | list[str]:
    return [kind, "null"] if field.allow_none else kind


def _describe(self: Any, field: fields.Field[Any], *, ret: dict[str, Any], **_: Any) -> dict[str, Any]:  # noqa: ARG001
    """JSON Schema of the house's fields; apispec knows marshmallow's own."""
    found: dict[str, Any] = {}
    if isinstance(field, wire_fields.Number):
        low = "exclusiveMinimum" if field.positive else "minimum"
        found = {"type": _types(field, "number"), low: field.low, "maximum": field.high}
    elif isinstance(field, own.Replicas):
        number = {"type": "integer", "minimum": field.low, "maximum": field.high}
        found = {"anyOf": [number, {"type": "string", "enum": ["auto"]}]}
    elif isinstance(field, wire_fields.Integer):
        found = {"type": _types(field, "integer"), "minimum": field.low, "maximum": field.high}
    elif isinstance(field, wire_fields.Text):
        found = {"type": _types(field, "string")}
        if field.choices:
            found["enum"] = [*field.choices, None] if field.allow_none else list(field.choices)
        else:
            found |= {"minLength": 1, "maxLength": field.longest, "pattern": _PRINTABLE}
    elif isinstance(field, wire_fields.Flag):
        found = {"type": _types(field, "boolean")}
    elif isinstance(field, wire_fields.NodeId):
        found = {"type": _types(field, "string"), "pattern": _NODE_ID, "maxLength": 64}
    elif isinstance(field, own.Checked):
        found = {"type": _types(field, "string"), **field.rule}
    elif isinstance(field, own.Timestamp):
        choices = [{"type": "number", "minimum": -1e15, "maximum": 1e15}, {"type": "string", "maxLength": 64}]
        found = {"anyOf": [*choices, {"type": "null"}] if field.allow_none else choices}
    elif isinstance(field, own.Either):
        plain = [key for key in field.plain if isinstance(key, bool)]
        assert len(plain) == len(field.plain) == 2
        found = {"anyOf": [{"type": "boolean"}, self.resolve_nested_schema(field.schema)]}
    elif isinstance(field, own.Model):
        name = {"type": "string", **own.RepoId.rule}
        failed = {"description": "Anything else is an entry that failed; the others go on."}
        found = {"anyOf": [name, self.resolve_nested_schema(field.schema), failed]}
    elif isinstance(field, fields.Dict) and isinstance(field.key_field, (wire_fields.Text, wire_fields.NodeId)):
        found = {"propertyNames": self.field2property(field.key_field)}
    return found


def init_app(app: Flask) -> Api:
    """Prepare the API of `app`; blueprints are registered on what is returned."""
    required = services_of(app).tokens is not None
    app.config.update(
        API_TITLE="fairshard",
        API_VERSION=version("fairshard"),
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/",
        OPENAPI_JSON_PATH="openapi.json",
        API_SPEC_OPTIONS={
            "info": {
                "description": GENERAL,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "security": [{"token": []}] if required else [],
        },
    )
    app.before_request(_check_query)
    api = _Api()
    api.init_app(app)
    api.spec.components.security_scheme(
        "token", {"type": "http", "scheme": "bearer", "description": "An API token (FAIRSHARD_TOKEN)."}
    )
    api.ma_plugin.converter.add_attribute_function(_describe)
    return api


def _check_query() -> None:
    if request.endpoint in {None, "static", "docs.show"}:
        return
    known = getattr(current_app.view_functions[str(request.endpoint)], "query_names", ())
    found = [{"path": name, "message": unknown_field(name, known)} for name in request.args if name not in known]
    if found:
        shown = f"query: {found[0]['path'][:80]} {found[0]['message']}"
        raise Refused(shown, status=422, code="invalid_input", details={"fields": found[:20]})


def finish(api: Api) -> None:
    """What cannot be said in marshmallow, once all schemas are known to the document."""
    schemas = api.spec.components.schemas
    schemas.pop("PaginationMetadata", None)  # flask-smorest's; nothing here uses its pages
    schemas["NodeIn"]["anyOf"] = [{"required": ["node_id"]}, {"required": ["id"]}]
    schemas["RunIn"]["oneOf"] = [{"required": [name]} for name in SOURCES]
    schemas["PreviewIn"]["oneOf"] = [{"required": ["model_name"]}, {"required": ["metadata"]}]
