"""Everything the document allows, much that it forbids, and thousands of requests that nobody should send."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.depth import depth
from support.running import RedisProcess
from support.web_cases import NODES, WILLIW_METADATA, Server

from web.auth import new_token

MALFORMED = depth(2_000, 10_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, whose waits and streams end soon."""
    directory = tmp_path_factory.mktemp("fuzz")
    with RedisProcess(directory / "redis") as redis:
        env = {
            "REDIS_URL": redis.url,
            "FAIRSHARD_DATA": str(directory / "data"),
            "FAIRSHARD_MAX_STREAM_S": "0.1",
            "FAIRSHARD_MAX_WAIT_S": "0.1",
        }
        with Server(directory, env) as server:
            yield server


@pytest.mark.search
@pytest.mark.timeout(depth(300, 900))
def test_schemathesis_finds_nothing_in_the_whole_api(server: Server, tmp_path: Path) -> None:
    token = new_token(tmp_path / "tokens.json", "fuzz", ["admin"])
    env = {"FAIRSHARD_REQUIRE_TOKEN": "always", "FAIRSHARD_TOKENS_FILE": str(tmp_path / "tokens.json")}
    with Server(tmp_path, server.env | env) as guarded:  # it tries without the token as well
        _schemathesis(guarded, token, tmp_path)


def _schemathesis(server: Server, token: str, directory: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        str(Path(__file__).parent / "schemathesis.toml"),
    ]
    # DELETE cancels a job, and a cancelled job can be looked at like any that ended. That a deleted plan is gone is
    # tested beside the workers that delete it.
    command += ["run", f"{server.url}/openapi.json", "--checks", "all", "--exclude-checks", "use_after_free"]
    command += ["--header", f"Authorization: Bearer {token}", "--max-examples", depth("4", "40"), "--seed", "7"]
    run = subprocess.run(
        [*command, "--continue-on-failure", "--no-color"], cwd=directory, capture_output=True, text=True, check=False,
        timeout=depth(280, 880),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]
    assert "Tested: 23" in run.stdout
    tried = re.search(r"(\d+) generated", run.stdout)
    assert tried is not None
    assert int(tried[1]) > 1000


_BODIES = [
    {"model_name": "a/b", "batch_size": 1, "process": {"pins": {"x": "big"}}},
    {"model_name": "a/b", "node_id": "n", "metadata_repo": "a/c", "available_nodes": NODES},
    {"metadata": WILLIW_METADATA, "available_nodes": NODES},
    {"models": ["a/b", {"model_name": "c/d"}]},
]
_PATHS = ["/api/request", "/api/process", "/api/get-plan", "/api/batches", "/api/plans/preview"]
_ODD: list[object] = [
    None, True, -1, 0, 10**12, 1e308, -0.0, "", "x" * 10_000, "../../etc/passwd", "a/b/c", "\u0000", "\ud800", [], {},
    [[[]]], {"a": {"b": {}}}, "🤖" * 100, "' OR 1=1 --", "${jndi:ldap://x}", "{{7*7}}", "\r\nX-Injected: 1",
    [None] * 1000,
]  # fmt: skip


def _spoiled(draw: random.Random) -> bytes:
    """A body with one to three things wrong, or bytes of one that is cut, flipped, repeated."""
    body = json.loads(json.dumps(draw.choice(_BODIES)))
    for _ in range(draw.randint(1, 3)):
        at = body
        while isinstance(at, (dict, list)) and at and draw.random() < 0.6:
            key = draw.choice(list(at) if isinstance(at, dict) else list(range(len(at))))
            if not isinstance(at[key], (dict, list)) or not at[key]:
                break
            at = at[key]
        if isinstance(at, dict):
            at[draw.choice([*list(at), "unknown", "", "model_name"])] = copy.deepcopy(draw.choice(_ODD))
        elif isinstance(at, list):
            at.append(copy.deepcopy(draw.choice(_ODD)))
    text = bytearray(json.dumps(body).encode())
    if draw.random() < 0.5:
        kind = draw.randrange(4)
        place = draw.randrange(len(text))
        if kind == 0:
            del text[place:]
        elif kind == 1:
            text[place] = draw.randrange(256)
        elif kind == 2:
            text[place:place] = bytes(draw.randrange(256) for _ in range(8))
        else:
            text *= 2
    return bytes(text)


def _request(draw: random.Random) -> bytes:
    """A request that is malformed in its line, its headers, its framing or its body."""
    kind = draw.random()
    if kind < 0.7:
        body = _spoiled(draw)
        kinds = ["application/json"] * 8 + ["text/plain", "application/x-www-form-urlencoded", ""]
        head = f"POST {draw.choice(_PATHS)} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {draw.choice(kinds)}\r\n"
        return head.encode() + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    if kind < 0.85:
        path = draw.choice(["/api/jobs/", "/api/plans/", "/api/batches/", "/api/jobs?limit=", "/static/", "/"])
        tail = "".join(draw.choice("abc09%/.\\?&=-_~;'\"<>{}|^`") for _ in range(draw.randint(0, 60)))
        method = draw.choice(["GET", "DELETE", "PUT", "PATCH", "TRACE", "OPTIONS", "HEAD", "BREW"])
        odd = draw.choice(
            ["Prefer: wait=-1", "Last-Event-ID: \x7f", "Authorization: Bearer", "X-HF-Token: a b", "Accept: ;"]
        )
        return f"{method} {path}{tail} HTTP/1.1\r\nHost: localhost\r\n{odd}\r\nConnection: close\r\n\r\n".encode(
            "latin-1"
        )
    if kind < 0.93:
        framing = draw.choice(
            [b"Content-Length: -5", b"Content-Length: x", b"Content-Length: 5\r\nContent-Length: 7",
             b"Transfer-Encoding: chunked\r\nContent-Length: 3", b"Transfer-Encoding: odd",
             b"Content-Length: 99999999999"]
        )  # fmt: skip
        return b"POST /api/request HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + framing + b"\r\n\r\nxyz"
    return bytes(draw.randrange(256) for _ in range(draw.randint(1, 300))) + b"\r\n\r\n"


def _send(server: Server, raw: bytes) -> int:
    """The status of the answer; 0 where the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        with contextlib.suppress(OSError):  # it may be refused while we still send
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n" not in answer and (got := sock.recv(4096)):
                answer += got
        while True:
            try:
                if not sock.recv(65536):
                    break
            except OSError:
                break
    match = re.match(rb"HTTP/1\.\d (\d{3})", answer)
    return int(match[1]) if match else 0


@pytest.mark.search
def test_thousands_of_malformed_requests_leave_it_serving(server: Server) -> None:
    draw = random.Random(20_261_124)
    sent = [_request(draw) for _ in range(MALFORMED)]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda raw: _send(server, raw), sent))
    failed = [
        (status, raw[:400]) for status, raw in zip(statuses, sent, strict=True) if status >= 500 and status != 501
    ]
    assert not failed, failed[:3]
    seen = Counter(statuses)
    assert {400, 404, 405, 415, 422} <= set(seen), seen
    assert seen[422] > MALFORMED / 10
    assert server.get("/api/health")[0] == 200
    assert server.get("/api/jobs")[0] == 200
    assert "Traceback" not in server.log.read_text(), server.log.read_text()[-3000:]
