"""Celery tasks as thin shells: `(job_id, step)` in, the ledger's claim around a function that knows no queue."""

from __future__ import annotations

import contextlib
import logging
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from celery import shared_task
from celery.exceptions import SoftTimeLimitExceeded
from redis.exceptions import RedisError

from planner.errors import FairshardError, NodeFailure
from workers.queue.claims import Claim, explained, run_step
from workers.queue.messages import MESSAGE_VERSION
from workers.queue.process import current
from workers.service.services import Services

logger = logging.getLogger(__name__)

Work = Callable[[Services, Claim], Mapping[str, Any]]


class NewerMessage(FairshardError):
    """The message is of a newer version than this worker speaks."""

    code = "newer_message"


class OtherNode(FairshardError):
    """The step is another node's."""

    code = "other_node"


def step_task(name: str) -> Callable[[Work], Any]:
    """Make `work(services, claim)` the Celery task `name` of `(job_id, step)`."""

    def decorate(work: Work) -> Any:
        def body(self: Any, job_id: str, step: str, version: int = MESSAGE_VERSION) -> dict[str, Any] | None:
            if version > MESSAGE_VERSION:
                # Acknowledged and left: the ledger has the step, and a newer worker will be sent it.
                raise NewerMessage(
                    f"{self.request.hostname} speaks message version {MESSAGE_VERSION} and was sent {version} "
                    f"({name}, job {job_id}): update this worker"
                )
            services = current()
            # Of this thread; what tells Flower runs in another, which has no request.
            hostname, task_id = str(self.request.hostname), str(self.request.id or "")
            own = step.partition(":")[2]
            if own and own != services.settings.node_id:
                # Left as well: it was not this node's queue, and the ledger sends it again.
                raise OtherNode(f"{hostname} was sent {step} of job {job_id}, which is node {own}'s to run")

            def limited(claim: Claim) -> Mapping[str, Any]:
                try:
                    with memory_limit(services.queue.step_memory_bytes):
                        return work(services, claim)
                except SoftTimeLimitExceeded:
                    limit_s = services.queue.step_time_s
                    _count(services, "step_time_limit_total")
                    raise NodeFailure(
                        f"{hostname}: step {step} took longer than {limit_s:.0f} s (FAIRSHARD_STEP_TIME_S)",
                        details={"limit_s": limit_s, "node_id": services.settings.node_id},
                    ) from None
                except (NodeFailure, MemoryError, OSError) as error:
                    if isinstance(error, MemoryError):
                        _count(services, "step_memory_limit_total")
                    # Whoever reads the job is on another machine: which node it was must be said.
                    cause = explained(error)
                    if not isinstance(cause, NodeFailure):
                        raise
                    raise NodeFailure(
                        f"{hostname}: {cause}", details=cause.details | {"node_id": services.settings.node_id}
                    ) from error

            def tell_flower(progress: Mapping[str, Any]) -> None:
                # Events are a courtesy: nobody but Flower reads them, and of an event's fields it shows `result`.
                with contextlib.suppress(Exception), self.app.events.default_dispatcher(hostname) as dispatcher:
                    dispatcher.send("task-progress", uuid=task_id, result=_in_words(progress), **progress)

            return run_step(
                services.ledger,
                job_id,
                step,
                limited,
                owner=hostname,
                node_id=services.settings.node_id,
                task_id=task_id,
                joining=services.joining,
                on_progress=tell_flower,
            )

        body.__name__ = work.__name__
        body.__doc__ = work.__doc__
        body.__module__ = work.__module__
        # What was explained needs no stack trace in the log.
        return shared_task(name=name, bind=True, throws=(FairshardError,))(body)

    return decorate


def _in_words(progress: Mapping[str, Any]) -> str:
    done, total, left_s = progress["done"], progress["total"], progress.get("eta_s")
    share = f"{100 * done / total:.0f} %" if total else f"{done:,}"
    left = f", {left_s:.0f} s left" if left_s is not None else ""
    return f"{share}{left}: {progress['what']}" if progress["what"] else f"{share}{left}"


def _count(services: Services, name: str) -> None:
    # The ledger's metrics show it; the step's outcome does not depend on it.
    with contextlib.suppress(RedisError):
        services.redis.hincrby(f"{services.queue.prefix}counters", name, 1)


@contextlib.contextmanager
def memory_limit(size_bytes: int | None) -> Iterator[None]:
    """Let this process take at most `size_bytes` more than it has; beyond it an allocation raises MemoryError."""
    if size_bytes is None:
        yield
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = pages * resource.getpagesize() + size_bytes
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
