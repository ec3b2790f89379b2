"""Submitting again what the web's journal has and Redis lost."""

from __future__ import annotations

import time
from typing import Any

from workers.jobs.journal import Accepted
from workers.ledger.ledger import Ledger
from workers.ledger.steps import ENDED, StepSpec

#: An entry of the journal that is younger may still be on its way to Redis, in milliseconds.
YOUNG_MS = 5000


def replay(journal: Accepted, ledger: Ledger) -> int:
    """Submit again what the journal has and Redis lost, in the order in which it was accepted; drop what ended.

    What was cancelled is kept as long as Redis would keep it, and cancelled again if Redis forgot that alone.

    Returns:
        How many jobs were submitted again.
    """
    entries = journal.least_recent()
    states = ledger.states([job_id for job_id, _ in entries])
    now_ms = time.time() * 1000
    ended: list[str] = []
    lost: list[tuple[str, dict[str, Any]]] = []
    for (job_id, entry), state in zip(entries, states, strict=True):
        cancelled_at = entry.get("cancelled_at")
        # Of another time than ours, before or after: the clock may have been set back since.
        if abs(now_ms - (cancelled_at or entry["created_at"])) < YOUNG_MS:
            # Even if it ended: Redis may be killed before it wrote any of it to its disk.
            continue
        if state in ENDED or (cancelled_at and now_ms - cancelled_at > ledger.job_ttl_ms):
            ended.append(job_id)
        elif cancelled_at and state is not None:
            ledger.cancel(job_id)
        elif not cancelled_at and state is None:
            lost.append((job_id, entry))
    journal.forget(ended)
    lost.sort(key=lambda found: found[1]["created_at"])
    return sum(_submit(job_id, entry, journal, ledger) for job_id, entry in lost)


def _submit(job_id: str, entry: dict[str, Any], journal: Accepted, ledger: Ledger) -> int:
    again = 0
    # It waits only for a job that Redis knows: this one may be in a later part of the journal, or come of another
    # look that goes on beside this one. Submitting the same id twice changes nothing.
    before = entry.get("waits_for")
    if before is not None and (awaited := journal.get(before)) is not None:
        if awaited.get("cancelled_at"):
            # What waited for it ended with it.
            journal.cancel(job_id)
            return 0
        again += _submit(before, awaited, journal, ledger)
    given = {name: value for name, value in entry.items() if name not in {"created_at", "kind", "steps"}}
    steps = [StepSpec(**{**step, "after": tuple(step["after"])}) for step in entry["steps"]]
    submission = ledger.submit(entry["kind"], job_id=job_id, steps=steps, **given)
    if submission.job_id != job_id:
        # The same was submitted anew before this look. Whoever was told of this job must find it all the same, so it
        # does the work once more: two that make the same thing do each other no harm.
        submission = ledger.submit(entry["kind"], job_id=job_id, steps=steps, **given | {"single_flight": None})
    return again + submission.created
