"""The chaos suite: jobs run while everything that they stand on is killed, stopped, cut off, doubled and dropped.

    python -m pytest tests/chaos/test_chaos.py                       the short form
    python tests/chaos/suite.py --jobs 300 --seconds 240 --seed 1    `make chaos`

Users post jobs by HTTP to gunicorn; models and metadata are on a Hub in its own process, which answers 429, 503, or
half. Of the messages, 10 % are doubled and 5 % dropped. Seeded: the same seed draws the same accidents in the same
order (what they hit depends on the machine's speed).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import redis

_TESTS = Path(__file__).resolve().parents[1]
if str(_TESTS) not in sys.path:
    sys.path.insert(0, str(_TESTS))

from support.checkpoints import checkpoint  # noqa: E402
from support.running import BlackHole, Service, Web, Worker, until  # noqa: E402

from workers.ledger.steps import ENDED  # noqa: E402

MODELS = ("llama", "llama_tied", "qwen2", "gemma2", "gpt2", "bert")
METADATA = "tester/metadata"
SHORT = {
    "FAIRSHARD_LEASE_S": "4",
    "FAIRSHARD_NODE_TTL_S": "6",
    "FAIRSHARD_GRACE_S": "5",
    # Accidents come faster here than anywhere: a good job must not run out of attempts.
    "FAIRSHARD_MAX_ATTEMPTS": "20",
}
#: What a process may have grown by over the quiet jobs at the end.
LEVEL_FILES, LEVEL_BYTES = 8, 48 << 20


class ChaosHub:
    """`chaos_hub.py` as a process."""

    def __init__(self, repos: Mapping[str, Path]) -> None:
        arguments = [f"{name}={folder}" for name, folder in repos.items()]
        self._process = subprocess.Popen(
            [sys.executable, str(_TESTS / "chaos" / "chaos_hub.py"), *arguments],
            env=os.environ | {"PYTHONPATH": str(_TESTS)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self._ask()
        self.url, self.token = said["url"], said["token"]

    def _ask(self, **given: Any) -> Any:
        if given:
            self.tell(**given)
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def tell(self, **given: Any) -> None:
        """A fault, or {"clear": true}."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(given) + "\n")
        self._process.stdin.flush()

    def history(self) -> list[list[tuple[str, str]]]:
        """What each commit to the metadata changed: (path, digest), oldest first."""
        return [[(path, digest) for path, digest in commit] for commit in self._ask(history=METADATA)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        # Waits, and closes its pipes.
        self._process.communicate()


class Chaos:
    """One run: a service, jobs, and accidents drawn by a seeded generator."""

    def __init__(self, directory: Path, *, seed: int, jobs: int, seconds: float) -> None:
        self.random = random.Random(seed)
        self.seed, self.wanted, self.seconds = seed, jobs, seconds
        self.log = directory / "events.jsonl"
        self.hub = ChaosHub({f"tiny/{name}": checkpoint(name) for name in MODELS})
        env = SHORT | {
            "PYTHONPATH": os.pathsep.join((str(_TESTS / "chaos"), str(_TESTS.parent))),
            "CHAOS_LOG": str(self.log),
            "CHAOS_DOUBLED": "0.1",
            "CHAOS_DROPPED": "0.05",
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": self.hub.token,
            "HF_HOME": str(directory / "hf"),
            "METADATA_REPO": METADATA,
        }
        self.service = Service(directory, env=env, appendonly=True, app="chaos_app")
        self.hole = BlackHole(self.service.redis.port)
        behind = {"REDIS_URL": f"redis://127.0.0.1:{self.hole.port}/0"}
        for worker in self.service.all_workers:
            worker.env |= behind
        self.web = Web(env=self.service.env | behind, directory=directory / "logs", app="chaos_app:web")
        self.accidents: Counter[str] = Counter()
        #: job -> what was asked for.
        self.accepted: dict[str, dict[str, Any]] = {}
        self.refused: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()

    # -- accidents ---------------------------------------------------------------------------------------------------
    def _worker(self) -> Worker:
        return self.random.choice(self.service.all_workers)

    def kill_worker(self) -> None:
        self._kill(self._worker())

    def _kill(self, worker: Worker) -> None:
        worker.kill()
        time.sleep(self.random.random())
        worker.start()

    def lose_node(self) -> None:
        """A node is away for so long that its steps are given to others."""
        worker = self.random.choice(list(self.service.workers.values()))
        worker.kill()
        time.sleep(self.random.uniform(9, 12))
        worker.start()

    def kill_reconciler(self) -> None:
        with self.service.redis.client() as client:
            _, pid, _ = str(client.get("fairshard:reconciler") or "::").rsplit(":", 2)
        for worker in self.service.all_workers:
            if worker.process is not None and str(worker.process.pid) == pid:
                self._kill(worker)

    def kill_planner(self) -> None:
        self._kill(self.service.planner)

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

    def pause_child(self) -> None:
        worker = self._worker()
        if worker.alive():
            for pid in worker.children():
                psutil.Process(pid).send_signal(signal.SIGSTOP)
                time.sleep(self.random.uniform(0.5, 7))
                psutil.Process(pid).send_signal(signal.SIGCONT)

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

    def kill_web(self) -> None:
        self.web.kill()
        time.sleep(self.random.random())
        self.web.start()

    def pause_web(self) -> None:
        assert self.web.process is not None
        os.killpg(self.web.process.pid, signal.SIGSTOP)
        time.sleep(self.random.uniform(0.5, 4))
        os.killpg(self.web.process.pid, signal.SIGCONT)

    def black_hole(self) -> None:
        self.hole.swallow()

    def drop_connections(self) -> None:
        with self.service.redis.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub", skipme=True)

    def bad_hub(self) -> None:
        fault: dict[str, Any] = self.random.choice(
            [
                {"kind": "status", "code": 429, "retry_after": 1, "times": 3},
                {"kind": "status", "code": 503, "times": 3},
                {"kind": "cut", "where": "cdn", "after_bytes": 1000, "times": 3},
                {"kind": "reset", "times": 2},
                {"kind": "lost_reply", "method": "POST", "times": 1},
                {"kind": "trickle", "where": "cdn", "bytes_per_s": 30_000, "times": 3},
            ]
        )
        self.hub.tell(**fault)

    def misfortune(self) -> None:
        """One accident."""
        weights: dict[Callable[[], None], int] = {
            self.kill_worker: 3, self.lose_node: 1, self.kill_reconciler: 1, self.kill_planner: 1, self.kill_child: 4,
            self.pause_worker: 2, self.pause_child: 1, self.term_worker: 1, self.kill_redis: 2, self.pause_redis: 1,
            self.kill_web: 2, self.pause_web: 1, self.black_hole: 2, self.drop_connections: 2, self.bad_hub: 6,
        }  # fmt: skip
        accident = self.random.choices(list(weights), list(weights.values()))[0]
        self.accidents[accident.__name__] += 1
        # What it should have hit may be down already.
        with contextlib.suppress(redis.RedisError, psutil.NoSuchProcess, ProcessLookupError):
            accident()

    # -- users -------------------------------------------------------------------------------------------------------
    def submit(self, first: int, last: int, *, seed: int) -> None:
        """Post jobs over the whole time; what is refused is asked for again, as clients do."""
        dice = random.Random(seed)
        for n in range(first, last):
            body: dict[str, Any] = {"model_name": f"tiny/{dice.choice(MODELS)}", "sequence_length": 1 + n}
            if dice.random() < 0.7:
                body["process"] = {"split": dice.random() < 0.7}
            while not self._over.is_set():
                status, answer = self.web.ask("POST", "/api/request", body)
                if status == 202:
                    with self._lock:
                        self.accepted[answer["job_id"]] = body
                    break
                assert status in {0, 503}, (status, answer)
                self.refused[status] += 1
                time.sleep(0.2)
            time.sleep(self.seconds / (last - first) * dice.random() * 1.5)

    def state(self, job_id: str) -> str:
        """A job's state by HTTP: an accepted job is never unknown."""
        status, answer = self.web.ask("GET", f"/api/jobs/{job_id}")
        assert status in {0, 200, 503}, (status, answer)
        return str(answer["state"]) if status == 200 else "unseen"

    # -- the run -----------------------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        """Run it, and check that nothing was lost, doubled or left behind.

        Returns:
            Figures for the report.
        """
        begin = time.monotonic()
        with self.hub, self.hole, self.service, self.web:
            half = self.wanted // 2
            users = [
                threading.Thread(target=self.submit, args=span, kwargs={"seed": self.seed + n}, daemon=True)
                for n, span in enumerate([(0, half), (half, self.wanted)])
            ]
            for user in users:
                user.start()
            end = time.monotonic() + self.seconds
            # A slow machine takes its time for the few accidents of a short run.
            while time.monotonic() < end or sum(self.accidents.values()) < 3:
                self.misfortune()
                time.sleep(self.random.expovariate(1 / 1.5))
            self.hub.tell(clear=True)
            for worker in self.service.all_workers:
                if not worker.alive():
                    worker.start()
            for user in users:
                user.join(timeout=120)
            assert len(self.accepted) == self.wanted, (len(self.accepted), self.wanted)
            self.settle(180 + self.wanted)
            settled = time.monotonic() - begin
            level = self.check_level()
            self._over.set()
            return {"seconds": round(settled)} | self.check() | level

    def settle(self, timeout_s: float) -> None:
        """Wait until every accepted job ended."""
        open_jobs = set(self.accepted)

        def unfinished() -> set[str]:
            for job_id in list(open_jobs):
                state = self.state(job_id)
                if state in ENDED:
                    open_jobs.discard(job_id)
                elif state == "unseen":
                    break
            return open_jobs

        until(
            lambda: not unfinished(),
            what=lambda: (
                f"{len(open_jobs)} of {len(self.accepted)} unfinished; first: "
                + json.dumps(self.web.ask("GET", f"/api/jobs/{min(open_jobs)}"))[:3000]
                + self.service.logs()
            ),
            timeout_s=timeout_s,
            every_s=0.5,
        )

    def check_level(self) -> dict[str, Any]:
        """Quiet jobs, before and after which the processes are as large as they were."""

        def sizes() -> dict[str, tuple[int, int]]:
            named = {worker.name: worker.process for worker in self.service.all_workers}
            named |= {"redis": self.service.redis.process, "web": self.web.process}
            found = {}
            for name, process in named.items():
                assert process is not None
                seen = psutil.Process(process.pid)
                # Of gunicorn the children serve; a pool's child is replaced when it dies.
                seen = seen.children()[0] if name == "web" else seen
                found[name] = (seen.num_fds(), seen.memory_info().rss)
            return found

        quiet = max(4, self.wanted // 10)
        # The first ones load what each process needs once, and reopen what accidents closed.
        for first in (self.wanted, self.wanted + quiet):
            before = sizes()
            seconds, self.seconds = self.seconds, 0.0
            self.submit(first, first + quiet, seed=first)
            self.seconds = seconds
            self.settle(120 + quiet)
        after = sizes()
        grown = {name: (after[name][0] - files, after[name][1] - size) for name, (files, size) in before.items()}
        bounds = (LEVEL_FILES, LEVEL_BYTES)
        assert all(files <= bounds[0] and size <= bounds[1] for files, size in grown.values()), grown
        return {
            "open_files_max": max(files for files, _ in after.values()),
            "rss_mb": {name: size >> 20 for name, (_, size) in after.items()},
            "grown_over_quiet_jobs": {
                name: f"{files} files, {size >> 20} MB" for name, (files, size) in grown.items()
            },
        }

    # -- what must hold at the end -----------------------------------------------------------------------------------
    def check(self) -> dict[str, Any]:
        """Nothing lost, doubled, half-written or left behind."""
        jobs = self.service.jobs()
        states: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for job_id, body in self.accepted.items():
            view = jobs.job(job_id)
            states[view["state"]] += 1
            if view["state"] == "failed":
                reasons[view["error"]["message"][:200]] += 1
                continue
            assert view["result"]["metadata"]["sequence_length"] == body["sequence_length"]
            if (body.get("process") or {}).get("split"):
                assert {shard["node_id"] for shard in view["result"]["shards"]} == set(view["result"]["node_ids"])
        # These models are good and there are attempts enough: no job has a reason to fail.
        assert states == {"done": len(self.accepted)}, (states, reasons)
        metrics = jobs.metrics()
        return {
            "jobs": len(self.accepted),
            "refused_submissions": sum(self.refused.values()),
            "accidents": dict(sorted(self.accidents.items())),
            "leases_expired": int(metrics.get("leases_expired_total", 0)),
            "resends": int(metrics.get("resends_total", 0)),
            "nodes_lost": int(metrics.get("nodes_lost_total", 0)),
            **self.check_commits(),
            **self.check_shards(),
            **self.check_redis(),
        }

    def check_commits(self) -> dict[str, int]:
        """Each job's metadata was published once (every job has another sequence length, thus another path)."""
        history = self.hub.history()
        touched = Counter(path for commit in history for path, _ in commit)
        profiles = {path: times for path, times in touched.items() if path.startswith("profiles/")}
        assert len(profiles) == len(self.accepted), (len(profiles), len(self.accepted))
        assert set(profiles.values()) == {1}, [item for item in profiles.items() if item[1] > 1]
        assert not [commit for commit in history[1:] if not commit], "a commit that changes nothing"
        plans = sum(path.startswith("plans/") for path in touched)
        return {"metadata_commits": sum(profiles.values()), "plans": plans}

    def check_shards(self) -> dict[str, int]:
        """Each shard was given its name once, is whole, and nothing half-written lies beside it."""
        from workers.splitter import verify

        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        renamed = Counter(
            line["target"]
            for line in lines
            if line["event"] == "rename" and Path(line["target"]).parent.name == "shards"
            if not Path(line["target"]).name.startswith(".")
        )
        assert set(renamed.values()) <= {1}, [item for item in renamed.items() if item[1] > 1]
        shards = 0
        for node_id in self.service.nodes:
            folder = self.service.data / "nodes" / node_id / "shards"
            for path in folder.iterdir() if folder.is_dir() else []:
                if not path.name.startswith("."):
                    report = verify([path])
                    assert not report.problems, (path, report.problems)
                    shards += 1
        until(
            lambda: not [*self.service.data.rglob("*.partial*"), *self.service.data.rglob("*.tmp")],
            what=lambda: str([*self.service.data.rglob("*.partial*"), *self.service.data.rglob("*.tmp")]),
        )
        messages = Counter(line["times"] for line in lines if line["event"] == "message")
        return {
            "shards_verified": shards,
            "messages": sum(messages.values()),
            "messages_dropped": messages[0],
            "messages_doubled": messages[2],
        }

    def check_redis(self) -> dict[str, int]:
        """No queue and no index is left behind."""
        queues = ("compute", "planner", *(f"node.{node_id}" for node_id in self.service.nodes))
        with self.service.redis.client() as client:
            until(
                lambda: not any(client.exists(f"fairshard:celery:{queue}") for queue in queues),
                what=lambda: str({queue: client.llen(f"fairshard:celery:{queue}") for queue in queues}),
            )
            keys = {str(key).removeprefix("fairshard:") for key in client.scan_iter("fairshard:*")}
            unacked = int(client.hlen("fairshard:celery:unacked"))
        for gone in ("unfinished", "due", "flight", "nodes_in_use", "submitters"):
            assert gone not in keys, gone
        left = ("at:", "waiters:", "requests:", "token:", "payload:")
        assert not [key for key in keys if key.startswith(left)]
        known = (
            "job:",
            "step:",
            "events:",
            "over:",
            "plan:",
            "plans:",
            "node:",
            "celery:celery-task-meta-",
            "celery:_kombu.binding",
        )
        others = {key for key in keys if not key.startswith(known)}
        assert len(others) < 40, others
        return {"keys": len(keys), "unacknowledged_messages": unacked}


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
