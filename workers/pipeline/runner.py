"""Runs stage calls: key → stored result? → child process → storage → row → event. The one place where a stage meets the
database, so the stages need not know it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel

from app.db.base import utcnow
from app.db.orm import StageResult as StageRow
from app.domain.artifact_key import ArtifactRef, digest_of, stage_key
from app.domain.failures import FailureKind, StageFailure
from app.errors import AppError
from app.jobs.holds import Hold
from app.jobs.ledger import JobLedger
from app.storage.base import BlobNotFound
from workers import kernel
from workers.installation import Installation
from workers.pipeline import keys
from workers.pipeline.answers import plain_files
from workers.pipeline.faults import infrastructure_faults
from workers.pipeline.folders import remove_tree
from workers.pipeline.isolated import IsolatedRunner, StageOutcome
from workers.pipeline.machine import MACHINE_BUSY, MachineLock
from workers.pipeline.progress import JobProgress
from workers.pipeline.protocol import Limits, StageRequest
from workers.pipeline.shared_caches import SharedCaches
from workers.pipeline.stage_calls import Outcome, StageCall, backend_of, begun, check_kind, now
from workers.pipeline.workspace import Workspace
from workers.telemetry.watch import NOBODY, StageSeen, Watch

log = structlog.get_logger(__name__)

_TRIES = 3  # of one stage call, when its process is lost or storage is away
_AT_ONCE_IN_VAIN = frozenset({"storage_full", "blob_corrupted", MACHINE_BUSY})
_PROGRESS_EVERY_S = 0.5
_PROGRESS_OF_MEASURING_S = 2.0  # telling of it takes the worker, the database and the API some time on the same cores
_HOLDERS_GRACE_S = 60.0  # a stage call that holds the machine ends within its limit, about
_LEAST_S = 1.0  # that a stage call has for itself, however long it waited for the machine


@dataclass
class JobView:
    """What clients see of the job: the list of stages, and how far it is."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    progress: JobProgress = field(default_factory=JobProgress)


class StageRunner:
    """Runs the stage calls of one job that this worker holds."""

    def __init__(
        self,
        *,
        claim: Hold,
        ledger: JobLedger,
        isolated: IsolatedRunner,
        workspace: Workspace,
        hardware: Mapping[str, Any],
        fingerprint: str,
        limits: Limits,
        lock_dir: Path,
        should_stop: Callable[[], bool],
        installation: Installation | None = None,
        shared_caches: SharedCaches | None = None,
        measure_again: bool = False,
        watch: Watch = NOBODY,
        elsewhere: Callable[[str, float], bool] = lambda _key, _seconds: False,
    ) -> None:
        """`measure_again`: measurements of other jobs are not taken; this job's own are, after a crash. `watch`: is
        told of every call. `elsewhere`: before a stage is computed, waits while another worker computes it for this
        job, so many seconds at most; whether one did."""
        self.claim = claim
        self.ledger = ledger
        self.isolated = isolated
        self.workspace = workspace
        self.hardware = hardware
        self.fingerprint = fingerprint
        self.limits = limits
        self.machine = MachineLock(lock_dir, limits.seconds + _HOLDERS_GRACE_S)
        self.should_stop = should_stop
        self.installation = installation or Installation()
        self.shared_caches = shared_caches
        self.measure_again = measure_again
        self.watch = watch
        self.elsewhere = elsewhere
        self._began = utcnow()
        self.view = JobView()
        self.calls: list[Outcome] = []

    def run(
        self,
        stage: str,
        inputs: Mapping[str, ArtifactRef],
        options: Mapping[str, Any],
        *,
        candidate: str | None = None,
        weight: float | None = None,
        seconds: float | None = None,
        soft_seconds: float | None = None,
    ) -> Outcome:
        """One stage call; `weight` is its share of the job's progress, where that is not the stage's usual one. It is
        ended after `seconds`, and asked to end by itself after `soft_seconds`. Raises StageFailure, Interrupted,
        LeaseLost."""
        call = self._call(stage, inputs, options, candidate, weight, seconds, soft_seconds)
        self.view.stages.append(call.entry)
        with self.watch.stage(call.seen):
            return self._run(call)

    def _run(self, call: StageCall) -> Outcome:
        try:
            with infrastructure_faults(call.stage_type.name):
                outcome = self._recall(call)
                if outcome is None and self.elsewhere(call.key, call.allowed):
                    outcome = self._recall(call)
            if outcome is None:
                self._publish(call)
                outcome = self._execute(call)
        except StageFailure as failure:
            call.entry.update(status="failed", finished_at=now(), detail=failure.detail)
            self.view.progress.done(call.weight)
            self._publish(call)
            raise
        seconds = round(outcome.seconds, 3)
        call.seen.seconds = outcome.seconds
        call.entry.update(status="succeeded", cached=outcome.cached, finished_at=now(), seconds=seconds)
        self.view.progress.done(call.weight)
        self._publish(call)
        self.calls.append(outcome)
        return outcome

    def _call(
        self,
        stage: str,
        inputs: Mapping[str, ArtifactRef],
        options: Mapping[str, Any],
        candidate: str | None,
        weight: float | None,
        seconds: float | None,
        soft_seconds: float | None,
    ) -> StageCall:
        stage_type = kernel.stages()[stage]
        weight = stage_type.weight if weight is None else weight
        full: BaseModel = stage_type.Options.model_validate(dict(options))
        complete = full.model_dump(mode="json")
        check_kind(stage_type, inputs, complete)
        libraries = keys.libraries(stage_type, complete)
        key = stage_key(
            stage=stage,
            version=stage_type.version,
            inputs=inputs,
            options=complete,
            libraries=keys.in_key(stage_type, libraries),
            hardware=self._hardware(stage_type, complete),
        )
        limit = min(self.limits.seconds, seconds or self.limits.seconds)
        entry, seen = begun(stage, candidate, key), StageSeen(stage, backend_of(complete), candidate)
        return StageCall(stage_type, key, dict(inputs), complete, libraries, entry, weight, limit, soft_seconds, seen)

    def _hardware(self, stage_type: type[kernel.Stage[Any]], options: Mapping[str, Any]) -> str | None:
        if not stage_type.hardware_bound:
            return None
        return keys.hardware(stage_type, options, self.hardware, self.fingerprint, self.installation.key_id)

    def _recall(self, call: StageCall) -> Outcome | None:
        tenant_id = self.claim.tenant_id
        row = None if self._anew(call) else self.ledger.recall(tenant_id, call.key)
        row = row or self._recall_partial(call)
        if row is None:
            return None
        call.seen.cached = True
        if row.failure is not None:
            raise StageFailure.from_json(row.failure)
        outputs = {name: ArtifactRef.from_json(files) for name, files in row.outputs.items()}
        maker, seconds = (row.data.get("made") or {}).get("worker"), 0.0
        if maker not in (None, self.claim.owner) and row.created_at >= self._began:
            # For this job, or for another one at the same time: what it took tells what the next one will take.
            call.entry["detail"], seconds = f"made by {maker}", row.seconds
        return call.outcome(outputs, row.data, cached=True, seconds=seconds)

    def _recall_partial(self, call: StageCall) -> StageRow | None:
        """What this job had to cut short, unless there is more time now: then it is worth doing again."""
        row = self.ledger.recall(self.claim.tenant_id, self._own_key(call.key))
        had = (row.data.get("made") or {}).get("within_seconds") if row else None
        return None if had is not None and call.allowed > had else row

    def _own_key(self, key: str) -> str:
        """The key of a result that only this job may take up again."""
        return digest_of([key, self.claim.job_id])

    def _anew(self, call: StageCall) -> bool:
        """Whether only this job's own result counts."""
        return self.measure_again and call.stage_type.exclusive_device

    def _execute(self, call: StageCall) -> Outcome:
        for attempt in range(1, _TRIES + 1):
            call.seen.tries = attempt
            try:
                with infrastructure_faults(call.stage_type.name):
                    result, outputs = self._attempt(call)
                break
            except StageFailure as failure:
                again = failure.kind is FailureKind.INFRASTRUCTURE and failure.code not in _AT_ONCE_IN_VAIN
                if again and attempt < _TRIES:
                    log.warning("stage_tried_again", stage=call.stage_type.name, attempt=attempt, reason=str(failure))
                    time.sleep(0.2 * attempt)
                    continue
                failure.reproduce = call.reproduce
                if call.lasting(failure):
                    self._remember(call, call.key, {}, {}, failure, 0.0)
                raise
        data = {**result.data, "notes_of_stage": result.notes, "made": self._made(call)}
        own = self._anew(call) or not result.reusable
        under = [*([self._own_key(call.key)] if own else []), *([call.key] if result.reusable else [])]
        if not result.reusable:
            data["made"]["within_seconds"] = call.allowed
        with infrastructure_faults(call.stage_type.name):
            for key in under:
                self._remember(call, key, outputs, data, None, result.seconds)
        return call.outcome(outputs, data, cached=False, seconds=result.seconds)

    def _made(self, call: StageCall) -> dict[str, Any]:
        """When and by whom; and on which machine, where that has a part in the result."""
        machine = {"hardware": dict(self.hardware)} if call.stage_type.hardware_bound else {}
        return {"at": now(), "worker": self.claim.owner, **machine}

    def _attempt(self, call: StageCall) -> tuple[StageOutcome, dict[str, ArtifactRef]]:
        stage = call.stage_type.name
        folder = self.workspace.new_call(stage)
        request = StageRequest(
            stage=stage,
            options=call.options,
            inputs=self._fetch(call.inputs),
            workspace=str(folder / "work"),
            outputs=str(folder / "out"),
            hardware=dict(self.hardware),
            limits=self._limits_of(call, 0.0),
            installation=self.installation.to_json(),
            kinds={name: ref.kind for name, ref in call.inputs.items() if ref.kind is not None},
        )
        sharing = call.stage_type.makes_engine and any(b.shares_cache for b in keys.backends(call.options))
        builds = self.shared_caches if sharing else None
        if builds is not None:
            builds.pull()
        place = call.place(self.hardware)
        with (
            self.machine.hold(place, self.should_stop, lambda: self._tell_waiting(call)) as waited,
            self.watch.held(alone=place.alone or place.gpu is not None),
        ):
            if waited:
                call.seen.waited += waited
                call.entry.update(detail=None, waited_seconds=round(waited, 3))
                request = replace(request, limits=self._limits_of(call, waited))
            result = self.isolated.run(request, on_progress=self._progress(call), should_stop=self.should_stop)
        if builds is not None:
            builds.push()
        most = request.limits.file_bytes
        files = {name: plain_files(folder / "out", name, most, stage) for name in dict.fromkeys(result.outputs)}
        outputs = {name: self.workspace.store(paths) for name, paths in files.items()}
        remove_tree(folder)
        return result, outputs

    def _fetch(self, inputs: Mapping[str, ArtifactRef]) -> dict[str, str]:
        """Their folders. Whatever is damaged among them is discarded first: the job's next try makes it anew, unless
        it was uploaded."""
        folders: dict[str, str] = {}
        discarded: Exception | None = None
        for name, ref in inputs.items():
            try:
                folders[name] = str(self.workspace.fetch(ref))
            except AppError as error:
                if error.code != "blob_corrupted":
                    raise
                sha256 = error.extra["sha256"]
                if not self.ledger.discard(self.claim.tenant_id, sha256):
                    raise
                discarded = BlobNotFound(f"{sha256}: damaged, and removed")
        if discarded is not None:
            raise discarded
        return folders

    def _limits_of(self, call: StageCall, waited: float) -> Limits:
        """Waiting for the machine is time of the job's budget: it goes off what the call may take before it stops by
        itself."""
        soft, hard = call.soft_seconds, call.seconds
        if soft is not None and waited:
            left = max(soft - waited, min(soft, _LEAST_S))
            soft, hard = left, hard - (soft - left)
        return Limits(hard, self.limits.memory_bytes, self.limits.file_bytes, soft)

    def _tell_waiting(self, call: StageCall) -> None:
        self.watch.waiting()
        call.entry["detail"] = "waiting for the machine"
        self._publish(call, message="waiting for the machine")

    def _remember(
        self,
        call: StageCall,
        key: str,
        outputs: Mapping[str, ArtifactRef],
        data: dict[str, Any],
        failure: StageFailure | None,
        seconds: float,
    ) -> None:
        row = StageRow(
            tenant_id=self.claim.tenant_id,
            key=key,
            stage=call.stage_type.name,
            outputs={name: ref.to_json() for name, ref in outputs.items()},
            data=data,
            failure=failure.to_json() if failure else None,
            seconds=seconds,
            created_at=utcnow(),
            used_at=utcnow(),
        )
        self.ledger.remember(self.claim, row)

    def tell(self, event_type: str, event: dict[str, Any]) -> None:
        """Leave an event for who watches the job."""
        self.ledger.progress(self.claim, {}, event_type, event)

    def _progress(self, call: StageCall) -> Callable[[float, str], None]:
        last = time.monotonic()
        every = _PROGRESS_OF_MEASURING_S if call.stage_type.exclusive_device else _PROGRESS_EVERY_S

        def on_progress(fraction: float, message: str) -> None:
            nonlocal last
            if time.monotonic() - last >= every:
                last = time.monotonic()
                self._publish(call, fraction, message)

        return on_progress

    def _publish(self, call: StageCall, fraction: float = 0.0, message: str = "") -> None:
        entry = call.entry
        progress = self.view.progress.at(fraction, call.weight)
        expected_end = self.view.progress.expected_end()
        changes = {
            "stage": entry["name"],
            "progress": progress,
            "expected_end": expected_end,
            "stages": [dict(s) for s in self.view.stages],
        }
        event = {
            "stage": entry["name"],
            "candidate": entry["candidate"],
            "status": entry["status"],
            "cached": entry["cached"],
            "progress": progress,
            "expected_end": expected_end.isoformat().replace("+00:00", "Z") if expected_end else None,
            "seconds": entry["seconds"],
            "message": message or entry["detail"] or "",
        }
        self.ledger.progress(self.claim, changes, "progress" if message or fraction else "stage", event)
