"""What a worker tells of its jobs and chores: counted in its metrics, and as spans of the trace that the job belongs
to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from structlog.contextvars import bound_contextvars

from app.db.orm import Job
from app.domain.failures import StageFailure
from app.jobs.ledger import Claim, LeaseLost
from app.jobs.logs import log_context
from app.operations.tracing import NO_TRACING, Attributes, Tracing, make_tracing
from app.settings import Settings
from app.sharing.service import HelpHold
from workers import devices
from workers.pipeline.isolated import Interrupted
from workers.telemetry.exposition import Exposition
from workers.telemetry.metrics import WorkerMetrics
from workers.telemetry.watch import StageSeen, Watch

LEASE_LOST = "lease_lost"
_NO_BACKEND = "none"
_NOTHING_SHIPS = "no_feasible_candidate"


class Telemetry(Watch):
    """Of one worker process. As a `Watch` it counts the stage calls of no job of this worker's own, without spans."""

    def __init__(self, settings: Settings, worker_id: str, hardware: Mapping[str, Any]) -> None:
        self._settings, self._worker_id, self._hardware = settings, worker_id, hardware
        self._alone = 0
        self._last_reading: dict[str, float] = {}
        self.metrics = WorkerMetrics(self._reading)
        self.tracing: Tracing = NO_TRACING
        self.exposition = Exposition(self.metrics.render, self._measuring)

    def start(self) -> None:
        self.tracing = make_tracing(self._settings, "anneal-worker", self._worker_id)
        worker = self._settings.worker
        if worker.metrics_port:
            self.exposition.start(worker.metrics_host, worker.metrics_port)

    def close(self) -> None:
        self.exposition.close()
        self.tracing.close()

    @contextmanager
    def attempt(self, job: Job, claim: Claim, stopped_by: Callable[[], str | None]) -> Iterator[Attempt]:
        """Around one attempt at a job; log lines inside bear its ids. `stopped_by`: why it was ended from outside."""
        metrics, began = self.metrics, time.monotonic()
        attempt = Attempt(self, job, claim)
        metrics.attempts.labels(job.queue).inc()
        if claim.token == 1:
            metrics.job_wait.labels(job.queue).observe(max((claim.claimed_at - job.created_at).total_seconds(), 0.0))
        metrics.busy.set(1)
        try:
            with bound_contextvars(**log_context(job)):
                yield attempt
        except LeaseLost:
            attempt.outcome = LEASE_LOST
            raise
        except Interrupted:
            attempt.outcome = stopped_by() or "interrupted"
            raise
        finally:
            metrics.busy.set(0)
            metrics.job_seconds.labels(job.queue, attempt.outcome).observe(time.monotonic() - began)
            if attempt.outcome == LEASE_LOST:
                metrics.leases_lost.inc()
            attempt.end()

    @contextmanager
    def help(self, hold: HelpHold) -> Iterator[Watch]:
        """Around one attempt at a call of another worker's job: what watches its stages."""
        help_ = _Help(self, hold)
        try:
            yield help_
            help_.outcome = "answered"
        except LeaseLost:
            help_.outcome = LEASE_LOST
            raise
        except Interrupted:
            help_.outcome = "interrupted"
            raise
        except StageFailure as failure:
            help_.outcome, help_.code = "failed", failure.code
            raise
        finally:
            help_.end()

    # As a watch

    @contextmanager
    def stage(self, seen: StageSeen) -> Iterator[None]:
        with self.counted(seen):
            yield

    def waiting(self) -> None:
        self.metrics.machine_waiting.set(1)

    @contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        self.metrics.machine_waiting.set(0)
        self._alone += alone
        try:
            yield
        finally:
            self._alone -= alone

    @contextmanager
    def counted(self, seen: StageSeen) -> Iterator[None]:
        """Around a stage call, whatever it ends with."""
        try:
            yield
        except StageFailure as failure:
            self._count(seen)
            self.metrics.stage_failures.labels(seen.stage, failure.code[:64]).inc()
            raise
        else:
            self._count(seen)
            if not seen.cached:
                self.metrics.stage_seconds.labels(seen.stage, seen.backend or _NO_BACKEND).observe(seen.seconds)
        finally:
            self.metrics.machine_waiting.set(0)

    def _count(self, seen: StageSeen) -> None:
        metrics = self.metrics
        (metrics.stage_hits if seen.cached else metrics.stage_misses).labels(seen.stage).inc()
        if seen.tries > 1:
            metrics.stage_retries.labels(seen.stage).inc(seen.tries - 1)
        if seen.waited:
            metrics.machine_wait.observe(seen.waited)

    # Chores

    def swept(self, counts: Mapping[str, int]) -> None:
        for what, count in counts.items():
            self.metrics.swept.labels(what).inc(count)

    def collected(self, counts: Mapping[str, int], seconds: float) -> None:
        for kind, count in counts.items():
            self.metrics.collected.labels(kind).inc(count)
        self.metrics.collector_seconds.inc(seconds)

    def helped(self, outcome: str) -> None:
        """A call of another worker's job: `answered`, `given_back`, `lost` or `failed`."""
        self.metrics.helped.labels(outcome).inc()

    def chore_failed(self, chore: str) -> None:
        self.metrics.chore_failures.labels(chore).inc()

    def delivered(self, outcome: str) -> None:
        """An attempt at a webhook: `delivered`, `failed` or `given_up`."""
        self.metrics.deliveries.labels(outcome).inc()

    # The machine

    def _measuring(self) -> bool:
        return self._alone > 0

    def _reading(self) -> Mapping[str, float]:
        """Of the worker's device; the last one while something is measured."""
        if not self._measuring():
            self._last_reading = {}
            for accelerator in devices.ACCELERATORS:
                self._last_reading |= accelerator.reading(self._hardware)
        return self._last_reading


class _Traced(Watch):
    """Work on a job, with its stages as spans below its own. `outcome`: how it ended; `code`: of its failure."""

    well: ClassVar[tuple[str, ...]] = ()  # outcomes that are no failure

    def __init__(self, telemetry: Telemetry, name: str, parent: str | None, attributes: Attributes) -> None:
        self._telemetry = telemetry
        self.outcome = "error"
        self.code: str | None = None
        self._span = telemetry.tracing.start(name, parent=parent, kind="consumer", attributes=attributes)

    @property
    def traceparent(self) -> str | None:
        """Of its span; None where nothing is traced."""
        return self._span.traceparent

    def end(self) -> None:
        told = {"anneal.outcome": self.outcome, **({"anneal.failure.code": self.code} if self.code else {})}
        self._span.end(told, failed=None if self.outcome in self.well else self.code or self.outcome)

    @contextmanager
    def stage(self, seen: StageSeen) -> Iterator[None]:
        told = {"anneal.stage": seen.stage, "anneal.backend": seen.backend or _NO_BACKEND}
        if seen.candidate is not None:
            told["anneal.candidate"] = seen.candidate
        span = self._telemetry.tracing.start(f"stage {seen.stage}", parent=self._span.traceparent, attributes=told)
        outcome, why = "error", ""
        try:
            with self._telemetry.counted(seen):
                yield
            outcome = "succeeded"
        except StageFailure as failure:
            outcome, why = "failed", failure.code
            raise
        except (Interrupted, LeaseLost):
            outcome = "interrupted"
            raise
        finally:
            ended: dict[str, str | int | float | bool] = {
                "anneal.outcome": outcome,
                "anneal.cached": seen.cached,
                "anneal.waited_seconds": round(seen.waited, 3),
                "anneal.tries": seen.tries,
                **({"anneal.failure.code": why} if why else {}),
            }
            span.end(ended, failed=why or ("internal" if outcome == "error" else None))

    def waiting(self) -> None:
        self._telemetry.waiting()

    @contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        with self._telemetry.held(alone=alone):
            yield


class Attempt(_Traced):
    """One attempt at a job. `outcome`: succeeded, failed, retried, or why it was stopped."""

    well = ("succeeded", "cancelled", "shutdown")

    def __init__(self, telemetry: Telemetry, job: Job, claim: Claim) -> None:
        told: Attributes = {
            "anneal.job.id": job.id,
            "anneal.tenant.id": job.tenant_id,
            "anneal.job.queue": job.queue,
            "anneal.job.attempt": claim.attempt,
            "anneal.request.id": job.correlation_id,
        }
        super().__init__(telemetry, "job", job.traceparent, told)

    def judged(self, spent_seconds: float, budget_seconds: float, *, shipped: bool) -> None:
        """It ended with a verdict; `shipped`: and an engine."""
        self.outcome, self.code = ("succeeded", None) if shipped else ("failed", _NOTHING_SHIPS)
        self._telemetry.metrics.budget_used.observe(spent_seconds / budget_seconds)

    def failed(self, code: str, *, again: bool = False) -> None:
        """`again`: the job is queued once more."""
        self.outcome, self.code = "retried" if again else "failed", code


class _Help(_Traced):
    """One attempt at a call of a job that another worker has. `outcome`: answered, failed, or why it was stopped."""

    well = ("answered", "interrupted", LEASE_LOST)

    def __init__(self, telemetry: Telemetry, hold: HelpHold) -> None:
        told = {"anneal.job.id": hold.job_id, "anneal.tenant.id": hold.tenant_id, "anneal.call.id": hold.call_id[:12]}
        super().__init__(telemetry, "help", hold.traceparent, told)
