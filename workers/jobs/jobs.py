"""What users can have done, and what they can ask: jobs, batches, plans, nodes. Torch-free, Flask-free."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

from planner.errors import Conflict, FairshardError, NodeFailure, NotFound, Unavailable
from planner.names import split_revision
from workers.jobs import kinds
from workers.jobs.batches import Batches
from workers.jobs.intake import Intake
from workers.jobs.journal import Accepted
from workers.jobs.kinds import NewJob
from workers.jobs.replay import replay
from workers.ledger.connection import eviction, reachable
from workers.ledger.steps import ENDED
from workers.ledger.views import accepted_view
from workers.runner.runs import Runs
from workers.service.services import Services
from workers.settings import QueueSettings, Settings

#: A job as JSON; the fields are those of `workers.ledger.views.Views.job`.
JobView = dict[str, Any]

logger = logging.getLogger(__name__)

#: Seconds between two looks at a job that is waited for.
_POLL_S = 0.1


class Jobs:
    """Submits jobs and answers about them; the web floor and the command line talk to this alone."""

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        *,
        journal: bool = False,
        queue: QueueSettings | None = None,
        max_queued: int | None = None,
        max_per_submitter: int | None = None,
    ) -> Self:
        """The jobs of the Redis and the store that the settings name; connects at the first call, not here.

        Args:
            settings: As `Settings.from_env()` gives them.
            journal: Whether accepted jobs are written to `<data>/journal.sqlite` first, and metadata and plans kept
                in `<data>/store` (the web process does).
            queue: Default: from the environment.
            max_queued: Refuse jobs when so many are unfinished.
            max_per_submitter: Refuse a submitter's when so many of his are.
        """
        from workers.celery_app import create_app
        from workers.queue.messages import sender

        queue = queue or QueueSettings.from_env()
        # No result backend: nobody here waits for Celery.
        app = create_app(settings, queue, results=False)
        # A caller is told within five seconds that Redis is away, whatever way it is.
        services = Services(settings=settings, queue=queue, wake=sender(app), redis_timeout_s=2.0, keeper=journal)
        return cls(services, journal=journal, max_queued=max_queued, max_per_submitter=max_per_submitter)

    def __init__(
        self,
        services: Services,
        *,
        journal: bool = False,
        max_queued: int | None = None,
        max_per_submitter: int | None = None,
    ) -> None:
        """See `from_settings`."""
        self._services = services
        self._journals = journal
        self._limits: dict[str, Any] = {"max_queued": max_queued, "max_per_submitter": max_per_submitter}

    @cached_property
    def _journal(self) -> Accepted | None:
        return Accepted(self._services.settings.data_dir / "journal.sqlite") if self._journals else None

    @cached_property
    def _intake(self) -> Intake:
        return Intake(self._services, self._journal, **self._limits)

    @cached_property
    def batches(self) -> Batches:
        """Many requests in one call."""
        return Batches(self._services, self._journal, intake=self._intake)

    @cached_property
    def runs(self) -> Runs:
        """Plans that run."""
        return Runs(self._services)

    def submit_request(
        self,
        model_name: str,
        *,
        hub_token: str | None = None,
        submitter: str | None = None,
        **fields: Any,
    ) -> JobView:
        """Have a model profiled, and with `process` planned and split.

        Args:
            model_name: "owner/name", or a name that the Hub resolves without its owner.
            hub_token: The user's own token; kept encrypted until the job ends.
            submitter: Whom it counts against.
            fields: As `workers.jobs.kinds.request` takes them.

        Raises:
            InvalidInput, LimitExceeded, Unavailable.
        """
        name = self._services.canonical(model_name, token=hub_token)
        return self._submit(kinds.request(name, **fields), hub_token=hub_token, submitter=submitter)

    def submit_process(
        self, model_name: str, *, hub_token: str | None = None, submitter: str | None = None, **options: Any
    ) -> JobView:
        """Have a profiled model planned and, with `split`, its shards cut.

        Args:
            model_name: "owner/name", or a name that the Hub resolves without its owner.
            hub_token: As for a request.
            submitter: Whom it counts against.
            options: As `workers.jobs.params.process_params` takes them.

        Raises:
            Conflict: If there is neither metadata nor a running request for the model.
            InvalidInput, LimitExceeded, Unavailable.
        """
        model_name = self._services.canonical(model_name, token=hub_token)
        new = kinds.process(model_name, **options)
        if not new.params["metadata_repo"]:
            revision = new.params["revision"]
            running = self._services.ledger.running_request(model_name, revision=revision)
            if not running and not self._services.profiled(model_name, revision=revision):
                named = f"{model_name}{split_revision(revision)[1]}"
                raise Conflict(
                    f"there is no metadata of {named} and no request that makes it: POST /api/request first "
                    f"('fairshard submit {model_name}' does both), or name a metadata_repo that has it",
                    details={"model_name": model_name},
                )
            newest = self._services.newest_record(model_name, revision=revision)
            new = kinds.from_profile(new, waits_for=running, newest=newest)
        return self._submit(new, hub_token=hub_token, submitter=submitter)

    def submit_delete(self, plan_id: str, *, force: bool = False, submitter: str | None = None) -> JobView:
        """Have a plan forgotten, and its shards deleted by the nodes that hold them.

        Args:
            plan_id: The plan's id.
            force: Cancel the jobs that use it first.
            submitter: Whom it counts against.

        Raises:
            NotFound: If there is no such plan.
            Conflict: If unfinished jobs use it, and it is not forced.
            LimitExceeded, Unavailable.
        """
        plan = self._services.plans.get(plan_id)
        using = self._services.ledger.using_plan(plan_id)
        if using and not force:
            raise Conflict(
                f"job {using[0]} is using plan {plan_id} ({len(using)} in all): wait for its end, cancel it, or "
                "delete the plan with ?force=true, which ends it first",
                details={"plan_id": plan_id, "job_ids": using[:100]},
            )
        for job_id in using:
            self.cancel(job_id)
        self.runs.undeploy(plan_id)
        return self._submit(kinds.delete(plan, alive=self._services.registry.alive_ids()), submitter=submitter)

    def _submit(self, new: NewJob, **more: Any) -> JobView:
        (view,) = self._intake.accept({secrets.token_hex(16): new}, **more)
        if isinstance(view, FairshardError):
            raise view
        return view

    def job(self, job_id: str) -> JobView:
        """The job; one that was accepted but that Redis has yet to hear of is `queued`.

        Raises:
            NotFound: If there is no such job.
        """
        try:
            return self._services.ledger.views.job(job_id)
        except NotFound:
            entry = self._journal.get(job_id) if self._journal is not None else None
            if entry is None:
                raise
            return accepted_view(job_id, entry)

    def jobs(
        self,
        *,
        state: str | None = None,
        model_name: str | None = None,
        kind: str | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> list[JobView]:
        """Jobs, newest first, without `steps`."""
        return self._services.ledger.views.jobs(
            state=state, model_name=model_name, kind=kind, limit=limit, offset=offset
        )

    def cancel(self, job_id: str) -> JobView:
        """Cancel a job (one that ended stays as it is), and return it.

        Raises:
            NotFound: If there is no such job.
        """
        ledger, journal = self._services.ledger, self._journal
        try:
            ledger.cancel(job_id)
            view = ledger.views.job(job_id)
        except NotFound:
            # Accepted, and lost by Redis: it is not submitted again.
            if journal is None or not journal.cancel(job_id):
                raise
            return self.job(job_id)
        if journal is not None and view["state"] == "cancelled":
            # Redis may forget that too.
            journal.cancel(job_id)
        return view

    def wait(self, job_id: str, *, step: str | None = None, timeout_s: float = 30.0) -> JobView:
        """Return the job once `step` is done (None: once the job ended), or as it is after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            view = self.job(job_id)
            done = any(found["name"] == step and found["state"] == "done" for found in view["steps"])
            if view["state"] in ENDED or done or time.monotonic() >= deadline:
                return view
            time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))

    def events(self, job_id: str, *, after: str = "0", limit: int = 100) -> list[tuple[str, dict[str, Any]]]:
        """As `Views.events`."""
        return self._services.ledger.views.events(job_id, after=after, limit=limit)

    def plan(self, plan_id: str) -> dict[str, Any]:
        """A plan's JSON (`planner.wire.read.plan_to_json`, with `job_id` beside).

        Raises:
            NotFound: If there is no such plan.
        """
        return self._services.plans.get(plan_id)

    def latest_plan(self, model_name: str) -> dict[str, Any]:
        """The model's newest plan.

        Raises:
            NotFound: If there is none.
        """
        return self._services.plans.latest(self._services.canonical(model_name))

    def plans(self, *, model_name: str | None = None, limit: int = 50, offset: int = 0) -> list[dict[str, Any]]:
        """`[{plan_id, model_name, revision, strategy, node_ids, generated_at, job_id}]`, newest first."""
        return self._services.plans.summaries(model_name=model_name, limit=limit, offset=offset)

    def profile(self, model_name: str, *, revision: str | None = None) -> dict[str, Any]:
        """The model's newest metadata as JSON.

        Raises:
            NotFound: If there is none.
        """
        from planner.wire.read import profile_to_json

        return profile_to_json(self._services.newest_profile(self._services.canonical(model_name), revision=revision))

    def nodes(self, *, limit: int | None = None, offset: int = 0) -> list[dict[str, Any]]:
        """Nodes alive, by id; with `limit` that many, after the first `offset`.

        `{node_id, device, flop_per_s, memory_bytes, memory_bytes_per_s, load, disk_free_bytes, versions: {name:
        version}, host, started_at, seen_at, queue_length, running: [{job_id, step}], wedged, shards: [plan_id],
        deployed_bytes}`.
        """
        services = self._services
        infos = services.registry.alive(limit=limit, offset=offset)
        running: dict[str, list[dict[str, str]]] = {}
        for job_id, step, worker in services.ledger.running():
            running.setdefault(worker.partition("@")[0], []).append({"job_id": job_id, "step": step})
        lengths = self._queue_lengths([f"node.{info['node_id']}" for info in infos])
        deployed = self.runs.deployed_bytes()
        views = []
        for info, length in zip(infos, lengths, strict=True):
            now = running.get(info["node_id"], [])
            # Alive, work waiting and nothing claimed: its consumer hangs. (For a moment it is so between two steps.)
            more = {"queue_length": length, "running": now, "wedged": bool(length and not now)}
            views.append({**info, **more, "deployed_bytes": deployed.get(info["node_id"], 0)})
        return views

    def node_count(self) -> int:
        """How many nodes announced themselves."""
        return self._services.registry.count()

    def _queue_lengths(self, names: Sequence[str]) -> list[int]:
        services = self._services
        with reachable():
            pipeline = services.redis.pipeline(transaction=False)
            for name in names:
                pipeline.llen(f"{services.queue.prefix}celery:{name}")
            return [int(length) for length in pipeline.execute()]

    def metrics(self) -> dict[str, float]:
        """As `Ledger.metrics`, with queue lengths, nodes alive and, where the journal can be read, what it holds."""
        services = self._services
        metrics = services.ledger.metrics()
        compute, planner = self._queue_lengths(["compute", "planner"])
        metrics |= {
            "queue_compute_messages": float(compute),
            "queue_planner_messages": float(planner),
            "nodes_alive": float(len(services.registry.alive())),
        }
        with contextlib.suppress(Unavailable):
            metrics["journal_jobs"] = float(len(self._journal)) if self._journal is not None else 0.0
        return metrics

    def step_seconds(self) -> dict[str, tuple[list[tuple[str, int]], float]]:
        """As `Ledger.step_seconds`."""
        return self._services.ledger.step_seconds()

    def ready(self) -> dict[str, bool]:
        """`{redis, planner, nodes, journal}`: whether Redis and the journal can be written, and who is alive.

        Never raises.
        """
        answers = {"redis": False, "planner": False, "nodes": False}
        with contextlib.suppress(FairshardError):
            services = self._services
            with reachable():
                # A write: with its memory or its disk full, Redis still answers what only looks.
                answers["redis"] = bool(services.redis.set(f"{services.queue.prefix}probe", "", px=1000))
                answers["planner"] = bool(services.redis.exists(f"{services.queue.prefix}planner"))
            # Asked every two seconds by each open page: one living node is enough to know.
            answers["nodes"] = bool(services.registry.alive(limit=10) or services.registry.alive())
        if self._journals:
            answers["journal"] = False
            with contextlib.suppress(Unavailable):
                if self._journal is not None:
                    self._journal.check()
                    answers["journal"] = True
        return answers

    def warnings(self) -> list[str]:
        """Why jobs are refused or can be lost; nothing where Redis cannot be asked, since `ready` says that."""
        try:
            found = [eviction(self._services.redis)]
            unfinished, most = self._services.ledger.metrics()["jobs_unfinished"], self._limits["max_queued"]
        except Unavailable:
            return []
        if most is not None and unfinished >= most:
            found.append(f"the queue is full: as many jobs are unfinished as FAIRSHARD_MAX_QUEUE allows, {most}")
        return [warning for warning in found if warning]

    def replay(self) -> int:
        """Submit again what the journal has and Redis lost; the web process calls this every few seconds.

        Returns:
            How many were.
        """
        try:
            # First: once the journal has forgotten a job, what the job made must be on the disk.
            self._services.keep()
        except NodeFailure as error:
            logger.warning("metadata and plans are kept by Redis alone: %s", error)
        return 0 if self._journal is None else replay(self._journal, self._services.ledger)
