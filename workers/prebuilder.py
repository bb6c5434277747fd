"""Builds engines for jobs that wait for a device that this worker has not (`app.prebuilds`), in its spare time.

What it makes are stage results under the very keys that the job's own worker asks for: that one finds them made, proves
and measures them. Nothing is measured here, and nothing ships from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog

from app.blobs.content import ContentStore
from app.domain.failures import FailureKind, StageFailure
from app.jobs.ledger import JobLedger, LeaseLost
from app.prebuilds.service import LEASE, PrebuildHold, PrebuildService
from app.settings import Settings
from workers import devices, kernel
from workers.candidates import Target
from workers.installation import Installation
from workers.libraries import model_formats
from workers.pipeline.faults import infrastructure_faults
from workers.pipeline.isolated import Interrupted, IsolatedRunner
from workers.pipeline.optimize import Optimizer
from workers.pipeline.protocol import Limits
from workers.pipeline.runner import StageRunner
from workers.pipeline.workspace import Workspace, open_workspace
from workers.spare import Held, SpareTime
from workers.telemetry.watch import NOBODY, Watch

log = structlog.get_logger(__name__)

_RENEW_S = LEASE.total_seconds() / 3


def targets_of(hardware: Mapping[str, Any]) -> dict[str, dict[str, Target]]:
    """Backend → what it builds for on this machine without having it, by name: all but the machine's own device."""
    found = {}
    for name, backend in sorted(kernel.backends().items()):
        own = devices.named(backend.device).kind(hardware)
        try:
            targets = {target.name: target for target in backend().targets(hardware) if target.name != own}
        except Exception:  # a plug-in that breaks its contract
            log.exception("targets_failed", backend=name)
            continue
        if targets:
            found[name] = targets
    return found


class Prebuilder:
    """An errand of the worker's spare time. `installation`: of a tenant."""

    def __init__(
        self,
        service: PrebuildService,
        ledger: JobLedger,
        content: ContentStore,
        isolated: IsolatedRunner,
        settings: Settings,
        worker_id: str,
        hardware: Mapping[str, Any],
        fingerprint: str,
        limits: Limits,
        installation: Callable[[str], Installation],
        spare: SpareTime,
        watch: Watch = NOBODY,
    ) -> None:
        self.targets = targets_of(hardware)
        self._service, self._ledger, self._content, self._isolated = service, ledger, content, isolated
        self._settings, self._worker_id, self._formats = settings, worker_id, model_formats()
        self._hardware, self._fingerprint, self._limits = hardware, fingerprint, limits
        self._installation, self._spare, self._watch = installation, spare, watch

    @property
    def offers(self) -> dict[str, dict[str, list[str]]]:
        """Backend → target → precisions."""
        return {b: {n: [*t.precisions] for n, t in targets.items()} for b, targets in self.targets.items()}

    def build_one(self) -> bool:
        """Take on the job that waits longest, if this worker is idle; whether there was one that it is done with."""
        if not self.targets:
            return False
        with self._spare.turn() as mine:
            hold = self._service.take(self._worker_id, self.targets, self._formats) if mine else None
            return hold is not None and self._build(hold)

    def _build(self, hold: PrebuildHold) -> bool:
        held = Held(self._spare, lambda: self._service.renew(hold), _RENEW_S)
        told = {"job_id": hold.job_id, "backend": hold.backend, "target": hold.target}
        log.info("prebuild_started", **told)
        name = f"prebuild-{hold.job_id}-{self._worker_id}".replace("/", "-")
        try:
            with (
                infrastructure_faults(),
                open_workspace(self._settings.home_dir, name, hold.tenant_id, self._content) as workspace,
            ):
                self._optimizer(hold, workspace, held).build()
        except (Interrupted, LeaseLost) as reason:
            if isinstance(reason, LeaseLost) or held.lost:
                log.info("prebuild_over", **told)  # its own worker has the job by now, or it was cancelled
                return True
            self._service.give_back(hold)
            return False
        except StageFailure as failure:
            log.info("prebuild_failed", code=failure.code, detail=failure.detail, **told)
            if failure.kind is FailureKind.INFRASTRUCTURE:
                self._service.retry_later(hold)
                return False
        self._service.end(hold)  # what fails on the model, the job itself says when it runs
        log.info("prebuild_ended", **told)
        return True

    def _optimizer(self, hold: PrebuildHold, workspace: Workspace, held: Held) -> Optimizer:
        job, model, datasets = self._ledger.load(hold)
        runner = StageRunner(
            claim=hold,
            ledger=self._ledger,
            isolated=self._isolated,
            workspace=workspace,
            hardware=self._hardware,
            fingerprint=self._fingerprint,
            limits=self._limits,
            lock_dir=self._settings.worker.lock_dir,
            should_stop=held.should_stop,
            installation=self._installation(hold.tenant_id),
            watch=self._watch,
        )
        target, backend = self.targets[hold.backend][hold.target], kernel.backends()[hold.backend]
        offered = kernel.BackendInfo(hold.backend, {}, (backend.device,), target.precisions)
        hardware = {**self._hardware, **target.hardware}
        return Optimizer(runner, job, model, datasets, [offered], self._settings.limits, hardware=hardware)
