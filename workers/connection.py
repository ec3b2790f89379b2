"""Connections to Redis that notice when it is gone."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError  # noqa: A004  (redis-py's own)
from redis.retry import Retry


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
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), 1, supported_errors=(ConnectionError,)),
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
