"""The services of this worker process, from its environment."""

from __future__ import annotations

import os
from functools import lru_cache

from celery import current_app

from workers.queue.messages import PLANNER, sender
from workers.service.services import Services
from workers.settings import QueueSettings, Settings


@lru_cache(maxsize=4)
def _for_process(pid: int) -> Services:  # noqa: ARG001  (the key: a forked child makes its own)
    keeper = PLANNER in current_app.amqp.queues.consume_from
    return Services(
        settings=Settings.from_env(), queue=QueueSettings.from_env(), wake=sender(current_app), keeper=keeper
    )


def current() -> Services:
    """The services of this worker process, from its environment."""
    return _for_process(os.getpid())
