"""The document says what the code does."""

from __future__ import annotations

import re
from typing import Any

import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from support.web_cases import NODES, WILLIW_METADATA, error_of

from planner.wire.read import options_from_json
from web.schemas import bodies as schemas


@pytest.fixture
def document(client: FlaskClient) -> dict[str, Any]:
    """The OpenAPI document."""
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.get_json()
    return found


def _valid(document: dict[str, Any], name: str, value: Any) -> None:
    registry: Registry[Any] = Registry().with_resource("urn:api", DRAFT202012.create_resource(document))
    Draft202012Validator({"$ref": f"urn:api#/components/schemas/{name}"}, registry=registry).validate(value)


def test_every_route_of_the_api_is_documented(client: FlaskClient, document: dict[str, Any]) -> None:
    rules = {str(rule.rule) for rule in client.application.url_map.iter_rules()}
    routes = {rule.replace("<", "{").replace(">", "}") for rule in rules if rule.startswith("/api/")}
    routes = {re.sub(r"{\w+:", "{", route) for route in routes}
    assert routes == set(document["paths"])
    for path, item in document["paths"].items():
        for method in item.keys() - {"parameters"}:
            operation = item[method]
            assert operation["summary"], path
            assert {"default", "422"} & set(operation["responses"])


def test_the_williw_protocols_fields_are_required_of_a_plan(document: dict[str, Any]) -> None:
    required = set(document["components"]["schemas"]["PlanOut"]["required"])
    assert required >= {
        "success", "model_name", "model_url", "plan_id", "generated_at", "metadata", "selected_nodes", "split_plan",
        "megaphone_plan",
    }  # fmt: skip


def test_answers_are_as_the_document_has_them(client: FlaskClient, document: dict[str, Any]) -> None:
    made = client.post(
        "/api/plans/preview",
        json={"metadata": WILLIW_METADATA, "available_nodes": NODES, "compare": True, "replicas": 1},
    ).get_json()
    assert len(made["replicas"]["plans"]) == 1
    _valid(document, "PreviewOut", made)
    _valid(document, "PlanOut", made)
    accepted = client.post("/api/request", json={"model_name": "a/b"})
    _valid(document, "RequestOut", accepted.get_json())
    job = client.get(accepted.headers["Location"]).get_json()
    _valid(document, "JobOut", job)
    assert job["steps"]
    _valid(document, "JobsOut", client.get("/api/jobs").get_json())
    process = client.post("/api/process", json={"model_name": "a/b"}, headers={"Prefer": "respond-async"})
    _valid(document, "AcceptedOut", process.get_json())
    batch = client.post("/api/batches", json={"models": ["a/c"]})
    _valid(document, "BatchOut", batch.get_json())
    _valid(document, "NodesOut", client.get("/api/nodes").get_json())
    _valid(document, "PlansOut", client.get("/api/plans").get_json())
    _valid(document, "HealthOut", client.get("/api/health").get_json())
    _valid(document, "ErrorOut", error_of(client.get("/api/jobs/00000000")))


def test_the_documents_limits_are_the_codes(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["RequestIn"]["properties"]
    assert (fields["batch_size"]["minimum"], fields["batch_size"]["maximum"]) == (1, 65_536)
    assert fields["kv_dtype"]["enum"] == list(schemas.KV_DTYPES)
    assert document["components"]["schemas"]["RequestIn"]["additionalProperties"] is False


def test_what_the_api_takes_for_options_the_planner_takes_too() -> None:
    given = {
        "strategy": "pipeline", "objective": "latency", "phase": "decode", "time_budget_s": 1.5, "pins": {"x": "a"},
        "exclude": ["b"], "max_memory_share": {"a": 0.5}, "max_compute_share": {"a": 1}, "reserve_bytes": 7,
        "count_activations": True, "use_compute_min": True, "allow_missing": True,
    }  # fmt: skip
    assert set(given) == set(schemas.PlanFields.OPTIONS)
    options = options_from_json(schemas.plan_options(schemas.PlanFields().load(given)))
    assert (options.strategy, options.time_budget_s, options.exclude) == ("pipeline", 1.5, frozenset({"b"}))


def test_a_document_with_tokens_says_so(make_app: Any, tmp_path: Any) -> None:
    from web.auth import new_token

    new_token(tmp_path / "tokens.json", "a", ["read"])
    document = make_app(tokens_file=tmp_path / "tokens.json").test_client().get("/openapi.json").get_json()
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
