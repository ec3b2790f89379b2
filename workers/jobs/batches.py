"""Batches: many requests in one call, each accepted or refused by itself."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from planner.errors import FairshardError, NotFound, Unavailable
from workers.jobs import kinds
from workers.jobs.intake import Intake
from workers.jobs.journal import Accepted
from workers.jobs.kinds import NewJob
from workers.ledger.connection import reachable
from workers.ledger.views import accepted_view, batch_state
from workers.service.services import Services

#: Entries of a batch that one answer shows, unless it is asked for another number.
PAGE = 200


class Batches:
    """The batches of `workers.jobs.jobs.Jobs`."""

    def __init__(
        self,
        services: Services,
        journal: Accepted | None,
        *,
        intake: Intake,
    ) -> None:
        """The jobs of a batch go through `intake`."""
        self._services = services
        self._journal = journal
        self._intake = intake

    def submit(
        self,
        entries: Sequence[Mapping[str, Any] | tuple[str, FairshardError]],
        *,
        hub_token: str | None = None,
        submitter: str | None = None,
    ) -> dict[str, Any]:
        """Submit many requests at once.

        Args:
            entries: Each with the fields of `kinds.request`; or its name, and why it was refused already.
            hub_token: As for a request.
            submitter: Whom the jobs count against.

        Returns:
            As `get`. An entry that is refused is in it as a failed one with its error; the others go on. So are
            those that were left when Redis went away, once any was accepted. Equal entries are one job.

        Raises:
            Unavailable: If nothing was accepted, for Redis or the journal's disk is away.
        """
        batch_id = secrets.token_hex(16)
        # Ids are drawn, and written, before anything is accepted: whatever ends this, its jobs have their batch.
        record: dict[str, Any] = {"created_at": time.time(), "jobs": []}
        jobs: dict[str, NewJob] = {}
        ids: dict[str, str] = {}
        names: dict[str, str] = {}
        for entry in entries:
            name = entry[0] if isinstance(entry, tuple) else entry.get("model_name")
            line: dict[str, Any] = {"model_name": str(name)[:200], "job_id": None}
            try:
                if isinstance(entry, tuple):
                    raise entry[1]
                asked = str(entry.get("model_name"))
                if asked not in names:
                    names[asked] = self._services.canonical(asked, token=hub_token)
                new = kinds.request(**{**entry, "model_name": names[asked]})
                line["job_id"] = ids.setdefault(new.single_flight, secrets.token_hex(16))
                jobs.setdefault(line["job_id"], new)
            except FairshardError as error:
                line["error"] = _as_json(error)
            record["jobs"].append(line)
        try:
            self._keep(batch_id, record)
            found = self._intake.accept(jobs, hub_token=hub_token, submitter=submitter, batch_id=batch_id)
            away = next((view for view in found if isinstance(view, Unavailable)), None)
            if away is not None and all(isinstance(view, FairshardError) for view in found):
                raise away
        except Unavailable:
            if self._journal is not None:
                self._journal.forget_batch(batch_id)
            raise
        views = dict(zip(jobs, found, strict=True))
        for line in record["jobs"]:
            view = views.get(line["job_id"])
            if isinstance(view, FairshardError):
                line.update(job_id=None, error=_as_json(view))
            elif view is not None:
                line["job_id"] = view["job_id"]
        with contextlib.suppress(Unavailable):  # then the first record stands
            self._keep(batch_id, record, away=away is not None)
        known = {view["job_id"]: view for view in found if not isinstance(view, FairshardError)}
        return _view(batch_id, record, {job_id: view["state"] for job_id, view in known.items()}, known, limit=PAGE)

    def _keep(self, batch_id: str, record: Mapping[str, Any], *, away: bool = False) -> None:
        services, keep_s = self._services, self._services.queue.job_ttl_s
        if self._journal is not None:
            self._journal.record_batch(batch_id, record, keep_s=keep_s)
        if not away:
            key, keep_ms = f"{services.queue.prefix}batch:{batch_id}", round(1000 * keep_s)
            with reachable():
                services.redis.set(key, json.dumps(record), px=keep_ms)

    def get(self, batch_id: str, *, limit: int = PAGE, cursor: int = 0) -> dict[str, Any]:
        """The batch, with `limit` of its entries from the `cursor`-th on.

        `{batch_id, state, counts: {<state>: n}, total, created_at, jobs: [{model_name, job_id, state, step, error}],
        next_cursor}`; counts are of all entries, `next_cursor` is null where no more follow.

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
        page = record["jobs"][cursor : cursor + limit]
        ledger, journal = self._services.ledger.views, self._journal
        job_ids = list(dict.fromkeys(line["job_id"] for line in record["jobs"] if line["job_id"]))
        states, views = ledger.states_of(job_ids), ledger.brief([line["job_id"] for line in page if line["job_id"]])
        for job_id in job_ids:
            entry = journal.get(job_id) if job_id not in states and journal is not None else None
            if entry is not None:
                views[job_id] = accepted_view(job_id, entry)
                states[job_id] = views[job_id]["state"]
        return _view(batch_id, record, states, views, limit=limit, cursor=cursor)


def _view(
    batch_id: str,
    record: Mapping[str, Any],
    states: Mapping[str, str],
    views: Mapping[str, Mapping[str, Any]],
    *,
    limit: int,
    cursor: int = 0,
) -> dict[str, Any]:
    gone = _as_json(NotFound("the job is not known any more: it ended longer ago than jobs are kept"))
    lines, last = record["jobs"], cursor + limit
    counts = Counter(states.get(line["job_id"], "failed") for line in lines)
    jobs = []
    for line in lines[cursor:last]:
        view = views.get(line["job_id"]) or {"state": "failed", "step": None, "error": line.get("error", gone)}
        shown = {name: view[name] for name in ("state", "step", "error")}
        jobs.append({"model_name": line["model_name"], "job_id": line["job_id"], **shown})
    return {
        "batch_id": batch_id,
        "state": batch_state(counts),
        "counts": dict(counts),
        "total": len(lines),
        "created_at": datetime.fromtimestamp(record["created_at"], tz=UTC).isoformat(timespec="seconds"),
        "jobs": jobs,
        "next_cursor": last if last < len(lines) else None,
    }


def _as_json(error: FairshardError) -> dict[str, Any]:
    return {"code": error.code, "message": str(error), "details": error.details}
