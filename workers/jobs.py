"""What users can have done: which steps each kind of job consists of. Torch-free, Flask-free.

request   download ─ profile ─ publish [─ plan ─ split:<node> ... ─ finish, with `process`]
process   plan ─ split:<node> ... ─ finish           waits for a running request of the same model
delete    delete:<node> ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.settings import Settings

#: A job as JSON; the fields are those of `workers.ledger.Ledger.job`.
JobView = dict[str, Any]


class Jobs:
    """Submits jobs and answers about them; the web floor and the command line talk to this alone."""

    @classmethod
    def from_settings(cls, settings: Settings, *, journal: bool = False) -> Jobs:
        """The jobs of the Redis and the store that the settings name; connects at the first call, not here.

        Args:
            settings: As `Settings.from_env()` gives them.
            journal: Whether accepted jobs are written to `<data>/journal.sqlite` first (the web process does).
        """
        raise NotImplementedError

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
        raise NotImplementedError

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
        raise NotImplementedError

    def submit_delete(self, plan_id: str, *, submitter: str | None = None) -> JobView:
        """Forget a plan and have the nodes delete its shards.

        Raises:
            NotFound: If there is no such plan.
        """
        raise NotImplementedError

    def submit_batch(
        self, entries: Sequence[Mapping[str, Any]], *, hub_token: str | None = None, submitter: str | None = None
    ) -> dict[str, Any]:
        """Submit many requests at once; each entry has the fields of `submit_request`.

        Returns:
            As `batch`. An entry that is refused is in it as a failed one with its error; the others go on.
        """
        raise NotImplementedError

    def batch(self, batch_id: str) -> dict[str, Any]:
        """`{batch_id, state, counts: {<state>: n}, created_at, jobs: [{model_name, job_id, state, step, error}]}`.

        Raises:
            NotFound: If there is no such batch.
        """
        raise NotImplementedError

    def job(self, job_id: str) -> JobView:
        """The job; one that was accepted but that Redis has yet to hear of is `queued`.

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
    ) -> list[JobView]:
        """Jobs, newest first, without `steps`."""
        raise NotImplementedError

    def cancel(self, job_id: str) -> JobView:
        """Cancel a job (one that ended stays as it is), and return it.

        Raises:
            NotFound: If there is no such job.
        """
        raise NotImplementedError

    def wait(self, job_id: str, *, step: str | None = None, timeout_s: float = 30.0) -> JobView:
        """Return the job once `step` is done (None: once the job ended), or as it is after `timeout_s`."""
        raise NotImplementedError

    def events(self, job_id: str, *, after: str = "0", limit: int = 100) -> list[tuple[str, dict[str, Any]]]:
        """As `Ledger.events`."""
        raise NotImplementedError

    def plan(self, plan_id: str) -> dict[str, Any]:
        """A plan's JSON (`planner.wire.plan_to_json`, with `job_id` beside).

        Raises:
            NotFound: If there is no such plan.
        """
        raise NotImplementedError

    def latest_plan(self, model_name: str) -> dict[str, Any]:
        """The model's newest plan.

        Raises:
            NotFound: If there is none.
        """
        raise NotImplementedError

    def plans(self, *, model_name: str | None = None, limit: int = 50, offset: int = 0) -> list[dict[str, Any]]:
        """`[{plan_id, model_name, revision, strategy, node_ids, generated_at, job_id}]`, newest first."""
        raise NotImplementedError

    def nodes(self) -> list[dict[str, Any]]:
        """Nodes alive, by id.

        `{node_id, device, flop_per_s, memory_bytes, memory_bytes_per_s, load, disk_free_bytes, versions: {name:
        version}, host, started_at, seen_at, queue_length, running: [{job_id, step}], wedged, shards: [plan_id]}`.
        """
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """As `Ledger.metrics`, with queue lengths and nodes alive."""
        raise NotImplementedError

    def ready(self) -> dict[str, bool]:
        """`{redis, planner, nodes}`: whether each answers; never raises."""
        raise NotImplementedError

    def replay(self) -> int:
        """Submit again what the journal has and Redis lost; the web process calls this every few seconds.

        Returns:
            How many were.
        """
        raise NotImplementedError
