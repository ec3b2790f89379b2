"""The queues' names, and what sends the ledger's messages: a message names a job and a step, and no more."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from kombu.exceptions import InconsistencyError, KombuError

from workers.ledger.steps import Wakeup

logger = logging.getLogger(__name__)


#: Any compute node.
COMPUTE = "compute"


PLANNER = "planner"


#: Of the messages; a worker refuses newer ones by name and leaves them to newer workers.
MESSAGE_VERSION = 1


def node_queue(node_id: str) -> str:
    """The queue that this node alone serves."""
    return f"node.{node_id}"


def sender(app: Celery) -> Callable[[Sequence[Wakeup]], None]:
    """What sends the ledger's messages through `app`; a message that can't be sent is the reconciler's to repeat."""

    def send_one(wakeup: Wakeup, producer: Any) -> None:
        app.send_task(
            wakeup.task,
            args=[wakeup.job_id, wakeup.step],
            kwargs={"version": MESSAGE_VERSION},
            queue=wakeup.queue,
            task_id=f"{wakeup.job_id}-{wakeup.step.replace(':', '-')}-{secrets.token_hex(4)}",
            producer=producer,
            retry=False,
            # What Flower and the logs show in place of two bare ids.
            argsrepr=f"({wakeup.step!r} of {wakeup.model_name!r}, job {wakeup.job_id})",
            kwargsrepr="{}",
        )

    def send(wakeups: Sequence[Wakeup]) -> None:
        try:
            with app.producer_or_acquire() as producer:
                for wakeup in wakeups:
                    try:
                        send_one(wakeup, producer)
                    except InconsistencyError:
                        # Redis lost the queues' bindings (it evicts, or was wiped): they are declared anew.
                        producer.connection.declared_entities.clear()
                        send_one(wakeup, producer)
        except (KombuError, OSError) as error:
            logger.warning("a message was not sent, the reconciler will: %s", error)

    return send
