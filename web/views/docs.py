"""GET /docs: the OpenAPI document as a page to read, self-contained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Flask, Response, current_app, make_response, render_template
from flask_smorest import Api
from markupsafe import Markup, escape

from web.guard import needs

blp = Blueprint("docs", __name__)

_KEY = "fairshard-docs"
_METHODS = ("get", "post", "put", "patch", "delete")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A field of a body, a parameter or an answer."""

    name: str
    kind: str
    required: bool
    description: str
    #: Name of the schema to read on, or None.
    ref: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    anchor: str
    summary: str
    description: str
    parameters: tuple[Row, ...]
    body: str | None
    #: (status, description, schema name or None).
    answers: tuple[tuple[str, str, str | None], ...]


def operations(spec: dict[str, Any]) -> dict[str, list[Operation]]:
    """The document's operations by tag."""
    found: dict[str, list[Operation]] = {}
    for path, item in spec["paths"].items():
        for method in _METHODS:
            if method in item:
                operation = item[method]
                both = [*item.get("parameters", []), *operation.get("parameters", [])]
                tag = (operation.get("tags") or ["other"])[0]
                found.setdefault(tag, []).append(_operation(method, path, operation, both, spec))
    return found


def _operation(
    method: str, path: str, operation: dict[str, Any], parameters: list[dict[str, Any]], spec: dict[str, Any]
) -> Operation:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    resolved = [_resolve(parameter, spec) for parameter in parameters]
    answers = []
    for status, answer in operation.get("responses", {}).items():
        answer = _resolve(answer, spec)  # noqa: PLW2901
        content: dict[str, Any] = next(iter(answer.get("content", {}).values()), {})
        answers.append((status, answer.get("description", ""), _name(content.get("schema", {}))))
    return Operation(
        method=method.upper(),
        path=path,
        anchor=f"{method}{path}".replace("/", "-").translate({ord("{"): None, ord("}"): None}),
        summary=operation.get("summary", ""),
        description=operation.get("description", ""),
        parameters=tuple(
            Row(
                name=parameter["name"],
                kind=f"{parameter['in']}, {_kind(parameter.get('schema', {}))}",
                required=parameter.get("required", False),
                description=parameter.get("description", ""),
            )
            for parameter in resolved
        ),
        body=_name(body),
        answers=tuple(sorted(answers)),
    )


def schemas(spec: dict[str, Any]) -> dict[str, tuple[str, list[Row]]]:
    """Name -> (what it is, its fields)."""
    found = {}
    for name, schema in spec.get("components", {}).get("schemas", {}).items():
        required = set(schema.get("required", []))
        rows = [
            Row(
                name=field,
                kind=_kind(inner),
                required=field in required,
                description=inner.get("description", ""),
                ref=_inner_name(inner),
            )
            for field, inner in schema.get("properties", {}).items()
        ]
        found[name] = (schema.get("description", ""), rows)
    return found


def _resolve(item: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in item:
        at: Any = spec
        for part in item["$ref"].removeprefix("#/").split("/"):
            at = at[part]
        item = at
    return item


def _name(schema: dict[str, Any]) -> str | None:
    ref = schema.get("$ref")
    return ref.rpartition("/")[2] if isinstance(ref, str) else None


def _inner_name(schema: dict[str, Any]) -> str | None:
    candidates = [schema, schema.get("items", {}), schema.get("additionalProperties", {})]
    candidates += [*schema.get("anyOf", []), *schema.get("allOf", [])]
    for candidate in candidates:
        if isinstance(candidate, dict) and (name := _name(candidate)):
            return name
    return None


def _kind(schema: dict[str, Any]) -> str:
    if name := _name(schema):
        return name
    if choices := schema.get("anyOf") or schema.get("allOf"):
        return " or ".join(_kind(choice) for choice in choices)
    kind = schema.get("type", "any")
    text = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if text.startswith("array"):
        return f"list of {_kind(schema.get('items', {}))}"
    inner = schema.get("additionalProperties")
    if text.startswith("object") and isinstance(inner, dict) and inner:
        return f"map to {_kind(inner)}"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    if low is not None and "maximum" in schema:
        text += f" {low:g} – {schema['maximum']:g}" if schema["maximum"] < 1e9 else f" ≥ {low:g}"
    if "default" in schema:
        text += f", default {json.dumps(schema['default'])}"
    return text


def init_app(app: Flask, api: Api) -> None:
    """Serve the document of `api` as a page."""
    spec = api.spec.to_dict()
    app.extensions[_KEY] = {"spec": spec, "operations": operations(spec), "schemas": schemas(spec)}
    app.add_template_filter(marked)
    app.register_blueprint(blp)


def marked(text: str) -> Markup:
    """`text` as HTML, with what stands between backticks as code."""
    parts = text.split("`")
    return Markup().join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


@blp.get("/docs")
@needs(None)
def show() -> Response:
    """The API, to read."""
    return make_response(render_template("docs.html", **current_app.extensions[_KEY]))
