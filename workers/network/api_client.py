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

from planner.errors import FairshardError, InvalidInput, NodeFailure, Unavailable, from_code
from workers.settings import ClientSettings

#: Bytes of an answer that are read; a plan of 10,000 layers takes 2 MB.
_MAX_ANSWER_BYTES = 256 * 2**20


def run_done(said: Mapping[str, Any]) -> dict[str, Any]:
    """A run that ended as it should.

    Raises:
        FairshardError: What it failed of, or that it was cancelled.
    """
    if said["state"] == "done":
        return dict(said)
    error = said.get("error") or {"code": "cancelled", "message": f"the run is {said['state']}"}
    raise from_code(error["code"], error["message"], details=error.get("details")) or NodeFailure(error["message"])


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
        request = self._request(method, path, body, {"Accept": "application/json", **(headers or {})})
        try:
            with self._answered(request) as response:
                text = response.read(_MAX_ANSWER_BYTES)
        except (http.client.HTTPException, OSError) as error:
            raise self._no_answer(error) from None
        try:
            return json.loads(text) if text else {}
        except ValueError:
            raise Unavailable(
                f"{url} answered something that is not JSON; does FAIRSHARD_URL name a fairshard?"
            ) from None

    def events(self, method: str, path: str, body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The server-sent events that `method path` answers, as (name, data); to stop means to hang up.

        Raises:
            FairshardError: As `call`.
        """
        name = ""
        try:
            with self._answered(self._request(method, path, body, {"Accept": "text/event-stream"})) as response:
                for line in response:
                    key, _, value = line.decode().rstrip("\r\n").partition(": ")
                    if key == "event":
                        name = value
                    elif key == "data":
                        yield name, json.loads(value)
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise self._no_answer(error) from None

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> urllib.request.Request:
        sent = dict(headers)
        if self._settings.token:
            sent["Authorization"] = f"Bearer {self._settings.token}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        url = self._settings.url + path
        return urllib.request.Request(url, data=data, headers=sent, method=method)  # noqa: S310  (http(s) alone)

    def _answered(self, request: urllib.request.Request) -> Any:
        try:
            return urllib.request.urlopen(request, timeout=self._timeout_s)  # noqa: S310  (http(s) alone)
        except urllib.error.HTTPError as error:
            with error:
                raise _said(error.code, error.read(2**20), request.full_url) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            raise self._no_answer(error) from None

    def _no_answer(self, error: Exception) -> Unavailable:
        reason = getattr(error, "reason", error)
        return Unavailable(
            f"no answer from {self._settings.url} ({reason}); is the service up (fairshard up), "
            "and does FAIRSHARD_URL name it?",
            details={"url": self._settings.url},
        )

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
    details |= {"status": status}
    other = Unavailable if status >= 500 else InvalidInput
    return from_code(code, message, details=details) or other(message, details=details)
