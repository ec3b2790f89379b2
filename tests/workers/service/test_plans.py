"""Plans outlive Redis: what it lost comes back from the store, and what was deleted does not."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from hub.server import TestHub

from planner.errors import AccessDenied, NotFound, Unavailable
from planner.wire.documents import dumps
from workers.metadata_store.base import MetadataStore, plan_path
from workers.metadata_store.folder import FolderStore
from workers.metadata_store.open import open_store
from workers.metadata_store.shared import SharedStore
from workers.network.retry import RetryPolicy
from workers.service.plans import Plans

REPO = "own/meta"
QUICK = RetryPolicy(attempts=2, first_s=0.01, longest_s=0.05, connect_s=5, stall_s=5)


@dataclass
class Served:
    """What makes plans: publishes to the store, then tells Redis."""

    client: redis.Redis
    store: MetadataStore

    def plans(self, **options: Any) -> Plans:
        return Plans(self.client, lambda: self.store, **options)

    def make(self, plan_id: str, *, model_name: str = "own/model", day: int = 1, **options: Any) -> dict[str, Any]:
        made = plan(plan_id, model_name=model_name, day=day)
        self.store.write({plan_path(plan_id): dumps(made)}, message="A plan")
        self.plans(**options).save(made | {"job_id": "0" * 32})
        return made

    def wipe(self) -> None:
        self.client.flushall()


def plan(plan_id: str, *, model_name: str = "own/model", day: int = 1) -> dict[str, Any]:
    return {
        "plan_id": plan_id,
        "model_name": model_name,
        "revision": "abc",
        "strategy": "greedy",
        "generated_at": f"2025-01-{day:02}T00:00:00Z",
        "split_plan": {"big": {}, "small": {}},
    }


@pytest.fixture(params=["folder", "hub", "redis"])
def served(request: pytest.FixtureRequest, tmp_path: Path, hub: TestHub, client: redis.Redis) -> Served:
    if request.param == "folder":
        return Served(client, open_store(tmp_path / "store"))
    if request.param == "redis":
        return Served(client, SharedStore(client, folder=FolderStore(tmp_path / "store")))
    return Served(client, open_store(REPO, token=hub.token, policy=QUICK))


@pytest.fixture
def on_hub(hub: TestHub, client: redis.Redis) -> Served:
    return Served(client, open_store(REPO, token=hub.token, policy=QUICK))


def ids(plans: Plans, **query: Any) -> list[str]:
    return [summary["plan_id"] for summary in plans.summaries(**query)]


def test_a_wiped_redis_gets_the_plans_back(served: Served) -> None:
    # By their ids in another order than by their age.
    for plan_id, day in (("b2", 1), ("c3", 3), ("a1", 2)):
        served.make(plan_id, day=day)
    served.make("d4", model_name="own/other", day=9)
    served.wipe()
    plans = served.plans()
    assert plans.latest("own/model") == plan("c3", day=3)
    assert ids(plans) == ["d4", "c3", "a1", "b2"]
    assert ids(plans, model_name="own/model", limit=2) == ["c3", "a1"]
    assert plans.summaries(model_name="own/other") == [
        {
            "plan_id": "d4",
            "model_name": "own/other",
            "revision": "abc",
            "strategy": "greedy",
            "node_ids": ["big", "small"],
            "generated_at": "2025-01-09T00:00:00Z",
            "job_id": None,
        }
    ]
    with pytest.raises(NotFound, match="/api/process"):
        plans.latest("own/third")


def test_a_list_is_read_again_as_well(served: Served) -> None:
    served.make("a1")
    served.wipe()
    assert ids(served.plans(), model_name="own/model") == ["a1"]


def test_what_is_made_after_the_wipe_stays_the_newest(served: Served) -> None:
    served.make("a1", day=9)
    served.wipe()
    served.make("b2", day=2)
    plans = served.plans()
    assert plans.latest("own/model")["plan_id"] == "b2"
    assert ids(plans) == ["b2", "a1"]
    assert plans.summaries()[0]["job_id"] == "0" * 32


def test_a_plan_made_again_is_the_newest_after_the_wipe_too(served: Served) -> None:
    served.make("a1", day=1)
    served.make("b2", day=2)
    # Publishing leaves the store's plan as it is, if only its time differs.
    served.plans().save(plan("a1", day=3) | {"job_id": "1" * 32}, again=True)
    assert served.plans().get("a1") == plan("a1", day=1) | {"job_id": "0" * 32}, "a stored plan never changes"
    before = served.store.write({}, message="the head")
    served.plans().save(plan("a1", day=4), again=True)
    assert served.store.write({}, message="the head") == before, "the newest, once more: no commit"
    served.wipe()
    assert ids(served.plans()) == ["a1", "b2"]
    assert served.plans().latest("own/model") == plan("a1", day=1)
    served.plans().delete("a1", "own/model")
    assert served.store.list("plans") == ["plans/b2.json"]


def test_a_deleted_plan_stays_deleted(served: Served) -> None:
    served.make("a1", day=1)
    served.make("b2", day=2)
    served.plans().delete("b2", "own/model")
    for _ in range(2):
        plans = served.plans()
        with pytest.raises(NotFound):
            plans.get("b2")
        assert plans.latest("own/model")["plan_id"] == "a1"
        assert ids(plans) == ["a1"]
        served.wipe()
    plans.delete("b2", "own/model")  # once more does no harm


def test_what_is_made_again_is_a_plan_like_any_other(served: Served) -> None:
    served.make("a1", ttl_s=0.2)
    served.plans().delete("a1", "own/model")
    made = served.make("a1", day=2, ttl_s=0.2)
    until_gone = time.monotonic() + 10
    while served.client.exists("fairshard:plan:a1"):
        assert time.monotonic() < until_gone
        time.sleep(0.05)
    plans = served.plans()
    assert plans.get("a1") == plans.latest("own/model") == made
    assert ids(plans) == ["a1"]
    plans.delete("a1", "own/model")
    with pytest.raises(NotFound):
        plans.get("a1")
    assert ids(plans) == []
    # Nothing of it is kept for ever.
    kept = {key for key in served.client.scan_iter() if not key.startswith("fairshard:store:")}
    assert kept <= {"fairshard:plans_read"}


def test_a_plan_that_redis_would_have_is_put_back_for_the_rest_of_its_time(served: Served) -> None:
    served.make("old", day=1)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 1000))
    served.store.write({plan_path("new"): dumps(plan("new") | {"generated_at": now})}, message="A plan")
    served.wipe()
    assert ids(served.plans(ttl_s=5000)) == ["new", "old"]
    assert 3900 < served.client.ttl("fairshard:plan:new") <= 4000
    assert not served.client.exists("fairshard:plan:old")
    assert served.plans().get("old") == plan("old")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"plan_id": "odd", "model_name": "../x", "split_plan": {}}', dumps(plan("other"))],
)
def test_what_is_no_plan_is_left_out(served: Served, content: bytes) -> None:
    served.make("a1")
    served.store.write({"plans/odd.json": content, "plans/a1/deep.json": b"{}"}, message="m")
    served.store.write({"plans/timeless.json": dumps(plan("timeless") | {"generated_at": None})}, message="m")
    served.wipe()
    assert ids(served.plans()) == ["a1", "timeless"]


def test_a_plan_deleted_while_the_store_is_read_does_not_come_back(served: Served) -> None:
    for number in range(3):
        served.make(f"p{number}")
    served.wipe()
    plans, listed, deleted = served.plans(), threading.Event(), threading.Event()

    stored = {path: served.store.read(path) for path in served.store.list("plans")}

    class Slow:
        """The store; somebody deletes a plan that it has listed and read, before the reader goes on."""

        spec = served.store.spec

        def list(self, prefix: str) -> Any:
            found = served.store.list(prefix)
            if not listed.is_set():
                listed.set()
                assert deleted.wait(30)
            return found

        def read(self, path: str) -> bytes:
            return stored[path]

    reader = Plans(served.client, Slow)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: ids(reader))
        assert listed.wait(30)
        plans.delete("p1", "own/model")
        deleted.set()
        assert sorted(reading.result()) == ["p0", "p2"]
    assert served.client.zscore("fairshard:plans:own/model", "p1") is None
    with pytest.raises(NotFound):
        plans.get("p1")


def test_a_poll_for_a_plan_that_is_not_there_costs_the_hub_nothing(hub: TestHub, on_hub: Served) -> None:
    plans = on_hub.plans()
    # With no repository, with an empty one, and with one that has other models' plans.
    for step in (lambda: None, lambda: on_hub.store.write({"x": b"1"}, message="m"), lambda: on_hub.make("a1")):
        step()
        on_hub.wipe()
        hub.counters.clear()
        for _ in range(20):
            with pytest.raises(NotFound):
                plans.latest("own/none")
        assert len(hub.counters.log("/api/models/own/meta")) <= 3, hub.counters.log()
    assert ids(plans) == ["a1"]


def test_many_who_ask_at_once_read_the_store_once(hub: TestHub, on_hub: Served) -> None:
    for number in range(4):
        on_hub.make(f"p{number}", day=number + 1)
    on_hub.wipe()
    hub.counters.clear()
    start = threading.Barrier(8)

    def ask(_: int) -> str:
        start.wait()
        return str(on_hub.plans().latest("own/model")["plan_id"])

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {"p3"}
    # Those that came first read the four plans, once for all; each also reads the one it answers.
    assert len(hub.counters.log("*/resolve/*/plans/p0.json")) == 1


def test_a_store_that_cannot_be_read_is_said_and_not_asked_at_every_call(hub: TestHub, on_hub: Served) -> None:
    on_hub.make("a1")
    on_hub.wipe()
    fault = hub.fault("status", path="/api/models/own/meta*", code=503, times=None)
    for _ in range(5):
        with pytest.raises(Unavailable, match="503"):
            on_hub.plans().latest("own/model")
        with pytest.raises(Unavailable, match="503"):
            on_hub.plans().summaries()
    assert fault.hits == QUICK.attempts
    hub.faults.clear()
    # What is made now is answered all the same.
    on_hub.make("b2", model_name="own/other")
    assert on_hub.plans().latest("own/other")["plan_id"] == "b2"
    on_hub.client.delete("fairshard:plans_read")  # as it goes by itself, after a while
    assert sorted(ids(on_hub.plans())) == ["a1", "b2"]


def test_a_reader_that_died_is_not_waited_for_long(on_hub: Served) -> None:
    on_hub.make("a1")
    on_hub.wipe()
    on_hub.client.set("fairshard:plans_read", "reading", px=60_000)
    with pytest.raises(Unavailable, match="ask again"):
        on_hub.plans().latest("own/model")
    on_hub.client.set("fairshard:plans_read", "reading", px=300)
    assert on_hub.plans().latest("own/model")["plan_id"] == "a1"


def test_a_plan_that_cannot_leave_the_store_is_not_half_deleted(hub: TestHub, on_hub: Served) -> None:
    made = on_hub.make("a1")
    reader = hub.add_user("bob")
    hub.grant(REPO, "bob")
    plans = Plans(on_hub.client, lambda: open_store(REPO, token=reader, policy=QUICK))
    with pytest.raises(AccessDenied):
        plans.delete("a1", "own/model")
    assert plans.latest("own/model") == made | {"job_id": "0" * 32}
    assert ids(plans) == ["a1"]
    on_hub.plans().delete("a1", "own/model")
    assert ids(plans) == []
