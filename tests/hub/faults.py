"""Faults to inject into the test Hub's answers, and the log of what was asked and sent."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

#: status      answer `code` (with `retry_after` and `headers`) and do nothing
#: cut         close the connection after `after_bytes` of the body
#: reset       the same, by TCP reset; with 0 bytes before any answer
#: trickle     send the body at `bytes_per_s`
#: ignore_range  answer 200 with the whole file to a Range
#: wrong_range   answer 206 with bytes that lie one byte further on, and say so in Content-Range
#: etag        state another ETag
#: flip        invert the byte at `offset` of the file, wherever the answer covers it
#: hang        answer nothing for `seconds` (or until the hub closes), then close
#: lost_reply  do what was asked, then close the connection without an answer
#: expired     the CDN refuses the signed URL
FaultKind = Literal[
    "status",
    "cut",
    "reset",
    "trickle",
    "ignore_range",
    "wrong_range",
    "etag",
    "flip",
    "hang",
    "lost_reply",
    "expired",
]
Where = Literal["hub", "cdn"]


@dataclass(slots=True, kw_only=True)
class Fault:
    """One fault: which requests it hits, how often, and what it does."""

    kind: FaultKind
    #: Shell pattern on the URL path ("*/model.safetensors"); the CDN's URLs end in the file's name as well.
    path: str = "*"
    method: str | None = None
    where: Where | None = None
    #: Hits only requests with (True) or without (False) a Range header; None: both.
    ranged: bool | None = None
    #: How many matching requests it hits; None: all.
    times: int | None = 1
    #: Matching requests let through before the first hit.
    skip: int = 0
    code: int = 503
    retry_after: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int = 0
    bytes_per_s: float = 1000.0
    offset: int = 0
    seconds: float | None = None
    #: Requests hit so far.
    hits: int = 0

    def take(self, *, where: Where, method: str, path: str, ranged: bool) -> bool:
        """Whether this request is hit; counts it. Called under the hub's lock."""
        if self.where not in (None, where) or self.method not in (None, method) or self.ranged not in (None, ranged):
            return False
        if not fnmatchcase(path, self.path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True


@dataclass(slots=True, kw_only=True)
class Request:
    """One request as the hub saw it."""

    where: Where
    method: str
    path: str
    query: str
    range: str | None
    authorization: str | None
    #: HTTP status answered; 0 where none was.
    status: int = 0
    #: Bytes of body sent.
    sent_bytes: int = 0


class Counters:
    """The requests so far, and sums over them by path pattern."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._log: list[Request] = []

    def add(self, request: Request) -> None:
        with self._lock:
            self._log.append(request)

    def clear(self) -> None:
        with self._lock:
            self._log.clear()

    def log(self, path: str = "*", *, method: str | None = None, where: Where | None = None) -> list[Request]:
        """The matching requests, in order of arrival."""
        with self._lock:
            return [
                r
                for r in self._log
                if fnmatchcase(r.path, path) and method in (None, r.method) and where in (None, r.where)
            ]

    def requests(self, path: str = "*", *, method: str | None = None, where: Where | None = None) -> int:
        """How many requests matched."""
        return len(self.log(path, method=method, where=where))

    def body_bytes(self, path: str = "*", *, where: Where | None = None) -> int:
        """Body bytes sent for the requests that matched."""
        return sum(r.sent_bytes for r in self.log(path, where=where))
