"""The reconciler: sends again what was lost, takes back what vanished workers held, gives up dead nodes.

One of the service's workers does it at a time, behind a lock in Redis; within `LOCK_S` and a second another takes it.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from redis.exceptions import ResponseError

from planner.errors import Unavailable
from workers.ledger.connection import reachable
from workers.ledger.ledger import Ledger
from workers.nodes.registry import Registry

logger = logging.getLogger(__name__)

#: Seconds between two passes.
PASS_S = 1.0
#: Seconds after which the lock of a reconciler that died is free.
LOCK_S = 5.0
#: Seconds between two looks at whether Redis evicted keys.
LOOK_S = 5.0
#: Seconds that a node is missed before its steps are given up, beyond its own expiry.
GRACE_S = 2.0

# Extend the lock only if it is still ours. Answers 0 if it is, else for how many milliseconds it is another's.
_HOLD = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return math.max(1, redis.call('PTTL', KEYS[1])) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 0
"""


class Reconciler:
    """One worker's candidate for the job."""

    def __init__(self, ledger: Ledger, registry: Registry, *, now: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._registry = registry
        #: Tells whoever looks into Redis which process it is.
        self._name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._now = now
        #: node_id -> when it was first missed.
        self._missed: dict[str, float] = {}
        self._last_pass: float | None = None
        #: Until then nobody is given up: after a restart of Redis all nodes have expired, and all come back.
        self._quiet_until = 0.0
        self._looked = -LOOK_S
        #: How many keys Redis had evicted when all jobs were last seen to be whole.
        self._evicted = 0
        self._hold: Any = ledger.redis.register_script(_HOLD)
        #: Seconds until the next pass is due: thousands of workers without the lock need not ask for it each second.
        self.next_in_s = PASS_S

    def holds_lock(self) -> bool:
        """Take or keep the lock; whether it is ours."""
        self.next_in_s = PASS_S
        with reachable():
            key = f"{self._ledger.prefix}reconciler"
            another_s = self._hold(keys=[key], args=[self._name, round(LOCK_S * 1000)]) / 1000
        # A holder that lives has renewed it by then; after one that died they come one after another.
        if another_s:
            self.next_in_s = another_s + random.random() * PASS_S  # noqa: S311  (no secret)
        return not another_s

    def once(self) -> int:
        """One pass, if the lock is ours.

        Returns:
            How many steps were overdue.
        """
        now = self._now()
        if not self.holds_lock():
            self._last_pass = None
            self._missed.clear()
            return 0
        if self._last_pass is None or now - self._last_pass > LOCK_S:
            # The lock is new, or Redis was away: every living node must have had its turn to announce itself.
            self._quiet_until = now + self._registry.ttl_s / 3 + GRACE_S
            self._missed.clear()
        self._last_pass = now
        late = 0
        # Bounded: the lock must be renewed before it expires.
        for _ in range(10):
            count = self._ledger.wake_overdue(limit=500)
            late += count
            if count < 500:
                break
        self._lose_dead_nodes()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._mend()
        return late

    def _mend(self) -> None:
        try:
            with reachable():
                evicted = int(self._ledger.redis.info("stats").get("evicted_keys", 0))
        except ResponseError:
            return  # a stand-in that knows no INFO; it evicts nothing
        if evicted != self._evicted:
            ended = self._ledger.mend()
            logger.warning("Redis evicted %d keys; %d jobs ended of it", evicted - self._evicted, ended)
            self._evicted = evicted

    def _lose_dead_nodes(self) -> None:
        in_use = self._ledger.nodes_in_use()
        alive = self._registry.alive_ids() if in_use else frozenset()
        now = self._now()
        missing = in_use - alive
        self._missed = {node_id: self._missed.get(node_id, now) for node_id in missing}
        if now < self._quiet_until:
            return
        for node_id, since in sorted(self._missed.items()):
            if now - since >= GRACE_S:
                lost = self._ledger.lose_node(node_id)
                if lost:
                    logger.warning("node %s is dead: %d of its steps go back to planning", node_id, lost)


class ReconcilerThread(threading.Thread):
    """Passes, once a second or when the lock may be free, until `stop`."""

    def __init__(self, reconciler: Reconciler) -> None:
        super().__init__(name="fairshard-reconciler", daemon=True)
        self._reconciler = reconciler
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let the pass under way be the last."""
        self._stopped.set()

    def run(self) -> None:
        """Pass after pass; whatever goes wrong, the next pass comes."""
        while not self._stopped.wait(self._reconciler.next_in_s):
            try:
                self._reconciler.once()
            except Unavailable as error:
                logger.warning("reconciler: %s", error)
            except Exception:
                logger.exception("a reconciler's pass failed")
