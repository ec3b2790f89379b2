"""What every worker process does beside its tasks: announce the node, reconcile, hand back what it can't finish."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery, bootsteps, signals
from celery.apps.worker import Worker
from celery.events.dispatcher import EventDispatcher
from celery.worker import state

from planner.errors import Conflict, FairshardError, InvalidInput
from workers.ledger.connection import eviction, is_local
from workers.queue.messages import COMPUTE, PLANNER, node_queue
from workers.queue.process import current
from workers.queue.reconciler import Reconciler, ReconcilerThread
from workers.service.services import Services
from workers.service.tokens import secret_key

logger = logging.getLogger(__name__)


def install(app: Celery) -> None:
    """Add the steps to `app`'s workers."""
    app.steps["worker"].update({ReconcileStep, FirstAndLastStep})
    signals.setup_logging.connect(_set_up_logging, weak=False)
    app.__dict__["Worker"] = app.subclass_with_self(PromptWorker, name="Worker", reverse="Worker")
    app.events.dispatcher_cls = "workers.queue.bootsteps:PromptDispatcher"


class PromptWorker(Worker):
    """celery's sleeps through its whole grace period when told to end; this one goes when its steps are done."""

    #: celery's stubs leave it out.
    hostname: str

    def prepare_args(self, **kwargs: Any) -> dict[str, Any]:
        """No worker listens to the others: with gossip each hears all, a traffic of the square of their number."""
        return {**kwargs, "without_gossip": True, "without_mingle": True}

    def wait_for_soft_shutdown(self) -> bool:
        """Wait until no step of this worker runs, for at most the grace period; whether there was any."""
        if not state.active_requests:
            return False
        grace_s = float(self.app.conf.worker_soft_shutdown_timeout)
        logger.warning("Initiating Soft Shutdown, terminating in %.0f seconds at most", grace_s)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and _busy(self.hostname):
            time.sleep(0.2)
        return True


class PromptDispatcher(EventDispatcher):
    """celery's repeats a heartbeat until Redis is back, and a worker that is told to end waits for it, for ever."""

    def send(self, type: str, *args: Any, **options: Any) -> Any:  # noqa: A002  (celery's name)
        """Send an event once; what no one heard of a worker's health is of no use later."""
        return super().send(type, *args, **{**options, "retry": False})


def _busy(hostname: str) -> bool:
    try:
        return any(owner == hostname for _, _, owner in current().ledger.running())
    except FairshardError:
        # Nobody knows: the grace period decides.
        return True


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

    #: The pool forks first: a child inherits what a thread has locked in that moment (an import, a cached property),
    #: locked for ever, and then hangs at its first step.
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **_: Any) -> None:
        super().__init__(worker)
        self._thread: ReconcilerThread | None = None

    def start(self, worker: Any) -> None:  # noqa: ARG002  (celery's signature)
        """Start the thread."""
        services = current()
        # Children that take another's place are forked later: nothing is made for the first time in the thread.
        reconciler = Reconciler(services.ledger, services.registry)
        self._thread = ReconcilerThread(reconciler)
        self._thread.start()

    def stop(self, worker: Any) -> None:  # noqa: ARG002  (celery's signature)
        """Stop the thread."""
        if self._thread is not None:
            self._thread.stop()


class Presence:
    """Writes `node:<id>` (the planner: `planner`) three times within its expiry, until `leave`."""

    def __init__(self) -> None:
        self._begun = False
        self._stopped = threading.Event()
        self._instance: str | None = None
        self._peers = contextlib.ExitStack()

    def begin(self, queues: set[str]) -> None:
        """Announce the worker of these queues once, then again and again in a thread.

        Raises:
            SystemExit: If another living worker has this node's id.
        """
        if self._begun:
            # celery is ready once more after each loss of its connection.
            return
        self._begun = True
        services = current()
        beats: list[Callable[[], None]] = []
        if PLANNER in queues:
            beats += [services.registry.announce_planner, services.keep]
        if node_queue(services.settings.node_id) in queues:
            from workers.runner.herald import Herald

            self._peers.enter_context(Herald(services))
            beats += [self._node(services), lambda: sweep_up(services)]
        for beat in beats:
            _once(beat)
        if beats:
            threading.Thread(target=self._again, args=(services, beats), name="fairshard-alive", daemon=True).start()
        with contextlib.suppress(FairshardError):
            if warning := eviction(services.redis):
                logger.warning("%s", warning)
        logger.info("serving %s", ", ".join(sorted(queues)))

    def _node(self, services: Services) -> Callable[[], None]:
        from workers.nodes.probe import describe, live

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
            from workers.shards.peer_server import PeerServer

            server = PeerServer.at(settings.shards_dir, url=settings.peer_url, token=settings.peer_token or "")
            self._peers.enter_context(server)

    def _again(self, services: Services, beats: list[Callable[[], None]]) -> None:
        while not self._stopped.wait(services.registry.ttl_s / 3):
            for beat in beats:
                _once(beat)

    def leave(self) -> None:
        """Say that the node goes."""
        self._stopped.set()
        self._peers.close()
        if self._instance is not None:
            services, instance = current(), self._instance
            _once(lambda: services.registry.leave(services.settings.node_id, instance=instance))


class FirstAndLastStep(_Step):
    """Before anything starts: may this worker be what it says? After all stopped: hand back, and leave.

    On the way out, steps that the grace period was too short for are handed back, no attempt counted. The worker is
    announced once it consumes: who is told of it may send it work, or end it, and celery can't be ended well sooner.
    """

    def include(self, parent: Any) -> bool:
        """Go first, and so be stopped last: no `requires` of ours can say that celery's pool comes later."""
        parent.steps.insert(0, self)
        return True

    def start(self, worker: Any) -> None:
        """Check the settings.

        Raises:
            SystemExit: If the worker may not be this node, or the planner.
        """
        worker.presence = Presence()
        queues = set(worker.app.amqp.queues.consume_from)

        def begin(**_: object) -> None:
            announce = partial(worker.presence.begin, queues)
            # In the event loop, not before it: celery says "ready" and then still looks after its pool.
            worker.hub.call_soon(announce) if worker.hub is not None else announce()

        signals.worker_ready.connect(begin, weak=False)
        try:
            _check_may(current(), queues)
        except FairshardError as error:
            logger.critical("%s", error)
            raise SystemExit(1) from error

    def stop(self, worker: Any) -> None:
        """Hand back what still runs (celery forgot its own list when it stopped the children), and leave."""
        ledger, mine = current().ledger, str(worker.hostname)
        try:
            for job_id, step, owner in ledger.running():
                if owner == mine and ledger.hand_back(job_id, step, owner=mine):
                    logger.info("job %s, step %s: handed back", job_id, step)
        except FairshardError as error:
            logger.warning("nothing was handed back, the leases will run out: %s", error)
        worker.presence.leave()


def _check_may(services: Services, queues: set[str]) -> None:
    """Check that this process may consume `queues`.

    Raises:
        Conflict: If a queue is another node's, or this node's join token is missing.
        InvalidInput: If other machines reach this Redis, and nodes are asked for no token, or FAIRSHARD_SECRET is
            not set.
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
            "`python -m workers.nodes.joining authority FILE` prints, or to 'open' to let every node in",
            details={"setting": "FAIRSHARD_JOIN_KEY"},
        )
    secret_key(settings)


def sweep_up(services: Services) -> None:
    """Remove unfinished shards of plans that no unfinished job wants from this node.

    One that is wanted stays: the split that is repeated goes on from it. One that a live process holds stays too.
    """
    settings = services.settings
    left = {path.name[1:].partition(".partial-")[0] for path in settings.shards_dir.glob(".*.partial-*")}
    if not left:
        return
    from workers.transfer.journal import discard_partials

    for plan_id in left - services.ledger.plans_wanted(settings.node_id):
        discard_partials(settings.shards_dir / plan_id)


def _once(beat: Callable[[], None]) -> None:
    try:
        beat()
    except FairshardError as error:
        logger.warning("not announced: %s", error)
    except Exception:
        logger.exception("announcing this worker failed")
