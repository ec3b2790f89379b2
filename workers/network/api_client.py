"""A client of fairshard's API, in the standard library alone."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from planner import errors
from planner.errors import FairshardError, Unavailable
from workers.settings import ClientSettings

#: Bytes of an answer that are read; a plan of 10,000 layers takes 2 MB.
_MAX_ANSWER_BYTES = 256 * 2**20

_BY_CODE: Mapping[str, type[FairshardError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FairshardError) and kind is not FairshardError
}


class Client:
    """Calls the API; its errors come back as the classes that the service raised."""

    def __init__(self, settings: ClientSettings, *, timeout_s: float = 60.0) -> None:
        self._settings, self._timeout_s = settings, timeout_s

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON that `method path` answers.

        Args:
            method: "GET", "POST", "DELETE".
            path: From the root of the service, with its query.
            body: Sent as JSON.
            headers: Beside those of every call.

        Raises:
            FairshardError: The one that the service names by its code.
            Unavailable: If the service cannot be reached, or answers what no fairshard answers.
        """
        url = self._settings.url + path
        sent = {"Accept": "application/json", **(headers or {})}
        if self._settings.token:
            sent["Authorization"] = f"Bearer {self._settings.token}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        request = urllib.request.Request(url, data=data, headers=sent, method=method)  # noqa: S310  (http(s) alone)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:  # noqa: S310
                text = response.read(_MAX_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise _said(error.code, error.read(2**20), url) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(
                f"no answer from {self._settings.url} ({reason}); is the service up (fairshard up), "
                "and does FAIRSHARD_URL name it?",
                details={"url": self._settings.url},
            ) from None
        try:
            return json.loads(text) if text else {}
        except ValueError:
            raise Unavailable(
                f"{url} answered something that is not JSON; does FAIRSHARD_URL name a fairshard?"
            ) from None

    def follow(self, job_id: str, *, pause: Callable[[], None] = lambda: time.sleep(0.5)) -> Iterator[dict[str, Any]]:
        """The job again and again, until it has ended; a service that restarts meanwhile is waited for.

        Args:
            job_id: The job.
            pause: Called between two calls.

        Raises:
            Unavailable: If the service stays away for a minute.
        """
        gone_since: float | None = None
        while True:
            try:
                job = self.call("GET", f"/api/jobs/{urllib.parse.quote(job_id, safe='')}")
            except Unavailable:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > 60:
                    raise
            else:
                gone_since = None
                yield job
                if job["state"] not in {"queued", "running"}:
                    return
            pause()


def _said(status: int, text: bytes, url: str) -> FairshardError:
    try:
        answer = json.loads(text)
        message, code = str(answer["error"]), str(answer["code"])
        details = dict(answer.get("details") or {})
    except (ValueError, TypeError, KeyError):
        return Unavailable(f"{url} answered {status} and no reason; does FAIRSHARD_URL name a fairshard?")
    kind = _BY_CODE.get(code) or (Unavailable if status >= 500 else errors.InvalidInput)
    return kind(message, details={**details, "status": status})
