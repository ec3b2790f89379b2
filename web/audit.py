"""One line of JSON for every change: who, what, whence, with which outcome. Bodies and headers are never in it."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler

from flask import Flask, Response, g, request

from web.guard import caller_name
from web.services import services_of

_log = logging.getLogger("fairshard.audit")


def changed(action: str, **what: object) -> None:
    """Say what this request changes; the line is written with its answer."""
    g.audit = {"action": action, **what}


def _write(response: Response) -> Response:
    found = g.get("audit")
    if found is not None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "token": caller_name(),
            "address": request.remote_addr,
            "request_id": g.get("request_id"),
            **found,
            "status": response.status_code,
        }
        _log.info("%s", json.dumps(line, default=str))
    return response


def init_app(app: Flask) -> None:
    """Write the audit lines of `app` to the log, or to a file of their own if one is set."""
    path = services_of(app).web.audit_log
    _log.setLevel(logging.INFO)
    if path is not None and not any(getattr(handler, "baseFilename", None) == str(path) for handler in _log.handlers):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = WatchedFileHandler(path, delay=True)  # follows logrotate
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
    app.after_request(_write)
