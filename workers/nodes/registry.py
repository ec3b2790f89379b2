"""Which nodes are alive: each writes `node:<id>` with an expiry, again and again. Torch-free, Celery-free."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from planner.cluster import Node
from planner.errors import Conflict
from planner.names import check_node_id
from workers.ledger.connection import clock, reachable
from workers.nodes.joining import Joining

logger = logging.getLogger(__name__)

#: Beside what a node says of itself: when it said so by Redis' clock, and the proof that it was it.
_SIGNATURE = ("signed_at", "proof")


class Registry:
    """Nodes that announced themselves within the last `ttl_s` seconds."""

    def __init__(
        self, redis: Redis, *, prefix: str = "fairshard:", ttl_s: float = 15.0, joining: Joining | None = None
    ) -> None:
        self._redis: Any = redis
        self._prefix = prefix
        self.ttl_s = ttl_s
        self._joining = joining or Joining()
        #: By node: what was found to be its own words, and what was not (said once in the log).
        self._believed: dict[str, str] = {}
        self._refused: set[str] = set()

    def announce(self, info: Mapping[str, Any]) -> None:
        """Say that the node is alive, and what it is (`probe.describe`); `instance` tells processes apart.

        Raises:
            Conflict: If another living process announces the same id.
        """
        node_id = check_node_id(info["node_id"])
        key = f"{self._prefix}node:{node_id}"
        now = datetime.now(tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with reachable():
            known = self._redis.get(key)
            now_s = clock(self._redis)
            if known:
                other = self._read(node_id, known, now_s)
                if other is not None and other.get("instance") != info.get("instance"):
                    raise Conflict(
                        f"node {node_id!r} is alive already (on {other.get('host')}, process {other.get('pid')}); "
                        "give this one another NODE_ID, or end the other and wait "
                        f"{self.ttl_s:.0f} seconds",
                        details={"node_id": node_id, "host": other.get("host")},
                    )
            said: dict[str, Any] = {**info, "seen_at": now, "signed_at": now_s}
            said["proof"] = self._joining.prove(node_id, "alive", said)
            self._redis.set(key, json.dumps(said), px=round(self.ttl_s * 1000))
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

    def alive(self, *, limit: int | None = None, offset: int = 0) -> list[dict[str, Any]]:
        """What the living nodes said, by id; with `limit` that many of them, after the first `offset`."""
        with reachable():
            known = sorted(self._redis.smembers(f"{self._prefix}nodes"))
            node_ids = known[offset:] if limit is None else known[offset : offset + limit]
            if not node_ids:
                return []
            said = self._redis.mget([f"{self._prefix}node:{node_id}" for node_id in node_ids])
            gone = [node_id for node_id, text in zip(node_ids, said, strict=True) if text is None]
            if gone:
                self._redis.srem(f"{self._prefix}nodes", *gone)
            now_s = clock(self._redis)
        pairs = zip(node_ids, said, strict=True)
        found = [self._read(node_id, text, now_s) for node_id, text in pairs if text is not None]
        return [info for info in found if info is not None]

    def count(self) -> int:
        """How many announced themselves; one that died is counted until someone looks for it."""
        with reachable():
            return int(self._redis.scard(f"{self._prefix}nodes"))

    def _read(self, node_id: str, text: str, now_s: float) -> dict[str, Any] | None:
        """What a node said; None if it was not that node, or is said again by someone else later."""
        info = json.loads(text)
        proof, signed_at = info.pop("proof", None), info.get("signed_at")
        believed = self._believed.get(node_id) == text or (
            info.get("node_id") == node_id and self._joining.holds(node_id, "alive", info, proof)
        )
        fresh = self._joining.authority is None or (
            isinstance(signed_at, float) and abs(now_s - signed_at) <= self.ttl_s
        )
        if believed and fresh:
            self._believed[node_id] = text
            self._refused.discard(node_id)
            return {name: value for name, value in info.items() if name not in _SIGNATURE}
        if node_id not in self._refused:
            self._refused.add(node_id)
            logger.warning("node %s is not let in: its announcement has no valid join token behind it", node_id)
        return None

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
