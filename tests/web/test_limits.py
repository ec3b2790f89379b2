"""How much, how often, how many at a time."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from support.running import RedisProcess, until
from support.web_cases import NODES, WILLIW_METADATA, Server, error_of

from planner.errors import InvalidInput
from web.app import create_app
from web.auth import new_token
from web.errors import LIMITS
from workers.settings import Settings, WebSettings


def _body(size: int) -> bytes:
    return b'{"model_name": "a/b", "node_id": "' + b"x" * size + b'"}'


def test_a_large_body_is_413_before_it_is_read(client: FlaskClient) -> None:
    for path in ("/api/request", "/api/process", "/api/batches", "/api/get-plan"):
        answer = client.post(path, data=_body(2**20), content_type="application/json")
        assert answer.status_code == 413
        assert error_of(answer)["details"] == {
            "largest_bytes": 2**20,
            "setting": "FAIRSHARD_MAX_BODY_BYTES",
        }


def test_a_body_of_100_mb_is_413_everywhere(client: FlaskClient) -> None:
    for path in ("/api/request", "/api/plans/preview"):
        answer = client.post(path, content_type="application/json", environ_overrides={"CONTENT_LENGTH": "100000000"})
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "too_large"


@pytest.mark.parametrize(("size", "status"), [(20, 202), (2**20, 413), (2**21, 413)])
def test_a_body_in_chunks_has_the_same_limit(client: FlaskClient, size: int, status: int) -> None:
    # Without a Content-Length, as gunicorn hands on a chunked body.
    answer = client.post(
        "/api/request",
        input_stream=io.BytesIO(_body(size)),
        content_type="application/json",
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert answer.status_code == status
    if status == 413:
        assert error_of(answer)["details"] == {
            "largest_bytes": 2**20,
            "setting": "FAIRSHARD_MAX_BODY_BYTES",
        }


def test_metadata_may_be_larger_than_other_bodies(client: FlaskClient) -> None:
    padded = WILLIW_METADATA | {"comment": "x" * 2**21}
    answer = client.post("/api/plans/preview", json={"metadata": padded, "available_nodes": NODES})
    assert answer.status_code == 200


def test_a_batch_has_a_largest_size(make_app: Any) -> None:
    client = make_app(max_batch=3).test_client()
    answer = client.post("/api/batches", json={"models": ["a/b", "a/c", "a/d", "a/e"]})
    assert answer.status_code == 422
    assert error_of(answer)["details"] == {"largest": 3, "got": 4, "setting": "FAIRSHARD_MAX_BATCH"}
    assert client.post("/api/batches", json={"models": ["a/b", "a/c", "a/d"]}).status_code == 202


def test_a_full_queue_refuses_with_retry_after(make_app: Any) -> None:
    client = make_app(max_queue=2).test_client()
    assert "fairshard_accepts_jobs 1.0" in client.get("/metrics").get_data(as_text=True)
    for name in ("a/b", "a/c"):
        assert client.post("/api/request", json={"model_name": name}).status_code == 202
    answer = client.post("/api/request", json={"model_name": "a/d"})
    assert answer.status_code == 429
    assert error_of(answer)["code"] == "limit_exceeded"
    assert int(answer.headers["Retry-After"]) > 0
    # What is there already is still answered, and the metric shows the refusal.
    assert client.post("/api/request", json={"model_name": "a/b"}).status_code == 202
    text = client.get("/metrics").get_data(as_text=True)
    assert 'status="429"' in text
    assert "fairshard_accepts_jobs 0.0" in text
    assert "FAIRSHARD_MAX_QUEUE allows, 2" in client.get("/api/health").get_json()["warnings"][0]


def test_each_token_has_its_own_share_of_the_queue(make_app: Any, tmp_path: Any) -> None:
    one, two = (new_token(tmp_path / "tokens.json", name, ["submit"]) for name in ("one", "two"))
    client = make_app(tokens_file=tmp_path / "tokens.json", max_jobs_per_token=1).test_client()

    def post(token: str, name: str) -> int:
        body, headers = {"model_name": name}, {"Authorization": f"Bearer {token}"}
        return int(client.post("/api/request", json=body, headers=headers).status_code)

    assert [post(one, "a/b"), post(one, "a/c"), post(two, "a/c")] == [202, 429, 202]


def test_the_rate_is_limited_per_caller_and_counted_in_redis(
    make_app: Any, settings: Settings, tmp_path: Any
) -> None:
    one, two = (new_token(tmp_path / "tokens.json", name, ["read"]) for name in ("one", "two"))
    # Two processes of one service: what one counts, the other knows.
    made = [make_app(tokens_file=tmp_path / "tokens.json", rate_limit="4/minute").test_client() for _ in range(2)]

    def get(index: int, token: str) -> Any:
        return made[index].get("/api/jobs", headers={"Authorization": f"Bearer {token}"})

    assert [get(index % 2, one).status_code for index in range(4)] == [200] * 4
    answer = get(0, one)
    assert answer.status_code == 429
    error_of(answer)
    assert int(answer.headers["Retry-After"]) > 0
    assert get(1, one).status_code == 429
    assert get(1, two).status_code == 200
    # Guessing tokens is limited too, and whoever looks after the service is not.
    assert [made[0].get("/api/jobs").status_code for _ in range(5)] == [401] * 4 + [429]
    assert made[0].get("/api/health/live").status_code == 200


def test_there_is_no_rate_limit_on_loopback(client: FlaskClient) -> None:
    assert {client.get("/api/nodes").status_code for _ in range(700)} == {200}


def test_each_limit_names_its_setting_and_is_counted(make_app: Any, tmp_path: Path) -> None:
    one, two, three = (new_token(tmp_path / "tokens.json", name, ["submit"]) for name in ("one", "two", "three"))
    limits = {"max_batch": 2, "max_queue": 2, "max_jobs_per_token": 1, "rate_limit": "6/minute", "listeners": 1}
    client = make_app(tokens_file=tmp_path / "tokens.json", max_metadata_bytes=2**20 + 1, **limits).test_client()

    def reached(token: str, path: str, **sent: Any) -> tuple[int, str]:
        answer = client.post(path, headers={"Authorization": f"Bearer {token}"}, **sent)
        return answer.status_code, (answer.get_json().get("details") or {}).get("setting", "")

    large = {"content_type": "application/json", "environ_overrides": {"CONTENT_LENGTH": "100000000"}}
    assert reached(one, "/api/request", **large) == (413, "FAIRSHARD_MAX_BODY_BYTES")
    assert reached(one, "/api/plans/preview", **large) == (413, "FAIRSHARD_MAX_METADATA_BYTES")
    assert reached(one, "/api/batches", json={"models": ["a/b"] * 3}) == (422, "FAIRSHARD_MAX_BATCH")
    job = client.post("/api/request", json={"model_name": "a/b"}, headers={"Authorization": f"Bearer {one}"})
    assert reached(one, "/api/request", json={"model_name": "a/c"}) == (429, "FAIRSHARD_MAX_JOBS_PER_TOKEN")
    assert reached(two, "/api/request", json={"model_name": "a/c"})[0] == 202
    assert reached(three, "/api/request", json={"model_name": "a/d"}) == (429, "FAIRSHARD_MAX_QUEUE")
    assert reached(one, "/api/get-plan", json={"model_name": "a/b", "node_id": "n"})[0] == 404
    assert reached(one, "/api/get-plan", json={}) == (429, "FAIRSHARD_RATE_LIMIT")
    events = f"/api/jobs/{job.get_json()['job_id']}/events"
    stream = client.get(events, headers={"Authorization": f"Bearer {two}"}, buffered=False)
    refused = client.get(events, headers={"Authorization": f"Bearer {two}"})
    assert (refused.status_code, error_of(refused)["details"]["setting"]) == (503, "FAIRSHARD_LISTENERS")
    stream.close()
    text = client.get("/metrics", headers={"Authorization": f"Bearer {two}"}).get_data(as_text=True)
    counted = re.findall(r'^fairshard_limits_reached_total\{setting="(\w+)"\} (.+)$', text, flags=re.MULTILINE)
    assert dict(counted) == dict.fromkeys(LIMITS, "1.0")


def test_a_packed_body_is_refused_and_not_unpacked(client: FlaskClient) -> None:
    bomb = gzip.compress(b'{"model_name": "a/b", "node_id": "' + b"x" * 50_000_000 + b'"}')
    for encoding in ("gzip", "deflate", "br", "zstd"):
        answer = client.post(
            "/api/request", data=bomb, content_type="application/json", headers={"Content-Encoding": encoding}
        )
        assert answer.status_code == 415
        assert "Content-Encoding" in error_of(answer)["error"]
    plain = client.post("/api/request", json={"model_name": "a/b"}, headers={"Content-Encoding": "identity"})
    assert plain.status_code == 202


def test_event_streams_are_few_and_give_their_place_back(make_app: Any) -> None:
    app = make_app(listeners=2, max_stream_s=0.5)
    client = app.test_client()
    job_id = client.post("/api/request", json={"model_name": "a/b"}).get_json()["job_id"]
    streams = [client.get(f"/api/jobs/{job_id}/events", buffered=False) for _ in range(2)]
    assert [stream.status_code for stream in streams] == [200, 200]
    refused = client.get(f"/api/jobs/{job_id}/events")
    assert refused.status_code == 503
    assert error_of(refused)["code"] == "too_many_listeners"
    assert int(refused.headers["Retry-After"]) > 0
    streams[0].close()  # never read: the client went away before the first event
    assert "event: submitted" in client.get(f"/api/jobs/{job_id}/events").get_data(as_text=True)
    streams[1].close()


def test_whoever_waits_leaves_room_for_the_others(make_app: Any) -> None:
    # A plan that nobody makes: the job waits for a request that no node takes.
    app = make_app(waiters=1)
    client = app.test_client()
    client.post("/api/request", json={"model_name": "a/b"})
    answers: list[int] = []
    wait = threading.Thread(
        target=lambda: answers.append(
            app.test_client()
            .post("/api/process", json={"model_name": "a/b"}, headers={"Prefer": "wait=60"})
            .status_code
        )
    )
    wait.start()
    places = app.extensions["fairshard"].waiters
    until(lambda: not places._value, what="the first caller waits")
    second = client.post("/api/process", json={"model_name": "a/b", "batch_size": 2}, headers={"Prefer": "wait=60"})
    assert second.status_code == 202  # at once; the first still waits
    assert wait.is_alive()
    for job in client.get("/api/jobs").get_json()["jobs"]:
        client.delete(f"/api/jobs/{job['job_id']}")
    wait.join(timeout=60)
    assert answers == [409]  # cancelled
    assert places._value == 1


def test_headers_are_bounded_before_our_code_sees_them(settings: Settings, tmp_path: Path) -> None:
    env = {"REDIS_URL": settings.redis_url, "FAIRSHARD_DATA": str(settings.data_dir)}

    def status(server: Server, head: str) -> int:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
            sock.sendall(f"{head}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return int(sock.makefile("rb").readline().split()[1])

    with Server(tmp_path, env) as server:
        assert status(server, "GET /api/health/live HTTP/1.1\r\nX-A: b") == 200
        assert status(server, f"GET /{'a' * 5_000} HTTP/1.1") in {400, 414}
        assert status(server, f"GET /api/health/live HTTP/1.1\r\nX-A: {'b' * 10_000}") in {400, 431}
        many = "\r\n".join(f"X-{number}: b" for number in range(100))
        assert status(server, f"GET /api/health/live HTTP/1.1\r\n{many}") in {400, 431}


def test_a_server_that_is_asked_to_go_waits_for_no_stream(settings: Settings, tmp_path: Any) -> None:
    env = {"REDIS_URL": settings.redis_url, "FAIRSHARD_DATA": str(settings.data_dir)}
    with Server(tmp_path, env) as server:
        body = json.dumps({"model_name": "a/b"}).encode()
        sent = urllib.request.Request(
            f"{server.url}/api/request", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(sent, timeout=60) as answer:
            job_id = json.load(answer)["job_id"]
        wait = urllib.request.Request(
            f"{server.url}/api/process", data=body, headers={"Content-Type": "application/json", "Prefer": "wait=100"}
        )
        with (
            ThreadPoolExecutor() as pool,
            urllib.request.urlopen(f"{server.url}/api/jobs/{job_id}/events", timeout=60) as stream,
        ):
            waiting = pool.submit(lambda: urllib.request.urlopen(wait, timeout=60).status)
            assert stream.readline() == b"retry: 2000\n"
            until(lambda: len(json.loads(server.get("/api/jobs")[1])["jobs"]) == 2, what="the second job is there")
            assert server.process is not None
            server.process.terminate()
            assert server.process.wait(timeout=20) == 0  # gunicorn's grace is 30 s
            assert b"event: submitted" in stream.read()
            assert waiting.result() == 202


@pytest.mark.parametrize(
    ("name", "value"),
    [("FAIRSHARD_REQUIRE_TOKEN", "perhaps"), ("FAIRSHARD_MAX_BATCH", "many"), ("FAIRSHARD_MAX_WAIT_S", "-3")],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=name):
        create_app(background=False)


def test_settings_come_from_the_environment() -> None:
    found = WebSettings.from_env(
        {"FAIRSHARD_BIND": "0.0.0.0:80", "FAIRSHARD_CORS_ORIGINS": "https://a.example, https://b.example"}
    )
    assert found.bind == "0.0.0.0:80"
    assert found.cors_origins == ("https://a.example", "https://b.example")


def test_requests_that_are_never_sent_whole_let_the_others_through(bare_redis: RedisProcess, tmp_path: Path) -> None:
    env = {"REDIS_URL": bare_redis.url, "FAIRSHARD_DATA": str(tmp_path)}
    env |= {"FAIRSHARD_WAITERS": "1", "FAIRSHARD_LISTENERS": "1"}
    headers = b"POST /api/request HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
    with Server(tmp_path, env) as server, contextlib.ExitStack() as silent:
        # As many as it has threads, and some more.
        for number in range(2 * 10 + 8):
            connection = silent.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(headers + b"\r\n{" if number % 2 else headers)
        with urllib.request.urlopen(f"{server.url}/api/health/live", timeout=50) as response:
            assert response.status == 200


def test_requests_that_trickle_for_ever_let_the_others_through(bare_redis: RedisProcess, tmp_path: Path) -> None:
    env = {"REDIS_URL": bare_redis.url, "FAIRSHARD_DATA": str(tmp_path), "FAIRSHARD_MAX_ARRIVAL_S": "2"}
    env |= {"FAIRSHARD_WAITERS": "1", "FAIRSHARD_LISTENERS": "1"}
    headers = b"POST /api/request HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n"
    with Server(tmp_path, env) as server, contextlib.ExitStack() as slow:
        connections = []
        for number in range(2 * 10 + 8):
            connections.append(slow.enter_context(socket.create_connection(("127.0.0.1", server.port))))
            connections[-1].sendall(headers + b"\r\n{" if number % 2 else headers + b"X-Slow: ")
        ended = threading.Event()

        def trickle() -> None:
            while not ended.wait(0.5):
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.sendall(b" ")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            with urllib.request.urlopen(f"{server.url}/api/health/live", timeout=40) as response:
                assert response.status == 200
        finally:
            ended.set()
            thread.join()
