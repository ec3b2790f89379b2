"""The ledger: jobs and their steps in Redis. Messages only wake; what is written here is the truth.

A job is a few steps. Every transition below is one Lua script (`ledger.lua`) on the server's clock:

    step   waiting ──(last predecessor committed)──► queued ──claim──► running ──commit──► done
                                                       ▲                  │
                                                       ├──── defer ───────┤   handed back, no attempt counted
                                                       ├──── fail ────────┤   attempts left: due again after a delay
                                                       ├── lease expired ─┤   the worker vanished: the reconciler
                                                       └─ reopen (a node died: back to the plan step)
           any unfinished state ──► failed (attempts spent, or an error that retrying cannot mend),
                                    cancelled (the user, or another step of the job failed), lost (its node died)

    job    queued ──first claim──► running ──last commit──► done | ──a step failed──► failed | ──cancel──► cancelled

A claim returns a *fence*, a number that grows with every claim of the step; whoever comes with an older one is
told so and can change nothing. A message that finds its step done, busy or closed is acknowledged and skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis import Redis

StepState = Literal["waiting", "queued", "running", "done", "failed", "cancelled", "lost"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
#: Job states that nothing changes any more.
ENDED: frozenset[str] = frozenset({"done", "failed", "cancelled"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """A step as its job is submitted with."""

    #: "download", "plan", "split:<node>", ...: unique within the job.
    name: str
    #: Celery task that runs it.
    task: str
    #: Celery queue whose workers may run it.
    queue: str
    #: Steps that must be done first.
    after: tuple[str, ...] = ()
    #: The one node that can run it; None: any consumer of the queue.
    node_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wakeup:
    """A message to send: this step may be run."""

    job_id: str
    step: str
    task: str
    queue: str
    #: For the message's readable form only.
    model_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What became of a submit."""

    job_id: str
    #: False: the same submission was unfinished already, and this is its job.
    created: bool


class Ledger:
    """Jobs and steps; torch-free, Flask-free, Celery-free.

    Redis that cannot be reached raises `planner.errors.Unavailable` from every method.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        prefix: str = "fairshard:",
        wake: Callable[[Sequence[Wakeup]], None] | None = None,
        lease_s: float = 15.0,
        max_attempts: int = 3,
        job_ttl_s: float = 7 * 86400.0,
    ) -> None:
        """Use `redis`; `wake` sends the messages (the reconciler sends again what it loses)."""
        raise NotImplementedError

    # -- what users do -------------------------------------------------------------------------------------------
    def submit(
        self,
        kind: str,
        *,
        model_name: str,
        params: Mapping[str, Any],
        steps: Sequence[StepSpec],
        job_id: str | None = None,
        single_flight: str | None = None,
        waits_for: str | None = None,
        submitter: str | None = None,
        batch_id: str | None = None,
        max_queued: int | None = None,
        max_per_submitter: int | None = None,
    ) -> Submission:
        """Accept a job and wake its first steps.

        Args:
            kind: "request", "process" or "delete".
            model_name: What the job is about.
            params: The job's parameters as JSON; every step reads them.
            steps: Its steps, in the order in which they are shown.
            job_id: A random one of 32 hex digits by default; submitting the same id twice changes nothing.
            single_flight: While a job with this key is unfinished, that one is returned and none is made.
            waits_for: Job whose end the first steps wait for; if it fails, so does this one.
            submitter: Whom the job counts against (an API token's name).
            batch_id: The batch it belongs to.
            max_queued: Refuse when this many jobs are unfinished.
            max_per_submitter: Refuse when this many of the submitter's are.

        Raises:
            LimitExceeded: If a limit is reached.
        """
        raise NotImplementedError

    def cancel(self, job_id: str) -> bool:
        """Cancel a job: nothing of it starts any more, and what runs is told at its next sign of life.

        Returns:
            Whether it was unfinished.

        Raises:
            NotFound: If there is no such job.
        """
        raise NotImplementedError

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as JSON.

        `{job_id, kind, state, step, steps: [{name, state, attempts, progress: {done, total, what} | null,
        error: {code, message, details} | null, node_id, started_at, ended_at}], model_name, params, error, result,
        submitter, batch_id, waits_for, created_at, started_at, ended_at}`; times are RFC 3339 in UTC or null.

        Raises:
            NotFound: If there is no such job.
        """
        raise NotImplementedError

    def jobs(
        self,
        *,
        state: str | None = None,
        model_name: str | None = None,
        kind: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[dict[str, Any]]:
        """Jobs as JSON, newest first, without their `steps` (see `job`)."""
        raise NotImplementedError

    def events(self, job_id: str, *, after: str = "0", limit: int = 100) -> list[tuple[str, dict[str, Any]]]:
        """What happened in a job after the event of id `after`: `(event id, {event, step, state, ...})`, oldest first.

        Events are "submitted", "claimed", "progress", "step", "retry", "lost" and, last, "ended". Does not block: poll.
        """
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Counters and gauges by name: jobs_<state>_total, steps_<state>_total, jobs_unfinished, steps_due, ..."""
        raise NotImplementedError
