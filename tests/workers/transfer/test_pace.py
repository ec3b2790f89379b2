"""How fast, and how long still: told from the last seconds alone."""

from __future__ import annotations

import pytest

from workers.progress import Pace


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        # One report tells no rate.
        ([(0, 0)], (None, None)),
        ([(0, 0), (2, 200)], (100.0, 8.0)),
        # A pause is part of the rate; nothing at all has no end.
        ([(0, 0), (2, 200), (4, 200)], (50.0, 16.0)),
        ([(0, 300), (5, 300)], (0.0, None)),
        # After the window the slow beginning is forgotten: 10 a second, then 50.
        ([(0, 0), (10, 100), (20, 600), (26, 900)], (50.0, 2.0)),
        # What was there already counts for no speed.
        ([(0, 900), (1, 950)], (50.0, 1.0)),
        ([(0, 0), (2, 1000)], (500.0, 0.0)),
    ],
)
def test_the_rate_is_that_of_the_last_seconds(
    told: list[tuple[float, int]], expected: tuple[float | None, float | None]
) -> None:
    now = 0.0
    pace = Pace(clock=lambda: now)
    for now, done in told:  # noqa: B007 - the clock reads it
        figures = pace.figures(done, 1000, "shard")
    assert (figures["rate_per_s"], figures["eta_s"]) == expected


def test_another_thing_begins_anew() -> None:
    now = 0.0
    pace = Pace(clock=lambda: now)
    pace.figures(0, 10, "headers")
    now = 1.0
    assert pace.figures(5_000, 10_000, "shard") == {"rate_per_s": None, "eta_s": None}
    now = 2.0
    assert pace.figures(6_000, None, "shard") == {"rate_per_s": 1000.0, "eta_s": None}
    now = 3.0
    assert pace.figures(10, 10_000, "shard")["rate_per_s"] is None, "it was begun again"
