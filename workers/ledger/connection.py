"""Connections to Redis that notice when it is gone."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, cast

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel

from planner.errors import Unavailable
from workers.settings.redis_url import RedisUrl


def connect(url: str, *, timeout_s: float = 5.0) -> Redis:
    """A client of the Redis at `url`, in any form of REDIS_URL; it connects at the first command.

    A connection that Redis dropped while it was idle is mended by one retry. A Redis that swallows packets is not
    asked twice: with the check of an idle connection that is two timeouts at most.

    Raises:
        ValueError: If `url` is no REDIS_URL.
    """
    at = RedisUrl.parse(url)
    options: dict[str, Any] = {
        "db": at.database,
        "username": at.username,
        "password": at.password,
        "decode_responses": True,
        "socket_timeout": timeout_s,
        "health_check_interval": 10,
        "retry": Retry(ExponentialBackoff(cap=0.2, base=0.05), 1, supported_errors=(RedisConnectionError,)),
    }
    if at.path is not None:
        return Redis(unix_socket_path=at.path, **options)
    options |= {"socket_connect_timeout": min(2.0, timeout_s), "socket_keepalive": True, **_tls(at)}
    if at.master is None:
        host, port = at.hosts[0]
        return Redis(host=host.strip("[]"), port=port, **options)
    asked = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0, **at.sentinel_login, **_tls(at)}
    # redis-py states no types here.
    sentinels: Any = Sentinel
    servers = [(host.strip("[]"), port) for host, port in at.hosts]
    return cast("Redis", sentinels(servers, sentinel_kwargs=asked, **options).master_for(at.master))


def clock(redis: Any) -> float:
    """Redis' seconds: the machines' own clocks may differ.

    Raises:
        Unavailable: If Redis cannot be reached.
    """
    with reachable():
        seconds, micros = redis.time()
    return float(seconds + micros / 1e6)


def for_celery(url: str) -> dict[str, Any]:
    """Celery's settings of a broker and a result backend in the Redis at `url`.

    Returns:
        `broker_url`, `result_backend`, `broker_transport_options`, `result_backend_transport_options`, and for TLS
        `broker_use_ssl` and `redis_backend_use_ssl`.
    """
    at = RedisUrl.parse(url)
    address = at.for_celery()
    options = {"master_name": at.master, "sentinel_kwargs": {**at.sentinel_login, **_tls(at)}} if at.master else {}
    found: dict[str, Any] = {"broker_url": address, "result_backend": address}
    if at.tls is not None:
        # kombu knows no names for what is checked.
        checked = {
            **at.tls,
            "ssl_cert_reqs": ssl.CERT_NONE if at.tls["ssl_cert_reqs"] == "none" else ssl.CERT_REQUIRED,
        }
        found |= {"broker_use_ssl": checked, "redis_backend_use_ssl": checked}
    return found | {"broker_transport_options": options, "result_backend_transport_options": dict(options)}


def _tls(at: RedisUrl) -> dict[str, Any]:
    return {} if at.tls is None else {"ssl": True, **at.tls}


def is_local(url: str) -> bool:
    """Whether the Redis at `url` is reached by this machine alone, as far as its address tells."""
    return all(_is_loopback(host.strip("[]")) for host, _ in RedisUrl.parse(url).hosts)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def eviction(redis: Redis) -> str | None:
    """What to tell where this Redis drops keys once its memory is full; None where it refuses writes instead.

    Raises:
        Unavailable: If it cannot be asked.
    """
    try:
        with reachable():
            info: Any = redis.info("memory")
    except ResponseError:  # a server that does not know INFO (fakeredis), or may not be asked
        return None
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
