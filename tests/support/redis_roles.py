"""What the roles beside workers do with Redis: the API's limiter, and Flower's list of queues."""

from __future__ import annotations

import asyncio
from typing import Any

from flower.utils.broker import Broker
from support.running import Service

from web.app import create_app
from workers.celery_app import create_app as create_celery
from workers.ledger.connection import connect
from workers.settings import QueueSettings, Settings


def counted(service: Service, *, limits: str) -> int:
    """How many of the limiter's counts lie in the service's Redis after a request to its API."""
    settings = Settings.from_env(service.env | {"NODE_ID": "web"})
    app = create_app(settings, background=False, rate_limit=limits)
    client = app.test_client()
    assert client.get("/api/jobs").status_code == 200
    with connect(settings.redis_url) as redis:
        found = len(redis.keys("fairshard:limits*"))
    # Or its connections would be found open when the collector comes.
    next(iter(app.extensions["limiter"])).storage.storage.connection_pool.disconnect()
    app.extensions["fairshard"].jobs._services.redis.close()
    return found


def waiting(service: Service) -> list[dict[str, Any]]:
    """The planner's queue as Flower reads it."""
    app = create_celery(Settings.from_env(service.env), QueueSettings())
    with app.connection() as connection:
        broker = Broker(
            connection.as_uri(include_password=True),
            broker_options=app.conf.broker_transport_options,
            broker_use_ssl=app.conf.broker_use_ssl,
        )
    return asyncio.run(_asked(broker))


async def _asked(broker: Any) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = await broker.queues(["planner"])
        return found
    finally:
        # Flower leaves its connections to the Sentinels open.
        manager = getattr(broker.redis.connection_pool, "sentinel_manager", None)
        for sentinel in manager.sentinels if manager else ():
            await sentinel.aclose()
