"""What a stage call may reach: its request's folders, its device, and what every stage reads."""

from __future__ import annotations

from pathlib import Path

import structlog

from app.domain.failures import StageFailure, infrastructure_failure
from app.sandbox.confine import confine
from app.sandbox.features import NOTHING, Features
from app.sandbox.moving import by_copies
from app.sandbox.policy import PLAIN_DEVICES, Grounds, Host, Policy
from app.settings import Settings
from workers import devices, kernel
from workers.pipeline import keys
from workers.pipeline.protocol import StageRequest

# Triton's Python backend makes an empty folder there, whatever TMPDIR says, and ends where it cannot.
_TRITON_FOLDERS = ("/tmp",)  # noqa: S108

log = structlog.get_logger(__name__)


class Unconfined(Exception):
    """WORKER_SANDBOX=required, and this machine has not what it takes; the message says what."""


def host_of(settings: Settings) -> Host:
    """How this installation confines its models."""
    worker = settings.worker
    triton = [] if worker.tritonserver is None else [worker.tritonserver.resolve().parent]
    read = [*worker.sandbox_read, *(f.parent if f.name == "bin" else f for f in triton)]
    return Host(worker.sandbox, tuple(map(str, read)), tuple(map(str, settings.hidden)))


def check_features(features: Features, mode: str) -> None:
    """Say what is open. Raises `Unconfined` where more was asked for."""
    if mode == "required" and not features.enough:
        raise Unconfined("; ".join(features.missing()))
    if missing := features.to_json(mode)["missing"]:
        log.warning("sandbox_incomplete", missing=missing)


def confine_call(request: StageRequest, grounds: Grounds, features: Features) -> int | None:
    """Confine this process to the call; the answer of `app.sandbox.confine.confine`. Raises StageFailure
    (`sandbox_failed`)."""
    if features == NOTHING:
        return None
    try:
        counter = confine(policy_of(request), grounds, features)
    except OSError as error:
        raise sandbox_failed(request.stage, str(error)) from error
    by_copies()
    return counter


def policy_of(request: StageRequest) -> Policy:
    """Makes the folders that the call writes to, where they are not there."""
    stage_type = kernel.stages().get(request.stage)
    cache = str(request.installation.get("cache_dir") or "")
    backends = keys.backends(request.options)
    cached = bool(cache) and any(backend.uses_cache for backend in backends)
    tmp = str(Path(request.workspace) / "tmp") if any(backend.uses_tmp for backend in backends) else ""
    for folder in (request.outputs, *([cache] if cached else []), *([tmp] if tmp else [])):
        Path(folder).mkdir(parents=True, exist_ok=True)
    used = [f for a in devices.ACCELERATORS for f in a.device_files(request.hardware)]
    return Policy(
        inputs=tuple(dict.fromkeys(request.inputs.values())),
        own=(request.workspace, request.outputs),
        shared=(cache,) if cached else (),
        folders=_TRITON_FOLDERS if request.options.get("tritonserver") else (),
        devices=(*PLAIN_DEVICES, *used),
        packets=bool(used),
        tmp=tmp,
        names_threads=bool(used),
        counted=True,
        loopback=stage_type is not None and stage_type.loopback,
        shared_memory_bytes=request.limits.memory_bytes,
    )


def sandbox_failed(stage: str, why: str) -> StageFailure:
    return infrastructure_failure(
        "sandbox_failed",
        f"The process of the {stage} stage could not be confined: {why}.",
        stage=stage,
        remedy="Ask the operator to look at `python -m app.sandbox` on the worker's machine.",
    )
