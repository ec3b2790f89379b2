"""Writes docs/api.md from the application's own OpenAPI document: `python scripts/api_doc.py` (`make docs`)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "api.md"
HEAD = """# API

Made from the application's OpenAPI document by `make docs`; a test keeps it true. A running service shows the same at
`/docs` (Swagger UI: every call can be tried there) and to machines at `/openapi.json`.

"""
WILLIW = """
## The williw protocol

The first clients of this kind of service were those of the public package williw-workers, version 2.0.0. They run
here unchanged; what they speak is called the williw protocol in these documents:

1. `POST /api/request` with `model_name`, `node_id` and `timestamp` is acknowledged. The client then profiles the
   model itself and uploads the metadata to a Hub repository of its own, at the root, as
   `<owner>_<name>_metadata.json`.
2. `POST /api/process` with `model_name`, `node_id`, `metadata_repo` and `timestamp` answers the plan made from that
   file: `success`, `model_name`, `model_url`, `plan_id`, `generated_at`, `metadata`, `selected_nodes`, `split_plan`
   and `megaphone_plan`.
3. `POST /api/get-plan` with `model_name` and `node_id` answers the model's newest plan.

Its metadata lists tensors, not layers: each entry of `layers` has `name`, `shape`, `num_params`,
`compute_required`, `layer_type` and `dtype`, and the plan's `unit` is then `tensor`. A node is named by `node_id`
or `id` and described by `gpu_available`, `gpu_name`, `gpu_usage_percent` and `cpu_cores`. All these names are kept;
what fairshard adds (revision, stages, predictions, reasons, jobs) stands beside them. fairshard publishes its own
metadata under that root name too, so that williw clients can read it.
"""


def spec() -> dict[str, Any]:
    """The OpenAPI document of an application with default settings."""
    from web.app import create_app
    from workers.settings import Settings

    with tempfile.TemporaryDirectory() as directory:
        app = create_app(Settings.from_env({"FAIRSHARD_DATA": directory, "NODE_ID": "docs"}), background=False)
        document: dict[str, Any] = app.test_client().get("/openapi.json").get_json()
    return document


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _type(schema: dict[str, Any], all_schemas: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})" if name in all_schemas else name
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(_type(part, all_schemas) for part in schema[key])
    kind = schema.get("type", "any")
    words = [*kind] if isinstance(kind, list) else [kind]
    if "array" in words and "items" in schema:
        words[words.index("array")] = f"list of {_type(schema['items'], all_schemas)}"
    text = " or ".join(words)
    if "enum" in schema:
        text = " \\| ".join(f"`{value}`" for value in schema["enum"])
    limits = [f"{sign} {schema[key]:g}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in schema]
    return f"{text} {', '.join(limits)}".strip()


def _fields(schema: dict[str, Any], all_schemas: dict[str, Any]) -> list[str]:
    rows = ["| field | type | |", "|---|---|---|"]
    required = set(schema.get("required", []))
    for name, field in schema.get("properties", {}).items():
        star = " **required**" if name in required else ""
        rows.append(f"| `{name}`{star} | {_type(field, all_schemas)} | {_line(field.get('description'))} |")
    return rows


def _body(content: dict[str, Any]) -> dict[str, Any]:
    for value in content.values():
        found: dict[str, Any] = value.get("schema", {})
        return found
    return {}


def _operation(method: str, path: str, operation: dict[str, Any], document: dict[str, Any]) -> list[str]:
    schemas = document["components"]["schemas"]
    parts = [f"### {method.upper()} {path}", "", _line(operation.get("summary"))]
    if operation.get("description"):
        parts += ["", operation["description"].strip()]
    parameters = operation.get("parameters", [])
    if parameters:
        parts += ["", "| parameter | in | |", "|---|---|---|"]
        for parameter in parameters:
            star = " **required**" if parameter.get("required") else ""
            parts.append(
                f"| `{parameter['name']}`{star} | {parameter['in']} | {_line(parameter.get('description'))} |"
            )
    if "requestBody" in operation:
        parts += ["", f"Body: {_type(_body(operation['requestBody']['content']), schemas)}"]
    parts += ["", "| status | answer | |", "|---|---|---|"]
    for status, answer in sorted(operation["responses"].items()):
        named = answer.get("$ref", "").rsplit("/", 1)[-1]
        response = document["components"]["responses"][named] if named else answer
        schema = _body(response.get("content", {}))
        kind = _type(schema, schemas) if schema else ""
        parts.append(f"| {status} | {kind} | {_line(response.get('description'))} |")
    return [*parts, ""]


def render() -> str:
    """The page."""
    document = spec()
    schemas = document["components"]["schemas"]
    parts = [HEAD + document["info"]["description"] + WILLIW, "## Calls", ""]
    for path, item in document["paths"].items():
        for method in ("get", "post", "delete"):
            if method in item:
                parts += _operation(method, path, item[method], document)
    parts += ["### GET /metrics", "", "Prometheus' text format; see [operations](operations.md#what-to-watch).", ""]
    parts += ["### GET /", "", "The page; for JSON clients the list of calls and whether the service is healthy.", ""]
    parts += ["## Bodies and answers", ""]
    for name, schema in sorted(schemas.items()):
        parts += [f"### {name}", ""]
        if schema.get("description"):
            parts += [_line(schema["description"]), ""]
        parts += [*_fields(schema, schemas), ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")
