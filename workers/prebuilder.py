"""Builds engines for jobs that wait for a device that this worker has not (`app.prebuilds`), in its spare time.

What it makes are stage results under the very keys that the job's own worker asks for: that one finds them made, proves
and measures them. Nothing is measured here, and nothing ships from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from app.domain.failures import FailureKind, StageFailure
from app.jobs.ledger import LeaseLost
from app.prebuilds.service import LEASE, PrebuildHold, PrebuildService
from workers import devices, kernel
from workers.candidates import Target
from workers.equipment import Equipment
from workers.libraries import model_formats
from workers.pipeline.faults import infrastructure_faults
from workers.pipeline.isolated import Interrupted
from workers.pipeline.optimize import Optimizer
from workers.pipeline.workspace import Workspace
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
    """An errand of the worker's spare time."""

    def __init__(self, service: PrebuildService, equipment: Equipment, spare: SpareTime, watch: Watch = NOBODY) -> None:
        self.targets = targets_of(equipment.hardware)
        self._service, self._equipment, self._formats = service, equipment, model_formats()
        self._spare, self._watch = spare, watch

    @property
    def offers(self) -> dict[str, dict[str, list[str]]]:
        """Backend → target → precisions."""
        return {b: {n: [*t.precisions] for n, t in targets.items()} for b, targets in self.targets.items()}

    def build_one(self) -> bool:
        """Take on the job that waits longest, if this worker is idle; whether there was one that it is done with."""
        if not self.targets:
            return False
        with self._spare.turn() as mine:
            hold = self._service.take(self._equipment.worker_id, self.targets, self._formats) if mine else None
            return hold is not None and self._build(hold)

    def _build(self, hold: PrebuildHold) -> bool:
        held = Held(self._spare, lambda: self._service.renew(hold), _RENEW_S)
        told = {"job_id": hold.job_id, "backend": hold.backend, "target": hold.target}
        log.info("prebuild_started", **told)
        name = f"prebuild-{hold.job_id}-{self._equipment.worker_id}"
        try:
            with infrastructure_faults(), self._equipment.workspace(name, hold.tenant_id) as workspace:
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
        job, models, datasets = self._equipment.ledger.load(hold)
        runner = self._equipment.runner(hold, workspace, held.should_stop, watch=self._watch)
        target, backend = self.targets[hold.backend][hold.target], kernel.backends()[hold.backend]
        offered = kernel.BackendInfo(hold.backend, {}, (backend.device,), target.precisions)
        hardware = {**self._equipment.hardware, **target.hardware}
        return Optimizer(runner, job, models, datasets, [offered], self._equipment.settings.limits, hardware=hardware)
