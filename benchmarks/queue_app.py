"""What benchmarks/queue.py measures: a no-op task, a no-op as a step of the ledger, and a view that validates."""

from __future__ import annotations

from typing import Any

from workers.celery_app import create_app
from workers.queue.claims import run_step
from workers.queue.messages import sender
from workers.service.services import Services
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


def validating() -> Any:
    """A Flask app whose POST /api/request checks its body as the service's does, and answers as many bytes."""
    from flask import Flask, jsonify, request

    from web.schemas import bodies as schemas

    flask = Flask("validating")
    schema = schemas.RequestIn()

    @flask.get("/api/health/live")
    def live() -> Any:
        return jsonify(status="ok")

    @flask.post("/api/request")
    def request_model() -> Any:
        given = schema.load(request.get_json())
        answer = jsonify(success=True, message="m" * 96, model_name=given["model_name"], node_id=None,
                         received_at="2026-01-01T00:00:00.000Z", job_id="0" * 32)  # fmt: skip
        answer.status_code = 202
        return answer

    return flask
