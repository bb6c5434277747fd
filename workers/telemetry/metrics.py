"""A worker's metrics, in its own process: what happened here since it started. What is to outlive it is counted in the
database (`app.db.counts`) and told by the API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

STAGE_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 1800)
WAIT_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 1800, 3600, 14400)
JOB_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400)
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)


class WorkerMetrics:
    """A registry of its own. `reading`: of the device, asked with every rendering; it may take some milliseconds."""

    def __init__(self, reading: Callable[[], Mapping[str, float]] = dict) -> None:
        self.registry = CollectorRegistry()
        self._jobs()
        self._stages()
        self._chores()
        self.registry.register(_Device(reading))

    def _jobs(self) -> None:
        self.attempts = self._counter("anneal_job_attempts_total", "Jobs taken on", "queue")
        self.job_wait = self._histogram(
            "anneal_job_wait_seconds", "From a job's submission until a worker first took it", WAIT_BUCKETS, "queue"
        )
        self.job_seconds = self._histogram(
            "anneal_job_attempt_seconds", "Of one attempt, by what became of it", JOB_BUCKETS, "queue", "outcome"
        )
        self.leases_lost = self._counter("anneal_leases_lost_total", "Jobs that were no longer this worker's")
        self.budget_used = self._histogram(
            "anneal_job_budget_used_ratio", "Of its budget, by a job that ended with a verdict", SHARES
        )
        self.busy = Gauge("anneal_worker_busy", "Whether a job runs here", registry=self.registry)

    def _stages(self) -> None:
        self.stage_seconds = self._histogram(
            "anneal_stage_seconds", "A stage's own work, where it ran and succeeded", STAGE_BUCKETS, "stage", "backend"
        )
        self.stage_hits = self._counter("anneal_stage_cache_hits_total", "Results that were there already", "stage")
        self.stage_misses = self._counter("anneal_stage_cache_misses_total", "Results that had to be made", "stage")
        self.stage_failures = self._counter("anneal_stage_failures_total", "Calls that failed", "stage", "code")
        self.stage_retries = self._counter("anneal_stage_retries_total", "Calls begun again", "stage")
        self.machine_wait = self._histogram(
            "anneal_machine_wait_seconds", "For the machine, of calls that had to wait for it", WAIT_BUCKETS
        )
        self.machine_waiting = Gauge(
            "anneal_machine_waiting", "Whether a call waits for the machine now", registry=self.registry
        )

    def _chores(self) -> None:
        self.swept = self._counter("anneal_swept_jobs_total", "Jobs seen to by this worker's sweeper", "what")
        self.collected = self._counter("anneal_collected_total", "Removed or tallied by the collector", "kind")
        self.collector_seconds = self._counter("anneal_collector_seconds_total", "Time of the collector's passes")
        self.chore_failures = self._counter("anneal_chore_failures_total", "Passes that failed", "chore")
        self.helped = self._counter("anneal_helped_calls_total", "Calls of other workers' jobs", "outcome")
        self.deliveries = self._counter("anneal_webhook_deliveries_total", "Webhook attempts", "outcome")

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(name, told, labels, registry=self.registry)

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, told, labels, buckets=buckets, registry=self.registry)


class _Device(Collector):
    """The worker's GPU, where it has one and NVML tells."""

    def __init__(self, reading: Callable[[], Mapping[str, float]]) -> None:
        self._reading = reading

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask the driver."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        for name, value in self._reading().items():
            yield GaugeMetricFamily(f"anneal_device_{name}", _DEVICE[name], value=value)


_DEVICE = {
    "memory_used_bytes": "Memory of the worker's GPU in use, of all processes",
    "utilization_ratio": "Share of time in which the worker's GPU computes",
    "temperature_celsius": "Of the worker's GPU",
}
