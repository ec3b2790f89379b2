"""Plans by id and by model: in Redis for speed, in the metadata store for good."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from redis import Redis

from planner.errors import NotFound
from workers.ledger import reachable
from workers.metadata_store import MetadataStore, plan_path


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

    def save(self, plan: Mapping[str, Any]) -> None:
        """Remember a published plan; equal plans have equal ids."""
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
        now = time.time()
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.set(f"{self._prefix}plan:{plan_id}", json.dumps(plan), px=self._ttl_ms)
            pipeline.hset(f"{self._prefix}plan_summaries", plan_id, json.dumps(summary))
            pipeline.zadd(f"{self._prefix}plans", {plan_id: now})
            pipeline.zadd(f"{self._prefix}plans:{model_name}", {plan_id: now})
            pipeline.execute()

    def get(self, plan_id: str) -> dict[str, Any]:
        """The plan's JSON.

        Raises:
            NotFound: If there is none.
        """
        with reachable():
            text = self._redis.get(f"{self._prefix}plan:{plan_id}")
            deleted = text is None and self._redis.sismember(f"{self._prefix}plans_deleted", plan_id)
        if text is not None:
            return dict(json.loads(text))
        if not deleted:
            try:
                return dict(json.loads(self._store().read(plan_path(plan_id))))
            except NotFound:
                pass
        raise NotFound(f"there is no plan {plan_id[:64]!r}")

    def latest(self, model_name: str) -> dict[str, Any]:
        """The model's newest plan.

        Raises:
            NotFound: If there is none.
        """
        with reachable():
            found = self._redis.zrevrange(f"{self._prefix}plans:{model_name}", 0, 0)
        if not found:
            raise NotFound(
                f"there is no plan for {model_name}: call /api/process, or 'fairshard submit {model_name}'"
            )
        return self.get(str(found[0]))

    def summaries(self, *, model_name: str | None = None, limit: int = 50, offset: int = 0) -> list[dict[str, Any]]:
        """Summaries, newest first."""
        key = f"{self._prefix}plans:{model_name}" if model_name else f"{self._prefix}plans"
        with reachable():
            plan_ids = self._redis.zrevrange(key, offset, offset + limit - 1)
            texts = self._redis.hmget(f"{self._prefix}plan_summaries", plan_ids) if plan_ids else []
        return [json.loads(text) for text in texts if text]

    def delete(self, plan_id: str, model_name: str) -> None:
        """Forget a plan."""
        with reachable():
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.delete(f"{self._prefix}plan:{plan_id}")
            pipeline.hdel(f"{self._prefix}plan_summaries", plan_id)
            pipeline.zrem(f"{self._prefix}plans", plan_id)
            pipeline.zrem(f"{self._prefix}plans:{model_name}", plan_id)
            pipeline.sadd(f"{self._prefix}plans_deleted", plan_id)
            pipeline.execute()
