"""How large one Redis and one API may grow, by simulation: nodes, jobs, plans and callers, and a tenth of each.

    python -m benchmarks.scale [--quick] [--nodes 2000] [--jobs 10000] [--plans 5000] [--clients 100]

The nodes' announcements are real and signed, made by one process; the jobs wait, a twentieth of them run; nothing is
planned or split. The API is gunicorn as it is delivered. Each caller asks every two seconds, as the page does.
`--quick`: the tenth alone. Prints one JSON object, and on stderr each target with its figure; the exit status is 1 if
one was missed. Everything runs on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT / "tests")]

from support.checkpoints import checkpoint  # noqa: E402
from support.running import RedisProcess, Web, Worker, until  # noqa: E402

from planner.cluster import Cluster, Node  # noqa: E402
from planner.errors import NodeFailure  # noqa: E402
from planner.strategies import make_plan  # noqa: E402
from planner.wire.read import plan_to_json  # noqa: E402
from workers.downloader import resolve  # noqa: E402
from workers.generator import generate  # noqa: E402
from workers.jobs.jobs import Jobs  # noqa: E402
from workers.nodes.joining import Authority, Joining, Token  # noqa: E402
from workers.nodes.registry import Registry  # noqa: E402
from workers.service.services import Services  # noqa: E402
from workers.settings import QueueSettings, Settings  # noqa: E402

_FORK = multiprocessing.get_context("fork")
#: Seconds between two calls of one client, and how long they call.
EVERY_S, CALLS_S = 2.0, 20.0
PATHS = {
    "nodes": "/api/nodes?limit=100",
    "nodes_last_page": "/api/nodes?limit=100&offset={last}",
    "jobs_queued": "/api/jobs?state=queued",
    "jobs_running": "/api/jobs?state=running",
    "jobs_done": "/api/jobs?state=done",
    "plans": "/api/plans",
    "health": "/api/health",
    "process": "POST /api/process",
}


def percentile(values: list[float], share: float) -> float:
    found = sorted(values)
    return round(1000 * found[min(len(found) - 1, math.ceil(share * len(found)) - 1)], 1)


class Server:
    """What Redis counts of itself, between two looks."""

    def __init__(self, redis: RedisProcess) -> None:
        self._client: Any = redis.client()

    def look(self) -> dict[str, float]:
        stats, cpu = self._client.info("stats"), self._client.info("cpu")
        return {
            "commands": stats["total_commands_processed"],
            "bytes": stats["total_net_input_bytes"] + stats["total_net_output_bytes"],
            "cpu_s": cpu["used_cpu_user"] + cpu["used_cpu_sys"],
            "at": time.monotonic(),
        }

    def memory(self) -> int:
        return int(self._client.info("memory")["used_memory"])


class Nodes:
    """Nodes that announce themselves, each with a join token of its own."""

    def __init__(self, redis: RedisProcess, authority: Authority, count: int, queue: QueueSettings) -> None:
        client = redis.client()
        self.count = count
        self.members = []
        for number in range(count):
            node_id = f"node-{number:05d}"
            joining = Joining(authority=authority.key.public_key(), token=Token.parse(authority.token(node_id)))
            info = {
                "node_id": node_id, "instance": node_id, "device": "NVIDIA A100 80GB", "flop_per_s": 2.5e14,
                "memory_bytes": 80 << 30, "memory_bytes_per_s": 2e12, "load": 0.1, "disk_free_bytes": 10**12,
                "versions": {"fairshard": "0.1.0", "torch": "2.9.0", "transformers": "5.5.0"}, "host": node_id,
                "pid": number, "started_at": "2026-01-01T00:00:00Z", "shards": [f"{number:016x}"],
            }  # fmt: skip
            self.members.append((Registry(client, ttl_s=queue.node_ttl_s, joining=joining), info))

    def announce(self) -> None:
        for registry, info in self.members:
            registry.announce(info)

    @contextlib.contextmanager
    def announcing(self, every_s: float) -> Iterator[None]:
        """Go on in a process of its own, evenly; it gives way, since real nodes are other machines."""

        def run() -> None:
            os.nice(10)
            begun, number = time.monotonic(), 0
            while True:
                registry, info = self.members[number % self.count]
                registry.announce(info)
                number += 1
                time.sleep(max(0.0, begun + number * every_s / self.count - time.monotonic()))

        process = _FORK.Process(target=run, daemon=True)
        process.start()
        try:
            yield
        finally:
            process.kill()
            process.join()


def fill(jobs: Jobs, services: Services, *, count: int, plans: int) -> dict[str, Any]:
    """Published metadata of one model, `count` unfinished jobs (a twentieth runs), `plans` stored plans."""
    profile = generate(resolve(checkpoint("llama")), compute=False)
    services.profile_published("scale/model", {"path": "none", "commit": "none"})
    begin = time.perf_counter()
    for number in range(count):
        view = jobs.submit_request(f"scale/model-{number}", process={})
        if number % 20 == 0:
            services.ledger.claim(view["job_id"], "download", owner=f"node-{number % 2000:05d}@host#1")
        if number % 100 == 1:
            claimed: Any = services.ledger.claim(view["job_id"], "download", owner="node@host#1")
            services.ledger.fail(claimed, NodeFailure("simulated"), final=True)
    posted = time.perf_counter() - begin
    nodes = tuple(Node(node_id=f"node-{n:05d}", flop_per_s=1e12, memory_bytes=1 << 30) for n in range(8))
    made = plan_to_json(make_plan(profile, Cluster(nodes=nodes)))
    for number in range(plans):
        services.plans.save(
            made | {"plan_id": f"{number:016x}", "model_name": f"scale/plan-{number}", "job_id": None}
        )
    return {"jobs_submitted_per_s": round(count / posted, 1)}


def call(connection: http.client.HTTPConnection, path: str, number: int) -> float:
    begin = time.perf_counter()
    if path.startswith("POST "):
        # Each another job, or it would be given one that waits.
        body = json.dumps({"model_name": "scale/model", "sequence_length": 1 + number % 100_000})
        connection.request("POST", path[5:], body, {"Content-Type": "application/json", "Prefer": "respond-async"})
        wanted = 202
    else:
        connection.request("GET", path)
        wanted = 200
    response = connection.getresponse()
    text = response.read()
    assert response.status == wanted, (path, response.status, text[:300])
    return time.perf_counter() - begin


def answers(web: Web, *, clients: int, last: int) -> dict[str, Any]:
    """p50 and p99 of each call, in milliseconds, while `clients` ask every two seconds, in a process of their own."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=lambda: sender.send(_answers(web, clients=clients, last=last)), daemon=True)
    process.start()
    found: dict[str, Any] = receiver.recv()
    process.join()
    return found


def _answers(web: Web, *, clients: int, last: int) -> dict[str, Any]:
    took: dict[str, list[float]] = {name: [] for name in PATHS}
    end = time.monotonic() + CALLS_S
    names = list(PATHS)

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=60)
        time.sleep(EVERY_S * number / clients)
        turn = number
        while time.monotonic() < end:
            begun = time.monotonic()
            name = names[turn % len(names)]
            took[name].append(call(connection, PATHS[name].format(last=last), turn * clients + number))
            turn += 1
            time.sleep(max(0.0, EVERY_S - (time.monotonic() - begun)))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        name: {"p50_ms": percentile(found, 0.5), "p99_ms": percentile(found, 0.99), "calls": len(found)}
        for name, found in took.items()
    }


def delay(web: Web, jobs: Jobs, services: Services, stop: Callable[[], bool]) -> dict[str, float]:
    """From a progress report to the listener of the job's event stream."""
    view = jobs.submit_request("scale/watched")
    claimed: Any = services.ledger.claim(view["job_id"], "download", owner="watched@host#1")
    found: list[float] = []
    with urllib.request.urlopen(f"{web.url}/api/jobs/{view['job_id']}/events", timeout=60) as stream:

        def report() -> None:
            while not stop():
                services.ledger.renew(claimed, progress={"done": time.time(), "total": 1, "what": "x"})
                time.sleep(0.37)
            services.ledger.cancel(view["job_id"])

        threading.Thread(target=report, daemon=True).start()
        for line in stream:
            if line.startswith(b"data:"):
                data = json.loads(line[5:])
                if data.get("progress"):
                    found.append(time.time() - data["progress"]["done"])
    return {"p50_ms": percentile(found, 0.5), "p99_ms": percentile(found, 0.99), "events": len(found)}


def idle(env: dict[str, str], folder: Path, server: Server, authority: Authority) -> dict[str, float]:
    """What a further real node costs Redis while it has nothing to do: announcements, queue, heartbeats."""
    spent: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        for name in ("idle-1", "idle-2"):  # the first one keeps the ledger too
            own = {"NODE_ID": name, "FAIRSHARD_JOIN_TOKEN": authority.token(name), "FAIRSHARD_FLOP_PER_S": "1e9"}
            own |= {"FAIRSHARD_MEMORY_BYTES": "1000000000", "FAIRSHARD_MEMORY_BYTES_PER_S": "1e9"}
            worker = Worker(name, f"node.{name}", env=env | own, directory=folder / "logs").start()
            stack.callback(worker.kill)
            until(worker.ready, what=lambda w=worker: str(w.log), timeout_s=120)
            before = server.look()
            time.sleep(12)
            after = server.look()
            seconds = after["at"] - before["at"]
            spent.append({what: (after[what] - before[what]) / seconds for what in ("commands", "bytes", "cpu_s")})
    more = {what: spent[1][what] - spent[0][what] for what in spent[0]}
    return {
        "commands_per_s": round(more["commands"], 1),
        "bytes_per_s": round(more["bytes"]),
        "redis_ms_per_s": round(1000 * more["cpu_s"], 2),
    }


def measure(*, nodes: int, jobs: int, plans: int, clients: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fairshard-scale-") as name, RedisProcess(Path(name) / "redis") as redis:
        folder, authority, server = Path(name), Authority(), Server(redis)
        env = {
            "REDIS_URL": redis.url, "FAIRSHARD_DATA": name, "NODE_ID": "api",
            "FAIRSHARD_JOIN_KEY": authority.join_key, "FAIRSHARD_MAX_QUEUE": "1000000",
            "FAIRSHARD_MAX_JOBS_PER_TOKEN": "1000000",
        }  # fmt: skip
        settings, queue = Settings.from_env(env), QueueSettings.from_env(env)
        services = Services(settings=settings, queue=queue)
        service_jobs = Jobs(services)
        empty = server.memory()
        report: dict[str, Any] = {"idle_worker": idle(env, folder, server, authority)}
        report |= fill(service_jobs, services, count=jobs, plans=plans)
        simulated = Nodes(redis, authority, nodes, queue)
        simulated.announce()
        report["redis_mb"] = round((server.memory() - empty) / 1e6, 1)
        before = server.look()
        simulated.announce()
        after = server.look()
        report["announcement"] = {
            "commands": round((after["commands"] - before["commands"]) / nodes, 1),
            "bytes": round((after["bytes"] - before["bytes"]) / nodes),
            "redis_ms": round(1000 * (after["cpu_s"] - before["cpu_s"]) / nodes, 3),
        }
        every_s = queue.node_ttl_s / 3
        done = threading.Event()
        with Web(env=env, directory=folder) as web, simulated.announcing(every_s):
            until(lambda: web.ask("GET", "/api/nodes?limit=1")[0] == 200, what="the API answers")
            heard: dict[str, Any] = {}
            assert web.process is not None
            api = [psutil.Process(web.process.pid), *psutil.Process(web.process.pid).children()]
            before, cpu_s = server.look(), sum(sum(process.cpu_times()[:2]) for process in api)
            report["answers"] = answers(web, clients=clients, last=max(0, nodes - 100))
            after, cpu_s = server.look(), sum(sum(process.cpu_times()[:2]) for process in api) - cpu_s
            calls = sum(took["calls"] for took in report["answers"].values())
            report["api_cpu_ms_a_call"] = round(1000 * cpu_s / calls, 1)
            listener = threading.Thread(
                target=lambda: heard.update(delay(web, service_jobs, services, done.is_set)), daemon=True
            )
            listener.start()
            done.wait(8)
            done.set()
            listener.join(30)
            report["event_stream"] = heard
            report["api_mb"] = round(sum(process.memory_info().rss for process in api) / 1e6)
        seconds = after["at"] - before["at"]
        report["redis_share"] = round((after["cpu_s"] - before["cpu_s"]) / seconds, 3)
        report["redis_commands_per_s"] = round((after["commands"] - before["commands"]) / seconds)
        report["redis_bytes_per_s_a_node"] = round((after["bytes"] - before["bytes"]) / seconds / nodes)
        return report


def targets(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """What was to be reached, and whether it was."""
    found: list[tuple[str, bool]] = []
    for size, part in report.items():
        for name, took in part["answers"].items():
            found.append((f"{size}: {name} answers in {took['p50_ms']} ms at p50 <= 100", took["p50_ms"] <= 100))
        spent = part["announcement"]["redis_ms"]
        found.append((f"{size}: an announcement takes {spent} ms of Redis' time <= 1", spent <= 1))
    if len(report) == 2:
        tenth, whole = report.values()
        for name in ("redis_mb", "redis_share"):
            ratio = whole[name] / max(tenth[name], 1e-3)
            found.append((f"{name} at ten times the size: {ratio:.1f} times <= 12", ratio <= 12))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tenth alone")
    for name, default in (("nodes", 2000), ("jobs", 10_000), ("plans", 5000), ("clients", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    quick = arguments.pop("quick")
    report = {"tenth": measure(**{name: max(1, value // 10) for name, value in arguments.items()})}
    if not quick:
        report["whole"] = measure(**arguments)
    print(json.dumps({"cores": os.cpu_count(), **report}, indent=1))
    reached = targets(report)
    for what, good in reached:
        print(f"{'reached' if good else 'MISSED '}  {what}", file=sys.stderr)
    sys.exit(not all(good for _, good in reached))


if __name__ == "__main__":
    main()
