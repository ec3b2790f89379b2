"""Taking jobs in: each is written to the journal, then to the ledger, or refused and forgotten."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from planner.errors import FairshardError, Unavailable
from workers.jobs.journal import Accepted
from workers.jobs.kinds import NewJob
from workers.ledger.views import accepted_view
from workers.service.services import Services


class Intake:
    """Where every job goes through."""

    def __init__(
        self,
        services: Services,
        journal: Accepted | None,
        *,
        max_queued: int | None = None,
        max_per_submitter: int | None = None,
    ) -> None:
        """See `workers.jobs.jobs.Jobs.from_settings`."""
        self._services = services
        self._journal = journal
        self._limits: dict[str, Any] = {"max_queued": max_queued, "max_per_submitter": max_per_submitter}

    def accept(
        self,
        jobs: Mapping[str, NewJob],
        *,
        hub_token: str | None = None,
        submitter: str | None = None,
        batch_id: str | None = None,
    ) -> list[dict[str, Any] | FairshardError]:
        """Write jobs (by id) to the journal, then to the ledger; each as it is then, or why it was refused."""
        services, journal = self._services, self._journal
        if hub_token:
            jobs = {
                job_id: replace(
                    new,
                    # Two users' views of a private model are two things.
                    single_flight=new.single_flight + services.tokens.fingerprint(hub_token),
                    # A token is never in the journal: should Redis lose it, its job says so (`Services.user_token`).
                    params={**new.params, "with_token": True},
                )
                for job_id, new in jobs.items()
            }
        accepted = {
            job_id: {**asdict(new), "submitter": submitter, "batch_id": batch_id} for job_id, new in jobs.items()
        }
        if journal is not None:
            journal.record(accepted)
        # Of those the caller hears that they were refused, whatever it is: they must not run later.
        refused = set(accepted)
        away: Unavailable | None = None
        views: list[dict[str, Any] | FairshardError] = []
        try:
            for job_id, new in jobs.items():
                try:
                    if away is not None:
                        raise away
                    if hub_token:
                        services.tokens.put(job_id, hub_token)
                    entry = {**accepted[job_id], "steps": new.steps}
                    given = services.ledger.submit(**entry, job_id=job_id, **self._limits).job_id
                    if given == job_id:
                        refused.discard(job_id)
                        # Made now, or by the first try of a call that was repeated. As it was when it was made: to
                        # read it back would cost a POST two more round trips.
                        now = {"created_at": time.time_ns() // 1_000_000}
                        views.append(accepted_view(job_id, accepted[job_id] | now))
                    else:
                        if hub_token:
                            services.tokens.drop(job_id)
                        views.append(services.ledger.views.job(given))
                except FairshardError as error:
                    away = error if isinstance(error, Unavailable) else None
                    views.append(error)
        finally:
            if journal is not None and refused:
                journal.forget(list(refused))
        return views
