"""Runs stage calls: key → stored result? → child process → storage → row → event. The one place where a stage meets the
database, so the stages need not know it."""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import structlog
from pydantic import BaseModel

from app.db.base import utcnow
from app.db.orm import StageResult as StageRow
from app.domain.artifact_key import ArtifactRef, canonical_json, stage_key
from app.domain.failures import FailureKind, StageFailure, infrastructure_failure
from app.errors import AppError
from app.jobs.ledger import Claim, JobLedger
from app.storage.base import BlobNotFound
from workers import kernel
from workers.pipeline.isolated import IsolatedRunner, StageOutcome
from workers.pipeline.protocol import Limits, StageRequest
from workers.pipeline.workspace import Workspace, device_lock

log = structlog.get_logger(__name__)

_TRIES = 3  # of one stage call, when its process is lost or storage is away
_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """The result of one stage call."""

    stage: str
    key: str
    inputs: dict[str, ArtifactRef]
    options: dict[str, Any]
    outputs: dict[str, ArtifactRef]
    data: dict[str, Any]
    cached: bool
    seconds: float  # the stage's own work, 0 where cached

    @property
    def notes(self) -> list[str]:
        return [n["message"] for n in self.data.get("notes_of_stage", [])]


@dataclass
class JobView:
    """What clients see of the job: the list of stages, and how far it is."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    planned: float = 1.0
    done: float = 0.0

    def progress(self, fraction: float = 0.0, weight: float = 0.0) -> float:
        return round(min((self.done + fraction * weight) / max(self.planned, 1e-9), 0.99), 4)


class StageRunner:
    """Runs the stage calls of one claimed job."""

    def __init__(
        self,
        *,
        claim: Claim,
        ledger: JobLedger,
        isolated: IsolatedRunner,
        workspace: Workspace,
        hardware: Mapping[str, Any],
        fingerprint: str,
        limits: Limits,
        should_stop: Callable[[], bool],
    ) -> None:
        self.claim = claim
        self.ledger = ledger
        self.isolated = isolated
        self.workspace = workspace
        self.hardware = hardware
        self.fingerprint = fingerprint
        self.limits = limits
        self.should_stop = should_stop
        self.view = JobView()
        self.calls: list[Outcome] = []

    def run(
        self,
        stage: str,
        inputs: Mapping[str, ArtifactRef],
        options: Mapping[str, Any],
        *,
        candidate: str | None = None,
        weight: float = 1.0,
        seconds: float | None = None,
    ) -> Outcome:
        """One stage call; `weight` is its share of the job's progress. Raises StageFailure, Interrupted, LeaseLost."""
        stage_type = kernel.stages()[stage]
        full: BaseModel = stage_type.Options.model_validate(dict(options))
        options = full.model_dump(mode="json")
        key = stage_key(
            stage=stage,
            version=stage_type.version,
            inputs=inputs,
            options=options,
            libraries=library_versions(stage_type.libraries),
            hardware=self.fingerprint if stage_type.hardware_bound else None,
        )
        entry: dict[str, Any] = {
            "name": stage,
            "candidate": candidate,
            "status": "running",
            "cached": False,
            "key": key,
            "started_at": _now(),
            "finished_at": None,
            "seconds": None,
            "detail": None,
        }
        self.view.stages.append(entry)
        try:
            outcome = self._recall(stage, key, inputs, options)
            if outcome is None:
                self._publish(entry, weight)
                outcome = self._execute(stage_type, key, inputs, options, entry, weight, seconds)
        except StageFailure as failure:
            entry.update(status="failed", finished_at=_now(), detail=failure.detail)
            self.view.done += weight
            self._publish(entry, 0)
            raise
        entry.update(status="succeeded", cached=outcome.cached, finished_at=_now(), seconds=round(outcome.seconds, 3))
        self.view.done += weight
        self._publish(entry, 0)
        self.calls.append(outcome)
        return outcome

    def _recall(
        self, stage: str, key: str, inputs: Mapping[str, ArtifactRef], options: dict[str, Any]
    ) -> Outcome | None:
        row = self.ledger.recall(self.claim.tenant_id, key)
        if row is None:
            return None
        if row.failure is not None:
            raise StageFailure.from_json(row.failure)
        outputs = {name: ArtifactRef.from_json(files) for name, files in row.outputs.items()}
        return Outcome(stage, key, dict(inputs), options, outputs, row.data, cached=True, seconds=0.0)

    def _execute(
        self,
        stage_type: type[kernel.Stage[Any]],
        key: str,
        inputs: Mapping[str, ArtifactRef],
        options: dict[str, Any],
        entry: dict[str, Any],
        weight: float,
        seconds: float | None,
    ) -> Outcome:
        for attempt in range(1, _TRIES + 1):
            try:
                outcome, outputs = self._attempt(stage_type, inputs, options, entry, weight, seconds)
                break
            except StageFailure as failure:
                if failure.kind is FailureKind.INFRASTRUCTURE and attempt < _TRIES and failure.code != "storage_full":
                    log.warning("stage_tried_again", stage=stage_type.name, attempt=attempt, reason=str(failure))
                    time.sleep(0.2 * attempt)
                    continue
                failure.reproduce = _reproduce(stage_type.name, inputs, options)
                if failure.cacheable and failure.kind is not FailureKind.INFRASTRUCTURE:
                    self._remember(stage_type.name, key, {}, {}, failure, 0.0)
                raise
        data = {**outcome.data, "notes_of_stage": outcome.notes}
        self._remember(stage_type.name, key, outputs, data, None, outcome.seconds)
        return Outcome(
            stage_type.name, key, dict(inputs), options, outputs, data, cached=False, seconds=outcome.seconds
        )

    def _attempt(
        self,
        stage_type: type[kernel.Stage[Any]],
        inputs: Mapping[str, ArtifactRef],
        options: dict[str, Any],
        entry: dict[str, Any],
        weight: float,
        seconds: float | None,
    ) -> tuple[StageOutcome, dict[str, ArtifactRef]]:
        try:
            folder = self.workspace.new_call(stage_type.name)
            request = StageRequest(
                stage=stage_type.name,
                options=options,
                inputs={name: str(self.workspace.fetch(ref)) for name, ref in inputs.items()},
                workspace=str(folder / "work"),
                outputs=str(folder / "out"),
                hardware=dict(self.hardware),
                limits=Limits(
                    min(self.limits.seconds, seconds or self.limits.seconds),
                    self.limits.memory_bytes,
                    self.limits.file_bytes,
                ),
            )
            lock = device_lock("cpu", self.should_stop) if stage_type.exclusive_device else nullcontext()
            with lock:
                outcome = self.isolated.run(
                    request, on_progress=self._progress(entry, weight), should_stop=self.should_stop
                )
            outputs = {name: self.workspace.store(folder / "out" / name) for name in outcome.outputs}
            shutil.rmtree(folder, ignore_errors=True)
            return outcome, outputs
        except AppError as error:
            raise infrastructure_failure(
                error.code, error.detail, stage=stage_type.name, remedy=error.remedy
            ) from error
        except BlobNotFound as error:
            raise infrastructure_failure(
                "blob_missing", f"A stored file is gone ({error}).", stage=stage_type.name, remedy="Upload it again."
            ) from error
        except OSError as error:
            code = "storage_full" if error.errno in (27, 28, 122) else "io_error"
            raise infrastructure_failure(code, str(error.strerror), stage=stage_type.name) from error

    def _remember(
        self,
        stage: str,
        key: str,
        outputs: Mapping[str, ArtifactRef],
        data: dict[str, Any],
        failure: StageFailure | None,
        seconds: float,
    ) -> None:
        row = StageRow(
            tenant_id=self.claim.tenant_id,
            key=key,
            stage=stage,
            outputs={name: ref.to_json() for name, ref in outputs.items()},
            data=data,
            failure=failure.to_json() if failure else None,
            seconds=seconds,
            created_at=utcnow(),
            used_at=utcnow(),
        )
        self.ledger.remember(self.claim, row)

    def _progress(self, entry: dict[str, Any], weight: float) -> Callable[[float, str], None]:
        last = time.monotonic()

        def on_progress(fraction: float, message: str) -> None:
            nonlocal last
            if time.monotonic() - last >= _PROGRESS_EVERY_S:
                last = time.monotonic()
                self._publish(entry, weight, fraction, message)

        return on_progress

    def _publish(self, entry: dict[str, Any], weight: float, fraction: float = 0.0, message: str = "") -> None:
        progress = self.view.progress(fraction, weight)
        changes = {"stage": entry["name"], "progress": progress, "stages": [dict(s) for s in self.view.stages]}
        event = {
            "stage": entry["name"],
            "candidate": entry["candidate"],
            "status": entry["status"],
            "cached": entry["cached"],
            "progress": progress,
            "seconds": entry["seconds"],
            "message": message or entry["detail"] or "",
        }
        self.ledger.progress(self.claim, changes, "progress" if message or fraction else "stage", event)


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of distributions; one that is missing is left out (its stage then fails by itself)."""
    versions = {}
    for name in names:
        for distribution in (name, f"{name}-gpu"):
            try:
                versions[distribution] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions


def _reproduce(stage: str, inputs: Mapping[str, ArtifactRef], options: Mapping[str, Any]) -> str:
    """What is needed to run the failed call by hand; stays with the stored failure, clients do not see it."""
    digests = {name: [f"{f.name}={f.sha256}" for f in ref.files] for name, ref in inputs.items()}
    request = canonical_json({"stage": stage, "inputs": digests, "options": dict(options)}).decode()
    return f"python -m workers.pipeline.child REQUEST.json   # {request}"


def _now() -> str:
    return utcnow().isoformat().replace("+00:00", "Z")
