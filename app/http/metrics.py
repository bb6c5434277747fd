"""Prometheus metrics of the API: of this process's requests, and of the service's state as the database tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from app.operations.statistics import Snapshot, Waiting

log = structlog.get_logger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


# Codes of failures that are none of a job's own; alerts watch them.
OF_THE_SERVICE = (
    "internal",
    "worker_lost",
    "child_lost",
    "machine_busy",
    "storage_unavailable",
    "storage_full",
    "blob_missing",
    "io_error",
)
_REASONS = ("release", "lease_expired")


class Metrics:
    """A registry of its own, so that several apps in one process (tests) do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("anneal_http_requests_total", "Requests answered", labels, registry=self.registry)
        self._seconds = Histogram(
            "anneal_http_request_seconds",
            "Time to the end of the answer",
            ("method", "route"),
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self.in_flight = Gauge("anneal_http_requests_in_flight", "Requests being answered", registry=self.registry)
        self.uploaded = Counter("anneal_uploaded_bytes_total", "Bytes of files received", registry=self.registry)

        self._state = _StateCollector()
        self.registry.register(self._state)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Read the service's state whenever metrics are asked for."""
        self._state.snapshot = snapshot

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _StateCollector(Collector):
    """Where the database does not answer, `anneal_database_up` says so, and the requests are told all the same."""

    snapshot: Callable[[], Snapshot] | None = None

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not read the database."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        if self.snapshot is None:
            return
        state = None
        try:
            state = self.snapshot()
        except SQLAlchemyError as error:
            log.warning("no_state_for_metrics", exc_info=error)
        yield GaugeMetricFamily(
            "anneal_database_up", "Whether the database told the service's state", value=float(state is not None)
        )
        if state is not None:
            yield from families(state)


def families(state: Snapshot) -> Iterator[Metric]:
    """The state as metrics; those by queue have the same queues, so that they can be compared."""
    ages = {queue: waiting.seconds(state.at) for queue, waiting in state.waiting.items()}
    depths = {queue: waiting.depth for queue, waiting in state.waiting.items()}
    overdue = Waiting(1, state.overdue_since).seconds(state.at)
    yield _gauge("anneal_jobs", "Jobs by status", "status", state.jobs)
    yield _gauge("anneal_queue_depth", "Queued jobs by queue", "queue", depths)
    yield _gauge("anneal_queue_oldest_seconds", "How long the oldest queued job waits", "queue", ages)
    yield _gauge("anneal_queue_running", "Running jobs by queue", "queue", state.running)
    yield _gauge("anneal_queue_workers", "Live workers that take jobs of this queue", "queue", state.workers)
    yield from _by_tenant(state)
    yield GaugeMetricFamily("anneal_live_workers", "Workers seen lately", value=state.live_workers)
    yield GaugeMetricFamily(
        "anneal_lease_overdue_seconds", "Since when a running job's lease is over and nobody saw to it", value=overdue
    )
    waiting = state.webhooks
    yield GaugeMetricFamily(
        "anneal_webhooks_waiting", "Deliveries of webhooks that have yet to be made", value=waiting.depth
    )
    yield GaugeMetricFamily(
        "anneal_webhooks_oldest_seconds",
        "How long an attempt at one of them is overdue",
        value=waiting.seconds(state.at),
    )
    # Those that are watched stand there from the beginning: the first one is a rise, too.
    failed = {**dict.fromkeys(OF_THE_SERVICE, 0), **state.failed}
    requeued = {**dict.fromkeys(_REASONS, 0), **state.requeued}
    yield _counter("anneal_jobs_failed_total", "Jobs that failed, ever", "code", failed)
    yield _counter("anneal_jobs_requeued_total", "Jobs queued again, ever", "reason", requeued)


def _by_tenant(state: Snapshot) -> Iterator[Metric]:
    if not state.tenants:
        return
    labels = ["queue", "tenant"]
    depth = GaugeMetricFamily("anneal_tenant_queue_depth", "Queued jobs of the tenants with the most", labels=labels)
    oldest = GaugeMetricFamily("anneal_tenant_queue_oldest_seconds", "How long their oldest waits", labels=labels)
    for names, waiting in state.tenants.items():
        depth.add_metric([*names], waiting.depth)
        oldest.add_metric([*names], waiting.seconds(state.at))
    yield depth
    yield oldest


def _gauge(name: str, told: str, label: str, values: Mapping[str, Any]) -> Metric:
    family = GaugeMetricFamily(name, told, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _counter(name: str, told: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, told, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
