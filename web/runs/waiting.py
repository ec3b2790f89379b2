"""Waiting for a run: for its end, or for each thing that it says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from flask import Response

from planner.errors import FairshardError
from web.errors import Refused, status_of_code
from web.services import services, stopping
from workers.runner.runs import Runs

#: A comment this often lets proxies and the server notice that the other side is gone, in seconds.
_BEAT_S = 10.0


def ended(run_id: str, *, timeout_s: float) -> dict[str, Any]:
    """The run once it has ended, or as it is after `timeout_s`, or when the server wants to go or has no place."""
    runs, gone, places = services().jobs.runs, stopping(), services().waiters
    if timeout_s <= 0 or not places.acquire(blocking=False):
        return runs.view(run_id)
    try:
        deadline = time.monotonic() + timeout_s
        for event in runs.follow(run_id):
            if (event and event[1]["event"] == "ended") or time.monotonic() >= deadline or gone():
                break
        return runs.view(run_id)
    finally:
        places.release()


def failed(view: dict[str, Any]) -> Refused:
    """The answer to a caller whose run failed or was cancelled."""
    error = view.get("error") or {"code": "cancelled", "message": f"the run is {view['state']}", "details": {}}
    details = {**error["details"], "run_id": view["run_id"]}
    code = str(error["code"])
    return Refused(str(error["message"]), status=status_of_code(code), code=code, details=details)


def streamed(run_id: str, lines: Callable[[dict[str, Any]], Iterator[str]]) -> Response:
    """The run's events as server-sent events, each as `lines` writes it; the run ends with a caller who hangs up.

    Raises:
        Refused: If all places are taken; the run ends.
    """
    made = services()
    runs = made.jobs.runs
    if not made.listeners.acquire(blocking=False):
        runs.cancel(run_id)
        raise Refused(
            f"all {made.web.listeners} event streams of this process are in use; try again, or do not stream",
            status=503,
            code="too_many_listeners",
            details={"listeners": made.web.listeners, "setting": "FAIRSHARD_LISTENERS"},
        )
    response = Response(_lines(runs, run_id, lines, gone=stopping()), mimetype="text/event-stream")

    def close() -> None:
        made.listeners.release()
        with contextlib.suppress(FairshardError):
            runs.cancel(run_id)

    # Not the generator's `finally`: a generator that never started has none.
    response.call_on_close(close)
    response.headers["X-Accel-Buffering"] = "no"
    return response


def _lines(
    runs: Runs, run_id: str, lines: Callable[[dict[str, Any]], Iterator[str]], *, gone: Callable[[], bool]
) -> Iterator[str]:
    beat = time.monotonic()
    try:
        for event in runs.follow(run_id):
            if gone():
                return
            if event is not None:
                beat = time.monotonic()
                yield from lines(event[1])
            elif time.monotonic() - beat >= _BEAT_S:
                beat = time.monotonic()
                yield ": still here\n\n"
    except FairshardError as error:
        said = {"code": error.code, "message": str(error), "details": error.details}
        yield from lines({"event": "ended", "state": "failed", "error": said})
