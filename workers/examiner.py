"""Answers which backends take a model (`GET /v1/models/{id}/compatibility`) while this worker has no job.

A job goes first: one that arrives ends the examination, which is given back and taken up again later. What is measured
on this machine by another worker is not disturbed: an examination holds its share of the machine like a build.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from app.compatibility.service import LEASE, CompatibilityService, Question
from app.db.orm import SourceModel
from app.domain.failures import FailureKind, StageFailure
from app.settings import LimitSettings
from workers import kernel
from workers.equipment import Equipment
from workers.libraries import installed_versions, model_formats
from workers.pipeline.faults import infrastructure_faults
from workers.pipeline.isolated import Interrupted, StageOutcome
from workers.pipeline.machine import MachineLock, Place
from workers.pipeline.protocol import Limits, StageRequest
from workers.pipeline.source import source_ref
from workers.pipeline.workspace import Workspace
from workers.spare import Held, SpareTime

log = structlog.get_logger(__name__)

_LONGEST_S = 300.0  # of one stage
_RENEW_S = LEASE.total_seconds() / 3


def examined_by(hardware: Mapping[str, Any]) -> dict[str, str]:
    """Backend → the version of its library, of those that can say on this machine what they take of a model."""
    found = {}
    for name, backend in sorted(kernel.backends().items()):
        try:
            if backend().examines(hardware):
                told = installed_versions(backend.libraries)
                found[name] = ", ".join(f"{library} {version}" for library, version in sorted(told.items()))[:200]
        except Exception:  # a plug-in that breaks its contract
            log.exception("examines_failed", backend=name)
    return found


class Examiner:
    """An errand of the worker's spare time."""

    def __init__(self, service: CompatibilityService, equipment: Equipment, spare: SpareTime) -> None:
        limits = equipment.limits
        self.backends = examined_by(equipment.hardware)
        self._service, self._equipment, self._formats = service, equipment, model_formats()
        self._limits = Limits(min(_LONGEST_S, limits.seconds), limits.memory_bytes, limits.file_bytes)
        self._machine = MachineLock(equipment.settings.worker.lock_dir, limits.seconds)
        self._spare = spare

    def answer_one(self) -> bool:
        """Take the oldest question on, if this worker is idle; whether there was one that it came to the end of."""
        if not self.backends:
            return False
        with self._spare.turn() as mine:
            question = self._service.take(self._equipment.worker_id, self.backends, self._formats) if mine else None
            return question is not None and self._answer(question)

    def _answer(self, question: Question) -> bool:
        left = list(question.backends)
        held = Held(self._spare, lambda: self._service.renew(question), _RENEW_S)
        name = f"examine-{question.model.id}-{self._equipment.worker_id}"
        model = question.model
        try:
            with infrastructure_faults(), self._equipment.workspace(name, model.tenant_id) as workspace:
                exported = self._export(workspace, model, held)
                while left:
                    self._ask(workspace, exported, question, left[0], held)
                    left.pop(0)
        except Interrupted:
            if not held.lost:
                self._service.give_back(question, left)
            return False
        except StageFailure as failure:
            log.info("not_examined", model_id=model.id, code=failure.code, detail=failure.detail)
            if failure.kind is FailureKind.INFRASTRUCTURE:
                self._service.retry_later(question, left)
                return False
            self._service.fail(question, left, failure.public())
        return True

    def _ask(self, workspace: Workspace, exported: Path, question: Question, backend: str, held: Held) -> None:
        """One backend. That it crashes on the model or takes too long says nothing of the others."""
        try:
            told = self._call(workspace, "compatibility", {"model": exported}, {"backend": backend}, held)
        except StageFailure as failure:
            if failure.kind is FailureKind.INFRASTRUCTURE:
                raise
            self._service.fail(question, (backend,), failure.public())
        else:
            self._service.answer(question, backend, told.data)

    def _export(self, workspace: Workspace, model: SourceModel, held: Held) -> Path:
        """The folder of the checked ONNX model."""
        source = workspace.fetch(source_ref(model))
        limits: LimitSettings = self._equipment.settings.limits
        options = {
            "format": model.format,
            "max_unpacked_bytes": limits.unpacked_bytes,
            "max_members": limits.archive_members,
            "max_ratio": limits.compression_ratio,
        }
        return self._call(workspace, "export", {"source": source}, options, held).folder / "model"

    def _call(
        self, workspace: Workspace, stage: str, inputs: Mapping[str, Path], options: Mapping[str, Any], held: Held
    ) -> _Done:
        folder = workspace.new_call(stage)
        request = StageRequest(
            stage=stage,
            options=dict(options),
            inputs={name: str(path) for name, path in inputs.items()},
            workspace=str(folder / "work"),
            outputs=str(folder / "out"),
            hardware=dict(self._equipment.hardware),
            limits=self._limits,
        )
        with self._machine.hold(Place(alone=False), held.should_stop, lambda: None):
            result = self._equipment.isolated.run(request, on_progress=lambda *_: None, should_stop=held.should_stop)
        return _Done(result, folder / "out")


class _Done:
    def __init__(self, outcome: StageOutcome, folder: Path) -> None:
        self.data, self.folder = outcome.data, folder
