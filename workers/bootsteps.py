"""What every worker process does beside its tasks: announce the node, reconcile, hand back what it can't finish."""

from __future__ import annotations

import logging
import threading
from typing import Any

from celery import Celery, bootsteps, signals

from planner.errors import Conflict, FairshardError
from workers.reconciler import Reconciler, ReconcilerThread
from workers.services import Services, current

logger = logging.getLogger(__name__)


def install(app: Celery) -> None:
    """Add the steps to `app`'s workers."""
    app.steps["worker"].update({ReconcileStep, AnnounceStep, HandBackStep})
    signals.setup_logging.connect(_set_up_logging, weak=False)


def _set_up_logging(loglevel: int | None = None, **_: object) -> None:
    logging.basicConfig(
        level=loglevel or logging.INFO,
        format="%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s",
        force=True,
    )


def serves_node(worker: Any, services: Services) -> bool:
    """Whether this worker serves its node's own queue; the planner and others announce nothing."""
    return f"node.{services.settings.node_id}" in worker.app.amqp.queues.consume_from


class ReconcileStep(bootsteps.StartStopStep):
    """A reconciler in each worker, one of which holds the lock."""

    def __init__(self, worker: Any, **_: Any) -> None:
        super().__init__(worker)
        self._thread: ReconcilerThread | None = None

    def start(self, worker: Any) -> None:  # noqa: ARG002  (celery's signature)
        """Start the thread."""
        services = current()
        self._thread = ReconcilerThread(lambda: Reconciler(services.ledger, services.registry))
        self._thread.start()

    def stop(self, worker: Any) -> None:  # noqa: ARG002  (celery's signature)
        """Stop the thread."""
        if self._thread is not None:
            self._thread.stop()


class AnnounceStep(bootsteps.StartStopStep):
    """Writes `node:<id>` three times within its expiry, for as long as the worker lives."""

    def __init__(self, worker: Any, **_: Any) -> None:
        super().__init__(worker)
        self._stopped = threading.Event()
        self._instance: str | None = None

    def start(self, worker: Any) -> None:
        """Announce the node once, then again and again in a thread.

        Raises:
            SystemExit: If another living worker has this node's id.
        """
        from workers.node import describe

        services = current()
        if not serves_node(worker, services):
            return
        info = describe(services.settings)
        self._instance = info["instance"]
        if info["shards"]:
            logger.info("node %s holds shards of plans %s", info["node_id"], ", ".join(info["shards"]))
        try:
            services.registry.announce(info)
        except Conflict as error:
            logger.critical("%s", error)
            raise SystemExit(1) from error
        except FairshardError as error:
            logger.warning("node %s was not announced yet: %s", info["node_id"], error)
        threading.Thread(target=self._again, args=(services, info), name="fairshard-node", daemon=True).start()

    def _again(self, services: Services, info: dict[str, Any]) -> None:
        from workers.node import live

        while not self._stopped.wait(services.registry.ttl_s / 3):
            try:
                services.registry.announce(info | live(services.settings))
            except FairshardError as error:
                logger.warning("node %s was not announced: %s", info["node_id"], error)
            except Exception:
                logger.exception("announcing the node failed")

    def stop(self, worker: Any) -> None:  # noqa: ARG002  (celery's signature)
        """Say that the node goes."""
        self._stopped.set()
        if self._instance is None:
            return
        services = current()
        try:
            services.registry.leave(services.settings.node_id, instance=self._instance)
        except FairshardError as error:
            logger.warning("the node's leaving was not announced: %s", error)


class HandBackStep(bootsteps.StartStopStep):
    """On the way out, steps that the grace period was too short for are handed back, no attempt counted."""

    requires = (AnnounceStep,)

    def start(self, worker: Any) -> None:
        """Nothing to start."""

    def stop(self, worker: Any) -> None:
        """Hand back what still runs."""
        from celery.worker import state

        services = current()
        for request in list(state.active_requests):
            arguments = request.args
            if len(arguments) < 2:
                continue
            try:
                services.ledger.hand_back(str(arguments[0]), str(arguments[1]), owner=str(worker.hostname))
            except FairshardError as error:
                logger.warning("a step was not handed back: %s", error)
