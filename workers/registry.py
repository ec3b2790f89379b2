"""Which nodes are alive: each writes `node:<id>` with an expiry, again and again. Torch-free, Celery-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from planner.cluster import Node
from planner.errors import Conflict
from planner.names import check_node_id
from workers.ledger import reachable


class Registry:
    """Nodes that announced themselves within the last `ttl_s` seconds."""

    def __init__(self, redis: Redis, *, prefix: str = "fairshard:", ttl_s: float = 15.0) -> None:
        self._redis: Any = redis
        self._prefix = prefix
        self.ttl_s = ttl_s

    def announce(self, info: Mapping[str, Any]) -> None:
        """Say that the node is alive, and what it is (`workers.node.describe`); `instance` tells processes apart.

        Raises:
            Conflict: If another living process announces the same id.
        """
        node_id = check_node_id(info["node_id"])
        key = f"{self._prefix}node:{node_id}"
        now = datetime.now(tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with reachable():
            known = self._redis.get(key)
            if known:
                other = json.loads(known)
                if other.get("instance") != info.get("instance"):
                    raise Conflict(
                        f"node {node_id!r} is alive already (on {other.get('host')}, process {other.get('pid')}); "
                        "give this one another NODE_ID, or end the other and wait "
                        f"{self.ttl_s:.0f} seconds",
                        details={"node_id": node_id, "host": other.get("host")},
                    )
            self._redis.set(key, json.dumps({**info, "seen_at": now}), px=round(self.ttl_s * 1000))
            self._redis.sadd(f"{self._prefix}nodes", node_id)

    def leave(self, node_id: str, *, instance: str) -> None:
        """Say that the node goes; its steps are planned again at once, not after the expiry."""
        key = f"{self._prefix}node:{node_id}"
        with reachable():
            known = self._redis.get(key)
            if known and json.loads(known).get("instance") == instance:
                self._redis.delete(key)

    def announce_planner(self) -> None:
        """Say that a planner worker is alive."""
        with reachable():
            self._redis.set(f"{self._prefix}planner", "1", px=round(self.ttl_s * 1000))

    def alive(self) -> list[dict[str, Any]]:
        """What the living nodes said, by id."""
        with reachable():
            node_ids = sorted(self._redis.smembers(f"{self._prefix}nodes"))
            if not node_ids:
                return []
            said = self._redis.mget([f"{self._prefix}node:{node_id}" for node_id in node_ids])
            gone = [node_id for node_id, text in zip(node_ids, said, strict=True) if text is None]
            if gone:
                self._redis.srem(f"{self._prefix}nodes", *gone)
        return [json.loads(text) for text in said if text]

    def alive_ids(self) -> frozenset[str]:
        """The living nodes' ids."""
        return frozenset(info["node_id"] for info in self.alive())


def to_node(info: Mapping[str, Any]) -> Node:
    """The planner's view of what a node announced."""
    return Node(
        node_id=info["node_id"],
        flop_per_s=float(info["flop_per_s"]),
        memory_bytes=int(info["memory_bytes"]),
        memory_bytes_per_s=info.get("memory_bytes_per_s"),
        load=float(info.get("load") or 0.0),
        device=info.get("device"),
    )
