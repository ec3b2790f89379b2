"""Runs as everyone sees them: asked for by the API, written by the start node, kept in Redis for an hour.

run:<id>            hash: the request, the state, its end        run:<id>:events   stream: tokens, then the end
run:<id>:alive      as long as the start node works on it        runner:<node>     list: what a node is told
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from planner.errors import Conflict, NotFound, Unavailable
from workers.ledger.connection import reachable
from workers.ledger.steps import ENDED
from workers.service.services import Services

#: Seconds that a run is kept after its end, and at most before it.
_KEPT_S, _LONGEST_S = 3600, 86400
#: Until the start node has taken the run, and until its runner has begun, in milliseconds: silence is its death.
_TAKEN_MS, _STARTING_MS = 10_000, 60_000
BEAT_S = 0.4
#: The same while it loads: an import of torch lets no other thread speak for seconds.
LOADING_S = 10.0
#: A message that its node did not take within so many seconds is void.
MESSAGE_S = 60
#: Tokens of one run that are kept for those who listen.
_MOST_EVENTS = 100_000
#: How long one look for events blocks, in milliseconds: less than Redis may take for an answer.
_BLOCK_MS = 500


class Runs:
    """The runs of one service."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._prefix = services.queue.prefix

    @property
    def _redis(self) -> Any:
        return self.services.redis

    def _key(self, run_id: str, *parts: str) -> str:
        return ":".join((f"{self._prefix}run", run_id, *parts))

    # -- whoever asks ----------------------------------------------------------------------------------------------
    def submit(self, plan: Mapping[str, Any], request: Mapping[str, Any]) -> str:
        """Have a plan run; its id.

        Args:
            plan: Its JSON.
            request: `prompt`, `messages`, `token_ids` or `inputs`, and how to go on (see docs/running.md); or
                `deploy`, which only loads it.

        Raises:
            Conflict: If a node of the plan is not alive.
            Unavailable: If Redis cannot be reached.
        """
        chain = plan["megaphone_plan"]
        needed = {hop["node_id"] for hop in chain["chain"]}
        gone = sorted(needed - self.services.registry.alive_ids())
        if gone:
            raise Conflict(
                f"plan {plan['plan_id']} cannot run: node {gone[0]} is not alive ({len(gone)} of {len(needed)} are "
                "not); start it, or process the model again for a plan over the others",
                details={"plan_id": plan["plan_id"], "nodes": gone},
            )
        run_id = secrets.token_hex(16)
        run = {
            "run_id": run_id,
            "plan_id": plan["plan_id"],
            "model_name": plan["model_name"],
            "revision": plan.get("revision"),
            "start_node": chain["start_node"],
            "created_at": datetime.now(tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "request": dict(request),
        }
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.hset(self._key(run_id), mapping={"run": json.dumps(run), "state": "queued"})
            pipeline.expire(self._key(run_id), _LONGEST_S)
            pipeline.set(self._key(run_id, "alive"), "", px=_TAKEN_MS)
            pipeline.execute()
        self.tell(chain["start_node"], {"what": "run", "run_id": run_id})
        # Their runners start with the first's, not after it; what is to be done the announcement says.
        for node_id in needed - {chain["start_node"]}:
            self.tell(node_id, {"what": "wake", "run_id": run_id})
        return run_id

    def plan_of(self, model_name: str) -> dict[str, Any]:
        """The plan by which a model is run: the one that is deployed, else its newest.

        Raises:
            NotFound: If it has none.
        """
        name = self.services.canonical(model_name)
        for plan_id in self.deployed():
            with contextlib.suppress(NotFound):
                plan = self.services.plans.get(plan_id)
                if plan["model_name"] == name:
                    return plan
        return self.services.plans.latest(name)

    def tell(self, node_id: str, message: Mapping[str, Any]) -> None:
        """Put a message where the main process of a node's worker takes it from."""
        key = f"{self._prefix}runner:{node_id}"
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.rpush(key, json.dumps(message))
            pipeline.expire(key, MESSAGE_S)
            pipeline.execute()

    def run(self, run_id: str) -> dict[str, Any]:
        """The run as it was asked for.

        Raises:
            NotFound: If there is none.
        """
        with reachable():
            text = self._redis.hget(self._key(run_id), "run")
        if text is None:
            raise NotFound(f"there is no run {run_id[:64]!r}: runs are forgotten an hour after their end")
        return dict(json.loads(text))

    def view(self, run_id: str) -> dict[str, Any]:
        """`{run_id, plan_id, model_name, revision, state, created_at}`, with `result` or `error` once it has ended.

        A run whose start node went silent has failed.

        Raises:
            NotFound: If there is none.
        """
        run = self.run(run_id)
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.hgetall(self._key(run_id))
            pipeline.exists(self._key(run_id, "alive"))
            found, alive = pipeline.execute()
        state = found.get("state", "queued")
        if state not in ENDED and not alive:
            error = Unavailable(
                f"node {run['start_node']}, which leads the run, went silent",
                details={"node_id": run["start_node"]},
            )
            self.end(run_id, "failed", error=error_json(error))
            return self.view(run_id)
        shown = {name: value for name, value in run.items() if name != "request"} | {"state": state}
        return shown | {name: json.loads(found[name]) for name in ("result", "error") if name in found}

    def cancel(self, run_id: str) -> dict[str, Any]:
        """Have a run end (one that has ended stays as it is), and return it.

        Raises:
            NotFound: If there is none.
        """
        self.run(run_id)
        with reachable():
            self._redis.hset(self._key(run_id), "cancel", 1)
        return self.view(run_id)

    def follow(self, run_id: str, *, after: str = "0") -> Iterator[tuple[str, dict[str, Any]] | None]:
        """The run's events after that of id `after`, as they come, until it has ended; None where nothing came.

        Raises:
            NotFound: If there is no run.
            Unavailable: If Redis cannot be reached.
        """
        while True:
            with reachable():
                found = self._redis.xread({self._key(run_id, "events"): after}, count=200, block=_BLOCK_MS)
            if not found:
                view = self.view(run_id)
                if view["state"] in ENDED:
                    # Its events are read, or forgotten.
                    yield after, {"event": "ended", **view}
                    return
                yield None
                continue
            for after, fields in found[0][1]:  # noqa: PLR1704  (the last one seen is where the next look starts)
                event = json.loads(fields["json"])
                yield after, event
                if event["event"] == "ended":
                    return

    def wait(self, run_id: str, *, timeout_s: float) -> dict[str, Any]:
        """The run once it has ended, or as it is after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for event in self.follow(run_id):
            if event is not None and event[1]["event"] == "ended":
                break
            if time.monotonic() >= deadline:
                break
        return self.view(run_id)

    # -- deployed plans --------------------------------------------------------------------------------------------
    def deploy(self, plan_id: str, node_bytes: Mapping[str, int]) -> None:
        """Note that the plan's nodes keep it loaded, and what that takes on each."""
        with reachable():
            self._redis.hset(f"{self._prefix}deployed", plan_id, json.dumps(dict(node_bytes)))

    def undeploy(self, plan_id: str) -> bool:
        """Let the plan's nodes unload it once it is idle; whether it was deployed."""
        with reachable():
            return bool(self._redis.hdel(f"{self._prefix}deployed", plan_id))

    def deployed(self) -> dict[str, dict[str, int]]:
        """Plan -> node -> bytes that it takes there."""
        with reachable():
            found = self._redis.hgetall(f"{self._prefix}deployed")
        return {plan_id: json.loads(text) for plan_id, text in found.items()}

    def deployed_bytes(self) -> dict[str, int]:
        """Node -> bytes of the plans that it keeps loaded."""
        found: dict[str, int] = {}
        for taken in self.deployed().values():
            for node_id, size_bytes in taken.items():
                found[node_id] = found.get(node_id, 0) + size_bytes
        return found

    # -- the start node --------------------------------------------------------------------------------------------
    def taken(self, run_id: str) -> None:
        """Say that the node has the run, and starts what will run it."""
        with reachable():
            self._redis.set(self._key(run_id, "alive"), "", px=_STARTING_MS, xx=True)

    def beat(self, run_id: str, *, for_s: float = LOADING_S) -> str | None:
        """Say that the run is worked on, and will be for so many seconds at least.

        Returns:
            Why it should end ("cancelled", or the state in which it ended); None if it should not.
        """
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.set(self._key(run_id, "alive"), "", px=round(for_s * 1000))
            pipeline.hmget(self._key(run_id), "state", "cancel")
            _, (state, cancel) = pipeline.execute()
        if state in ENDED:
            return str(state)
        return "cancelled" if cancel or state is None else None

    def state(self, run_id: str, state: str) -> None:
        """Say that the run is `loading` or `running`."""
        self._say(run_id, {"event": state}, state=state)

    def tokens(self, run_id: str, token_ids: list[list[int]], text: list[str]) -> None:
        """Say what was generated: of each sequence the new ids, and the text that they add."""
        self._say(run_id, {"event": "tokens", "token_ids": token_ids, "text": text})

    def end(
        self,
        run_id: str,
        state: str,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """End a run; who says so first is believed."""
        key = self._key(run_id)
        with reachable():
            if not self._redis.hsetnx(key, "ended", time.time()):
                return
        said = {"result": result} if result is not None else {"error": error} if error is not None else {}
        fields = {name: json.dumps(value) for name, value in said.items()}
        self._say(run_id, {"event": "ended", "state": state, **said}, state=state, **fields)
        with reachable():
            for parts in ((), ("events",)):
                self._redis.expire(self._key(run_id, *parts), _KEPT_S)

    def _say(self, run_id: str, event: Mapping[str, Any], **fields: str) -> None:
        events = self._key(run_id, "events")
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            if fields:
                pipeline.hset(self._key(run_id), mapping=fields)
            pipeline.xadd(events, {"json": json.dumps(event)}, maxlen=_MOST_EVENTS, approximate=True)
            pipeline.expire(events, _LONGEST_S)
            pipeline.execute()


def error_json(error: BaseException) -> dict[str, Any]:
    """An error as it is kept: `{code, message, details}`."""
    from planner.errors import FairshardError

    if isinstance(error, FairshardError):
        return {"code": error.code, "message": str(error), "details": error.details}
    return {"code": "error", "message": f"{type(error).__name__}: {error}"[:500], "details": {}}
