"""A stage call as the runner keeps it: what it is keyed by, where it runs, what comes of it. Values; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.db.base import utcnow
from app.domain.artifact_key import ArtifactRef, canonical_json
from app.domain.failures import FailureKind, StageFailure
from workers import devices, kernel
from workers.pipeline import keys
from workers.pipeline.machine import Place
from workers.telemetry.watch import StageSeen

_CRASHES = frozenset({"runtime_crashed", "engine_crashed"})


@dataclass(frozen=True)
class Outcome:
    """The result of one stage call."""

    stage: str
    key: str
    inputs: dict[str, ArtifactRef]
    options: dict[str, Any]
    outputs: dict[str, ArtifactRef]
    data: dict[str, Any]
    libraries: dict[str, str]
    cached: bool
    seconds: float  # the stage's own work; 0 where it was there before the job's attempt

    def of_kind(self, *kinds: str) -> ArtifactRef:
        """The output that is of the first of these kinds that there is. Raises StageFailure (`wrong_artifact`)."""
        found = {ref.kind: ref for ref in self.outputs.values() if ref.kind is not None}
        kind = next((kind for kind in kinds if kind in found), None)
        if kind is None:
            raise _wrong_artifact(kinds, [*found])
        return found[kind]

    @property
    def made(self) -> dict[str, Any]:
        """{at, worker, [hardware]}: of the run that made this result, which may be an earlier job's."""
        return dict(self.data.get("made") or {})

    @property
    def notes(self) -> list[str]:
        return [n["message"] for n in self.data.get("notes_of_stage", [])]


@dataclass(frozen=True)
class StageCall:
    """`options`: complete; `entry`: what clients see of it; `weight`: its share of the job's progress; `seconds`,
    `soft_seconds`: after which it is ended, and asked to end by itself."""

    stage_type: type[kernel.Stage[Any]]
    key: str
    inputs: dict[str, ArtifactRef]
    options: dict[str, Any]
    libraries: dict[str, str]
    entry: dict[str, Any]
    weight: float
    seconds: float
    soft_seconds: float | None
    seen: StageSeen

    @property
    def allowed(self) -> float:
        """Seconds after which it has to come to an end by itself, at the latest."""
        return self.seconds if self.soft_seconds is None else min(self.soft_seconds, self.seconds)

    def outcome(
        self, outputs: dict[str, ArtifactRef], data: dict[str, Any], *, cached: bool, seconds: float
    ) -> Outcome:
        kinds = self.stage_type.kinds(self.options)
        typed = {name: replace(ref, kind=kinds.get(name)) for name, ref in outputs.items()}
        return Outcome(
            self.stage_type.name, self.key, self.inputs, self.options, typed, data, self.libraries, cached, seconds
        )

    def place(self, hardware: Mapping[str, Any]) -> Place:
        """What measures on the machine's own processor has the machine for itself. What measures on a device with a
        lock of its own has that, and shares the rest with the other devices' workers; builds measure there, too:
        TensorRT times its tactics."""
        stage, used = self.stage_type, {devices.named(b.device) for b in keys.backends(self.options)}
        if keys.target(stage, self.options):
            return Place(alone=False)  # the device is not touched
        locks = {accelerator: accelerator.lock(hardware) for accelerator in used}
        apart = next((lock for lock in locks.values() if lock is not None), None)
        if apart is None:
            return Place(alone=stage.exclusive_device)
        measures = stage.exclusive_device or stage.hardware_bound
        alone = stage.exclusive_device and None in locks.values()
        return Place(alone, gpu=apart if measures else None)

    def lasting(self, failure: StageFailure) -> bool:
        """Whether it is kept under the call's key. A crash of native code (an instruction that this CPU has not, say)
        is a fact of this machine: only a key that holds the machine may say so."""
        holds_machine = self.stage_type.hardware_bound and not keys.target(self.stage_type, self.options)
        of_this_machine = failure.code in _CRASHES and not holds_machine
        return failure.cacheable and failure.kind is not FailureKind.INFRASTRUCTURE and not of_this_machine

    @property
    def reproduce(self) -> str:
        """What is needed to run the call by hand, should it fail; stays with the stored failure, clients do not see
        it."""
        digests = {name: [f"{f.name}={f.sha256}" for f in ref.files] for name, ref in self.inputs.items()}
        request = {"stage": self.stage_type.name, "inputs": digests, "options": self.options}
        return f"python -m workers.pipeline.child REQUEST.json   # {canonical_json(request).decode()}"


def begun(stage: str, candidate: str | None, key: str) -> dict[str, Any]:
    """The `entry` of a call that begins now."""
    return {
        "name": stage,
        "candidate": candidate,
        "status": "running",
        "cached": False,
        "key": key,
        "started_at": now(),
        "finished_at": None,
        "seconds": None,
        "detail": None,
    }


def check_kind(
    stage_type: type[kernel.Stage[Any]], inputs: Mapping[str, ArtifactRef], options: Mapping[str, Any]
) -> None:
    """Who wires steps together has seen to it that they fit; here it ends, where a plug-in did not."""
    accepted, given = stage_type.accepts(options), inputs.get("model")
    if given is not None and given.kind is not None and given.kind not in accepted:
        raise _wrong_artifact(accepted, [given.kind], stage_type.name)


def backend_of(options: Mapping[str, Any]) -> str:
    """Whose engine a call is about; "" for none, `several` where it compares."""
    if isinstance(named := options.get("backend"), str):
        return named
    used = [b.name for b in keys.backends(options)]
    return used[0] if len(used) == 1 else "several" if used else ""


def now() -> str:
    return utcnow().isoformat().replace("+00:00", "Z")


def _wrong_artifact(wanted: Sequence[str], there: Sequence[str], stage: str | None = None) -> StageFailure:
    return StageFailure(
        "wrong_artifact",
        f"It takes {' or '.join(wanted)}, and there is {', '.join(there) or 'nothing'}.",
        FailureKind.MODEL,
        stage,
        remedy="Report this to whoever maintains the backend that proposed it.",
    )
