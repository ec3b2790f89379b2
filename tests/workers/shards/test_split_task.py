"""The split task of a service: what other nodes and earlier plans found, and reading twice on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.running import RedisProcess
from support.shard_cases import raw_tensors

from planner.cluster import Cluster, Node
from planner.plan import Plan, PlanOptions
from planner.strategies.make import plan_for
from planner.tasks import _split_steps
from planner.wire.read import plan_to_json
from workers.downloader import download, resolve
from workers.generator import generate
from workers.jobs.params import process_params
from workers.service.services import Services
from workers.settings import QueueSettings, Settings
from workers.shards.manifest import read_manifest
from workers.tasks import delete_shards, split
from workers.uploader import publish

NODES = ("a", "b")
MODEL = "tester/model"


class Service:
    """Nodes of a service whose tasks run in this process."""

    def __init__(self, hub: TestHub, redis: RedisProcess, folder: Path) -> None:
        hub.add_repo(MODEL, checkpoint("llama"))
        self.profile = generate(resolve(MODEL), compute=False)
        self.nodes = {
            node: Services(
                settings=Settings.from_env({"FAIRSHARD_DATA": str(folder), "NODE_ID": node, "REDIS_URL": redis.url}),
                queue=QueueSettings(),
                keeper=node == "a",
            )
            for node in NODES
        }
        services = self.nodes["a"]
        published = publish(self.profile, services.store())
        self.where = {"model_name": MODEL, "path": published.path, "commit": published.commit}

    def plan(self, allocation: Mapping[str, tuple[int, ...]]) -> Plan:
        cluster = Cluster(nodes=tuple(Node(node_id=n, flop_per_s=1e12, memory_bytes=2**40) for n in NODES))
        made = plan_for(self.profile, cluster, PlanOptions(), allocation)
        made = replace(made, revision=self.profile.revision)
        self.nodes["a"].plans.save(plan_to_json(made))
        return made

    def run(self, plan: Plan, node: str, *, params: Mapping[str, Any] | None = None) -> Path:
        """Have a node cut its shard, as the plan step would; its folder."""
        services = self.nodes[node]
        asked = process_params(params or {})
        steps = _split_steps(plan, self.where, paranoid=bool(asked["paranoid"]))
        (spec,) = [replace(step, after=()) for step in steps if step.name == f"split:{node}"]
        job_id = services.ledger.submit("process", model_name=MODEL, params=asked, steps=[spec]).job_id
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("workers.queue.step_task.current", lambda: services)
            split.run(job_id, spec.name)
        (step,) = services.ledger.views.job(job_id)["steps"]
        assert step["state"] == "done", step["error"]["message"]
        return services.settings.shards_dir / plan.plan_id

    def delete(self, plan: Plan, node: str) -> None:
        from workers.ledger.steps import StepSpec

        services = self.nodes[node]
        step = StepSpec(
            name=f"delete:{node}", task="workers.delete_shards", queue="x", args={"plan_id": plan.plan_id}
        )
        job_id = services.ledger.submit("delete", model_name=MODEL, params={}, steps=[step]).job_id
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("workers.queue.step_task.current", lambda: services)
            delete_shards.run(job_id, step.name)


@pytest.fixture
def service(hub: TestHub, tmp_path: Path) -> Iterator[Service]:
    with RedisProcess(tmp_path / "redis") as redis:
        yield Service(hub, redis, tmp_path / "data")


@pytest.fixture
def flipped(hub: TestHub, service: Service) -> Callable[..., Any]:
    """Has the Hub send a wrong byte of a tensor in layer 2, behind the header."""

    def flip() -> Any:
        tensor = service.profile.layers[2].tensors[0]
        return hub.fault("flip", path="*/model.safetensors", where="cdn", offset=tensor.begin + 5, skip=1)

    return flip


def assert_right(folder: Path) -> None:
    everything, found = raw_tensors(checkpoint("llama")), raw_tensors(folder)
    wanted = [tensor.name for tensor in read_manifest(folder).tensors]
    # Names alone: pytest takes minutes over what differs in megabytes, and some of these tests want it to fail.
    assert found.keys() == set(wanted)
    assert not [name for name in wanted if found[name] != everything[name]]


def test_what_an_earlier_plan_found_on_another_node_finds_a_wrong_byte(
    service: Service, flipped: Callable[..., Any]
) -> None:
    """Without peers; each node holds a part, so that no sha256 of the Hub can help."""
    last = len(service.profile.layers) - 1
    early = service.plan({"a": tuple(range(last)), "b": (last,)})
    assert_right(service.run(early, "a"))
    fault = flipped()
    late = service.plan({"a": (0, 1), "b": tuple(range(2, last + 1))})
    folder = service.run(late, "b")
    assert fault.hits == 1, "or nothing was tested"
    assert_right(folder)


def test_a_wrong_digest_ends_with_the_shard_that_it_came_with(service: Service, flipped: Callable[..., Any]) -> None:
    last = len(service.profile.layers) - 1
    flipped()
    early = service.plan({"a": tuple(range(last)), "b": (last,)})
    with pytest.raises(AssertionError):
        assert_right(service.run(early, "a"))  # nobody knew better
    late = service.plan({"a": (0, 1), "b": tuple(range(2, last + 1))})
    with pytest.raises(AssertionError, match="elsewhere it is"):
        service.run(late, "b")
    service.delete(early, "a")
    assert_right(service.run(late, "b"))


@pytest.mark.parametrize("paranoid", [True, False])
def test_paranoid_is_an_option_of_the_job(service: Service, flipped: Callable[..., Any], paranoid: bool) -> None:
    fault = flipped()
    last = len(service.profile.layers) - 1
    plan = service.plan({"a": tuple(range(last)), "b": (last,)})
    folder = service.run(plan, "a", params={"paranoid": paranoid})
    assert fault.hits == 1
    if paranoid:
        assert_right(folder)
    else:
        with pytest.raises(AssertionError):
            assert_right(folder)


def test_a_damaged_copy_in_the_hubs_cache_leaves_no_shard(service: Service) -> None:
    cached = download(resolve(MODEL)) / "model.safetensors"
    damaged = bytearray(cached.read_bytes())
    damaged[-5] ^= 1
    target = cached.resolve()
    target.chmod(0o644)
    target.write_bytes(damaged)
    plan = service.plan({"a": tuple(range(len(service.profile.layers)))})
    with pytest.raises(AssertionError, match="sha256"):
        service.run(plan, "a")
    assert not list(service.nodes["a"].settings.shards_dir.glob("[!.]*"))
