"""One attempt at a job: from the claim to what ends it, gives it back or loses it. One at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.db.orm import Dataset, Job, SourceModel
from app.domain.failures import FailureKind, StageFailure
from app.errors import AppError
from app.jobs.ledger import Claim, JobLedger, LeaseLost
from app.logging import bind_correlation_id
from workers import kernel
from workers.background import InARow
from workers.equipment import Equipment
from workers.helping import Sharing
from workers.pipeline.faults import infrastructure_faults
from workers.pipeline.isolated import Interrupted
from workers.pipeline.lease import LeaseKeeper, StopReason
from workers.pipeline.machine import MACHINE_BUSY
from workers.pipeline.optimize import Optimizer
from workers.pipeline.outcome import Optimization
from workers.pipeline.report import make_manifest, make_report
from workers.pipeline.results import engine_row, no_feasible_candidate, publish
from workers.pipeline.runner import StageRunner
from workers.pipeline.shared_caches import SharedCaches
from workers.pipeline.workspace import Workspace
from workers.room import Room
from workers.telemetry.telling import Attempt, Telemetry

log = structlog.get_logger(__name__)

_INTERNAL = StageFailure(
    "internal",
    "The service failed on this job.",
    FailureKind.INFRASTRUCTURE,
    remedy="Report this with the job's id: the worker's log holds the trace.",
)
RETRIED_LATER = frozenset({"storage_unavailable", "io_error", "blob_missing", "child_lost", MACHINE_BUSY})
_OF_THE_WORKER = frozenset({"internal", "child_lost"})
_TOO_MANY = 3
_SHUTS_DOWN = "the worker shuts down"


class Attempts:
    """Of one worker. `renewals`: by a database that fails while there is time for another try; `give_up`: told why this
    worker had better end."""

    def __init__(
        self,
        equipment: Equipment,
        renewals: JobLedger,
        backends: list[kernel.BackendInfo],
        sharing: Sharing,
        *,
        shared_caches: SharedCaches,
        room: Room,
        telemetry: Telemetry,
        shutdown: threading.Event,
        give_up: Callable[[str], None],
    ) -> None:
        self._equipment, self._renewals, self._backends, self._sharing = equipment, renewals, backends, sharing
        self._shared_caches, self._room, self._telemetry = shared_caches, room, telemetry
        self._shutdown, self.give_up = shutdown, give_up
        self._ledger, self._settings = equipment.ledger, equipment.settings
        self._unwell = InARow(_TOO_MANY)

    def run(self, claim: Claim, asked: float) -> bool:
        """Whether the job has ended; else it is tried again later, or another worker has it. `asked`: when it was
        claimed, by the monotonic clock."""
        keeper = LeaseKeeper(
            self._renewals,
            claim,
            self._shutdown,
            asked=asked,
            on_lost=self._equipment.isolated.interrupt,
            hand_back=partial(self._hand_back, claim),
        )
        with keeper:
            try:
                return self._run(claim, keeper)
            except LeaseLost:
                log.warning("lease_lost", job_id=claim.job_id, token=claim.token)
            except Interrupted:
                self._interrupted(claim, keeper)
        return False

    def _run(self, claim: Claim, keeper: LeaseKeeper[Claim]) -> bool:
        job, models, datasets = self._ledger.load(claim)
        bind_correlation_id(job.correlation_id)
        with self._telemetry.attempt(job, claim, lambda: keeper.reason) as attempt:
            return self._attempt(claim, keeper, attempt, job, models, datasets)

    def _attempt(
        self,
        claim: Claim,
        keeper: LeaseKeeper[Claim],
        attempt: Attempt,
        job: Job,
        models: Sequence[SourceModel],
        datasets: Mapping[str, Dataset],
    ) -> bool:
        log.info("job_started", job_id=job.id, attempt=claim.attempt)
        stages: list[dict[str, Any]] = []
        again = False
        crew = self._sharing.crew(claim, keeper.should_stop, attempt.traceparent)
        try:
            name = f"{claim.job_id}-{claim.token}"
            with infrastructure_faults(), self._equipment.workspace(name, claim.tenant_id) as workspace:
                runner = self._equipment.runner(
                    claim,
                    workspace,
                    keeper.should_stop,
                    shared_caches=self._shared_caches,
                    measure_again=job.spec.get("measure") == "again",
                    watch=attempt,
                    elsewhere=crew.elsewhere,
                )
                stages = runner.view.stages
                found = Optimizer(
                    runner,
                    job,
                    models,
                    datasets,
                    self._backends,
                    self._settings.limits,
                    self._settings.worker.searches_dir,
                    tritonserver=self._settings.worker.tritonserver,
                    crew=crew,
                ).run()
                if keeper.should_stop():
                    raise Interrupted
                self._finish(claim, found, runner, workspace)
                shipped = found.package is not None
                attempt.judged(found.spent_seconds, found.spec.budget_seconds, shipped=shipped)
            self._ended(None)
        except StageFailure as failure:
            again = self._failed(claim, failure, stages)
            attempt.failed(failure.code, again=again)
            self._ended(failure.code)
        except (LeaseLost, Interrupted, SQLAlchemyError):
            raise
        except Exception:  # a fault of ours: the job gets a typed error, the trace stays in the log
            log.exception("job_internal_error", job_id=claim.job_id)
            self._ledger.fail(claim, _INTERNAL.public(), {"stages": stages})
            attempt.failed(_INTERNAL.code)
            self._ended(_INTERNAL.code)
        log.info("job_ended", job_id=job.id)
        return not again

    def _ended(self, code: str | None) -> None:
        """A worker whose jobs all fail, and not by their own fault, leaves them to others."""
        if self._unwell.add(code in _OF_THE_WORKER):
            self.give_up(f"{_TOO_MANY} jobs in a row failed here with {sorted(_OF_THE_WORKER)}")

    def _finish(self, claim: Claim, found: Optimization, runner: StageRunner, workspace: Workspace) -> None:
        equipment = self._equipment
        report = make_report(found, runner.calls, runner.view.stages)
        published = publish(
            workspace, report, lambda digest: make_manifest(found, runner.calls, equipment.fingerprint, digest)
        )
        if found.package is None:
            failure = no_feasible_candidate(found)
            changes = {"stages": runner.view.stages, **published.columns()}
            self._ledger.fail(claim, failure.public(), changes)
            return
        hardware = {**equipment.hardware, "fingerprint": equipment.fingerprint}
        self._ledger.complete(
            claim,
            engine=engine_row(claim, found, published, hardware),
            report=published.report,
            manifest=published.manifest,
            changes={"stages": runner.view.stages},
            event={"picked": found.verdict.picked, "progress": 1.0},
        )

    def _failed(self, claim: Claim, failure: StageFailure, stages: list[dict[str, Any]]) -> bool:
        """Whether the job is tried again."""
        log.warning("job_failed", job_id=claim.job_id, code=failure.code, stage=failure.stage, detail=failure.detail)
        # Another's disk may have room; and the storage's operator will make some.
        full = failure.code == "storage_full" and (self._room.short_lately() or isinstance(failure.__cause__, AppError))
        if (failure.code in RETRIED_LATER or full) and not self._ledger.exhausted(claim):
            self._ledger.retry_later(claim, failure.detail)
            return True
        self._ledger.fail(claim, failure.public(), {"stages": stages})
        return False

    def _interrupted(self, claim: Claim, keeper: LeaseKeeper[Claim]) -> None:
        log.info("job_interrupted", job_id=claim.job_id, reason=keeper.reason)
        try:
            if keeper.reason is StopReason.CANCELLED:
                self._ledger.cancelled(claim, {})
            elif keeper.reason is StopReason.SHUTDOWN:
                self._ledger.release(claim, _SHUTS_DOWN)
        except LeaseLost:
            log.warning("lease_lost", job_id=claim.job_id, token=claim.token)

    def _hand_back(self, claim: Claim) -> None:
        """At a shutdown, while the job's thread is still busy with it: what that writes afterwards is refused."""
        try:
            self._renewals.release(claim, _SHUTS_DOWN)
            log.info("job_handed_back", job_id=claim.job_id)
        except LeaseLost:
            log.info("job_left_already", job_id=claim.job_id)
        except SQLAlchemyError as error:
            log.warning("job_not_handed_back", job_id=claim.job_id, error=str(error)[:200])
