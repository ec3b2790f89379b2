"""Who is let in, what is written down, what never is."""

from __future__ import annotations

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from support.running import RedisProcess
from support.web_cases import error_of

from planner.errors import InvalidInput
from web import auth
from web.app import create_app
from web.audit import changed
from web.auth import Tokens, is_loopback, new_token
from workers.settings import Settings

SECRET = "hf_" + "SeCrEtOfAUser" * 2


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """A token of each scope, by scope, in a file."""
    return {scope: new_token(tmp_path / "tokens.json", f"{scope}-er", [scope]) for scope in auth.SCOPES}


@pytest.fixture
def guarded(make_app: Any, tokens: dict[str, str], tmp_path: Path) -> FlaskClient:
    """A client of an application that asks for tokens."""
    client: FlaskClient = make_app(bind="0.0.0.0:8080", tokens_file=tmp_path / "tokens.json").test_client()
    return client


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


#: (method, path, body, scope it needs).
CALLS: list[tuple[str, str, dict[str, Any] | None, str]] = [
    ("GET", "/api/jobs", None, "read"),
    ("GET", "/api/jobs/abcdef01", None, "read"),
    ("GET", "/api/jobs/abcdef01/events", None, "read"),
    ("GET", "/api/plans", None, "read"),
    ("GET", "/api/plans/abcdef01", None, "read"),
    ("GET", "/api/nodes", None, "read"),
    ("GET", "/api/batches/abcdef01", None, "read"),
    ("GET", "/metrics", None, "read"),
    ("POST", "/api/get-plan", {"model_name": "a/b", "node_id": "n"}, "read"),
    ("POST", "/api/plans/preview", {"model_name": "a/b"}, "read"),
    ("POST", "/api/request", {"model_name": "a/b"}, "submit"),
    ("POST", "/api/process", {"model_name": "a/c"}, "submit"),
    ("POST", "/api/batches", {"models": ["a/b"]}, "submit"),
    ("DELETE", "/api/jobs/abcdef01", None, "submit"),
    ("DELETE", "/api/plans/abcdef01", None, "admin"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[0]} {call[1]}")
def test_each_call_needs_its_scope(
    guarded: FlaskClient, tokens: dict[str, str], call: tuple[str, str, Any, str]
) -> None:
    method, path, body, scope = call
    for headers in ({}, _bearer("fs_wrong"), _bearer(""), {"Authorization": "Basic YTpi"}, _bearer("\xff\xfe")):
        answer = guarded.open(path, method=method, json=body, headers=headers)
        assert answer.status_code == 401
        assert error_of(answer)["code"] == "unauthorized"
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    needed = auth.SCOPES.index(scope)
    for place, name in enumerate(auth.SCOPES):
        answer = guarded.open(path, method=method, json=body, headers=_bearer(tokens[name]))
        if place < needed:
            assert answer.status_code == 403
            assert error_of(answer)["details"] == {"needed": scope, "has": [name]}
        else:
            assert answer.status_code not in {401, 403}


def test_every_address_but_these_needs_a_token(guarded: FlaskClient) -> None:
    public = set()
    for rule in guarded.application.url_map.iter_rules():
        path = str(rule.rule)
        for name in rule.arguments:
            example = {"filename": "style.css", "path": "swagger-ui.css"}.get(name, "abcdef01")
            path = path.replace(path[path.index("<") : path.index(">") + 1], example)
        method = min((rule.methods or set()) - {"HEAD", "OPTIONS"})
        with guarded.open(path, method=method) as answer:
            status = answer.status_code
        if status != 401:
            public.add(path)
    assert public == {
        "/", "/docs", "/docs/", "/docs/swagger-ui.css", "/openapi.json",
        "/static/style.css", "/api/health", "/api/health/ready", "/api/health/live",
        "/api/nodes/invitations/abcdef01",  # sealed: only the printed line opens it
    }  # fmt: skip


def test_a_token_that_is_removed_is_refused_at_once(
    guarded: FlaskClient, tokens: dict[str, str], tmp_path: Path
) -> None:
    assert guarded.get("/api/jobs", headers=_bearer(tokens["read"])).status_code == 200
    path = tmp_path / "tokens.json"
    rows = json.loads(path.read_text())["tokens"]
    path.write_text(json.dumps({"tokens": [row for row in rows if row["name"] != "read-er"]}))
    assert guarded.get("/api/jobs", headers=_bearer(tokens["read"])).status_code == 401
    assert guarded.get("/api/jobs", headers=_bearer(tokens["submit"])).status_code == 200


def test_an_unreadable_file_lets_nobody_in(guarded: FlaskClient, tokens: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "tokens.json").unlink()
    assert guarded.get("/api/jobs", headers=_bearer(tokens["admin"])).status_code >= 400


def test_the_file_holds_hashes_only(tokens: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    assert path.stat().st_mode & 0o077 == 0
    assert not [token for token in tokens.values() if token in path.read_text()]
    assert len(set(tokens.values())) == 3
    assert all(len(token) > 40 for token in tokens.values())


def test_all_tokens_are_compared_in_constant_time(
    tokens: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return a == b

    found = Tokens(tmp_path / "tokens.json")
    monkeypatch.setattr("web.auth.hmac.compare_digest", compare)
    for presented in (tokens["read"], "nothing"):
        compared.clear()
        found.find(presented)
        assert len(compared) == 3  # the first match does not end it


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", '{"tokens": 1}', '{"tokens": [1]}', '{"tokens": [{"name": "a"}]}',
        '{"tokens": [{"name": "a", "sha256": "xyz", "scopes": ["read"]}]}',
        '{"tokens": [{"name": "a", "sha256": "' + "0" * 64 + '", "scopes": []}]}',
        '{"tokens": [{"name": "a", "sha256": "' + "0" * 64 + '", "scopes": ["root"]}]}',
        '{"tokens": [{"name": "a\\nb", "sha256": "' + "0" * 64 + '", "scopes": ["read"]}]}',
        '{"tokens": [' + ", ".join(['{"name": "a", "sha256": "' + "0" * 64 + '", "scopes": ["read"]}'] * 2) + "]}",
    ],
)  # fmt: skip
def test_a_tokens_file_with_a_mistake_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(InvalidInput) as refused:
        Tokens(path)
    assert "0" * 64 not in str(refused.value)


def test_tokens_are_made_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "tokens.json"
    assert auth.main(["new", "ci", "--scopes", "read", "--file", str(path)]) == 0
    token = capsys.readouterr().out.strip()
    found = Tokens(path).find(token)
    assert found is not None
    assert (found.name, found.may("read"), found.may("submit")) == ("ci", True, False)
    assert auth.main(["new", "ci", "--file", str(path)]) == 1
    assert "already" in capsys.readouterr().err
    assert auth.main(["new", "other", "--scopes", "root", "--file", str(path)]) == 1


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("127.0.0.1:8080", True), ("localhost:8080", True), ("[::1]:8080", True), ("127.9.9.9:1", True),
        ("unix:/run/x.sock", True), ("127.0.0.1", True),
        ("0.0.0.0:8080", False), (":8080", False), ("[::]:80", False), ("192.168.1.2:80", False),
        ("example.org:80", False), ("localhost.evil.example:80", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_loopback(bind: str, expected: bool) -> None:
    assert is_loopback(bind) is expected


def test_an_open_address_without_tokens_does_not_start(settings: Settings) -> None:
    with pytest.raises(InvalidInput, match="FAIRSHARD_TOKENS_FILE"):
        create_app(settings, bind="0.0.0.0:8080", background=False)
    with pytest.raises(InvalidInput, match="FAIRSHARD_TOKENS_FILE"):
        create_app(settings, require_token="always", background=False)


def test_on_loopback_only_its_names_are_answered(client: FlaskClient) -> None:
    # A page of evil.example can make its name resolve to 127.0.0.1; the Host header gives it away.
    for host in ("evil.example", "127.0.0.1.evil.example:8080", "evil.example:8080", "localhost.evil.example", ""):
        answer = client.get("/api/jobs", headers={"Host": host})
        assert answer.status_code == 421, host
        error_of(answer)
    for host in ("localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080"):
        assert client.get("/api/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/api/jobs", "/nothing", "/static/main.js", "/openapi.json"])
def test_every_answer_carries_the_headers(client: FlaskClient, path: str) -> None:
    with client.get(path, headers={"Accept": "text/html"}) as answer:
        headers = answer.headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Request-ID"]
    assert "Access-Control-Allow-Origin" not in headers
    if path.startswith("/api"):
        assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_need_nothing_from_elsewhere_and_nothing_inline(client: FlaskClient, path: str) -> None:
    text = client.get(path, headers={"Accept": "text/html"}).get_data(as_text=True)
    for forbidden in (" style=", "<style", "onclick=", "javascript:", 'src="http', "//cdn", 'href="//', "@import"):
        assert forbidden not in text, forbidden
    assert text.count("<script") == len(re.findall(r'<script [^>]*src="/(?:static|docs)/', text))


def test_a_request_id_is_kept_if_it_is_one(client: FlaskClient) -> None:
    assert client.get("/", headers={"X-Request-ID": "a-1"}).headers["X-Request-ID"] == "a-1"
    for bad in ("a b", "x" * 65, "<script>"):
        assert client.get("/", headers={"X-Request-ID": bad}).headers["X-Request-ID"] != bad


def test_other_origins_are_let_in_by_setting_only(make_app: Any, client: FlaskClient) -> None:
    asked = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in client.options("/api/request", headers=asked).headers
    allowed = make_app(cors_origins=("https://ui.example",)).test_client()
    answer = allowed.options("/api/request", headers=asked)
    assert answer.status_code == 204
    assert answer.headers["Access-Control-Allow-Origin"] == "https://ui.example"
    assert "X-HF-Token" in answer.headers["Access-Control-Allow-Headers"]
    assert "Origin" in answer.headers["Vary"]
    other = allowed.options("/api/request", headers=asked | {"Origin": "https://ui.example.evil"})
    assert "Access-Control-Allow-Origin" not in other.headers
    everyone = make_app(cors_origins=("*",)).test_client()
    assert everyone.get("/api/jobs", headers={"Origin": "https://x"}).headers["Access-Control-Allow-Origin"] == "*"


def test_each_change_leaves_one_audit_line(make_app: Any, tokens: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "logs" / "audit.log"
    client = make_app(tokens_file=tmp_path / "tokens.json", audit_log=log).test_client()
    headers = _bearer(tokens["admin"])
    job_id = client.post("/api/request", json={"model_name": "a/b"}, headers=headers).get_json()["job_id"]
    client.get(f"/api/jobs/{job_id}", headers=headers)  # reading changes nothing
    client.post("/api/request", json={"model_name": "../x"}, headers=headers)  # refused: nothing changed
    client.delete(f"/api/jobs/{job_id}", headers=headers)
    client.post("/api/batches", json={"models": ["a/c"]}, headers=headers)
    for handler in logging.getLogger("fairshard.audit").handlers:
        handler.flush()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["action"] for line in lines] == ["request", "cancel", "batch"]
    assert {line["token"] for line in lines} == {"admin-er"}
    assert lines[0]["job_id"] == lines[1]["job_id"] == job_id
    assert all(line["address"] and line["time"] and line["request_id"] for line in lines)
    assert tokens["admin"] not in log.read_text()


def test_every_call_that_changes_something_says_so_in_the_audit(client: FlaskClient) -> None:
    views = client.application.view_functions
    changing = {
        rule.endpoint
        for rule in client.application.url_map.iter_rules()
        if {"POST", "PUT", "PATCH", "DELETE"} & (rule.methods or set())
        and getattr(views[rule.endpoint], "needs_scope", "submit") != "read"
    }
    assert len(changing) == 12

    def says(function: Any) -> bool:
        """Whether it calls `changed`, or another function of its module that does."""
        called = [function.__globals__.get(name) for name in function.__code__.co_names]
        own = [f for f in called if inspect.isfunction(f) and f.__module__ == function.__module__]
        return changed in called or any(map(says, own))

    for endpoint in changing:
        assert says(inspect.unwrap(views[endpoint])), endpoint


@pytest.mark.parametrize("field", ["model_name", "metadata_repo", "revision", "node_id"])
@pytest.mark.parametrize(
    "value",
    ["http://169.254.169.254/x", "file:///etc/passwd", "../../etc/passwd", "a/b@evil.example", "//evil.example/x",
     "a/b?x=1", "a/b#x", "a/b\x00", "/etc/passwd", "a\\b"],
)  # fmt: skip
def test_no_request_names_an_address_or_a_path(client: FlaskClient, field: str, value: str) -> None:
    body = {"model_name": "a/b"} | {field: value}
    answer = client.post("/api/process", json=body)
    assert answer.status_code == 422
    assert field in error_of(answer)["error"]


def test_a_users_hub_token_is_nowhere_in_the_open(
    make_app: Any, bare_redis: RedisProcess, settings: Settings, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    client = make_app(audit_log=tmp_path / "audit.log").test_client()
    headers = {"X-HF-Token": SECRET}
    answers = [
        client.post("/api/request", json={"model_name": "a/b", "process": True}, headers=headers),
        client.post("/api/request", json={"model_name": "../b"}, headers=headers),
        client.post("/api/process", json={"model_name": "a/c"}, headers=headers),
        client.post("/api/batches", json={"models": ["a/d"]}, headers=headers),
        client.post("/api/request", json={"model_name": "a/b"}, headers={"X-HF-Token": f"{SECRET} x"}),
    ]
    assert [answer.status_code for answer in answers] == [202, 422, 409, 202, 422]
    answers += [
        client.get("/api/jobs"),
        client.get(f"/api/jobs/{answers[0].get_json()['job_id']}"),
        client.get("/metrics"),
    ]
    for answer in answers:
        assert SECRET not in answer.get_data(as_text=True)
        assert SECRET not in str(answer.headers)
    assert SECRET not in caplog.text
    with bare_redis.client() as redis:
        redis.save()
    dumped = (bare_redis.directory / "dump.rdb").read_bytes()
    assert b"a/b" in dumped  # it is the file that holds the job
    assert SECRET.encode() not in dumped
    for path in settings.data_dir.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
