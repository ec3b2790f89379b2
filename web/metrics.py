"""GET /metrics: Prometheus' text format, written plainly.

The ledger's numbers are those of the whole service. What this server counts itself (answers by operation and status,
which shows the limits that were reached) is per process, and says so in its label `process`.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter, defaultdict

from flask import Blueprint, Flask, Response, current_app, g, request

from planner.errors import Unavailable
from web.errors import LIMITS
from web.services import services

blp = Blueprint("metrics", __name__)

_KEY = "fairshard-counts"
_NAME = re.compile(r"[^a-zA-Z0-9_]")


class Counts:
    """Answers and the seconds they took, by operation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.answers: Counter[tuple[str, str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.limits = dict.fromkeys(LIMITS, 0)

    def add(self, operation: str, method: str, status: int, seconds: float, limit: str | None) -> None:
        """Count an answer, and the setting whose limit was reached."""
        with self._lock:
            if limit is not None:
                self.limits[limit] += 1
            self.answers[operation, method, status] += 1
            self.seconds[operation] += seconds

    def lines(self) -> list[str]:
        """The counts in Prometheus' format."""
        label = f'process="{os.getpid()}"'
        with self._lock:
            answers, seconds = sorted(self.answers.items()), sorted(self.seconds.items())
            limits = sorted(self.limits.items())
        return [
            "# HELP fairshard_http_responses_total Answers by operation and status; 413, 429 and 503 are limits.",
            "# TYPE fairshard_http_responses_total counter",
            *(
                f'fairshard_http_responses_total{{operation="{op}",method="{method}",status="{status}",{label}}} {n}'
                for (op, method, status), n in answers
            ),
            "# HELP fairshard_limits_reached_total Requests that a limit refused, by the setting that has it.",
            "# TYPE fairshard_limits_reached_total counter",
            *(f'fairshard_limits_reached_total{{setting="{setting}",{label}}} {n}' for setting, n in limits),
            "# HELP fairshard_http_seconds_total Time spent answering, by operation.",
            "# TYPE fairshard_http_seconds_total counter",
            *(f'fairshard_http_seconds_total{{operation="{op}",{label}}} {spent:.6f}' for op, spent in seconds),
        ]


def _start() -> None:
    g.started = time.perf_counter()


def init_app(app: Flask) -> None:
    """Count the answers of `app`, and show them."""
    counts = Counts()
    app.extensions[_KEY] = counts

    def count(response: Response) -> Response:
        known = {"GET", "POST", "DELETE", "OPTIONS", "HEAD"}
        counts.add(
            request.endpoint or "none",
            request.method if request.method in known else "other",
            response.status_code,
            time.perf_counter() - g.get("started", time.perf_counter()),
            g.get("limit"),
        )
        return response

    app.before_request(_start)
    app.after_request(count)
    app.register_blueprint(blp)


@blp.get("/metrics")
def show() -> Response:
    """The service's numbers and this process's."""
    counts: Counts = current_app.extensions[_KEY]
    try:
        numbers, up = services().jobs.metrics(), 1
    except Unavailable:
        numbers, up = {}, 0
    lines = [
        "# HELP fairshard_redis_up Whether Redis answered this scrape.",
        "# TYPE fairshard_redis_up gauge",
        f"fairshard_redis_up {up}",
    ]
    for name, value in sorted(numbers.items()):
        full = f"fairshard_{_NAME.sub('_', name)}"
        lines += [f"# TYPE {full} {'counter' if full.endswith('_total') else 'gauge'}", f"{full} {value:g}"]
    text = "\n".join([*lines, *counts.lines(), ""])
    return Response(text, content_type="text/plain; version=0.0.4; charset=utf-8")
