"""Domain errors -> HTTP, in one table; one handler, one payload `{error, code, details}`, never a stack trace."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from planner import errors
from planner.errors import FairshardError
from planner.wire.fields import explain
from web.services import services

#: The nearest class in an error's line of descent decides.
STATUS: dict[type[FairshardError], int] = {
    errors.FairshardError: 500,
    errors.InvalidInput: 422,
    errors.NotFound: 404,
    errors.AccessDenied: 403,
    errors.Conflict: 409,
    # The request is well formed; what contradicts it is the state of the cluster.
    errors.Infeasible: 409,
    errors.LimitExceeded: 429,
    errors.NodeFailure: 502,
    errors.IntegrityError: 502,
    errors.Unavailable: 503,
    errors.Cancelled: 409,
}
#: Seconds after which a refused caller may come back.
RETRY_AFTER_S = {429: 10, 503: 5}
#: Settings whose being reached is counted (`details.setting` names the one that was).
LIMITS = (
    "FAIRSHARD_MAX_BODY_BYTES", "FAIRSHARD_MAX_METADATA_BYTES", "FAIRSHARD_MAX_BATCH", "FAIRSHARD_MAX_QUEUE",
    "FAIRSHARD_MAX_JOBS_PER_TOKEN", "FAIRSHARD_RATE_LIMIT", "FAIRSHARD_LISTENERS",
)  # fmt: skip
#: Clearer than werkzeug's.
_MESSAGES = {
    404: "there is nothing at this address; /docs lists what there is",
    405: "this address does not know that method; the Allow header lists those it does",
}
#: What may fit into one answer; some libraries put whole bodies into their messages.
_LONGEST = 2_000

_log = logging.getLogger("fairshard.web")


class Refused(FairshardError):
    """A refusal that only HTTP knows: no token, a wrong media type, too many streams."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, details=details)
        self.status, self.name, self.headers = status, code, dict(headers or {})


def status_of(error: FairshardError) -> int:
    """The HTTP status of a domain error."""
    if isinstance(error, Refused):
        return error.status
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def status_of_code(code: str | None) -> int:
    """The HTTP status of an error that a job recorded by its code."""
    kinds = {kind.code: kind for kind in _descendants(FairshardError)}
    kind = kinds.get(code or "")
    return 500 if kind is None else next(STATUS[base] for base in kind.__mro__ if base in STATUS)


def _descendants(kind: type[FairshardError]) -> list[type[FairshardError]]:
    return [
        kind,
        *(found for child in kind.__subclasses__() if child is not Refused for found in _descendants(child)),
    ]


def payload(error: Refused) -> Response:
    """The one form in which an error is answered."""
    text, setting = str(error), error.details.get("setting")
    if setting in LIMITS:
        g.limit = setting  # for web.metrics
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    if request.path.startswith("/v1/"):
        response = _for_openai(text, error)
    else:
        response = jsonify({"error": text, "code": error.name, "details": dict(error.details)})
        response.status_code = error.status
    if error.status in RETRY_AFTER_S:
        response.headers["Retry-After"] = str(RETRY_AFTER_S[error.status])
    response.headers.update(error.headers)
    return response


def _for_openai(text: str, error: Refused) -> Response:
    """The error in the form of OpenAI's API, whose clients tell errors apart by it."""
    status = 400 if error.status == 422 else error.status
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    said = {"message": text, "type": kind, "param": error.details.get("param"), "code": error.name}
    response = jsonify({"error": said})
    response.status_code = status
    return response


def job_failed(job: Mapping[str, Any]) -> Response:
    """The answer to a caller who waited for a job that failed or was cancelled."""
    error = job.get("error") or {}
    code = str(error.get("code") or ("cancelled" if job.get("state") == "cancelled" else "error"))
    message = str(error.get("message") or f"the job is {job.get('state')}")
    details = {**(error.get("details") or {}), "job_id": job.get("job_id")}
    return payload(Refused(message, status=status_of_code(code), code=code, details=details))


def _domain(error: FairshardError) -> Response:
    if not isinstance(error, Refused):
        status = status_of(error)
        if status >= 500:
            _log.warning("%s %s: %s: %s", request.method, request.path, error.code, error)
        error = Refused(str(error), status=status, code=error.code, details=error.details)
    return payload(error)


def _http(error: HTTPException) -> Response:
    status = error.code or 500
    headers = {name: value for name, value in error.get_headers() if name in {"Allow", "Retry-After", "Location"}}
    message, code = _MESSAGES.get(status) or error.description, _code(status)
    details: dict[str, Any] = {}
    # webargs puts what marshmallow found into `data`.
    found = getattr(error, "data", None) or {}
    if error.response is not None:  # abort(Response)
        message = None
    elif messages := found.get("messages"):
        where, inner = next(iter(messages.items())) if isinstance(messages, dict) else ("body", messages)
        message, fields = explain(inner, what={"json": "body"}.get(str(where), str(where)))
        code, details = "invalid_input", {"fields": fields}
    elif status == 413:
        most = request.max_content_length or 0
        own = most == services().web.max_body_bytes
        message = f"the body is larger than {most:,} bytes"
        setting = "FAIRSHARD_MAX_BODY_BYTES" if own else "FAIRSHARD_MAX_METADATA_BYTES"
        details = {"largest_bytes": most, "setting": setting}
    elif status == 429:
        message = f"too many requests: at most {error.description} are answered; Retry-After says when to come back"
        details = {"limit": error.description, "setting": "FAIRSHARD_RATE_LIMIT"}
    message = message or HTTPStatus(status).phrase
    return payload(Refused(message, status=status, code=code, details=details, headers=headers))


def _code(status: int) -> str:
    return {400: "bad_request", 413: "too_large", 429: "limit_exceeded"}.get(
        status, HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")
    )


def _unexpected(error: Exception) -> Response:
    # The stack goes to the log under an id that the caller can quote.
    _log.error("%s %s failed [%s]", request.method, request.path, g.get("request_id"), exc_info=error)
    message = "something went wrong here; the log has it under this request_id"
    details = {"request_id": g.get("request_id")}
    return payload(Refused(message, status=500, code="internal_error", details=details))


def init_app(app: Flask) -> None:
    """Answer every error of `app` in the one form."""
    app.register_error_handler(FairshardError, _domain)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)
