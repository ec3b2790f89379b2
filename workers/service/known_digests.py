"""What nodes found each tensor of a model's revision to be: a wrong byte that one is sent, another knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from redis import Redis

from workers.ledger.connection import reachable

_AT_ONCE = 5000


class KnownDigests:
    """Digests by model, revision and tensor, in Redis; the first that is told stays until it is dropped.

    They can only have bytes refused, never taken: whoever writes wrong ones stops a job, and no more.
    """

    def __init__(self, redis: Redis, *, prefix: str, ttl_s: float) -> None:
        """Keep them in `redis` for `ttl_s` after the last was told."""
        self._redis: Any = redis
        self._prefix = prefix
        self._ttl_ms = round(ttl_s * 1000)

    def of(self, model_name: str, revision: str, tensors: Iterable[str]) -> dict[str, str]:
        """The digests of those of `tensors` that are known."""
        found: dict[str, str] = {}
        names = iter(tensors)
        while some := list(islice(names, _AT_ONCE)):
            with reachable():
                digests = self._redis.hmget(self._key(model_name, revision), some)
            found |= {name: digest for name, digest in zip(some, digests, strict=True) if digest}
        return found

    def tell(self, model_name: str, revision: str, digests: Mapping[str, str]) -> None:
        """Add digests of tensors that are not known yet."""
        key, items = self._key(model_name, revision), iter(digests.items())
        while some := list(islice(items, _AT_ONCE)):
            with reachable():
                pipeline = self._redis.pipeline(transaction=False)
                for name, digest in some:
                    pipeline.hsetnx(key, name, digest)
                pipeline.pexpire(key, self._ttl_ms)
                pipeline.execute()

    def drop(self, model_name: str, revision: str) -> None:
        """Forget those of a revision: a shard that is deleted may be the one that is wrong."""
        with reachable():
            self._redis.delete(self._key(model_name, revision))

    def _key(self, model_name: str, revision: str) -> str:
        return f"{self._prefix}digests:{model_name}@{revision}"
