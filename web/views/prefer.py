"""`Prefer` of RFC 7240: how long a caller wants to wait, and what was made of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PREFERENCE = re.compile(r'\s*([A-Za-z0-9!#$%&\'*+.^_`|~-]+)(?:\s*=\s*("[^"]*"|[^\s",;]*))?')


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How long to wait for a plan."""

    seconds: float
    #: What `Preference-Applied` says; None: nothing was preferred.
    applied: str | None = None


def preferences(headers: Iterable[str]) -> dict[str, str]:
    """The preferences in `Prefer` headers by lower-case name; of one that comes twice the first counts."""
    found: dict[str, str] = {}
    for header in headers:
        for part in header.split(","):
            if match := _PREFERENCE.match(part):
                found.setdefault(match[1].lower(), (match[2] or "").strip('"'))
    return found


def waiting(headers: Iterable[str], *, default_s: float, longest_s: float) -> Waiting:
    """How long a request with these `Prefer` headers waits.

    `wait=N` waits N seconds at most; `respond-async` alone not at all; with both, N seconds and then asynchronously
    (RFC 7240, 4.3). What does not parse is ignored, as the RFC has it; a longer wait than `longest_s` is cut.
    """
    found = preferences(headers)
    asynchronous = "respond-async" in found
    text = found.get("wait", "")
    if text.isascii() and text.isdigit():
        seconds = int(text[:9])
        applied = f"wait={seconds}" if seconds <= longest_s else f"wait={longest_s:.0f}"
        return Waiting(
            seconds=min(seconds, longest_s), applied=f"respond-async, {applied}" if asynchronous else applied
        )
    if asynchronous:
        return Waiting(seconds=0.0, applied="respond-async")
    return Waiting(seconds=min(default_s, longest_s))
