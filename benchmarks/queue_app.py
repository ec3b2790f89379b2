"""The tasks that benchmarks/queue.py measures: a bare no-op, and a no-op as a step of the ledger."""

from __future__ import annotations

from typing import Any

from workers.celery_app import create_app, sender
from workers.claims import run_step
from workers.services import Services
from workers.settings import QueueSettings, Settings

app = create_app()
app.conf.include = []
app.set_default()
_services: list[Services] = []


def services() -> Services:
    if not _services:
        _services.append(Services(settings=Settings.from_env(), queue=QueueSettings.from_env(), wake=sender(app)))
    return _services[0]


@app.task(name="bench.noop")
def noop(job_id: str, step: str, version: int = 1) -> None:
    """What raw Celery does with the same message and the same settings."""


@app.task(name="bench.step", bind=True)
def step_task(self: Any, job_id: str, step: str, version: int = 1) -> None:
    """The same as a step: claimed, committed, its successor woken."""
    run_step(services().ledger, job_id, step, lambda _: {}, owner=str(self.request.hostname))
