"""The service's own apps on a line that doubles and drops messages, and a log of what was renamed.

    celery -A chaos_app worker ...          gunicorn ... chaos_app:web

CHAOS_DOUBLED, CHAOS_DROPPED (shares) and CHAOS_LOG (a file) say how; the append-only log gets a line of JSON for each
message that met its fate and for each rename that succeeded.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery

from workers import celery_app
from workers.ledger.steps import Wakeup
from workers.queue import messages, process

_DICE = random.Random(os.urandom(8))
_send_well = messages.sender
_rename = os.rename
_replace = os.replace


def note(**line: Any) -> None:
    """One line, in one write: lines of several processes do not mix."""
    descriptor = os.open(os.environ["CHAOS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, json.dumps(line | {"node_id": os.environ.get("NODE_ID", "")}).encode() + b"\n")
    finally:
        os.close(descriptor)


def bad_line(app: Celery) -> Callable[[Sequence[Wakeup]], None]:
    """As `workers.queue.messages.sender`, with accidents."""
    send = _send_well(app)
    doubled, dropped = float(os.environ["CHAOS_DOUBLED"]), float(os.environ["CHAOS_DROPPED"])

    def send_badly(wakeups: Sequence[Wakeup]) -> None:
        passed: list[Wakeup] = []
        for wakeup in wakeups:
            chance = _DICE.random()
            times = 0 if chance < dropped else 2 if chance < dropped + doubled else 1
            passed += [wakeup] * times
            note(event="message", times=times)
        send(passed)

    return send_badly


def _renaming(rename: Callable[..., None]) -> Callable[..., None]:
    def renamed(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        if "/shards/" in str(target):
            note(event="rename", source=str(source), target=str(target))

    return renamed


messages.sender = bad_line
process.sender = bad_line  # type: ignore[attr-defined]  # where the workers look it up
os.rename = _renaming(_rename)
os.replace = _renaming(_replace)


def __getattr__(name: str) -> Any:
    if name in {"app", "celery"}:
        return celery_app.app
    if name == "web":
        from web.wsgi import app

        return app
    raise AttributeError(name)
