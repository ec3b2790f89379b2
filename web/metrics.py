"""GET /metrics: Prometheus' numbers, of the whole service and of all processes of this server.

What the ledger and the registry know is read from Redis at the scrape, once, whichever process answers. What the
processes count themselves (answers, limits that were reached) lies in files that they share under gunicorn
(`web.gunicorn_conf`), or in this process where there is but one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from flask import Blueprint, Flask, Response, current_app, g, request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from planner.errors import Unavailable
from web.errors import LIMITS
from web.services import services_of
from workers.jobs.jobs import Jobs

blp = Blueprint("metrics", __name__)

_KEY = "fairshard-metrics"
_METHODS = frozenset({"GET", "POST", "DELETE", "OPTIONS", "HEAD"})
#: Of a look (5 ms) and of a caller who waits for a plan (two minutes at most), in seconds.
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
_CONVERTER = re.compile(r"<\w+:")


class ServiceCollector(Collector):
    """What Redis knows of the service, read when it is asked for."""

    def __init__(self, jobs: Jobs, *, most_jobs: int) -> None:
        self._jobs, self._most_jobs = jobs, most_jobs

    def describe(self) -> list[Metric]:
        """Nothing: to register must not ask Redis."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The numbers; without Redis only that it is away."""
        ready = self._jobs.ready()
        accepts = GaugeMetricFamily("fairshard_accepts_jobs", "Whether a job can be accepted and kept now.")
        try:
            numbers, steps = self._jobs.metrics(), self._jobs.step_seconds()
        except Unavailable:
            accepts.add_metric((), 0)
            yield accepts
            yield GaugeMetricFamily("fairshard_redis_up", "Whether Redis answered this scrape.", 0)
            return
        room = numbers["jobs_unfinished"] < self._most_jobs
        accepts.add_metric((), ready["redis"] and ready.get("journal", True) and room)
        yield accepts
        yield GaugeMetricFamily("fairshard_redis_up", "Whether Redis answered this scrape.", 1)
        for name, value in sorted(numbers.items()):
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"fairshard_{name}", f"Of the whole service: {name.replace('_', ' ')}.", value)
        took = HistogramMetricFamily("fairshard_step_seconds", "How long steps took that were done.", labels=["step"])
        for step, (buckets, total) in sorted(steps.items()):
            took.add_metric((step,), [*buckets], total)
        yield took


class Metrics:
    """What an application counts, and the registry that shows it."""

    def __init__(self, service: ServiceCollector) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        try:
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
            own = None
        except ValueError:  # no folder is shared: one process
            own = self.registry
        self.registry.register(service)
        self.answers = Counter(
            "fairshard_http_responses",
            "Answers by route and status; 413, 429 and 503 are limits.",
            ("route", "method", "status"),
            registry=own,
        )
        self.seconds = Histogram(
            "fairshard_http_response_seconds",
            "Time until an answer began, by route and class of status.",
            ("route", "method", "status"),
            buckets=_BUCKETS_S,
            registry=own,
        )
        self.limits = Counter(
            "fairshard_limits_reached",
            "Requests that a limit refused, by the setting that has it.",
            ("setting",),
            registry=own,
        )
        for setting in LIMITS:
            self.limits.labels(setting)

    def count(self, response: Response) -> Response:
        """Count an answer. Paths that no route has share one label, methods that nobody knows another."""
        rule = request.url_rule
        route = "unmatched" if rule is None else _CONVERTER.sub("<", rule.rule)
        method = request.method if request.method in _METHODS else "other"
        self.answers.labels(route, method, str(response.status_code)).inc()
        seconds = time.perf_counter() - g.get("started", time.perf_counter())
        self.seconds.labels(route, method, f"{response.status_code // 100}xx").observe(seconds)
        if limit := g.get("limit"):
            self.limits.labels(limit).inc()
        return response


def _start() -> None:
    g.started = time.perf_counter()


def init_app(app: Flask) -> None:
    """Count the answers of `app`, and show them."""
    made = services_of(app)
    metrics = Metrics(ServiceCollector(made.jobs, most_jobs=made.web.max_queue))
    app.extensions[_KEY] = metrics
    app.before_request(_start)
    app.after_request(metrics.count)
    app.register_blueprint(blp)


@blp.get("/metrics")
def show() -> Response:
    """All numbers, as Prometheus reads them."""
    metrics: Metrics = current_app.extensions[_KEY]
    return Response(generate_latest(metrics.registry), content_type=CONTENT_TYPE_LATEST)
