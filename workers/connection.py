"""Connections to Redis that notice when it is gone."""

from __future__ import annotations

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry


def connect(url: str) -> Redis:
    """A client of the Redis at `url`; it connects at the first command.

    One retry mends a connection that Redis dropped while it was idle. More would keep an API call waiting: a Redis
    that swallows packets is reported within two connect timeouts, four seconds.
    """
    return Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=5,
        socket_connect_timeout=2,
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), 1),
    )
