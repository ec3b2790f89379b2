"""What the ledger costs: steps against raw Celery no-ops, growth with workers, POSTs, a large backlog, and a batch.

    python -m benchmarks.queue [--parts steps,post,backlog,batch] [--steps 2000] [--processes 1,2,4,8]
                               [--backlog 100000]

Run it as a module: by its path it would hide the standard library's `queue`. Prints one JSON object, and on stderr
each target with its figure. Everything runs on this machine, those who ask too: the figures grow with its cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "benchmarks")]
# Python puts this file's folder first, where queue.py hides the standard library's.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _ROOT / "benchmarks"]

from support.running import RedisProcess, Web, until  # noqa: E402

from workers.ledger.ledger import Ledger  # noqa: E402
from workers.ledger.steps import StepSpec  # noqa: E402

CHAIN = 4
#: Connections that post at the same time, and for how long, in seconds.
CONNECTIONS, POST_S = 32, 8.0


class Workers:
    """One Celery worker with a pool of `processes`."""

    def __init__(self, processes: int, *, env: dict[str, str], directory: Path) -> None:
        self.log = directory / f"worker-{processes}.log"
        arguments = ["-A", "queue_app", "worker", "-Q", "compute", "-c", str(processes), "--loglevel", "WARNING"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", *arguments], env=env, stdout=log, stderr=log
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def chain() -> list[StepSpec]:
    names = [f"step{n}" for n in range(CHAIN)]
    return [
        StepSpec(name=name, task="bench.step", queue="compute", after=tuple(names[i - 1 : i]))
        for i, name in enumerate(names)
    ]


def rates(redis: RedisProcess, processes: int, steps: int, directory: Path) -> dict[str, float]:
    env = os.environ | environment(redis, directory) | {"REMAP_SIGTERM": "SIGQUIT"}
    os.environ.update(REDIS_URL=redis.url, FAIRSHARD_DATA=str(directory))
    from workers.celery_app import create_app
    from workers.queue.messages import sender

    app = create_app()
    client: Any = redis.client()
    client.flushall()
    ledger = Ledger(redis.client(), wake=sender(app))
    found: dict[str, float] = {}
    with Workers(processes, env=env, directory=directory) as workers:
        done = "fairshard:counters"

        def warm() -> None:
            ledger.submit("request", model_name="a/b", params={}, steps=chain())

        warm()
        until(lambda: client.hget(done, "jobs_done_total") == "1", what=workers.log.read_text, timeout_s=60)
        # Counted alternately, the better of two: this machine does other things too.
        for _ in range(2):
            begin = time.perf_counter()
            with app.producer_or_acquire() as producer:
                for n in range(steps):
                    app.send_task(
                        "bench.noop", args=[f"{n:032x}", "step"], kwargs={"version": 1}, queue="compute",
                        producer=producer, retry=False, argsrepr="()", kwargsrepr="{}",
                    )  # fmt: skip
            until(
                lambda: not client.llen("fairshard:celery:compute") and not client.hlen("fairshard:celery:unacked"),
                what="no-ops are done", timeout_s=300, every_s=0.01,
            )  # fmt: skip
            found["noops_per_s"] = max(found.get("noops_per_s", 0), steps / (time.perf_counter() - begin))
            before = int(client.hget(done, "jobs_done_total"))
            begin = time.perf_counter()
            for _ in range(steps // CHAIN):
                warm()
            until(
                lambda goal=before + steps // CHAIN: int(client.hget(done, "jobs_done_total")) == goal,  # type: ignore[misc]
                what="jobs are done", timeout_s=300, every_s=0.01,
            )  # fmt: skip
            found["steps_per_s"] = max(found.get("steps_per_s", 0), steps / (time.perf_counter() - begin))
    return {name: round(value, 1) for name, value in found.items()} | {
        "ratio": round(found["steps_per_s"] / found["noops_per_s"], 3)
    }


def environment(redis: RedisProcess, directory: Path) -> dict[str, str]:
    (directory / "path").mkdir(exist_ok=True)
    # A folder with the apps alone: benchmarks/ itself has a queue.py that would hide the standard library's.
    (directory / "path" / "queue_app.py").write_bytes((_ROOT / "benchmarks" / "queue_app.py").read_bytes())
    found = {"REDIS_URL": redis.url, "FAIRSHARD_DATA": str(directory), "PYTHONPATH": str(directory / "path")}
    return found | {"FAIRSHARD_MAX_QUEUE": "10000000", "FAIRSHARD_MAX_JOBS_PER_TOKEN": "10000000"}


def posts(redis: RedisProcess, directory: Path) -> dict[str, Any]:
    """POST /api/request (journal on disk, ledger, message) against a view that validates the same body alone."""
    found: dict[str, Any] = {}
    redis.client().flushall()
    for name, app in (("validating", "queue_app:validating()"), ("service", "web.wsgi:app")):
        with Web(env=environment(redis, directory), directory=directory, app=app) as web:
            hammer(web.port, 1.0)
            found[name] = hammer(web.port, POST_S)
    found["ratio"] = round(found["service"]["posts_per_s"] / found["validating"]["posts_per_s"], 3)
    return found


def hammer(port: int, seconds: float) -> dict[str, float]:
    """Post over `CONNECTIONS` connections from a process of its own, which shares no lock with anybody."""
    script = _ROOT / "benchmarks" / "queue_load.py"
    command = [sys.executable, "-P", str(script), str(port), str(CONNECTIONS), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def backlog(redis: RedisProcess, steps: int) -> dict[str, float]:
    client: Any = redis.client()
    client.flushall()
    ledger = Ledger(redis.client())

    def submit(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            ledger.submit("request", model_name="owner/name", params={"sequence_length": 512}, steps=chain())
        return count / (time.perf_counter() - begin)

    submit(100)
    empty_rate = max(submit(500) for _ in range(3))
    client.flushall()
    before = int(client.info("memory")["used_memory"])
    submit(steps // CHAIN)
    memory = int(client.info("memory")["used_memory"]) - before
    begin = time.perf_counter()
    ledger.wake_overdue()
    quiet = time.perf_counter() - begin
    full_rate = max(submit(500) for _ in range(3))
    client.execute_command("WAIT", "0", "10")
    until(
        lambda: client.zcount("fairshard:due", 0, time.time() * 1000) > 1000, what="steps are overdue", timeout_s=60
    )
    begin = time.perf_counter()
    count = ledger.wake_overdue(limit=500)
    took = time.perf_counter() - begin
    return {
        "steps": float(steps),
        "bytes_per_step": round(memory / steps, 1),
        "reconciler_pass_s_nothing_due": round(quiet, 5),
        f"reconciler_pass_s_{count}_due": round(took, 5),
        "submits_per_s_empty": round(empty_rate, 1),
        "submits_per_s_with_backlog": round(full_rate, 1),
    }


def batch(redis: RedisProcess, directory: Path, entries: int = 10_000) -> dict[str, float]:
    """A batch of many models by HTTP: until it is accepted, and a page of it."""
    client: Any = redis.client()
    client.flushall()
    limits = {"FAIRSHARD_MAX_BATCH": "10000", "FAIRSHARD_MAX_JOBS_PER_TOKEN": "20000", "FAIRSHARD_MAX_QUEUE": "20000"}
    (directory / "batch").mkdir()
    env = environment(redis, directory / "batch") | limits
    with Web(env=env, directory=directory / "batch") as web:
        begun = time.monotonic()
        models = [f"owner/model-{n}" for n in range(entries)]
        status, answer = web.ask("POST", "/api/batches", {"models": models}, timeout_s=300)
        accepted_s = time.monotonic() - begun
        assert (status, answer["counts"]) == (202, {"queued": entries}), answer
        pages = []
        for cursor in range(0, entries, entries // 10):
            begun = time.monotonic()
            status, page = web.ask("GET", f"/api/batches/{answer['batch_id']}?cursor={cursor}")
            pages.append(time.monotonic() - begun)
            assert (status, len(page["jobs"])) == (200, 200)
    return {
        "entries": entries,
        "accepted_s": round(accepted_s, 2),
        "page_p50_s": round(sorted(pages)[len(pages) // 2], 3),
    }


def targets(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """What was to be reached, and whether it was."""
    found: list[tuple[str, bool]] = []
    by = report.get("by_processes", {})
    cores = os.cpu_count() or 1
    for processes, rate in by.items():
        found.append((f"steps / no-ops with {processes} processes: {rate['ratio']} >= 0.6", rate["ratio"] >= 0.6))
    if 1 in by and min(cores, max(by)) > 1:
        most = min(cores, max(by))
        growth = by[most]["steps_per_s"] / by[1]["steps_per_s"]
        raw = by[most]["noops_per_s"] / by[1]["noops_per_s"]
        found.append(
            (f"growth from 1 to {most} processes: {growth:.2f} >= 0.9 x the no-ops' {raw:.2f}", growth >= 0.9 * raw)
        )
    if "post" in report:
        post = report["post"]
        service = post["service"]
        # How many is a figure, not a target: the view that only validates has neither disk nor queue.
        said = f"POST: {service['posts_per_s']}/s, {post['ratio']} of a view that validates; p99"
        found.append((f"{said} {service['p99_ms']} ms <= 500", service["p99_ms"] <= 500))
        found.append(("POST: every one was answered 202", post["service"]["others"] == 0))
    if "backlog" in report:
        back = report["backlog"]
        ratio = back["submits_per_s_with_backlog"] / back["submits_per_s_empty"]
        found += [
            (f"{back['bytes_per_step']} bytes a step <= 4096", back["bytes_per_step"] <= 4096),
            (f"submits with the backlog / without: {ratio:.2f} >= 0.8", ratio >= 0.8),
            (
                f"reconciler's pass, nothing due: {back['reconciler_pass_s_nothing_due']} s <= 0.1",
                back["reconciler_pass_s_nothing_due"] <= 0.1,
            ),
            (
                f"reconciler's pass, 500 due: {back['reconciler_pass_s_500_due']} s <= 1",
                back["reconciler_pass_s_500_due"] <= 1,
            ),
        ]
    if many := report.get("batch"):
        found.append(
            (f"a batch of {many['entries']} accepted in {many['accepted_s']} s <= 60", many["accepted_s"] <= 60)
        )
        found.append((f"a page of it in {many['page_p50_s']} s <= 0.5", many["page_p50_s"] <= 0.5))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,post,backlog,batch")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", default="1,2,4,8")
    parser.add_argument("--backlog", type=int, default=100_000)
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    with tempfile.TemporaryDirectory(prefix="fairshard-bench-") as name, RedisProcess(Path(name) / "redis") as redis:
        directory = Path(name)
        report: dict[str, Any] = {"cores": os.cpu_count()}
        if "steps" in parts:
            report["by_processes"] = {
                processes: rates(redis, processes, arguments.steps, directory)
                for processes in map(int, arguments.processes.split(","))
            }
        if "post" in parts:
            report["post"] = posts(redis, directory)
        if "backlog" in parts:
            report["backlog"] = backlog(redis, arguments.backlog)
        if "batch" in parts:
            report["batch"] = batch(redis, directory)
    print(json.dumps(report, indent=1))
    for what, reached in targets(report):
        print(f"{'reached' if reached else 'MISSED '}  {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
