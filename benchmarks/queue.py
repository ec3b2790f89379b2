"""What the ledger costs: steps a second against raw Celery no-ops, growth with workers, and a large backlog.

    python benchmarks/queue.py [--steps 2000] [--processes 1,2,4,8] [--backlog 100000]

Prints one JSON object. Everything runs on this machine: the figures grow with its cores.
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

from running import RedisProcess, until  # noqa: E402

from workers.ledger import Ledger, StepSpec  # noqa: E402

CHAIN = 4


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
    env = os.environ | {"REDIS_URL": redis.url, "FAIRSHARD_DATA": str(directory), "REMAP_SIGTERM": "SIGQUIT"}
    (directory / "path").mkdir(exist_ok=True)
    # A folder with the app alone: benchmarks/ itself has a queue.py that would hide the standard library's.
    (directory / "path" / "queue_app.py").write_bytes((_ROOT / "benchmarks" / "queue_app.py").read_bytes())
    env["PYTHONPATH"] = str(directory / "path")
    os.environ.update(REDIS_URL=redis.url, FAIRSHARD_DATA=str(directory))
    from workers.celery_app import create_app, sender

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
                lambda goal=before + steps // CHAIN: int(client.hget(done, "jobs_done_total")) == goal,
                what="jobs are done", timeout_s=300, every_s=0.01,
            )  # fmt: skip
            found["steps_per_s"] = max(found.get("steps_per_s", 0), steps / (time.perf_counter() - begin))
    return {name: round(value, 1) for name, value in found.items()} | {
        "ratio": round(found["steps_per_s"] / found["noops_per_s"], 3)
    }


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
    return {
        "steps": float(steps),
        "bytes_per_step": round(memory / steps, 1),
        "reconciler_pass_s_nothing_due": round(quiet, 5),
        f"reconciler_pass_s_{count}_due": round(time.perf_counter() - begin, 5),
        "submits_per_s_empty": round(empty_rate, 1),
        "submits_per_s_with_backlog": round(full_rate, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--processes", default="1,2,4,8")
    parser.add_argument("--backlog", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fairshard-bench-") as name, RedisProcess(Path(name) / "redis") as redis:
        directory = Path(name)
        report: dict[str, Any] = {"cores": os.cpu_count(), "by_processes": {}}
        for processes in map(int, arguments.processes.split(",")):
            report["by_processes"][processes] = rates(redis, processes, arguments.steps, directory)
        report["backlog"] = backlog(redis, arguments.backlog)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
