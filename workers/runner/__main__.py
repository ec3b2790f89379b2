"""The runner: one process a node that holds stages, sessions and caches. Started by the node's worker, ended with it.

python -m workers.runner        orders on standard input, a line of JSON each; settings from the environment
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from planner.errors import FairshardError
from workers.runner.announcement import answer, check_announcement
from workers.runner.runs import BEAT_S, Runs, error_json
from workers.service.services import Services
from workers.service.tokens import secret_key
from workers.settings import QueueSettings, RunSettings, Settings

logger = logging.getLogger(__name__)

#: Between two looks whether there is anything left to do, in seconds.
_LOOK_S = 1.0


class Runner:
    """The process' parts; torch is loaded with the first order, after this node has said that it lives."""

    def __init__(self) -> None:
        self.settings, self.services = (
            RunSettings.from_env(),
            Services(settings=Settings.from_env(), queue=QueueSettings.from_env()),
        )
        self.runs = Runs(self.services)
        self.token = _token(self.services.settings)
        self._made = threading.Lock()
        self._parts: tuple[Any, Any] | None = None
        #: Runs that ended before they began, the last of them: one may still be loading here.
        self._over: deque[str] = deque(maxlen=1000)
        #: Orders that are being obeyed.
        self.busy = 0
        self.used_at = time.monotonic()

    def _sessions(self) -> tuple[Any, str]:
        """The sessions, and the address where other nodes reach them."""
        with self._made:
            if self._parts is None:
                from workers.runner import drive  # noqa: F401  (loads what the first run needs)
                from workers.runner.server import RunnerServer
                from workers.runner.sessions import Sessions
                from workers.runner.stages import Stages

                own = self.services.settings
                stages = Stages(own.shards_dir, memory_bytes=self._memory_bytes())
                sessions = Sessions(stages, node_id=own.node_id, token=self.token, settings=self.settings)
                url = self.settings.url or _beside(own.peer_url)
                server = RunnerServer(sessions, token=self.token, url=url, settings=self.settings).__enter__()
                logger.info("runner of node %s serves runs at %s", own.node_id, server.url)
                self._parts = (sessions, server.url)
            return self._parts

    def _memory_bytes(self) -> int | None:
        """What this node offers, as it announced itself."""
        own = self.services.settings
        said = next((info for info in self.services.registry.alive() if info["node_id"] == own.node_id), None)
        return own.memory_bytes if said is None else int(said["memory_bytes"])

    def obey(self, message: Mapping[str, Any]) -> None:
        """Do what an order says; what goes wrong is told to whoever waits for it."""
        self.busy += 1
        try:
            if message["what"] == "run":
                self._lead(message["run_id"])
            elif message["what"] == "announcement":
                self._join(message)
            elif message["what"] == "wake":
                self._sessions()
            else:
                self._over.append(message["run_id"])
                if self._parts is not None:
                    self._parts[0].end(message["run_id"])
        except Exception:
            logger.exception("an order was not obeyed")
        finally:
            self.busy -= 1
            self.used_at = time.monotonic()

    def _lead(self, run_id: str) -> None:
        beating = _Repeated(lambda: self.runs.beat(run_id))
        try:
            with beating:
                from workers.runner.drive import Run

                sessions, url = self._sessions()
        except Exception as error:
            logger.exception("run %s was not begun", run_id)
            self.runs.end(run_id, "failed", error=error_json(error))
            return
        Run(self.runs, sessions, run_id=run_id, url=url, token=self.token, settings=self.settings).lead()

    def _join(self, message: Mapping[str, Any]) -> None:
        """Take part in a run that another node leads."""
        body, run_id = message["body"], message["body"]["run_id"]
        try:
            plan = self.services.plans.get(body["plan_id"])["megaphone_plan"]
            check_announcement(self.runs, message, start_node=plan["start_node"])
            with _Repeated(lambda: answer(self.runs, run_id, state="loading")):
                from workers.runner.drive import described

                sessions, url = self._sessions()
                asked = {name: body[name] for name in ("batch", "prompt", "more", "padded")}
                part = sessions.make(run_id, body["plan_id"], start=body["from"], **asked)
                said = described(part.loaded, url)
            if run_id in self._over:
                sessions.end(run_id)
                return
            answer(self.runs, run_id, state="ready", **said)
        except Exception as error:
            if not isinstance(error, FairshardError):
                logger.exception("run %s cannot be joined", run_id)
            answer(self.runs, run_id, state="refused", error=error_json(error))

    def idle(self) -> bool:
        """End what is over; whether nothing is left to do here."""
        if self._parts is None:
            return not self.busy and time.monotonic() - self.used_at > self.settings.idle_s
        sessions = self._parts[0]
        left = sessions.sweep()
        keep: Any = ()
        with contextlib.suppress(FairshardError):
            keep = self.runs.deployed().keys()
            loaded = sessions.stages.sweep(keep=keep, idle_s=self.settings.idle_s)
            if not loaded and not left and not self.busy:
                return time.monotonic() - self.used_at > self.settings.idle_s
        return False


class _Repeated:
    """Calls something now and again until the `with` block is left; that Redis is away is nothing to it."""

    def __init__(self, call: Any) -> None:
        self._call, self._left = call, threading.Event()
        self._thread = threading.Thread(target=self._again, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _again(self) -> None:
        while not self._left.is_set():
            with contextlib.suppress(FairshardError):
                self._call()
            self._left.wait(BEAT_S)


def _token(settings: Settings) -> str:
    """What nodes of one service show each other: FAIRSHARD_PEER_TOKEN, else made of the secret that all share."""
    return settings.peer_token or hmac.new(secret_key(settings), b"fairshard runner 1", "sha256").hexdigest()


def _beside(peer_url: str | None) -> str:
    """Where runs are served unless FAIRSHARD_RUN_URL says so: the port after that of the shards."""
    if peer_url is None:
        return "http://127.0.0.1:0"
    parts = urlsplit(peer_url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"http://{host}:{(parts.port or 80) + 1}"


def main() -> int:
    """Obey orders until standard input ends, the worker is gone, or nothing was to do for long."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s runner %(name)s: %(message)s", force=True
    )
    # Ctrl-C in a terminal reaches the worker as well, which ends this process when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    try:
        runner = Runner()
    except FairshardError as error:
        logger.critical("%s", error)
        return 1

    def read() -> None:
        for line in sys.stdin:
            threading.Thread(target=runner.obey, args=(json.loads(line),), daemon=True).start()
        logger.info("the worker ended, and so does its runner")
        _leave()

    threading.Thread(target=read, daemon=True, name="orders").start()
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
        try:
            if runner.idle():
                logger.info("nothing was to do for %g s: the runner ends", runner.settings.idle_s)
                break
        except Exception:
            logger.exception("looking after sessions failed")
    _leave()
    return 0


def _leave() -> None:
    # At once: threads that compute would hold a normal end up, and there is nothing to save.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
