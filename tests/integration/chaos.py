"""The chaos suite: jobs run while everything that they stand on is killed, stopped, cut off, doubled and dropped.

    python -m pytest tests/integration/test_chaos.py                       the short form
    python tests/integration/chaos.py --jobs 300 --seconds 240 --seed 1    `make chaos`

Seeded: the same seed draws the same accidents in the same order (what they hit depends on the machine's speed).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import redis

_TESTS = Path(__file__).resolve().parents[1]
if str(_TESTS) not in sys.path:
    sys.path.insert(0, str(_TESTS))

from checkpoints import models_dir  # noqa: E402
from running import Service, Worker, until  # noqa: E402

from planner.errors import Unavailable  # noqa: E402
from workers.ledger import ENDED  # noqa: E402

MODELS = ("llama", "llama_tied", "qwen2", "gemma2", "gpt2", "bert")
SHORT = {
    "FAIRSHARD_LEASE_S": "4",
    "FAIRSHARD_NODE_TTL_S": "6",
    "FAIRSHARD_GRACE_S": "5",
    "FAIRSHARD_MAX_ATTEMPTS": "12",
}


class Chaos:
    """One run: a service, jobs, and accidents drawn by a seeded generator."""

    def __init__(self, directory: Path, *, seed: int, jobs: int, seconds: float) -> None:
        self.random = random.Random(seed)
        self.wanted = jobs
        self.seconds = seconds
        self.service = Service(directory, models_dir=models_dir(), env=SHORT, appendonly=True)
        self.accidents: Counter[str] = Counter()
        self.accepted: list[str] = []
        self.refused = 0
        self._over = threading.Event()

    # -- accidents ---------------------------------------------------------------------------------------------------
    def _worker(self) -> Worker:
        return self.random.choice(self.service.all_workers)

    def kill_worker(self) -> None:
        worker = self._worker()
        worker.kill()
        time.sleep(self.random.random())
        worker.start()

    def kill_child(self) -> None:
        worker = self._worker()
        if worker.alive():
            for pid in worker.children():
                psutil.Process(pid).kill()

    def pause_worker(self) -> None:
        worker = self._worker()
        if worker.alive():
            worker.signal(signal.SIGSTOP)
            time.sleep(self.random.uniform(0.5, 7))
            worker.signal(signal.SIGCONT)

    def term_worker(self) -> None:
        worker = self._worker()
        if worker.alive():
            worker.stop()
            worker.start()

    def kill_redis(self) -> None:
        # everysec: what was written a second ago is on disk; what was written since comes back from the journal.
        self.service.redis.kill()
        time.sleep(self.random.uniform(0, 2))
        self.service.redis.start()

    def pause_redis(self) -> None:
        process = self.service.redis.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(0.2, 3))
        process.send_signal(signal.SIGCONT)

    def drop_connections(self) -> None:
        with self.service.redis.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub", skipme=True)

    def lose_messages(self) -> None:
        """Drop the next message of each queue, and double another."""
        with self.service.redis.client() as client:
            for queue in ("compute", "planner", *(f"node.{node_id}" for node_id in self.service.nodes)):
                key = f"fairshard:celery:{queue}"
                messages: list[Any] = list(client.lrange(key, 0, -1))
                if messages and self.random.random() < 0.5:
                    client.rpop(key)
                elif messages:
                    client.lpush(key, messages[-1])

    def misfortune(self) -> None:
        """One accident."""
        accident = self.random.choices(
            [
                self.kill_worker, self.kill_child, self.pause_worker, self.term_worker, self.kill_redis,
                self.pause_redis, self.drop_connections, self.lose_messages,
            ],
            [3, 4, 2, 1, 2, 1, 2, 6],
        )[0]  # fmt: skip
        self.accidents[accident.__name__] += 1
        # What it should have hit may be down already.
        with contextlib.suppress(redis.RedisError, psutil.NoSuchProcess):
            accident()

    # -- users -------------------------------------------------------------------------------------------------------
    def submit_all(self) -> None:
        """Submit jobs over the whole time; what is refused is asked for again, as clients do."""
        jobs = self.service.jobs(journal=True)
        dice = random.Random(self.wanted)
        for n in range(self.wanted):
            while not self._over.is_set():
                try:
                    view = jobs.submit_request(
                        f"tiny/{dice.choice(MODELS)}", sequence_length=1 + n, process={"split": dice.random() < 0.7}
                    )
                except Unavailable:
                    self.refused += 1
                    time.sleep(0.2)
                    continue
                self.accepted.append(view["job_id"])
                break
            time.sleep(self.seconds / self.wanted * dice.random() * 1.5)

    def replay(self) -> None:
        """What the web process does beside serving."""
        jobs = self.service.jobs(journal=True)
        while not self._over.wait(2):
            try:
                jobs.replay()
            except Unavailable:
                continue

    # -- the run -----------------------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        """Run it, and check that nothing was lost, doubled or left behind.

        Returns:
            Figures for the report.
        """
        with self.service:
            users = [threading.Thread(target=target, daemon=True) for target in (self.submit_all, self.replay)]
            for user in users:
                user.start()
            end = time.monotonic() + self.seconds
            while time.monotonic() < end:
                self.misfortune()
                time.sleep(self.random.expovariate(1 / 1.5))
            for worker in self.service.all_workers:
                if not worker.alive():
                    worker.start()
            users[0].join(timeout=120)
            jobs = self.service.jobs(journal=True)

            def unfinished() -> list[str]:
                try:
                    return [job_id for job_id in self.accepted if jobs.job(job_id)["state"] not in ENDED]
                except Unavailable:
                    return ["redis"]

            until(
                lambda: not unfinished(),
                what=lambda: (
                    f"{len(unfinished())} of {len(self.accepted)} unfinished; first: "
                    + json.dumps(jobs.job(unfinished()[0]))[:3000]
                    + self.service.logs()
                ),
                timeout_s=180,
                every_s=0.5,
            )
            self._over.set()
            return self.check(jobs)

    def check(self, jobs: Any) -> dict[str, Any]:
        """What must hold at the end."""
        assert len(self.accepted) == self.wanted, (len(self.accepted), self.wanted)
        states: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for job_id in self.accepted:
            view = jobs.job(job_id)
            states[view["state"]] += 1
            if view["state"] == "failed":
                reasons[view["error"]["message"][:200]] += 1
            if view["state"] == "done" and view["result"]["split"]:
                assert {shard["node_id"] for shard in view["result"]["shards"]} == set(view["result"]["node_ids"])
        # These models are good and there are attempts enough: no job has a reason to fail.
        assert states == {"done": self.wanted}, (states, reasons)
        from workers.splitter import verify

        shards = 0
        for node_id in self.service.nodes:
            folder = self.service.data / "nodes" / node_id / "shards"
            for path in folder.iterdir() if folder.is_dir() else []:
                if not path.name.startswith("."):
                    report = verify([path])
                    assert not report.problems, (path, report.problems)
                    shards += 1
        with self.service.redis.client() as client:
            keys = {str(key).removeprefix("fairshard:") for key in client.scan_iter("fairshard:*")}
        for gone in ("unfinished", "due", "flight", "nodes_in_use", "submitters"):
            assert gone not in keys, gone
        assert not [key for key in keys if key.startswith(("at:", "waiters:", "requests:", "token:"))]
        files = {worker.name: _open_files(worker) for worker in self.service.all_workers}
        assert max(files.values()) < 100, files
        return {
            "jobs": self.wanted,
            "shards_verified": shards,
            "refused_submissions": self.refused,
            "accidents": dict(sorted(self.accidents.items())),
            "attempts_lost": int(jobs.metrics().get("leases_expired_total", 0)),
            "resends": int(jobs.metrics().get("resends_total", 0)),
            "open_files_max": max(files.values()),
        }


def _open_files(worker: Worker) -> int:
    assert worker.process is not None
    return int(psutil.Process(worker.process.pid).num_fds())


def main() -> int:
    """The long form, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fairshard-chaos-") as directory:
        chaos = Chaos(Path(directory), seed=arguments.seed, jobs=arguments.jobs, seconds=arguments.seconds)
        print(json.dumps(chaos.run(), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
