"""What the API accepts, what it refuses, and in which words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from flask.testing import FlaskClient
from support.running import RedisProcess
from support.web_cases import NODES, WILLIW_METADATA, error_of

from planner import errors
from planner.errors import FairshardError
from planner.plan import STRATEGIES as NAMES
from planner.strategies.make import STRATEGIES
from planner.wire.documents import dumps
from web.errors import STATUS, Refused, status_of, status_of_code
from web.views.prefer import Waiting, waiting
from workers.metadata_store.base import plan_path
from workers.metadata_store.folder import FolderStore
from workers.metadata_store.open import open_store
from workers.metadata_store.shared import SharedStore
from workers.service.plans import Plans
from workers.settings import Settings

BAD_NAMES = [
    "../../etc/passwd", "a/b/c", "", "/", "a/", "/b", "a//b", "a/..", "./b", "a/b ", "a/b\n", "a\\b",
    "a/b.git", "a--b/c", "a/-b", "a/b?x", "http://evil/x", "a/b%2fc", "é/b", "x" * 10_240, "a/" + "b" * 97,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name[:12]))
@pytest.mark.parametrize("path", ["/api/request", "/api/process", "/api/get-plan", "/api/plans/preview"])
def test_names_that_are_no_repository_are_refused(client: FlaskClient, path: str, name: str) -> None:
    body = {"model_name": name} | ({"node_id": "n"} if path == "/api/get-plan" else {})
    answer = client.post(path, json=body)
    error = error_of(answer)
    assert answer.status_code == 422
    assert error["code"] == "invalid_input"
    assert "owner/name" in error["error"]
    assert len(error["error"]) < 400


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "model_name is required"),
        ({"model_name": 5}, "owner/name"),
        ({"model_name": None}, "must not be null"),
        ({"model_name": ["a/b"]}, "owner/name"),
        ({"model_name": "a/b", "batch_size": 0}, "from 1 to 65,536, got 0"),
        ({"model_name": "a/b", "batch_size": 10**12}, "got 1000000000000"),
        ({"model_name": "a/b", "batch_size": -1}, "got -1"),
        ({"model_name": "a/b", "batch_size": 1.5}, "got 1.5"),
        ({"model_name": "a/b", "batch_size": "1"}, "got '1'"),
        ({"model_name": "a/b", "batch_size": True}, "got True"),
        ({"model_name": "a/b", "batch_size": None}, "must not be null"),
        ({"model_name": "a/b", "sequence_length": 0}, "got 0"),
        ({"model_name": "a/b", "sequence_length": 10**12}, "got 1000000000000"),
        ({"model_name": "a/b", "revision": "../main"}, "branch, tag or commit"),
        ({"model_name": "a/b", "node_id": "a b"}, "1 to 64 letters"),
        ({"model_name": "a/b", "node_id": 7}, "body: node_id must be 1 to 64 letters"),
        ({"model_name": "a/b", "timestamp": {}}, "seconds since 1970"),
        ({"model_name": "a/b", "download": "everything"}, "headers, full"),
        ({"model_name": "a/b", "kv_dtype": "F12"}, "must be one of"),
        ({"model_name": "a/b", "process": 1}, "true, false or an object"),
        ({"model_name": "a/b", "process": {"strategy": "magic"}}, "greedy, pipeline, equal, memory"),
        ({"model_name": "a/b", "process": {"model_name": "a/b"}}, "model_name is not a known field"),
        ({"model_name": "a/b", "colour": "blue"}, "colour is not a known field"),
        ({"model_name": "a/b", "modelname": "a/b"}, "modelname is not a known field; did you mean 'model_name'?"),
        (
            {"model_name": "a/b", "process": {"stratgy": "equal"}},
            "process.stratgy is not a known field; did you",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_request_with_a_mistake_is_told_which(client: FlaskClient, body: dict[str, Any], says: str) -> None:
    answer = client.post("/api/request", json=body)
    assert answer.status_code == 422
    assert says in error_of(answer)["error"]
    assert client.get("/api/jobs").get_json() == {"jobs": []}


def test_a_query_parameter_that_no_route_knows_is_refused(client: FlaskClient) -> None:
    looked = 0
    for rule in client.application.url_map.iter_rules():
        if rule.endpoint in {"static", "docs.show"}:
            continue
        path = re.sub("<[^>]*>", "abcdef01", rule.rule)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            answer = client.open(f"{path}?colour=blue", method=method, json={} if method == "POST" else None)
            if path.startswith("/v1/"):  # OpenAI's clients know what is wrong by 400, and its form
                status, said = 400, answer.get_json()["error"]["message"]
            else:
                status, said = 422, error_of(answer)["error"]
            assert answer.status_code == status, (method, path)
            assert said.startswith("query: colour is not a known field"), path
            looked += 1
    assert looked >= 20
    for path, near in (("/api/jobs?stat=done", "state"), ("/api/plans?limti=1", "limit")):
        assert error_of(client.get(path))["error"].endswith(f"did you mean {near!r}?")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"time_budget_s": 0}, "above 0"),
        ({"time_budget_s": -1}, "above 0"),
        ({"time_budget_s": "1"}, "must be a number"),
        ({"strategy": None}, "must not be null"),
        ({"phase": "training"}, "prefill, decode"),
        ({"pins": {"model.layers.0": "no such id!"}}, "letters"),
        ({"pins": []}, "mapping"),
        ({"exclude": "big"}, "list"),
        ({"max_memory_share": {"big": 1.5}}, "from 0 to 1"),
        ({"available_nodes": []}, "available_nodes length must be between 1 and 1000"),
        ({"available_nodes": [{"flop_per_s": 1e9}]}, "node_id is required"),
        ({"available_nodes": [{"node_id": "a", "memory_bytes": -1}]}, "got -1"),
        ({"available_nodes": [{"node_id": "a", "ip": "10.0.0.1"}]}, "ip is not a known field"),
        ({"metadata_repo": "https://evil.example/x"}, "owner/name"),
        ({"metadata_repo": "../secrets"}, "owner/name"),
        ({"split": "yes"}, "true or false"),
        ({"links": {"pairs": [{"from": "a"}]}}, "to is required"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_process_with_a_mistake_is_told_which(client: FlaskClient, extra: dict[str, Any], says: str) -> None:
    answer = client.post("/api/process", json={"model_name": "a/b"} | extra)
    assert answer.status_code == 422
    assert says in error_of(answer)["error"]


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"model_name": "a/b", "model_name": "c/d"}', 400, "invalid_json"),
        (b'{"model_name": "a/b", "batch_size": NaN}', 400, "invalid_json"),
        (b'{"model_name": "a/b", "timestamp": Infinity}', 400, "invalid_json"),
        (b'{"model_name": "a/b", "batch_size": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"x":' * 100_000, 400, "invalid_json"),
        (b"[" * 500_000, 400, "invalid_json"),
        (b"[]", 422, "invalid_input"),
        (b'"a/b"', 422, "invalid_input"),
        (b"null", 422, "invalid_input"),
    ],
    ids=lambda value: str(value[:20]) if isinstance(value, bytes) else None,
)
def test_bodies_that_are_no_json_object(client: FlaskClient, sent: bytes, status: int, code: str) -> None:
    answer = client.post("/api/request", data=sent, content_type="application/json")
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


def test_only_json_is_taken(client: FlaskClient) -> None:
    # A form can be posted by any page of any site; JSON cannot, without the browser asking first.
    answer = client.post("/api/request", data={"model_name": "a/b"})
    assert answer.status_code == 415
    assert "application/json" in error_of(answer)["error"]


def test_a_lone_surrogate_does_not_break_anything(client: FlaskClient) -> None:
    for body in ('{"model_name": "a/\\ud800"}', '{"model_name": "a/b", "node_id": "\\udfff"}', '{"\\ud800": 1}'):
        answer = client.post("/api/request", data=body, content_type="application/json")
        assert answer.status_code == 422
        error_of(answer)


def test_process_without_metadata_says_what_to_call(client: FlaskClient) -> None:
    answer = client.post("/api/process", json={"model_name": "a/b"})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (409, "conflict")
    assert "/api/request" in error["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/jobs/0123456789abcdef"),
        ("DELETE", "/api/jobs/0123456789abcdef"),
        ("GET", "/api/jobs/0123456789abcdef/events"),
        ("GET", "/api/plans/0123456789abcdef"),
        ("DELETE", "/api/plans/0123456789abcdef"),
        ("GET", "/api/batches/0123456789abcdef"),
        ("GET", "/api/jobs/..%2f..%2fetc"),
        ("GET", "/nothing"),
        ("GET", "/static/../app.py"),
        ("GET", "/static/..%2fapp.py"),
    ],
)
def test_what_is_not_there_is_404(client: FlaskClient, method: str, path: str) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "not_found"


def test_get_plan_of_a_model_without_one_is_404(client: FlaskClient) -> None:
    answer = client.post("/api/get-plan", json={"model_name": "a/b", "node_id": "n"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


def test_what_redis_lost_is_answered_from_the_store_until_it_is_deleted(
    client: FlaskClient, settings: Settings, bare_redis: RedisProcess
) -> None:
    made = client.post("/api/plans/preview", json={"metadata": WILLIW_METADATA, "available_nodes": NODES}).get_json()
    plan = {name: value for name, value in made.items() if name != "explanation"}
    path, asked = f"/api/plans/{plan['plan_id']}", {"model_name": "williw/model", "node_id": "n"}
    open_store(settings.store_dir).write({plan_path(plan["plan_id"]): dumps(plan)}, message="A plan")
    assert client.post("/api/get-plan", json=asked).get_json() == client.get(path).get_json() == plan
    assert [entry["plan_id"] for entry in client.get("/api/plans").get_json()["plans"]] == [plan["plan_id"]]
    deletion = client.delete(path).get_json()["job_id"]
    # As the planner does with it.
    assert [step["name"] for step in client.get(f"/api/jobs/{deletion}").get_json()["steps"]] == ["forget"]
    with bare_redis.client() as redis:
        store = SharedStore(redis, folder=FolderStore(settings.store_dir))
        Plans(redis, lambda: store).delete(plan["plan_id"], "williw/model")
    for _ in range(2):
        assert client.get(path).status_code == client.post("/api/get-plan", json=asked).status_code == 404
        assert client.get("/api/plans").get_json() == {"plans": []}
        with bare_redis.client() as redis:
            redis.flushall()


def test_another_method_is_405_and_told_which(client: FlaskClient) -> None:
    answer = client.put("/api/request", json={})
    assert answer.status_code == 405
    assert "POST" in answer.headers["Allow"]
    assert error_of(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", "offset=-1", "state=odd", "model_name=../x"])
def test_a_wrong_query_is_refused(client: FlaskClient, query: str) -> None:
    answer = client.get(f"/api/jobs?{query}")
    assert answer.status_code == 422
    assert query.partition("=")[0] in error_of(answer)["error"]


def test_an_accepted_request_is_queued_and_listed(client: FlaskClient) -> None:
    body = {"model_name": "a/b", "timestamp": 1700000000.5, "node_id": "n1", "process": {"strategy": "pipeline"}}
    answer = client.post("/api/request", json=body).get_json()
    # Whoever has the job go on to the plan need not be told to call for it.
    assert "/api/process" not in answer["message"]
    assert "/api/process" in client.post("/api/request", json={"model_name": "a/c"}).get_json()["message"]
    client.delete(f"/api/jobs/{client.get('/api/jobs?model_name=a/c').get_json()['jobs'][0]['job_id']}")
    job_id = answer["job_id"]
    job = client.get(f"/api/jobs/{job_id}").get_json()
    assert (job["state"], job["kind"], job["step"]) == ("queued", "request", "download")
    assert job["params"]["process"]["options"] == {"strategy": "pipeline"}
    assert [entry["job_id"] for entry in client.get("/api/jobs?state=queued").get_json()["jobs"]] == [job_id]
    assert client.get("/api/jobs?state=done").get_json() == {"jobs": []}
    assert client.delete(f"/api/jobs/{job_id}").get_json()["state"] == "cancelled"


def test_the_williw_health_answer_and_the_page_share_an_address(client: FlaskClient) -> None:
    for accept in ("*/*", "application/json", ""):
        answer = client.get("/", headers={"Accept": accept})
        assert answer.get_json()["status"] == "healthy"
        assert [api["path"] for api in answer.get_json()["apis"]] == ["/api/request", "/api/process", "/api/get-plan"]
    page = client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.mimetype == "text/html"
    assert "Accept" in page.headers["Vary"]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], Waiting(seconds=30)),
        (["wait=10"], Waiting(seconds=10, applied="wait=10")),
        (["Wait = 10"], Waiting(seconds=10, applied="wait=10")),
        (['wait="7"'], Waiting(seconds=7, applied="wait=7")),
        (["wait=0"], Waiting(seconds=0, applied="wait=0")),
        (["respond-async"], Waiting(seconds=0, applied="respond-async")),
        (["respond-async, wait=5"], Waiting(seconds=5, applied="respond-async, wait=5")),
        (["respond-async", "wait=5"], Waiting(seconds=5, applied="respond-async, wait=5")),
        (["wait=5, wait=9"], Waiting(seconds=5, applied="wait=5")),  # the first counts
        (["wait=900"], Waiting(seconds=120, applied="wait=120")),  # cut to the longest
        (["wait=" + "9" * 400], Waiting(seconds=120, applied="wait=120")),
        (["wait=-1"], Waiting(seconds=30)),  # what does not parse is ignored
        (["wait=soon"], Waiting(seconds=30)),
        (["wait=²"], Waiting(seconds=30)),
        (["handling=lenient; wait=3"], Waiting(seconds=30)),  # a parameter of another preference
        ([',,;=,"', "\x00"], Waiting(seconds=30)),
    ],
)
def test_prefer_is_read_as_rfc_7240_has_it(headers: list[str], expected: Waiting) -> None:
    assert waiting(headers, default_s=30, longest_s=120) == expected


def _kinds() -> list[type[FairshardError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FairshardError)]


def test_every_domain_error_has_its_status() -> None:
    assert {kind for kind in STATUS if kind.__module__ != "planner.errors"} == set()
    for kind in _kinds():
        status = status_of(kind("x"))
        assert status == status_of_code(kind.code)
        assert 400 <= status < 600
        if kind is not FairshardError:
            assert status != 500, f"{kind.__name__} needs a line in the table"
    assert status_of(errors.InvalidMetadata("x")) == 422
    assert status_of(Refused("x", status=418, code="teapot")) == 418
    assert status_of_code("never heard of") == 500


def test_strategies_are_the_planners() -> None:
    assert tuple(STRATEGIES) == NAMES


def test_an_unexpected_error_shows_no_inside(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def burst(*_: object, **__: object) -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr("workers.jobs.jobs.Jobs.nodes", burst)
    answer = client.get("/api/nodes", headers={"X-Request-ID": "abc-1"})
    assert answer.status_code == 500
    error = error_of(answer)
    assert error["details"] == {"request_id": "abc-1"}
    assert "hunter2" not in answer.get_data(as_text=True)
    assert "hunter2" in caplog.text
    assert "abc-1" in caplog.text


def test_a_preview_needs_no_cluster(client: FlaskClient) -> None:
    answer = client.post("/api/plans/preview", json={"metadata": WILLIW_METADATA, "available_nodes": NODES})
    assert answer.status_code == 200, answer.get_data(as_text=True)
    plan = answer.get_json()
    assert plan["unit"] == "tensor"
    assert sum(len(part["layer_names"]) for part in plan["split_plan"].values()) == 6
    assert client.get("/api/plans").get_json() == {"plans": []}
    assert client.get("/api/jobs").get_json() == {"jobs": []}


def with_a_cache(**fields: object) -> dict[str, Any]:
    """Four layers of 10 bytes and 2 a token, in BF16, for two nodes of 44 bytes."""
    layer = {"compute_required": 4.0, "activation_bytes": 4, "kv_cache_bytes": 8}
    layers = [
        {"name": f"layers.{at}", "weight_bytes": 10, "kv_terms": {"bytes_per_token": 2}, **layer} for at in range(4)
    ]
    return {
        "metadata": {"model_name": "a/b", "dtype": "BF16", "sequence_length": 4, "layers": layers},
        "available_nodes": [{"node_id": name, "flop_per_s": 1.0, "memory_bytes": 44} for name in "ab"],
        "strategy": "pipeline",
        **fields,
    }


def test_a_preview_takes_the_dtype_of_the_cache_and_finds_the_longest_context(client: FlaskClient) -> None:
    # Two layers a node: 2 * (10 + 2 S) <= 44 up to S = 6, and at half the bytes a token up to S = 12.
    for fields, longest in (({}, 6), ({"kv_dtype": "F8_E4M3"}, 12)):
        answer = client.post("/api/plans/preview", json=with_a_cache(max_context=True, **fields))
        assert answer.status_code == 200, answer.get_data(as_text=True)
        assert answer.get_json()["max_context"] == {"max_sequence_length": longest, "limit": "nodes"}
    plain = client.post("/api/plans/preview", json=with_a_cache(sequence_length=8, kv_dtype="F8_E4M3"))
    assert plain.status_code == 200
    assert "max_context" not in plain.get_json()
    assert client.post("/api/plans/preview", json=with_a_cache(sequence_length=8)).status_code == 409
    many = [{"node_id": f"n{at}", "flop_per_s": 1.0, "memory_bytes": 44} for at in range(900)]
    layers = [{"name": f"layers.{at}", "compute_required": 1.0} for at in range(30)]
    body = with_a_cache(max_context=True, available_nodes=many, metadata={"model_name": "a/b", "layers": layers})
    assert "with max_context plans at most 20,000" in error_of(client.post("/api/plans/preview", json=body))["error"]


def test_a_preview_asks_for_a_cache_that_is_not_known(client: FlaskClient) -> None:
    known: Any = WILLIW_METADATA["layers"]
    layers = [layer | {"kv_cache_bytes": None} for layer in known]
    body: dict[str, Any] = {"metadata": WILLIW_METADATA | {"layers": layers}, "available_nodes": NODES}
    assert "kv_bytes_per_token" in error_of(client.post("/api/plans/preview", json=body))["error"]
    told = client.post("/api/plans/preview", json=body | {"kv_bytes_per_token": 600})
    assert told.status_code == 200
    assert any("as stated: 600 bytes a token" in note for note in told.get_json()["approximate"])


def test_a_part_of_a_repository_is_a_job_of_its_own(client: FlaskClient) -> None:
    def asked(**which: str) -> str:
        answer = client.post("/api/request", json={"model_name": "own/parts", **which})
        assert answer.status_code == 202, answer.get_json()
        return str(answer.get_json()["job_id"])

    whole, part = asked(), asked(variant="bf16", subfolder="text_encoder")
    assert len({whole, part, asked(variant="fp16")}) == 3
    assert asked(revision="~subfolder=text_encoder~variant=bf16") == part
    for wrong in ({"variant": "../x"}, {"subfolder": "../x"}, {"subfolder": ""}, {"revision": "a~b"}):
        assert client.post("/api/request", json={"model_name": "own/parts", **wrong}).status_code == 422
    answer = client.post("/api/process", json={"model_name": "own/parts", "variant": "int8"})
    assert answer.status_code == 409
    assert "~variant=int8" in error_of(answer)["error"]


def test_a_preview_of_a_checkpoint_that_lacks_tensors_needs_leave(client: FlaskClient) -> None:
    body = with_a_cache()
    body["metadata"]["missing_tensors"] = ["layers.2.up.weight"]
    answer = client.post("/api/plans/preview", json=body)
    assert answer.status_code == 422
    assert "the checkpoint lacks 1 tensor of its model: layers.2.up.weight;" in error_of(answer)["error"]
    assert error_of(answer)["details"]["missing_tensors"] == ["layers.2.up.weight"]
    allowed = client.post("/api/plans/preview", json={**body, "allow_missing": True})
    assert allowed.status_code == 200, allowed.get_data(as_text=True)
    assert allowed.get_json()["missing_tensors"] == ["layers.2.up.weight"]


def test_a_preview_takes_links_as_a_matrix(client: FlaskClient) -> None:
    # 2 s from a to b, 1 s back: the chain begins at b.
    matrix = {"latency_s": [[None, 2.0], [1.0, None]], "bytes_per_s": None}
    answer = client.post("/api/plans/preview", json=with_a_cache(links={"matrix": matrix}))
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert [hop["node_id"] for hop in answer.get_json()["megaphone_plan"]["chain"]] == ["b", "a"]
    assert answer.get_json()["predicted"]["latency_s"] == pytest.approx(17.0)  # four layers of 4 s and the hop
    for bad, says in (
        (with_a_cache(links={"matrix": {"latency_s": [[0.0]]}}), "must be 2 rows of 2"),
        (with_a_cache(links={"matrix": {"latency_s": [[0.0, -1.0], [0.0, 0.0]]}}), "links.matrix.latency_s[0][1]"),
        ({"model_name": "a/b", "links": {"matrix": matrix}}, "links.matrix needs available_nodes"),
    ):
        answer = client.post("/api/plans/preview", json=bad)
        assert answer.status_code == 422
        assert says in error_of(answer)["error"]


@pytest.mark.parametrize("replicas", ["auto", 2, 2.0])
def test_a_preview_with_replicas_has_a_plan_for_each_chain(client: FlaskClient, replicas: object) -> None:
    nodes = [*NODES, *({**node, "node_id": f"{node['node_id']}-2"} for node in NODES)]
    body = {"metadata": WILLIW_METADATA, "available_nodes": nodes}
    answer = client.post("/api/plans/preview", json={**body, "replicas": replicas})
    assert answer.status_code == 200, answer.get_data(as_text=True)
    found = answer.get_json()
    one = client.post("/api/plans/preview", json=body).get_json()
    assert found["plan_id"] == one["plan_id"] == found["replicas"]["one_chain"]["plan_id"]
    chains = found["replicas"]
    assert chains["chains"] == len(chains["plans"]) >= 2
    used = [node_id for plan in chains["plans"] for node_id in plan["split_plan"]]
    assert sorted([*used, *(idle["node_id"] for idle in chains["idle"])]) == sorted(
        str(node["node_id"]) for node in nodes
    )
    total = sum(1 / plan["predicted"]["bottleneck_s"] for plan in chains["plans"])
    assert chains["throughput_per_s"] == pytest.approx(total)
    assert chains["ratio"] >= 1
    assert "replicas" not in one
    assert client.get("/api/plans").get_json() == {"plans": []}


@pytest.mark.parametrize("bad", [0, -1, "2", "all", 1.5, True, [], 1001])
def test_replicas_are_a_number_or_auto(client: FlaskClient, bad: object) -> None:
    body = {"metadata": WILLIW_METADATA, "available_nodes": NODES, "replicas": bad}
    answer = client.post("/api/plans/preview", json=body)
    assert answer.status_code == 422
    assert "replicas must be auto or a whole number from 1 to 1,000, got" in error_of(answer)["error"]


def test_a_preview_with_replicas_is_of_no_more_than_the_server_plans_in_time(client: FlaskClient) -> None:
    layers = [{"name": f"layers.{at}", "compute_required": 1.0} for at in range(21)]
    body = {
        "metadata": {"model_name": "a/b", "layers": layers},
        "available_nodes": [{"node_id": f"n{at}", "flop_per_s": 1e9, "memory_bytes": 10} for at in range(1000)],
    }
    assert client.post("/api/plans/preview", json=body).status_code == 200
    answer = client.post("/api/plans/preview", json={**body, "replicas": "auto"})
    assert answer.status_code == 422
    assert "at most 20,000 layers × nodes, got 21 × 1,000" in error_of(answer)["error"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"available_nodes": NODES}, 422, "exactly one of"),
        ({"metadata": WILLIW_METADATA, "available_nodes": NODES, "replicas": None}, 422, "must not be null"),
        ({"metadata": WILLIW_METADATA, "available_nodes": NODES, "replicas": 3}, 409, "3 replicas"),
        ({"metadata": WILLIW_METADATA, "available_nodes": NODES, "replicas": 2, "objective": "latency"}, 422,
         "one request's time"),
        ({"metadata": WILLIW_METADATA, "model_name": "a/b"}, 422, "exactly one of"),
        ({"metadata": {}, "available_nodes": NODES}, 422, "model_name"),
        ({"metadata": {"model_name": "a/b", "layers": []}, "available_nodes": NODES}, 422, "layers"),
        ({"metadata": WILLIW_METADATA}, 409, "no node is alive"),
        ({"model_name": "a/b", "available_nodes": NODES}, 404, "a/b"),
        ({"metadata": WILLIW_METADATA,
          "available_nodes": [{"node_id": "a", "gpu_available": True, "gpu_name": "Z9"}]}, 422, "Z9"),
        ({"metadata": WILLIW_METADATA, "available_nodes": [NODES[0], NODES[0]]}, 422, "big"),
        ({"metadata": WILLIW_METADATA,
          "available_nodes": [{"node_id": "a", "flop_per_s": 1e9, "memory_bytes": 10}]}, 409, "memory"),
        ({"metadata": WILLIW_METADATA, "available_nodes": NODES, "pins": {"nothing": "big"}}, 422, "nothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_preview_that_cannot_be_says_why(client: FlaskClient, body: dict[str, Any], status: int, says: str) -> None:
    answer = client.post("/api/plans/preview", json=body)
    assert answer.status_code == status, answer.get_data(as_text=True)
    assert says in json.dumps(error_of(answer), ensure_ascii=False)


def test_a_wrong_entry_of_a_batch_is_one_failed_entry(client: FlaskClient) -> None:
    models = ["a/b", "../../x", {"model_name": "a/c", "sequence_length": -1}, 5, {"model_name": "a/d", "unknown": 1}]
    answer = client.post("/api/batches", json={"models": models})
    assert answer.status_code == 202, answer.get_json()
    batch = answer.get_json()
    assert [line["state"] for line in batch["jobs"]] == ["queued", "failed", "failed", "failed", "failed"]
    said = [line["error"]["message"] for line in batch["jobs"][1:]]
    for expected, message in zip(("owner/name", "sequence_length", "owner/name", "unknown"), said, strict=True):
        assert expected in message
    page = client.get(f"/api/batches/{batch['batch_id']}?limit=2&cursor=1").get_json()
    assert (len(page["jobs"]), page["total"], page["next_cursor"]) == (2, 5, 3)
