"""In the main process of a node's worker: takes what the node is told of runs, and starts the runner to do it.

The runner is a process of its own, since it holds gigabytes and computes for long; it is started by the first
announcement and reads its orders from its standard input, a line each. When this process dies, however it dies, that
ends, and the runner ends with it: no memory stays behind.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
from typing import Any, Self

from planner.errors import FairshardError, NodeFailure
from workers.ledger.connection import reachable
from workers.runner.announcement import answer
from workers.runner.runs import Runs, error_json
from workers.service.services import Services

logger = logging.getLogger(__name__)

#: How long one look for messages blocks, in seconds: less than Redis may take for an answer.
_BLOCK_S = 1
#: What a runner gets to end by itself.
_GRACE_S = 5.0


class Herald:
    """Waits for what this node is told, in a thread, as long as the context is open."""

    def __init__(self, services: Services) -> None:
        self._runs = Runs(services)
        self._redis: Any = services.redis
        self._key = f"{services.queue.prefix}runner:{services.settings.node_id}"
        self._stopped = threading.Event()
        self._runner: subprocess.Popen[str] | None = None
        #: What the runner was given since it started: (what, run_id).
        self._given: list[tuple[str, str]] = []
        self._thread = threading.Thread(target=self._wait, name="fairshard-herald", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        runner = self._runner
        if runner is None or runner.stdin is None:
            return
        with contextlib.suppress(OSError):
            runner.stdin.close()
        try:
            runner.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            runner.kill()
            runner.wait()

    def _wait(self) -> None:
        while not self._stopped.is_set():
            try:
                with reachable():
                    found = self._redis.blpop([self._key], timeout=_BLOCK_S)
                self._mourn()
                if found is not None:
                    self._take(json.loads(found[1]))
            except FairshardError as error:
                logger.warning("no word of runs: %s", error)
                self._stopped.wait(1.0)
            except Exception:
                logger.exception("a message of a run was not taken")

    def _take(self, message: dict[str, Any]) -> None:
        if message["what"] == "announcement":
            answer(self._runs, message["run_id"], state="taken")
        elif message["what"] == "run":
            self._runs.taken(message["run_id"])
        elif message["what"] == "end" and (self._runner is None or self._runner.poll() is not None):
            return  # nothing is left to end
        line = json.dumps(message) + "\n"
        for _ in range(2):
            runner = self._living()
            try:
                assert runner.stdin is not None
                runner.stdin.write(line)
                runner.stdin.flush()
            except OSError:  # it was idle, and has just ended
                runner.wait()
                continue
            self._given.append((message["what"], message["run_id"]))
            return

    def _mourn(self) -> None:
        """Where the runner died, say so to whoever waits for it; what has ended stays as it is."""
        code = None if self._runner is None else self._runner.poll()
        if code is None or not self._given:
            return
        given, self._given = self._given, []
        node_id = self._runs.services.settings.node_id
        died = error_json(
            NodeFailure(f"the runner of node {node_id} died (status {code})", details={"node": node_id})
        )
        for what, run_id in given:
            if what == "run":
                self._runs.end(run_id, "failed", error=died)
            elif what == "announcement":
                answer(self._runs, run_id, state="refused", error=died)

    def _living(self) -> subprocess.Popen[str]:
        if self._runner is None or self._runner.poll() is not None:
            self._given = []
            self._runner = subprocess.Popen(
                [sys.executable, "-m", "workers.runner"], stdin=subprocess.PIPE, text=True
            )
            logger.info("runner %d starts", self._runner.pid)
        return self._runner
