"""What every worker process does beside its tasks: announce the node, reconcile, hand back what it can't finish."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery, bootsteps, signals

from planner.errors import Conflict, FairshardError, InvalidInput
from workers.celery_app import COMPUTE, PLANNER, node_queue
from workers.connection import is_local
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


class _Step(bootsteps.StartStopStep):
    """A step that does the same whether the worker stops warmly or coldly."""

    def terminate(self, worker: Any) -> None:
        """Celery's own would do nothing for a step without an `obj`."""
        self.stop(worker)


class ReconcileStep(_Step):
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


class AnnounceStep(_Step):
    """Writes `node:<id>` (the planner: `planner`) three times within its expiry, for as long as the worker lives."""

    def __init__(self, worker: Any, **_: Any) -> None:
        super().__init__(worker)
        self._stopped = threading.Event()
        self._instance: str | None = None
        self._peers = contextlib.ExitStack()

    def start(self, worker: Any) -> None:
        """Announce the worker once, then again and again in a thread.

        Raises:
            SystemExit: If another living worker has this node's id, or the worker may not be this node.
        """
        services = current()
        beats: list[Callable[[], None]] = []
        try:
            _check_may(services, set(worker.app.amqp.queues.consume_from))
        except FairshardError as error:
            logger.critical("%s", error)
            raise SystemExit(1) from error
        if PLANNER in worker.app.amqp.queues.consume_from:
            beats.append(services.registry.announce_planner)
        if node_queue(services.settings.node_id) in worker.app.amqp.queues.consume_from:
            beats += [self._node(services), lambda: sweep_up(services)]
        for beat in beats:
            _once(beat)
        if beats:
            threading.Thread(target=self._again, args=(services, beats), name="fairshard-alive", daemon=True).start()

    def _node(self, services: Services) -> Callable[[], None]:
        from workers.node import describe, live

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
        self._serve_peers(services)
        return lambda: services.registry.announce(info | live(services.settings))

    def _serve_peers(self, services: Services) -> None:
        settings = services.settings
        if settings.peer_url:
            from workers.peer_server import PeerServer

            server = PeerServer.at(settings.shards_dir, url=settings.peer_url, token=settings.peer_token or "")
            self._peers.enter_context(server)

    def _again(self, services: Services, beats: list[Callable[[], None]]) -> None:
        while not self._stopped.wait(services.registry.ttl_s / 3):
            for beat in beats:
                _once(beat)

    def stop(self, worker: Any) -> None:  # noqa: ARG002  (celery's signature)
        """Say that the node goes."""
        self._stopped.set()
        self._peers.close()
        if self._instance is not None:
            services, instance = current(), self._instance
            _once(lambda: services.registry.leave(services.settings.node_id, instance=instance))


def _check_may(services: Services, queues: set[str]) -> None:
    """Check that this process may consume `queues`.

    Raises:
        Conflict: If a queue is another node's, or this node's join token is missing.
        InvalidInput: If other machines reach the Redis of a planner that asks nodes for no token.
    """
    settings = services.settings
    others = sorted(q for q in queues if q.startswith(node_queue("")) and q != node_queue(settings.node_id))
    if others:
        raise Conflict(f"this worker is node {settings.node_id!r} (NODE_ID) and can't serve the queue {others[0]!r}")
    if node_queue(settings.node_id) in queues or COMPUTE in queues:
        services.joining.check_node(settings.node_id)
    if PLANNER in queues and settings.join_key is None and not is_local(settings.redis_url):
        raise InvalidInput(
            "other machines reach this Redis, and nodes are asked for no join token: set FAIRSHARD_JOIN_KEY to what "
            "`python -m workers.joining authority FILE` prints, or to 'open' to let every node in",
            details={"setting": "FAIRSHARD_JOIN_KEY"},
        )


def sweep_up(services: Services) -> None:
    """Remove what interrupted splits left, if nobody wants it."""
    from workers.sweep import sweep

    sweep(services)


def _once(beat: Callable[[], None]) -> None:
    try:
        beat()
    except FairshardError as error:
        logger.warning("not announced: %s", error)
    except Exception:
        logger.exception("announcing this worker failed")


class HandBackStep(_Step):
    """On the way out, steps that the grace period was too short for are handed back, no attempt counted."""

    requires = (AnnounceStep,)

    def start(self, worker: Any) -> None:
        """Nothing to start."""

    def stop(self, worker: Any) -> None:
        """Hand back what still runs: celery forgot its own list when it stopped the children."""
        ledger, mine = current().ledger, str(worker.hostname)
        try:
            for job_id, step, owner in ledger.running():
                if owner == mine and ledger.hand_back(job_id, step, owner=mine):
                    logger.info("job %s, step %s: handed back", job_id, step)
        except FairshardError as error:
            logger.warning("nothing was handed back, the leases will run out: %s", error)
