"""kombu's Redis transports, less one way to hang.

When Redis restarts quickly, redis-py 8 reconnects the pub/sub connection by itself within the read that failed, and
then reads on, with no timeout, for a message that nobody sends: the worker's main loop stands still while its
threads live on (seen with kombu 5.7.0 and redis-py 8.1.0, 1 of 2 restarts within 0.2 s). Here such a read fails, and
celery's consumer reconnects as it does for any lost connection.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as base
from redis.backoff import NoBackoff
from redis.retry import Retry


class _Prompt:
    """A channel whose pub/sub connection is not mended behind its back."""

    def _receive_one(self, c: Any) -> Any:
        if c.connection is not None:
            c.connection.retry = Retry(NoBackoff(), 0)
        return super()._receive_one(c)  # type: ignore[misc]


class Channel(_Prompt, base.Channel):
    """kombu's channel, mended."""


class SentinelChannel(_Prompt, base.SentinelChannel):
    """kombu's channel to the server that the Sentinels name, mended."""


class Transport(base.Transport):
    """kombu's, with our channel."""

    Channel = Channel


class SentinelTransport(base.SentinelTransport):
    """kombu's, with our channel."""

    Channel = SentinelChannel


def install() -> None:
    """Make these the transports of redis://, rediss://, redis+socket:// and sentinel:// addresses in this process."""
    # By the schemes' own names: another name in `broker_transport` is no address that Flower understands.
    TRANSPORT_ALIASES.update(
        dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport"), sentinel=f"{__name__}:SentinelTransport"
    )
