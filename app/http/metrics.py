"""Prometheus metrics: of this process's requests, and of the service's state as the database tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


@dataclass(frozen=True)
class Snapshot:
    """The service's state: jobs by status, queued jobs by queue, live workers."""

    jobs: Mapping[str, int]
    queued: Mapping[str, int]
    live_workers: int


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
    snapshot: Callable[[], Snapshot] | None = None

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: registering must not read the database."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if self.snapshot is None:
            return
        state = self.snapshot()
        jobs = GaugeMetricFamily("anneal_jobs", "Jobs by status", labels=["status"])
        for status, count in state.jobs.items():
            jobs.add_metric([status], count)
        yield jobs
        queued = GaugeMetricFamily("anneal_queue_depth", "Queued jobs by queue", labels=["queue"])
        for queue, count in state.queued.items():
            queued.add_metric([queue], count)
        yield queued
        yield GaugeMetricFamily("anneal_live_workers", "Workers seen lately", value=state.live_workers)
