"""What users can have done, and what they can ask: jobs, batches, plans, nodes. Torch-free, Flask-free."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from planner.errors import FairshardError, NodeFailure, NotFound, Unavailable
from planner.names import check_model_name
from workers.jobs.replay import replay
from workers.jobs.submissions import JobView, Submissions
from workers.ledger.connection import eviction, reachable
from workers.ledger.ledger import ENDED
from workers.ledger.views import accepted_view, batch_view, failed_view

logger = logging.getLogger(__name__)

#: Seconds between two looks at a job that is waited for.
_POLL_S = 0.1


class Jobs(Submissions):
    """Submits jobs and answers about them; the web floor and the command line talk to this alone."""

    def submit_batch(
        self, entries: Sequence[Mapping[str, Any]], *, hub_token: str | None = None, submitter: str | None = None
    ) -> dict[str, Any]:
        """Submit many requests at once; each entry has the fields of `submit_request`.

        Returns:
            As `batch`. An entry that is refused is in it as a failed one with its error; the others go on. So are
            those that were left when Redis went away, once any was accepted.

        Raises:
            Unavailable: If nothing was accepted.
        """
        batch_id = secrets.token_hex(16)
        # Ids are drawn, and written, before anything is accepted: whatever ends this, its jobs have their batch.
        jobs: list[dict[str, Any]] = [
            {"model_name": str(entry.get("model_name"))[:200], "job_id": secrets.token_hex(16)} for entry in entries
        ]
        record = {"created_at": time.time(), "jobs": jobs}
        views: list[JobView] = []
        away: Unavailable | None = None
        try:
            self._keep_batch(batch_id, record)
            for entry, job in zip(entries, jobs, strict=True):
                try:
                    if away is not None:
                        raise away
                    more = {"submitter": submitter, "batch_id": batch_id, "job_id": job["job_id"]}
                    view = self.submit_request(**entry, hub_token=hub_token, **more)
                except FairshardError as error:
                    if isinstance(error, Unavailable):
                        if not any(view["job_id"] for view in views):
                            raise
                        away = error
                    cause = {"code": error.code, "message": str(error), "details": error.details}
                    job.update(job_id=None, error=cause)
                    view = {**failed_view(cause), "job_id": None}
                else:
                    job["job_id"] = view["job_id"]
                views.append(view)
        except Unavailable:
            if self._journal is not None:
                self._journal.forget_batch(batch_id)
            raise
        with contextlib.suppress(Unavailable):  # then the first record stands
            self._keep_batch(batch_id, record, away=away is not None)
        return batch_view(batch_id, record, views)

    def _keep_batch(self, batch_id: str, record: Mapping[str, Any], *, away: bool = False) -> None:
        services, keep_s = self._services, self._services.queue.job_ttl_s
        if self._journal is not None:
            self._journal.record_batch(batch_id, record, keep_s=keep_s)
        if not away:
            key, keep_ms = f"{services.queue.prefix}batch:{batch_id}", round(1000 * keep_s)
            with reachable():
                services.redis.set(key, json.dumps(record), px=keep_ms)

    def batch(self, batch_id: str) -> dict[str, Any]:
        """`{batch_id, state, counts: {<state>: n}, created_at, jobs: [{model_name, job_id, state, step, error}]}`.

        Raises:
            NotFound: If there is no such batch.
        """
        record = self._journal.batch(batch_id) if self._journal is not None else None
        if record is None:
            with reachable():
                text: Any = self._services.redis.get(f"{self._services.queue.prefix}batch:{batch_id}")
            if text is None:
                raise NotFound(f"there is no batch {batch_id[:64]!r}")
            record = json.loads(text)
        return batch_view(batch_id, record, [self._batch_entry(entry) for entry in record["jobs"]])

    def _batch_entry(self, entry: Mapping[str, Any]) -> JobView:
        if entry["job_id"] is None:
            return failed_view(entry.get("error"))
        try:
            return self.job(entry["job_id"])
        except NotFound as error:
            return failed_view({"code": error.code, "message": str(error), "details": {}})

    def job(self, job_id: str) -> JobView:
        """The job; one that was accepted but that Redis has yet to hear of is `queued`.

        Raises:
            NotFound: If there is no such job.
        """
        try:
            return self._services.ledger.job(job_id)
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
        return self._services.ledger.jobs(state=state, model_name=model_name, kind=kind, limit=limit, offset=offset)

    def cancel(self, job_id: str) -> JobView:
        """Cancel a job (one that ended stays as it is), and return it.

        Raises:
            NotFound: If there is no such job.
        """
        ledger, journal = self._services.ledger, self._journal
        try:
            ledger.cancel(job_id)
            view = ledger.job(job_id)
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
        """As `Ledger.events`."""
        return self._services.ledger.events(job_id, after=after, limit=limit)

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
        return self._services.plans.latest(check_model_name(model_name))

    def plans(self, *, model_name: str | None = None, limit: int = 50, offset: int = 0) -> list[dict[str, Any]]:
        """`[{plan_id, model_name, revision, strategy, node_ids, generated_at, job_id}]`, newest first."""
        return self._services.plans.summaries(model_name=model_name, limit=limit, offset=offset)

    def profile(self, model_name: str, *, revision: str | None = None) -> dict[str, Any]:
        """The model's newest metadata as JSON.

        Raises:
            NotFound: If there is none.
        """
        from planner.wire.read import profile_to_json

        return profile_to_json(self._services.newest_profile(check_model_name(model_name), revision=revision))

    def nodes(self, *, limit: int | None = None, offset: int = 0) -> list[dict[str, Any]]:
        """Nodes alive, by id; with `limit` that many, after the first `offset`.

        `{node_id, device, flop_per_s, memory_bytes, memory_bytes_per_s, load, disk_free_bytes, versions: {name:
        version}, host, started_at, seen_at, queue_length, running: [{job_id, step}], wedged, shards: [plan_id]}`.
        """
        services = self._services
        infos = services.registry.alive(limit=limit, offset=offset)
        running: dict[str, list[dict[str, str]]] = {}
        for job_id, step, worker in services.ledger.running():
            running.setdefault(worker.partition("@")[0], []).append({"job_id": job_id, "step": step})
        lengths = self._queue_lengths([f"node.{info['node_id']}" for info in infos])
        views = []
        for info, length in zip(infos, lengths, strict=True):
            now = running.get(info["node_id"], [])
            # Alive, work waiting and nothing claimed: its consumer hangs. (For a moment it is so between two steps.)
            views.append({**info, "queue_length": length, "running": now, "wedged": bool(length and not now)})
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
