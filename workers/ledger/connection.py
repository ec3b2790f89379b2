"""Connections to Redis that notice when it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from planner.errors import Unavailable


def connect(url: str, *, timeout_s: float = 5.0) -> Redis:
    """A client of the Redis at `url`; it connects at the first command.

    A connection that Redis dropped while it was idle is mended by one retry. A Redis that swallows packets is not
    asked twice: with the check of an idle connection that is two timeouts at most.
    """
    return Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=timeout_s,
        socket_connect_timeout=min(2.0, timeout_s),
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), 1, supported_errors=(RedisConnectionError,)),
    )


def is_local(url: str) -> bool:
    """Whether the Redis at `url` is reached by this machine alone, as far as its address tells."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return True
    try:
        return ip_address(parts.hostname or "localhost").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


def eviction(redis: Redis) -> str | None:
    """What to tell where this Redis drops keys once its memory is full; None where it refuses writes instead.

    Raises:
        Unavailable: If it cannot be asked.
    """
    with reachable():
        info: Any = redis.info("memory")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy == "noeviction":
        return None
    return (
        f"Redis' maxmemory-policy is {policy}: once its memory is full it drops jobs and plans unseen; "
        "set it to noeviction (redis-cli CONFIG SET maxmemory-policy noeviction)"
    )


#: What a Redis says that can't write now (its disk is full, its memory is, it is a replica) where redis-py has no
#: class for it: in a bare answer to "MISCONF", and in what a script quotes of the write that failed.
_REFUSALS = ("MISCONF ", "-OOM ", "-READONLY ")


@contextmanager
def reachable() -> Iterator[None]:
    """Redis' own errors as `planner.errors.Unavailable`."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError) as error:
        raise Unavailable(f"Redis cannot be reached: {error}; is it running, and is REDIS_URL right?") from error
    except ResponseError as error:
        if not isinstance(error, (OutOfMemoryError, ReadOnlyError)) and not any(w in str(error) for w in _REFUSALS):
            raise
        raise Unavailable(f"Redis refuses writes: {error}") from error
