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

A claim returns a *fence*, a number that grows with every claim of the step (also over a restart of Redis that forgot
the last second); whoever comes with an older one is told so and can change nothing. A message that finds its step
done, busy or closed is acknowledged and skipped.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError

from planner.errors import FairshardError, LimitExceeded, NotFound, Unavailable
from workers.views import event_view, job_view, step_view

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
    #: What the step needs beyond the job's parameters, as JSON.
    args: Mapping[str, Any] = field(default_factory=dict)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A step that this process may run until its lease ends."""

    job_id: str
    step: str
    #: Grows with each claim of the step; writes with an older one change nothing.
    fence: int
    #: This attempt, from 1.
    attempt: int
    kind: str
    model_name: str
    #: The job's parameters.
    params: Mapping[str, Any]
    #: The step's own.
    args: Mapping[str, Any]
    #: Nodes that died while they held steps of this job.
    lost_nodes: frozenset[str]


#: Why a step was not claimed: its message is then acknowledged and skipped.
Refusal = Literal["unknown", "done", "closed", "waiting", "busy", "early", "poisoned"]
#: What becomes of a write: "ok", or the reason why it changed nothing.
Standing = Literal["ok", "fenced", "cancelled", "unknown", "done"]


@contextmanager
def reachable() -> Iterator[None]:
    """Redis' own errors as `planner.errors.Unavailable`."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError) as error:
        raise Unavailable(f"Redis cannot be reached: {error}; is it running, and is REDIS_URL right?") from error
    except (OutOfMemoryError, ReadOnlyError) as error:
        raise Unavailable(f"Redis refuses writes: {error}") from error


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
        #: Any: redis-py types each answer as bytes or str; this client decodes, so it is str.
        self.redis: Any = redis
        self.prefix = prefix
        self.lease_ms = round(lease_s * 1000)
        self._wake = wake
        self._max_attempts = max_attempts
        self._job_ttl_ms = round(job_ttl_s * 1000)
        self._script = redis.register_script(Path(__file__).with_name("ledger.lua").read_text("utf-8"))

    def _run(self, operation: str, *arguments: str | int | float) -> list[str]:
        """Run a transition; send the messages that it asks for; return what it answers."""
        with reachable():
            answer = self._script(keys=[self.prefix], args=[operation, *arguments])
        *values, wakes = answer
        if wakes and self._wake is not None:
            self._wake(
                [
                    Wakeup(job_id=job_id, step=step, task=task, queue=queue, model_name=model_name)
                    for job_id, step, task, queue, model_name in wakes
                ]
            )
        return [str(value) for value in values]

    def _spec(self, spec: StepSpec) -> dict[str, Any]:
        fields = {**asdict(spec), "args": json.dumps(dict(spec.args)), "max_attempts": self._max_attempts}
        return _without_none(fields)

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
        on_node_loss: str = "replan",
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
            on_node_loss: When a node dies: "replan", "wait" for it, or "skip" its steps.

        Raises:
            LimitExceeded: If a limit is reached.
        """
        job_id = job_id or secrets.token_hex(16)
        entry = _without_none(
            {
                "kind": kind,
                "model_name": model_name,
                "params": json.dumps(dict(params)),
                "steps": [self._spec(step) for step in steps],
                "flight": single_flight,
                "waits_for": waits_for,
                "submitter": submitter,
                "batch_id": batch_id,
                "max_queued": max_queued,
                "max_per_submitter": max_per_submitter,
                "on_node_loss": on_node_loss,
                "ttl_ms": self._job_ttl_ms,
            }
        )
        outcome, value = self._run("submit", job_id, json.dumps(entry))
        if outcome == "full":
            raise LimitExceeded(
                f"{value} jobs are unfinished and the limit is {max_queued}: try again when some have ended",
                details={"unfinished": int(value), "limit": max_queued, "setting": "FAIRSHARD_MAX_QUEUE"},
            )
        if outcome == "submitter_full":
            raise LimitExceeded(
                f"{value} of your jobs are unfinished and the limit is {max_per_submitter}: wait, or cancel some",
                details={
                    "unfinished": int(value),
                    "limit": max_per_submitter,
                    "setting": "FAIRSHARD_MAX_JOBS_PER_TOKEN",
                },
            )
        return Submission(job_id=value, created=outcome == "created")

    def cancel(self, job_id: str) -> bool:
        """Cancel a job: nothing of it starts any more, and what runs is told at its next sign of life.

        Returns:
            Whether it was unfinished.

        Raises:
            NotFound: If there is no such job.
        """
        (outcome,) = self._run("cancel", job_id)
        if outcome == "unknown":
            raise no_job(job_id)
        return outcome == "cancelled"

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as JSON.

        `{job_id, kind, state, step, steps: [{name, state, attempts, progress: {done, total, what, rate_per_s, eta_s}
        | null, error: {code, message, details} | null, node_id, started_at, ended_at}], model_name, params, error,
        result, submitter, batch_id, waits_for, created_at, started_at, ended_at}`; times are RFC 3339 in UTC or null.

        Raises:
            NotFound: If there is no such job.
        """
        with reachable():
            fields = self.redis.hgetall(f"{self.prefix}job:{job_id}")
            if not fields:
                raise no_job(job_id)
            names = fields.get("steps", "").split()
            pipeline = self.redis.pipeline(transaction=False)
            for name in names:
                pipeline.hgetall(f"{self.prefix}step:{job_id}:{name}")
            steps = pipeline.execute()
        return {
            **job_view(job_id, fields),
            "steps": [step_view(name, found) for name, found in zip(names, steps, strict=True)],
        }

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
        found: list[dict[str, Any]] = []
        begin, page, skipped = 0, 200, 0
        while len(found) < limit:
            with reachable():
                ids = self.redis.zrevrange(f"{self.prefix}jobs", begin, begin + page - 1)
                pipeline = self.redis.pipeline(transaction=False)
                for job_id in ids:
                    pipeline.hgetall(f"{self.prefix}job:{job_id}")
                hashes = pipeline.execute()
            for job_id, fields in zip(ids, hashes, strict=True):
                wanted = {"state": state, "model_name": model_name, "kind": kind}
                if not fields or any(value and fields.get(name) != value for name, value in wanted.items()):
                    continue
                skipped += 1
                if skipped > offset and len(found) < limit:
                    found.append(job_view(job_id, fields))
            if len(ids) < page:
                break
            begin += page
        return found

    def events(self, job_id: str, *, after: str = "0", limit: int = 100) -> list[tuple[str, dict[str, Any]]]:
        """What happened in a job after the event of id `after`: `(event id, {event, at, step, ...})`, oldest first.

        Events are "submitted", "claimed", "progress", "step", "retry", "lost" and, last, "ended". Never blocks: poll.
        """
        with reachable():
            entries = self.redis.xrange(f"{self.prefix}events:{job_id}", min=f"({after}", count=limit)
        return [(str(event_id), event_view(fields)) for event_id, fields in entries]

    def metrics(self) -> dict[str, float]:
        """Counters and gauges by name: jobs_<state>_total, steps_<state>_total, jobs_unfinished, steps_due, ..."""
        with reachable():
            pipeline = self.redis.pipeline(transaction=False)
            pipeline.hgetall(f"{self.prefix}counters")
            pipeline.zcard(f"{self.prefix}unfinished")
            pipeline.zcard(f"{self.prefix}due")
            counters, unfinished, due = pipeline.execute()
        return {name: float(value) for name, value in counters.items()} | {
            "jobs_unfinished": float(unfinished),
            "steps_due": float(due),
        }

    def running_request(self, model_name: str) -> str | None:
        """The newest unfinished request for the model, or None."""
        with reachable():
            found = self.redis.zrevrange(f"{self.prefix}requests:{model_name}", 0, 0)
        return str(found[0]) if found else None

    def states(self, job_ids: Sequence[str]) -> list[str | None]:
        """The jobs' states in one round trip; None where Redis knows no such job."""
        with reachable():
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hget(f"{self.prefix}job:{job_id}", "state")
            return list(pipeline.execute())

    # -- what workers do -----------------------------------------------------------------------------------------
    def claim(self, job_id: str, step: str, *, owner: str) -> Claimed | Refusal:
        """Take a step for `lease_s`; `owner` is unique to this call, so that a retried call is one claim."""
        how, *values = self._run("claim", job_id, step, owner, self.lease_ms)
        if how != "claimed":
            return how  # type: ignore[return-value]
        fence, attempt, params, model_name, lost, kind, args = values
        return Claimed(
            job_id=job_id,
            step=step,
            fence=int(fence),
            attempt=int(attempt),
            kind=kind,
            model_name=model_name,
            params=json.loads(params),
            args=json.loads(args) if args else {},
            lost_nodes=frozenset(lost.split()),
        )

    def renew(self, claim: Claimed, *, progress: Mapping[str, Any] | None = None) -> Standing:
        """Extend the lease, and tell how far the step is."""
        text = json.dumps(dict(progress)) if progress else ""
        return self._run("renew", claim.job_id, claim.step, claim.fence, self.lease_ms, text)[0]  # type: ignore[return-value]

    def commit(
        self,
        claim: Claimed,
        result: Mapping[str, Any],
        *,
        add: Sequence[StepSpec] = (),
        drop: Sequence[str] = (),
        job_result: Mapping[str, Any] | None = None,
    ) -> Standing:
        """Finish a step: store its result, add and drop steps, make its successors due, end the job with the last.

        A step in `add` that exists already is started over, and its present owner fenced.
        """
        entry = _without_none(
            {
                "result": json.dumps(dict(result)),
                "job_result": json.dumps(dict(job_result)) if job_result is not None else None,
                "add": [self._spec(step) for step in add],
                "drop": list(drop),
            }
        )
        return self._run("commit", claim.job_id, claim.step, claim.fence, json.dumps(entry))[0]  # type: ignore[return-value]

    def fail(
        self, claim: Claimed, error: FairshardError, *, delay_s: float = 0.0, final: bool = False
    ) -> Literal["retry", "failed", "fenced", "cancelled", "unknown", "done"]:
        """Record that the attempt failed: again after `delay_s`, or for good if `final` or the attempts are spent."""
        text = json.dumps({"code": error.code, "message": str(error), "details": error.details}, default=str)
        arguments = (claim.job_id, claim.step, claim.fence, text, round(delay_s * 1000), int(final))
        return self._run("fail", *arguments)[0]  # type: ignore[return-value]

    def defer(self, claim: Claimed, *, delay_s: float = 0.0) -> Standing:
        """Hand the step back, no attempt counted: this worker is going, or something is not ready."""
        return self._run("defer", claim.job_id, claim.step, claim.fence, round(delay_s * 1000))[0]  # type: ignore[return-value]

    def hand_back(self, job_id: str, step: str, *, owner: str) -> bool:
        """Take a running step from the worker `owner` that is stopping, no attempt counted; whether it had it."""
        return self._run("hand_back", job_id, step, owner)[0] == "ok"

    def result(self, job_id: str, step: str) -> dict[str, Any] | None:
        """What a step of the job was committed with; None if it was not."""
        with reachable():
            text = self.redis.hget(f"{self.prefix}step:{job_id}:{step}", "result")
        return json.loads(text) if text else None

    def job_result(self, job_id: str) -> dict[str, Any]:
        """The job's result so far; {} if there is none."""
        with reachable():
            text = self.redis.hget(f"{self.prefix}job:{job_id}", "result")
        return json.loads(text) if text else {}

    def running(self) -> list[tuple[str, str, str]]:
        """(job, step, worker) of the steps that run now; of at most 10,000 jobs."""
        with reachable():
            ids = self.redis.zrange(f"{self.prefix}unfinished", 0, 9999)
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hget(f"{self.prefix}job:{job_id}", "steps")
            names = pipeline.execute()
            pairs = [(job, step) for job, text in zip(ids, names, strict=True) for step in (text or "").split()]
            pipeline = self.redis.pipeline(transaction=False)
            for job_id, step in pairs:
                pipeline.hmget(f"{self.prefix}step:{job_id}:{step}", "state", "owner")
            found = pipeline.execute()
        return [
            (job_id, step, str(owner).partition("#")[0])
            for (job_id, step), (state, owner) in zip(pairs, found, strict=True)
            if state == "running" and owner
        ]

    # -- what the reconciler does --------------------------------------------------------------------------------
    def wake_overdue(self, *, limit: int = 500) -> int:
        """Send again what nobody claimed, take back what vanished workers held, close what passed its attempts.

        Returns:
            How many steps were overdue.
        """
        return int(self._run("overdue", limit, self.lease_ms)[0])

    def nodes_in_use(self) -> frozenset[str]:
        """Nodes that alone can run some unfinished step."""
        with reachable():
            return frozenset(self.redis.smembers(f"{self.prefix}nodes_in_use"))

    def plans_wanted(self, node_id: str) -> frozenset[str]:
        """Plans of which the node has a shard to cut."""
        with reachable():
            members = self.redis.smembers(f"{self.prefix}at:{node_id}")
            pipeline = self.redis.pipeline(transaction=False)
            for member in members:
                pipeline.hget(f"{self.prefix}step:{member.replace('|', ':', 1)}", "args")
            found = [json.loads(text) for text in pipeline.execute() if text]
        return frozenset(args["plan_id"] for args in found if "plan_id" in args)

    def lose_node(self, node_id: str) -> int:
        """Close the dead node's steps and have their jobs planned again, or wait, by each job's policy.

        Returns:
            How many steps were closed.
        """
        error = {
            "code": "node_lost",
            "message": f"node {node_id} stopped giving signs of life",
            "details": {"node_id": node_id},
        }
        return int(self._run("lose", node_id, json.dumps(error))[0])


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    # Lua's cjson reads null as a value that is true.
    return {name: value for name, value in fields.items() if value is not None}


def no_job(job_id: str) -> NotFound:
    """The error for a job that nobody knows."""
    return NotFound(f"there is no job {job_id[:64]!r}: it never was, or it ended longer ago than jobs are kept")
