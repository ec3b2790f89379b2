"""What users can have done: which steps each kind of job consists of. Torch-free, Flask-free.

request   download ─ profile ─ publish [─ plan ─ split:<node> ... ─ finish, with `process`]
process   plan ─ split:<node> ... ─ finish           waits for a running request of the same model
delete    delete:<node> ...
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from planner.errors import Conflict, FairshardError, InvalidInput, NotFound, Unavailable
from planner.limits import check_batch_size, check_sequence_length
from planner.names import check_model_name, check_revision
from workers.accepted import Accepted
from workers.ledger import ENDED, StepSpec, no_job, reachable
from workers.services import Services
from workers.settings import QueueSettings, Settings
from workers.views import queued_view

#: A job as JSON; the fields are those of `workers.ledger.Ledger.job`.
JobView = dict[str, Any]

#: The steps of a request and of a process.
_REQUEST = (
    StepSpec(name="download", task="workers.download", queue="compute"),
    StepSpec(name="profile", task="workers.generate_metadata", queue="compute", after=("download",)),
    StepSpec(name="publish", task="workers.publish_metadata", queue="compute", after=("profile",)),
)
_PLAN = StepSpec(name="plan", task="planner.plan", queue="planner")
_PROCESS_FIELDS = frozenset(
    {
        "options", "batch_size", "sequence_length", "available_nodes", "links", "metadata_repo", "revision", "split",
        "on_node_loss",
    }
)  # fmt: skip
#: Seconds between two looks at a job that is waited for.
_POLL_S = 0.1
#: An entry of the journal that is younger may still be on its way to Redis, in milliseconds.
_YOUNG_MS = 5000


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
    ) -> Jobs:
        """The jobs of the Redis and the store that the settings name; connects at the first call, not here.

        Args:
            settings: As `Settings.from_env()` gives them.
            journal: Whether accepted jobs are written to `<data>/journal.sqlite` first (the web process does).
            queue: Default: from the environment.
            max_queued: Refuse jobs when so many are unfinished.
            max_per_submitter: Refuse a submitter's when so many of his are.
        """
        from workers.celery_app import create_app, sender

        queue = queue or QueueSettings.from_env()
        # No result backend: nobody here waits for Celery.
        app = create_app(settings, queue, results=False)
        # A caller is told within five seconds that Redis is away, whatever way it is.
        services = Services(settings=settings, queue=queue, wake=sender(app), redis_timeout_s=2.0)
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

    def _submit(
        self, kind: str, *, model_name: str, steps: Sequence[StepSpec], hub_token: str | None = None, **entry: Any
    ) -> JobView:
        """Write the job to the journal, then to the ledger."""
        services, journal = self._services, self._journal
        job_id = secrets.token_hex(16)
        if entry.get("single_flight") and hub_token:
            # Two users' views of a private model are two things.
            entry["single_flight"] += services.tokens.fingerprint(hub_token)
        if hub_token:
            # A token is never in the journal: should Redis lose it, its job says so (`Services.user_token`).
            entry["params"] = {**entry["params"], "with_token": True}
        if journal is not None:
            plain = [{"name": step.name, "task": step.task, "queue": step.queue, "after": list(step.after),
                      "node_id": step.node_id, "args": dict(step.args)} for step in steps]  # fmt: skip
            journal.record(job_id, {"kind": kind, "model_name": model_name, "steps": plain, **entry})
        try:
            if hub_token:
                services.tokens.put(job_id, hub_token)
            submission = services.ledger.submit(
                kind, model_name=model_name, steps=steps, job_id=job_id, **entry, **self._limits
            )
        except FairshardError:
            if journal is not None:
                journal.forget([job_id])
            raise
        if not submission.created:
            if journal is not None:
                journal.forget([job_id])
            if hub_token:
                services.tokens.drop(job_id)
        return services.ledger.job(submission.job_id)

    def submit_request(
        self,
        model_name: str,
        *,
        revision: str | None = None,
        batch_size: int = 1,
        sequence_length: int = 512,
        kv_dtype: str | None = None,
        download: str = "headers",
        process: Mapping[str, Any] | None = None,
        hub_token: str | None = None,
        submitter: str | None = None,
        batch_id: str | None = None,
    ) -> JobView:
        """Have a model profiled, and its metadata published.

        Args:
            model_name: "owner/name".
            revision: Branch, tag or commit; None: the default branch.
            batch_size: Sequences of one pass.
            sequence_length: Tokens of each.
            kv_dtype: Type of the KV cache ("F16", ...); None: the model's.
            download: "headers", or "full" to fetch the whole checkpoint to the node's cache first.
            process: Options as `submit_process` takes them ({} for the defaults): plan and split as well.
            hub_token: The user's own token; kept encrypted until the job ends.
            submitter: Whom it counts against.
            batch_id: Its batch.

        Raises:
            InvalidInput, LimitExceeded, Unavailable.
        """
        check_model_name(model_name)
        if revision is not None:
            check_revision(revision)
        if download not in {"headers", "full"}:
            raise InvalidInput(f"download must be 'headers' or 'full', got {download!r:.40}")
        params: dict[str, Any] = {
            "model_name": model_name,
            "revision": revision,
            "batch_size": check_batch_size(batch_size),
            "sequence_length": check_sequence_length(sequence_length),
            "kv_dtype": kv_dtype,
            "download": download,
            "process": None if process is None else _process_params(process),
        }
        steps = list(_REQUEST)
        on_node_loss = "replan"
        if process is not None:
            steps.append(StepSpec(name="plan", task=_PLAN.task, queue=_PLAN.queue, after=("publish",)))
            on_node_loss = params["process"]["on_node_loss"]
        return self._submit(
            "request",
            model_name=model_name,
            params=params,
            steps=steps,
            single_flight=_flight("request", params),
            submitter=submitter,
            batch_id=batch_id,
            on_node_loss=on_node_loss,
            hub_token=hub_token,
        )

    def submit_process(
        self,
        model_name: str,
        *,
        options: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        available_nodes: Sequence[Mapping[str, Any]] | None = None,
        links: Mapping[str, Any] | None = None,
        metadata_repo: str | None = None,
        revision: str | None = None,
        split: bool | None = None,
        on_node_loss: str = "replan",
        hub_token: str | None = None,
        submitter: str | None = None,
        batch_id: str | None = None,
    ) -> JobView:
        """Have a profiled model planned and, with `split`, its shards cut.

        Args:
            model_name: "owner/name".
            options: JSON of `PlanOptions` (`planner.wire.options_from_json`).
            batch_size: Plan at this; None: as profiled.
            sequence_length: Plan at this; None: as profiled.
            available_nodes: Nodes as the wire form has them; None: those registered and alive.
            links: As in a nodes file.
            metadata_repo: Hub repository to read the metadata from (the seed's root file included); None: the
                service's own profile of the latest request.
            revision: Of the metadata, if `metadata_repo` holds several.
            split: None: true where every node is registered.
            on_node_loss: "replan" over the others, or "wait" for the node.
            hub_token: As for a request.
            submitter: Whom it counts against.
            batch_id: Its batch.

        Raises:
            Conflict: If there is neither metadata nor a running request for the model.
            InvalidInput, LimitExceeded, Unavailable.
        """
        check_model_name(model_name)
        params = _process_params(
            {
                "options": options,
                "batch_size": batch_size,
                "sequence_length": sequence_length,
                "available_nodes": available_nodes,
                "links": links,
                "metadata_repo": metadata_repo,
                "revision": revision,
                "split": split,
                "on_node_loss": on_node_loss,
            }
        ) | {"model_name": model_name}
        services = self._services
        running = None if metadata_repo else services.ledger.running_request(model_name)
        if not metadata_repo and not running and not services.profiled(model_name):
            raise Conflict(
                f"there is no metadata of {model_name} and no request that makes it: POST /api/request first "
                f"('fairshard submit {model_name}' does both), or name a metadata_repo that has it",
                details={"model_name": model_name},
            )
        return self._submit(
            "process",
            model_name=model_name,
            params=params,
            steps=[_PLAN],
            single_flight=_flight("process", params),
            waits_for=running,
            submitter=submitter,
            batch_id=batch_id,
            on_node_loss=on_node_loss,
            hub_token=hub_token,
        )

    def submit_delete(self, plan_id: str, *, submitter: str | None = None) -> JobView:
        """Forget a plan and have the nodes delete its shards.

        Raises:
            NotFound: If there is no such plan.
        """
        services = self._services
        plan = services.plans.get(plan_id)
        model_name = plan["model_name"]
        alive = services.registry.alive_ids()
        # Nodes that are away are not waited for; they keep what they have until `fairshard delete` on them.
        nodes = [node_id for node_id in sorted(plan["split_plan"]) if node_id in alive]
        steps = [
            StepSpec(
                name=f"delete:{node_id}",
                task="workers.delete_shards",
                queue=f"node.{node_id}",
                node_id=node_id,
                args={"plan_id": plan_id},
            )
            for node_id in nodes
        ] or [StepSpec(name="forget", task="planner.forget", queue="planner", args={"plan_id": plan_id})]
        view = self._submit(
            "delete",
            model_name=model_name,
            params={"plan_id": plan_id, "model_name": model_name},
            steps=steps,
            single_flight=f"delete:{plan_id}",
            submitter=submitter,
            on_node_loss="skip",
        )
        services.plans.delete(plan_id, model_name)
        return view

    def submit_batch(
        self, entries: Sequence[Mapping[str, Any]], *, hub_token: str | None = None, submitter: str | None = None
    ) -> dict[str, Any]:
        """Submit many requests at once; each entry has the fields of `submit_request`.

        Returns:
            As `batch`. An entry that is refused is in it as a failed one with its error; the others go on.
        """
        services = self._services
        batch_id = secrets.token_hex(16)
        jobs: list[dict[str, Any]] = []
        for entry in entries:
            try:
                view = self.submit_request(**entry, hub_token=hub_token, submitter=submitter, batch_id=batch_id)
            except Unavailable:
                raise
            except FairshardError as error:
                cause = {"code": error.code, "message": str(error), "details": error.details}
                jobs.append({"model_name": str(entry.get("model_name"))[:200], "job_id": None, "error": cause})
            else:
                jobs.append({"model_name": view["model_name"], "job_id": view["job_id"]})
        record = {"created_at": time.time(), "jobs": jobs}
        with reachable():
            services.redis.set(
                f"{services.queue.prefix}batch:{batch_id}", json.dumps(record), ex=round(services.queue.job_ttl_s)
            )
        return self.batch(batch_id)

    def batch(self, batch_id: str) -> dict[str, Any]:
        """`{batch_id, state, counts: {<state>: n}, created_at, jobs: [{model_name, job_id, state, step, error}]}`.

        Raises:
            NotFound: If there is no such batch.
        """
        services = self._services
        with reachable():
            text: Any = services.redis.get(f"{services.queue.prefix}batch:{batch_id}")
        if text is None:
            raise NotFound(f"there is no batch {batch_id[:64]!r}")
        record = json.loads(text)
        jobs = []
        counts: dict[str, int] = {}
        for entry in record["jobs"]:
            view: dict[str, Any] = {"state": "failed", "step": None, "error": entry.get("error")}
            if entry["job_id"] is not None:
                try:
                    view = self.job(entry["job_id"])
                except NotFound as error:
                    view["error"] = {"code": error.code, "message": str(error), "details": {}}
            jobs.append(
                {
                    "model_name": entry["model_name"],
                    "job_id": entry["job_id"],
                    "state": view["state"],
                    "step": view["step"],
                    "error": view["error"],
                }
            )
            counts[view["state"]] = counts.get(view["state"], 0) + 1
        return {
            "batch_id": batch_id,
            "state": _batch_state(counts),
            "counts": counts,
            "created_at": datetime.fromtimestamp(record["created_at"], tz=UTC).isoformat(timespec="seconds"),
            "jobs": jobs,
        }

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
            return queued_view(job_id, entry)

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
        try:
            self._services.ledger.cancel(job_id)
        except NotFound:
            if self._journal is None or self._journal.get(job_id) is None:
                raise
            # Accepted, and lost by Redis: it is not submitted again.
            self._journal.forget([job_id])
            raise no_job(job_id) from None
        return self._services.ledger.job(job_id)

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
        """A plan's JSON (`planner.wire.plan_to_json`, with `job_id` beside).

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
        from planner.wire import profile_to_json

        return profile_to_json(self._services.newest_profile(check_model_name(model_name), revision=revision))

    def nodes(self) -> list[dict[str, Any]]:
        """Nodes alive, by id.

        `{node_id, device, flop_per_s, memory_bytes, memory_bytes_per_s, load, disk_free_bytes, versions: {name:
        version}, host, started_at, seen_at, queue_length, running: [{job_id, step}], wedged, shards: [plan_id]}`.
        """
        services = self._services
        infos = services.registry.alive()
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

    def _queue_lengths(self, names: Sequence[str]) -> list[int]:
        services = self._services
        with reachable():
            pipeline = services.redis.pipeline(transaction=False)
            for name in names:
                pipeline.llen(f"{services.queue.prefix}celery:{name}")
            return [int(length) for length in pipeline.execute()]

    def metrics(self) -> dict[str, float]:
        """As `Ledger.metrics`, with queue lengths and nodes alive."""
        services = self._services
        metrics = services.ledger.metrics()
        compute, planner = self._queue_lengths(["compute", "planner"])
        return metrics | {
            "queue_compute_messages": float(compute),
            "queue_planner_messages": float(planner),
            "nodes_alive": float(len(services.registry.alive())),
            "journal_jobs": float(len(self._journal)) if self._journal is not None else 0.0,
        }

    def ready(self) -> dict[str, bool]:
        """`{redis, planner, nodes}`: whether each answers; never raises."""
        answers = {"redis": False, "planner": False, "nodes": False}
        with contextlib.suppress(FairshardError):
            services = self._services
            with reachable():
                answers["redis"] = bool(services.redis.ping())
                answers["planner"] = bool(services.redis.exists(f"{services.queue.prefix}planner"))
            answers["nodes"] = bool(services.registry.alive())
        return answers

    def replay(self) -> int:
        """Submit again what the journal has and Redis lost; the web process calls this every few seconds.

        Returns:
            How many were.
        """
        journal = self._journal
        if journal is None:
            return 0
        ledger = self._services.ledger
        entries = journal.least_recent()
        states = ledger.states([job_id for job_id, _ in entries])
        now_ms = time.time() * 1000
        # A young one stays, even if it ended: Redis may be killed before it wrote any of it to its disk.
        old = [
            (job_id, entry, state)
            for (job_id, entry), state in zip(entries, states, strict=True)
            if now_ms - entry["created_at"] >= _YOUNG_MS
        ]
        journal.forget([job_id for job_id, _, state in old if state in ENDED])
        again = 0
        for job_id, entry, state in old:
            if state is not None:
                continue
            del entry["created_at"]
            steps = [StepSpec(**{**step, "after": tuple(step["after"])}) for step in entry.pop("steps")]
            submission = ledger.submit(entry.pop("kind"), job_id=job_id, steps=steps, **entry)
            # Another job of the same flight does its work; this one must not come back for ever.
            if not submission.created and submission.job_id != job_id:
                journal.forget([job_id])
            again += submission.created
        return again


def _flight(kind: str, params: Mapping[str, Any]) -> str:
    return f"{kind}:" + json.dumps(params, sort_keys=True, separators=(",", ":"))


def _batch_state(counts: Mapping[str, int]) -> str:
    if counts.keys() & {"queued", "running"}:
        return "queued" if counts.keys() == {"queued"} else "running"
    for state in ("failed", "cancelled"):
        if state in counts:
            return state
    return "done"


def _process_params(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of planning, checked, so that a mistake is refused before a job is made of it.

    Raises:
        InvalidInput: If a field is unknown or wrong.
    """
    from planner.wire import cluster_from_json, links_from_json, options_from_json

    unknown = sorted(given.keys() - _PROCESS_FIELDS)
    if unknown:
        raise InvalidInput(f"process has unknown fields {', '.join(unknown)[:200]}; known: {sorted(_PROCESS_FIELDS)}")
    params = dict.fromkeys(sorted(_PROCESS_FIELDS)) | dict(given)
    options_from_json(params["options"] or {})
    if params["batch_size"] is not None:
        check_batch_size(params["batch_size"])
    if params["sequence_length"] is not None:
        check_sequence_length(params["sequence_length"])
    nodes, links = params["available_nodes"], params["links"]
    if nodes is not None and not nodes:
        raise InvalidInput("available_nodes is empty: leave it out to use the nodes that are alive")
    if nodes is not None:
        try:
            cluster_from_json({"nodes": list(nodes), **({"links": links} if links else {})})
        except InvalidInput as error:
            # What the reader sent is no file.
            message = str(error).replace("nodes file: nodes", "available_nodes").replace("nodes file: ", "")
            raise InvalidInput(message, details=error.details) from None
    elif links:
        links_from_json(links)
    if params["metadata_repo"] is not None:
        check_model_name(str(params["metadata_repo"]).removeprefix("datasets/"))
    if params["revision"] is not None:
        check_revision(params["revision"])
    params["on_node_loss"] = params["on_node_loss"] or "replan"
    if params["on_node_loss"] not in {"replan", "wait"}:
        raise InvalidInput(f"on_node_loss must be 'replan' or 'wait', got {params['on_node_loss']!r:.40}")
    return params
