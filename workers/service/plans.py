"""Plans by id and by model: in Redis for speed, in the metadata store for good.

The store has plans by their ids alone; which ones a model has, and which is the newest, Redis knows. A Redis that
was wiped, or is new, is told from the store's plans when it is first asked.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from planner.errors import FairshardError, InvalidInput, NotFound, Unavailable
from planner.names import check_model_name
from planner.wire.documents import dumps, loads_json
from workers.ledger.connection import reachable
from workers.metadata_store.base import MetadataStore, check_plan_id, plan_path, remade_path

logger = logging.getLogger(__name__)

#: Plans read from the store at a time: each takes three calls of a Hub repository.
_READERS = 8
#: States of reading the store's plans; any other is why they could not be read.
_READING, _DONE = "reading", "done"
#: A process that reads them and stores none for so long has died, in milliseconds.
_READING_MS = 120_000
#: A store that had no plan, or that could not be read, is not asked again for so long, in milliseconds.
_ASK_AGAIN_MS = 15_000
#: How long a call waits for another one's reading, and between two looks, in seconds.
_WAIT_S, _POLL_S = 2.0, 0.05


class Plans:
    """The service's plans."""

    def __init__(
        self,
        redis: Redis,
        store: Callable[[], MetadataStore],
        *,
        prefix: str = "fairshard:",
        ttl_s: float = 30 * 86400.0,
    ) -> None:
        """Keep a plan's JSON in Redis for `ttl_s`; `store` opens the metadata store when it is needed."""
        self._redis: Any = redis
        self._store = store
        self._prefix = prefix
        self._ttl_ms = round(ttl_s * 1000)

    def save(self, plan: Mapping[str, Any], *, again: bool = False) -> None:
        """Remember a published plan as its model's newest; one published before (`again`) stays as it was."""
        plan_id, model_name, now = plan["plan_id"], plan["model_name"], datetime.now(UTC)
        if again:
            newest = self._ids(model_name, limit=1)
            plan = {"job_id": plan.get("job_id")} | self.get(plan_id)
            if newest not in ([], [plan_id]):
                # Else whoever reads the store after Redis was wiped would take the one before it for the newest.
                note = dumps({"plan_id": plan_id, "generated_at": now.isoformat(timespec="seconds")})
                self._store().write({remade_path(plan_id): note}, message=f"Plan {plan_id} for {model_name}, again")
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            self._remember(pipeline, plan, now.timestamp())
            pipeline.execute()

    def get(self, plan_id: str) -> dict[str, Any]:
        """The plan's JSON.

        Raises:
            NotFound: If there is none.
        """
        with reachable():
            text = self._redis.get(f"{self._prefix}plan:{plan_id}")
        try:
            return dict(json.loads(self._store().read(plan_path(plan_id)) if text is None else text))
        except NotFound:
            raise NotFound(f"there is no plan {plan_id[:64]!r}") from None

    def latest(self, model_name: str) -> dict[str, Any]:
        """The model's newest plan.

        Raises:
            NotFound: If there is none.
            Unavailable: If Redis knows of none, and the store cannot be read now.
        """
        found = self._ids(model_name, limit=1)
        if not found:
            self._read_back()
            found = self._ids(model_name, limit=1)
        if not found:
            raise NotFound(
                f"there is no plan for {model_name}: call /api/process, or 'fairshard submit {model_name}'"
            )
        return self.get(found[0])

    def summaries(self, *, model_name: str | None = None, limit: int = 50, offset: int = 0) -> list[dict[str, Any]]:
        """Summaries, newest first.

        Raises:
            Unavailable: If Redis has lost them, and the store cannot be read now.
        """
        self._read_back()
        plan_ids = self._ids(model_name, limit=limit, offset=offset)
        with reachable():
            texts = self._redis.hmget(f"{self._prefix}plan_summaries", plan_ids) if plan_ids else []
        return [json.loads(text) for text in texts if text]

    def delete(self, plan_id: str, model_name: str) -> None:
        """Forget a plan, in the store first: while that has it, it is there and can be deleted once more.

        Raises:
            AccessDenied: If the token may not write to the store.
            NodeFailure: If the store's folder cannot be written.
            Unavailable: If Redis or the Hub cannot be reached.
        """
        gone = dict.fromkeys((plan_path(plan_id), remade_path(plan_id)))
        self._store().write(gone, message=f"Forget plan {plan_id} for {model_name}")
        self._forget([(plan_id, model_name)])

    def _ids(self, model_name: str | None, *, limit: int, offset: int = 0) -> list[str]:
        """Of the model's plans (None: of all), newest first."""
        key = f"{self._prefix}plans:{model_name}" if model_name else f"{self._prefix}plans"
        with reachable():
            return [str(found) for found in self._redis.zrevrange(key, offset, offset + limit - 1)]

    def _remember(self, pipeline: Any, plan: Mapping[str, Any], made_s: float, *, unless_known: bool = False) -> None:
        plan_id, model_name = plan["plan_id"], plan["model_name"]
        summary = {
            "plan_id": plan_id,
            "model_name": model_name,
            "revision": plan.get("revision"),
            "strategy": plan.get("strategy"),
            "node_ids": sorted(plan.get("split_plan") or {}),
            "generated_at": plan.get("generated_at"),
            "job_id": plan.get("job_id"),
        }
        left_ms = self._ttl_ms - max(0, round((time.time() - made_s) * 1000))
        if left_ms > 0:
            pipeline.set(f"{self._prefix}plan:{plan_id}", json.dumps(plan), px=left_ms, nx=unless_known)
        put = pipeline.hsetnx if unless_known else pipeline.hset
        put(f"{self._prefix}plan_summaries", plan_id, json.dumps(summary))
        for key in (f"{self._prefix}plans", f"{self._prefix}plans:{model_name}"):
            pipeline.zadd(key, {plan_id: made_s}, nx=unless_known)

    def _forget(self, plans: Iterable[tuple[str, str]]) -> None:
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            for plan_id, model_name in plans:
                pipeline.delete(f"{self._prefix}plan:{plan_id}")
                pipeline.hdel(f"{self._prefix}plan_summaries", plan_id)
                pipeline.zrem(f"{self._prefix}plans", plan_id)
                pipeline.zrem(f"{self._prefix}plans:{model_name}", plan_id)
            pipeline.execute()

    # -- from the store, after Redis was wiped ---------------------------------------------------------------------
    def _read_back(self) -> None:
        """See that Redis knows the store's plans: one caller reads them, once; the key says that it is done.

        Raises:
            Unavailable: If the store cannot be read now, or another process is not done with it.
        """
        key, deadline = f"{self._prefix}plans_read", time.monotonic() + _WAIT_S
        while True:
            with reachable():
                pipeline = self._redis.pipeline(transaction=True)
                pipeline.set(key, _READING, nx=True, px=_READING_MS)
                pipeline.get(key)
                mine, state = pipeline.execute()
            if mine:
                break
            if state == _DONE:
                return
            if state != _READING:
                raise Unavailable(state)
            if time.monotonic() >= deadline:
                raise Unavailable("the plans are being read from the metadata store: ask again in a few seconds")
            time.sleep(_POLL_S)
        try:
            found = self._read_store(key)
        except FairshardError as error:
            with reachable():
                self._redis.set(key, str(error), px=_ASK_AGAIN_MS)
            raise
        with reachable():
            # Only if it is still there: else Redis was wiped once more, meanwhile.
            self._redis.set(key, _DONE, px=None if found else _ASK_AGAIN_MS, xx=True)

    def _read_store(self, key: str) -> bool:
        """Remember the store's plans that Redis does not know; whether there was any."""
        store, found = self._store(), {}
        try:
            listed = set(store.list("plans"))
        except NotFound:
            # A Hub repository is made when the first thing is published.
            return False
        paths = [path for path in sorted(listed) if not path.endswith(remade_path("x").removeprefix("plans/x"))]
        with ThreadPoolExecutor(_READERS) as pool:
            for path, plan in zip(paths, pool.map(lambda path: _read(store, path), paths), strict=True):
                if plan is None:
                    continue
                found[path] = (plan["plan_id"], plan["model_name"])
                again = remade_path(plan["plan_id"])
                made_s = _made_s(loads_json(store.read(again)) if again in listed else plan)
                with reachable():
                    pipeline = self._redis.pipeline(transaction=True)
                    self._remember(pipeline, plan, made_s, unless_known=True)
                    pipeline.pexpire(key, _READING_MS)
                    pipeline.execute()
        if found:
            # What was deleted since it was listed may have come back: of what is deleted later, Redis is told.
            left = set(store.list("plans"))
            self._forget(ids for path, ids in found.items() if path not in left)
        return bool(found)


def _read(store: MetadataStore, path: str) -> dict[str, Any] | None:
    """The plan at `path`; None if there is none that can be read."""
    try:
        plan = loads_json(store.read(path), source=f"{store.spec}/{path}")
        if isinstance(plan, dict) and isinstance(plan.get("split_plan"), dict):
            check_model_name(plan.get("model_name"))
            if path == plan_path(check_plan_id(plan.get("plan_id"))):
                return plan
    except NotFound:
        return None
    except InvalidInput as error:
        logger.warning("%s/%s is no plan: %s", store.spec, path, error)
    return None


def _made_s(plan: Any) -> float:
    """When the plan was made, in seconds since 1970; 0 if it does not say."""
    try:
        when = datetime.fromisoformat(plan["generated_at"])
    except (KeyError, TypeError, ValueError):
        return 0.0
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
