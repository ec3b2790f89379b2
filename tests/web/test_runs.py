"""Runs over HTTP where no node is alive: what is refused, and in which form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flask.testing import FlaskClient
from support.web_cases import error_of

from web.auth import new_token


def test_there_is_nothing_to_run(client: FlaskClient) -> None:
    answer = client.post("/api/plans/0123456789abcdef/runs", json={"prompt": "x"})
    assert (answer.status_code, error_of(answer)["error"]) == (404, "there is no plan '0123456789abcdef'")
    answer = client.post("/api/plans/0123456789abcdef/runs", json={"prompt": "x", "temprature": 1})
    assert error_of(answer)["details"]["fields"][0]["path"] == "temprature"
    assert client.delete("/api/plans/0123456789abcdef/deployment").status_code == 404
    assert client.get("/api/runs/0123456789abcdef").status_code == 404
    assert client.get("/v1/models").get_json() == {"object": "list", "data": []}


def test_errors_of_v1_are_in_the_form_of_openais_api(client: FlaskClient, make_app: Any, tmp_path: Path) -> None:
    for body, status, code, param in (
        ({"model": "no/such", "messages": [{"role": "user", "content": "x"}]}, 404, "not_found", None),
        ({"messages": []}, 400, "invalid_input", "model"),
        ({"model": "a/b", "messages": [{"role": "user"}]}, 400, "invalid_input", "messages"),
        (
            {"model": "a/b", "messages": [{"role": "user", "content": "x"}], "tools": [1]},
            400,
            "invalid_input",
            "tools",
        ),
        ({"model": "a/b", "messages": [{"role": "user", "content": "x"}], "top_p": 2}, 400, "invalid_input", "top_p"),
        ({"model": 5, "messages": [{"role": "user", "content": "x"}]}, 400, "invalid_input", "model"),
    ):
        answer = client.post("/v1/chat/completions", json=body)
        error = answer.get_json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    assert client.post("/v1/completions", data="{", content_type="application/json").status_code == 400
    assert client.post("/v1/completions", json={"model": "a/b", "prompt": [1, "x"]}).status_code == 400
    assert client.post("/v1/embeddings", json={"model": "a/b", "input": [[1]]}).status_code == 400

    token = new_token(tmp_path / "tokens.json", "who", ["submit"])
    guarded = make_app(bind="0.0.0.0:8080", tokens_file=tmp_path / "tokens.json").test_client()
    asked = {"model": "no/such", "input": "x"}
    answer = guarded.post("/v1/embeddings", json=asked)
    assert (answer.status_code, answer.get_json()["error"]["type"]) == (401, "authentication_error")
    assert guarded.post("/v1/embeddings", json=asked, headers={"Authorization": f"Bearer {token}"}).status_code == 404
