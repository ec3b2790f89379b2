"""Server-sent events of a job: `GET /api/jobs/<id>/events`.

Each stream holds a thread of the server, so there are few places (`WebSettings.listeners` a process) and each ends
after `max_stream_s`; its client comes back with Last-Event-ID and misses nothing, since events are kept with the job.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from flask import Response

from planner.errors import FairshardError, Unavailable
from web.errors import Refused
from web.services import services, stopping
from workers.jobs.jobs import Jobs
from workers.ledger.steps import ENDED

#: Between two looks for events, in seconds.
_POLL_S = 0.25
#: A comment this often lets proxies and the server notice that the other side is gone, in seconds.
_BEAT_S = 10.0
#: An event, in JSON Schema.
EVENT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "For Last-Event-ID."},
        "event": {"type": "string", "description": "submitted, claimed, progress, step, retry, lost; last, ended."},
        "data": {"description": "JSON: the step, its state, how far it is."},
    },
}
_EVENT_ID = re.compile(r"\d{1,20}-\d{1,20}")


def stream(job_id: str, *, after: str) -> Response:
    """The events of a job after the one of id `after`, as they come, until it ends.

    Raises:
        NotFound: If there is no such job.
        Refused: If all places are taken.
    """
    made = services()
    job = made.jobs.job(job_id)
    start = after if _EVENT_ID.fullmatch(after) else "0"
    if job["state"] in ENDED and start != "0" and not made.jobs.events(job_id, after=start, limit=1):
        return Response(status=204)  # tells an EventSource not to come back
    if not made.listeners.acquire(blocking=False):
        raise Refused(
            f"all {made.web.listeners} event streams of this process are in use; poll the job instead",
            status=503,
            code="too_many_listeners",
            details={"listeners": made.web.listeners, "setting": "FAIRSHARD_LISTENERS"},
        )
    response = Response(
        _lines(made.jobs, job_id, start, longest_s=made.web.max_stream_s, gone=stopping()),
        mimetype="text/event-stream",
    )
    # Not the generator's `finally`: a generator that never started has none.
    response.call_on_close(made.listeners.release)
    response.headers["X-Accel-Buffering"] = "no"
    return response


def _lines(jobs: Jobs, job_id: str, after: str, *, longest_s: float, gone: Callable[[], bool]) -> Iterator[str]:
    begun = beat = time.monotonic()
    yield "retry: 2000\n\n"
    while time.monotonic() - begun < longest_s and not gone():
        try:
            found = jobs.events(job_id, after=after)
        except Unavailable:
            found = []  # Redis comes back, or the time is over
        except FairshardError as error:
            yield _event("error", {"code": error.code, "message": str(error)})
            return
        for after, event in found:  # noqa: PLR1704  (the last one seen is where the next look starts)
            yield _event(str(event.get("event", "message")), event, event_id=after)
            if event.get("event") == "ended":
                return
        now = time.monotonic()
        if found:
            beat = now
            continue
        if now - beat >= _BEAT_S:
            beat = now
            yield ": still here\n\n"
        time.sleep(min(_POLL_S, longest_s))


def _event(name: str, data: dict[str, Any], *, event_id: str | None = None) -> str:
    lines = [f"id: {event_id}"] if event_id else []
    return "\n".join([*lines, f"event: {name}", f"data: {json.dumps(data)}", "", ""])
