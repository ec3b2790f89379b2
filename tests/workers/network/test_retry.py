"""How long we wait, and when we stop."""

from __future__ import annotations

import email.utils
import time

import pytest

from planner.errors import Unavailable
from workers.network.retry import RetryPolicy, Transient, asked_s, parse_retry_after, retrying


@pytest.mark.parametrize(
    ("failures", "asked", "jitter", "expected"),
    [
        (1, None, 1, 0.5),
        (1, None, 0, 0.25),
        (2, None, 1, 1.0),
        (4, None, 1, 4.0),
        (30, None, 1, 20.0),  # the longest
        (1, 7.0, 1, 7.5),  # never less than was asked for
        (30, 7.0, 1, 8.0),  # and at most a second more
    ],
)
def test_pauses_double_up_to_the_longest(failures: int, asked: float | None, jitter: float, expected: float) -> None:
    assert RetryPolicy().pause_s(failures, retry_after_s=asked, jitter=jitter) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("header", "expected"),
    [("5", 5.0), ("0", 0.0), ("-3", 0.0), ("1.5", 1.5), (None, None), ("", None), ("soon", None), ("nan", None)],
)
def test_retry_after_in_seconds(header: str | None, expected: float | None) -> None:
    assert parse_retry_after(header) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "3", "RateLimit": '"api";r=0;t=55'}, 3.0),
        ({"RateLimit": '"resolvers";r=0;t=120'}, 120.0),
        ({"RateLimit": '"resolvers"; r=12; t=120'}, None),
        ({"RateLimit": "none"}, None),
        ({}, None),
    ],
)
def test_the_hubs_rate_limit_is_understood(headers: dict[str, str], expected: float | None) -> None:
    assert asked_s(headers.get) == expected


def test_retry_after_as_a_date() -> None:
    now = time.time()
    assert parse_retry_after(email.utils.formatdate(now + 30, usegmt=True), now_s=now) == pytest.approx(30, abs=1)
    assert parse_retry_after(email.utils.formatdate(now - 30, usegmt=True), now_s=now) == 0


def test_it_gives_up_after_the_stated_attempts_and_pauses_between() -> None:
    pauses: list[float] = []

    def attempt() -> None:
        raise Transient("HTTP 503")

    with pytest.raises(Unavailable, match=r"http://x: HTTP 503 \(tried 5 times\)") as caught:
        retrying(attempt, what="http://x", policy=RetryPolicy(), pause=pauses.append)
    assert caught.value.details["attempts"] == 5
    assert len(pauses) == 4
    assert pauses == sorted(pauses)


def test_progress_renews_patience() -> None:
    done = 0

    def attempt() -> int:
        nonlocal done
        done += 100_000
        if done < 2_000_000:
            raise Transient("cut")
        return done

    assert retrying(attempt, what="x", policy=RetryPolicy(), progress=lambda: done, pause=lambda _: None) == 2_000_000


def test_a_trickle_of_progress_does_not() -> None:
    done = 0

    def attempt() -> None:
        nonlocal done
        done += 10
        raise Transient("cut")

    with pytest.raises(Unavailable):
        retrying(attempt, what="x", policy=RetryPolicy(), progress=lambda: done, pause=lambda _: None)
    assert done == 50


def test_other_errors_are_not_retried() -> None:
    calls = 0

    def attempt() -> None:
        nonlocal calls
        calls += 1
        raise KeyError

    with pytest.raises(KeyError):
        retrying(attempt, what="x", policy=RetryPolicy())
    assert calls == 1
