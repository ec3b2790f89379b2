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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from redis import Redis

from planner.errors import FairshardError, LimitExceeded
from planner.names import split_revision
from workers.ledger.connection import reachable
from workers.ledger.steps import Claimed, Refusal, Standing, StepSpec, Submission, Wakeup
from workers.ledger.views import Views, no_job

#: Bounds of the histogram of steps' durations, in seconds; the same as in ledger.lua.
STEP_BOUNDS_S = ("0.1", "0.5", "2", "10", "60", "300", "1800", "7200", "+Inf")


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
        #: Jobs as users see them.
        self.views = Views(redis, prefix=prefix)
        self.lease_ms = round(lease_s * 1000)
        self._wake = wake
        self._max_attempts = max_attempts
        self.job_ttl_ms = round(job_ttl_s * 1000)
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
                "ttl_ms": self.job_ttl_ms,
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

    # -- what workers do -----------------------------------------------------------------------------------------
    def claim(self, job_id: str, step: str, *, owner: str, task_id: str = "") -> Claimed | Refusal:
        """Take a step for `lease_s`, for the Celery task `task_id`.

        `owner` is unique to this call, so that a retried call is one claim.
        """
        how, *values = self._run("claim", job_id, step, owner, self.lease_ms, task_id)
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

    # -- what the reconciler does --------------------------------------------------------------------------------
    def wake_overdue(self, *, limit: int = 500) -> int:
        """Send again what nobody claimed, take back what vanished workers held, close what passed its attempts.

        Returns:
            How many steps were overdue.
        """
        return int(self._run("overdue", limit, self.lease_ms)[0])

    def mend(self) -> int:
        """After Redis evicted keys: have each unfinished job go on with what is left, or end if that is not enough.

        Jobs that are gone altogether come back from the web's journal.

        Returns:
            How many ended.
        """
        begin = f"{self.prefix}job:"
        with reachable():
            found = [key.removeprefix(begin) for key in self.redis.scan_iter(f"{begin}*", count=1000)]
        return sum(int(self._run("mend", *found[at : at + 100])[0]) for at in range(0, len(found), 100))

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

    # -- what others need to know --------------------------------------------------------------------------------
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

    def step_seconds(self) -> dict[str, tuple[list[tuple[str, int]], float]]:
        """How long steps that were done took: kind of step -> (`(at most seconds, how many)` up to "+Inf", sum)."""
        with reachable():
            found = self.redis.hgetall(f"{self.prefix}counters:step_seconds")
        counted: dict[str, dict[str, int]] = {}
        for field, value in found.items():
            kind, _, bound = field.partition(" ")
            counted.setdefault(kind, {})[bound] = int(value)
        result = {}
        for kind, buckets in counted.items():
            total_ms = buckets.pop("ms")
            sums = accumulate(buckets.get(bound, 0) for bound in STEP_BOUNDS_S)
            result[kind] = (list(zip(STEP_BOUNDS_S, sums, strict=True)), total_ms / 1000)
        return result

    def running_request(self, model_name: str, *, revision: str | None = None) -> str | None:
        """The newest unfinished request for the model, or for the part of it that a revision names; or None."""
        part = split_revision(revision)[1]
        with reachable():
            found = self.redis.zrevrange(f"{self.prefix}requests:{model_name}", 0, -1)
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in found:
                pipeline.hget(f"{self.prefix}job:{job_id}", "params")
            given = [json.loads(params or "{}").get("revision") for params in pipeline.execute()]
        asked = (str(job) for job, its in zip(found, given, strict=True) if split_revision(its)[1] == part)
        return next(asked, None)

    def using_plan(self, plan_id: str) -> list[str]:
        """Unfinished jobs that made this plan, and have its shards cut."""
        with reachable():
            ids = self.redis.zrange(f"{self.prefix}unfinished", 0, -1)
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hget(f"{self.prefix}job:{job_id}", "result")
            results = pipeline.execute()
        return [
            job for job, text in zip(ids, results, strict=True) if text and json.loads(text).get("plan_id") == plan_id
        ]

    def states(self, job_ids: Sequence[str]) -> list[str | None]:
        """The jobs' states in one round trip, of ended ones for 30 days; None where Redis knows no such job."""
        with reachable():
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hget(f"{self.prefix}job:{job_id}", "state")
                pipeline.get(f"{self.prefix}over:{job_id}")
            found = pipeline.execute()
        return [state or over for state, over in zip(found[::2], found[1::2], strict=True)]

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
        """(job, step, worker) of the steps that run now."""
        with reachable():
            found = self.redis.hgetall(f"{self.prefix}running")
        return [(*member.split("|", 1), owner.partition("#")[0]) for member, owner in found.items()]

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


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    # Lua's cjson reads null as a value that is true.
    return {name: value for name, value in fields.items() if value is not None}
