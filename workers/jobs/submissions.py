"""Submitting jobs: which steps each kind consists of. Torch-free, Flask-free.

request   download ─ profile ─ publish [─ plan ─ split:<node> ... ─ finish, with `process`]
process   plan ─ split:<node> ... ─ finish           waits for a running request of the same model
delete    forget ─ delete:<node> ...
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from planner.errors import Conflict, InvalidInput
from planner.limits import check_batch_size, check_sequence_length
from planner.names import check_model_name, check_revision
from workers.jobs.journal import Accepted
from workers.jobs.params import process_params
from workers.ledger.ledger import StepSpec
from workers.ledger.views import accepted_view
from workers.service.services import Services
from workers.settings import QueueSettings, Settings

#: A job as JSON; the fields are those of `workers.ledger.ledger.Ledger.job`.
JobView = dict[str, Any]

#: The steps of a request and of a process.
_REQUEST = (
    StepSpec(name="download", task="workers.download", queue="compute"),
    StepSpec(name="profile", task="workers.generate_metadata", queue="compute", after=("download",)),
    StepSpec(name="publish", task="workers.publish_metadata", queue="compute", after=("profile",)),
)
_PLAN = StepSpec(name="plan", task="planner.plan", queue="planner")


class Submissions:
    """The half of `workers.jobs.jobs.Jobs` that has things done."""

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

    def _submit(
        self,
        kind: str,
        *,
        model_name: str,
        steps: Sequence[StepSpec],
        hub_token: str | None = None,
        job_id: str | None = None,
        **entry: Any,
    ) -> JobView:
        """Write the job to the journal, then to the ledger."""
        services, journal = self._services, self._journal
        job_id = job_id or secrets.token_hex(16)
        if entry.get("single_flight") and hub_token:
            # Two users' views of a private model are two things.
            entry["single_flight"] += services.tokens.fingerprint(hub_token)
        if hub_token:
            # A token is never in the journal: should Redis lose it, its job says so (`Services.user_token`).
            entry["params"] = {**entry["params"], "with_token": True}
        plain = [{"name": step.name, "task": step.task, "queue": step.queue, "after": list(step.after),
                  "node_id": step.node_id, "args": dict(step.args)} for step in steps]  # fmt: skip
        accepted = {"kind": kind, "model_name": model_name, "steps": plain, **entry}
        if journal is not None:
            journal.record(job_id, accepted)
        try:
            if hub_token:
                services.tokens.put(job_id, hub_token)
            submission = services.ledger.submit(
                kind, model_name=model_name, steps=steps, job_id=job_id, **entry, **self._limits
            )
        except BaseException:
            # Whatever it is, the caller hears that it was refused: it must not run later.
            if journal is not None:
                journal.forget([job_id])
            raise
        if submission.job_id == job_id:
            # Made now, or by the first try of a call that was repeated. As it was when it was made: to read it back
            # would cost a POST two more round trips.
            return accepted_view(job_id, accepted | {"created_at": time.time_ns() // 1_000_000})
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
        job_id: str | None = None,
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
            job_id: Its own id, if it is made; None: a random one.

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
            "process": None if process is None else process_params(process),
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
            job_id=job_id,
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
        paranoid: bool = False,
        hub_token: str | None = None,
        submitter: str | None = None,
        batch_id: str | None = None,
    ) -> JobView:
        """Have a profiled model planned and, with `split`, its shards cut.

        Args:
            model_name: "owner/name".
            options: JSON of `PlanOptions` (`planner.wire.read.options_from_json`).
            batch_size: Plan at this; None: as profiled.
            sequence_length: Plan at this; None: as profiled.
            available_nodes: Nodes as the wire form has them; None: those registered and alive.
            links: As in a nodes file.
            metadata_repo: Hub repository to read the metadata from (the seed's root file included); None: the
                service's own profile of the latest request.
            revision: Of the metadata, if `metadata_repo` holds several.
            split: None: true where every node is registered.
            on_node_loss: "replan" over the others, or "wait" for the node.
            paranoid: Have every byte fetched twice and compared.
            hub_token: As for a request.
            submitter: Whom it counts against.
            batch_id: Its batch.

        Raises:
            Conflict: If there is neither metadata nor a running request for the model.
            InvalidInput, LimitExceeded, Unavailable.
        """
        check_model_name(model_name)
        params = process_params(
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
                "paranoid": paranoid,
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
        """Have a plan forgotten, and its shards deleted by the nodes that hold them.

        Raises:
            NotFound: If there is no such plan.
            LimitExceeded, Unavailable.
        """
        plan = self._services.plans.get(plan_id)
        model_name = plan["model_name"]
        alive = self._services.registry.alive_ids()
        args = {"plan_id": plan_id}
        # Forgotten first: where the store can't be written, the plan stays, and so do its shards.
        steps = [StepSpec(name="forget", task="planner.forget", queue="planner", args=args)]
        # Nodes that are away are not waited for; they keep what they have until `fairshard delete` on them.
        steps += [
            StepSpec(
                name=f"delete:{node_id}",
                task="workers.delete_shards",
                queue=f"node.{node_id}",
                after=("forget",),
                node_id=node_id,
                args=args,
            )
            for node_id in sorted(plan["split_plan"])
            if node_id in alive
        ]
        return self._submit(
            "delete",
            model_name=model_name,
            params={"plan_id": plan_id, "model_name": model_name},
            steps=steps,
            single_flight=f"delete:{plan_id}",
            submitter=submitter,
            on_node_loss="skip",
        )


def _flight(kind: str, params: Mapping[str, Any]) -> str:
    return f"{kind}:" + json.dumps(params, sort_keys=True, separators=(",", ":"))
