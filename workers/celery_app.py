"""The Celery app: queues and settings, each with its reason. Torch-free.

A message only wakes: it names a job and a step, and the ledger says whether there is anything to do. Measured on
celery 5.7.0 and kombu 5.7.0: a message can be lost between BRPOP and the write to `unacked`, whatever the settings.

    celery -A workers.celery_app worker -Q compute,node.<NODE_ID> -n <NODE_ID>@%h -c 1      a compute node
    celery -A workers.celery_app worker -Q planner -n planner@%h -c 1                       the planner
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any

from celery import Celery

from planner.errors import FairshardError
from workers.ledger.connection import for_celery
from workers.queue import transport as transports
from workers.queue.messages import COMPUTE
from workers.settings import QueueSettings, Settings, check_environment

logger = logging.getLogger(__name__)

#: A day: the shortest of all consumers' wins, and a step may run for hours. The ledger's leases notice losses sooner.
_VISIBILITY_S = 86400


def create_app(
    settings: Settings | None = None, queue: QueueSettings | None = None, *, results: bool = True
) -> Celery:
    """The app for one process.

    Args:
        settings: Default: from the environment.
        queue: Likewise.
        results: Whether there is a result backend; the web process needs none.
    """
    transports.install()
    settings = settings or Settings.from_env()
    queue = queue or QueueSettings.from_env()
    redis = for_celery(settings.redis_url)
    backend = redis.pop("result_backend")
    transport = {
        "visibility_timeout": _VISIBILITY_S,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        # Without these a live worker stayed wedged behind a half-open connection.
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "retry_on_timeout": True,
        "global_keyprefix": f"{queue.prefix}celery:",
    }
    app = Celery(
        "fairshard",
        broker=redis.pop("broker_url"),
        backend=backend if results else None,
        include=["planner.tasks", "workers.tasks"],
        set_as_current=False,
    )
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_default_queue=COMPUTE,
        # A worker that dies gives its message back at once; the ledger bounds the attempts.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        task_track_started=False,
        # Backstop of the ledger's own limit: the child is told, and a minute later killed.
        task_soft_time_limit=queue.step_time_s,
        task_time_limit=queue.step_time_s + 60,
        # True lost the task in 3 of 3 broker restarts.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=queue.grace_s,
        # An idle worker has nothing to wait for.
        worker_enable_soft_shutdown_on_idle=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=redis.pop("broker_transport_options") | transport,
        # No `result_extended`: it would store the arguments.
        result_expires=86400,
        result_backend_always_retry=True,
        result_backend_transport_options=redis.pop("result_backend_transport_options")
        | {
            "global_keyprefix": f"{queue.prefix}celery:",
            "retry_policy": {"timeout": 5.0},
        },
        redis_socket_timeout=5,
        redis_socket_connect_timeout=2,
        redis_backend_health_check_interval=10,
        redis_retry_on_timeout=True,
        # Flower shows what runs; the events hold ids only. What was sent and not received yet the ledger knows: an
        # event for it would cost each POST a third of its message.
        worker_send_task_events=True,
        task_send_sent_event=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        **redis,  # TLS
    )
    return app


@cache
def _default_app() -> Celery:
    from workers.queue.bootsteps import install

    try:
        check_environment()
        app = create_app()
    except FairshardError as error:
        sys.exit(f"fairshard: {error}")  # Celery would show a traceback
    install(app)
    app.set_default()
    return app


def __getattr__(name: str) -> Any:
    # `celery -A workers.celery_app` reads `app`; made on access, so that an import reads no environment.
    if name in {"app", "celery"}:
        return _default_app()
    raise AttributeError(name)
