"""When to try again after a failure, and for how long."""

from __future__ import annotations

import email.utils
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from planner.errors import Unavailable
from workers.progress import stoppable, wait

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long one server is retried; by default some 8 s without a single byte."""

    #: Failures in a row without progress before giving up.
    attempts: int = 5
    #: The first pause; each further one is twice as long, up to `longest_s`.
    first_s: float = 0.5
    longest_s: float = 20.0
    #: If a server asks to wait longer than this, it is given up; the Hub counts requests in windows of 300 s.
    longest_retry_after_s: float = 300.0
    #: A connection must be made, and answer, within this.
    connect_s: float = 10.0
    #: A connection that brings fewer than `stall_bytes` in `stall_s` is given up for a new one.
    stall_s: float = 20.0
    stall_bytes: int = 64 * 1024

    def pause_s(self, failures: int, *, retry_after_s: float | None = None, jitter: float | None = None) -> float:
        """Seconds to wait after `failures` (from 1) in a row.

        Between half of the exponential pause and all of it, so that nodes that failed together do not return
        together; never less than the server asked for.

        Args:
            failures: Failures so far without progress.
            retry_after_s: What the server asked for.
            jitter: From 0 to 1; default drawn at random.
        """
        share: float = random.random() if jitter is None else jitter  # noqa: S311 - spreads load, guards nothing
        backoff = min(self.longest_s, self.first_s * 2.0 ** (failures - 1)) * (0.5 + share / 2)
        return backoff if retry_after_s is None else retry_after_s + min(backoff, 1.0)


class Transient(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def retrying(
    attempt: Callable[[], T],
    *,
    what: str,
    policy: RetryPolicy,
    progress: Callable[[], int] = lambda: 0,
    pause: Callable[[float], object] = time.sleep,
) -> T:
    """Call `attempt` until it returns, raises anything but `Transient`, or the policy gives up.

    Args:
        attempt: What to do; goes on from where it failed if it can.
        what: For the message, such as an address.
        policy: The limits.
        progress: Grows as bytes arrive; failures are counted anew once it has grown by `policy.stall_bytes`.
        pause: Sleeps; may raise to stop.

    Raises:
        Unavailable: After `policy.attempts` failures in a row; the message says the last one.
    """
    failures, reached = 0, progress()
    while True:
        try:
            with stoppable(f"waits for {what}" + (f", attempt {failures + 1}" if failures else "")):
                return attempt()
        except Transient as error:
            if progress() - reached >= policy.stall_bytes:
                failures, reached = 0, progress()
            failures += 1
            pause_s = policy.pause_s(failures, retry_after_s=error.retry_after_s)
            details = {"what": what, "attempts": failures, "retry_after_s": error.retry_after_s}
            if (error.retry_after_s or 0) > policy.longest_retry_after_s:
                raise Unavailable(
                    f"{what}: {error}; the server asks to wait {pause_s:.0f} s", details=details
                ) from error
            if failures >= policy.attempts:
                raise Unavailable(f"{what}: {error} (tried {failures} times)", details=details) from error
            asks = "asks to wait" if error.retry_after_s else f"is asked again (attempt {failures + 1}) in"
            wait(pause_s, f"{what} {asks} {pause_s:.0f} s: {error}", pause=pause)


def asked_s(header: Callable[[str], str | None]) -> float | None:
    """Seconds that an answer asks to wait: by Retry-After, or by the RateLimit header that the Hub sends.

    Args:
        header: Gives the answer's header of a name, whatever its case.
    """
    found = parse_retry_after(header("Retry-After"))
    if found is not None:
        return found
    # draft-ietf-httpapi-ratelimit-headers: "api";r=0;t=55 means none remaining for 55 s.
    spent = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", header("RateLimit") or "")
    return float(spent[1]) if spent else None


def parse_retry_after(value: str | None, *, now_s: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or an HTTP date; None where it says neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = when.timestamp() - (time.time() if now_s is None else now_s)
    return max(0.0, seconds) if seconds == seconds else None  # noqa: PLR0124 - "nan" parses as a float
