"""Inside the child process: limits, then the stage, then `result.json`. Never raises to its caller.

Run by the zygote's fork. By hand, to reproduce a failure: `python -m workers.pipeline.child REQUEST.json`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.domain.failures import FailureKind, StageFailure
from app.errors import AppError
from workers import installation, kernel
from workers.pipeline.protocol import RESULT_FILE, Limits, StageRequest

_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
# Address space that is reserved but not used (thread stacks, allocator arenas) counts against RLIMIT_DATA; the worker
# watches the memory really used. This limit only stops what grows faster than the watch looks.
_DATA_SLACK = 2 << 30
# Likewise of processes and threads, which the worker counts: what stops a fork bomb between two looks. Not root's.
_TASKS = 16_384


def name_process(name: str) -> None:
    """What `ps` and `top` call this process: at most 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, not of the machine's first one."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children_of(pid: int) -> list[int]:
    """The direct children of a process; none where it is gone."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []
    found: list[int] = []
    for task in tasks:
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


def tasks_of_user() -> int:
    """Processes and threads of this user on this machine."""
    user, found = os.geteuid(), 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == user:
                found += len([*(process / "task").iterdir()])
    return found


def apply_limits(limits: Limits, tasks: int = 0) -> None:
    """`tasks`: that this user has beside those of the call, of which the kernel counts the sum."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    data = limits.memory_bytes + _DATA_SLACK
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    cpu = math.ceil(limits.seconds * (os.cpu_count() or 1)) + 60
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    most = tasks + _TASKS
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too large a file is then an OSError with EFBIG


class PipeReporter(kernel.Reporter):
    """Writes progress as JSON lines; drops a line rather than wait for a slow reader."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._last = 0.0
        self.notes: list[dict[str, Any]] = []
        if fd is not None:
            os.set_blocking(fd, False)

    def progress(self, fraction: float, message: str = "") -> None:
        now = time.monotonic()
        if now - self._last < 0.1 and fraction < 1:
            return
        self._last = now
        self._send({"progress": round(min(max(float(fraction), 0.0), 1.0), 4), "message": message[:200]})

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append({"message": message[:1000], **facts})

    def _send(self, value: dict[str, Any]) -> None:
        if self._fd is not None:
            try:
                os.write(self._fd, json.dumps(value).encode() + b"\n")
            except (BlockingIOError, BrokenPipeError):
                return


def run_request(request: StageRequest, progress_fd: int | None) -> dict[str, Any]:
    """Run the stage; the JSON that becomes `result.json`: outputs, data, notes and seconds, or a failure."""
    reporter = PipeReporter(progress_fd)
    if request.installation:
        installation.use(installation.Installation.from_json(request.installation))
    started = time.perf_counter()
    try:
        result = _run(request, reporter)
        json.dumps(result.data, allow_nan=False)
        body: dict[str, Any] = {
            "outputs": list(result.outputs),
            "data": dict(result.data),
            "reusable": result.reusable,
        }
    except StageFailure as failure:
        failure.stage = failure.stage or request.stage
        body = {"failure": failure.to_json()}
    except BaseException as error:  # whatever a library raises on an untrusted model ends as a typed failure
        traceback.print_exc()
        body = {"failure": _translate(error, request.stage).to_json()}
    return {**body, "notes": reporter.notes, "seconds": time.perf_counter() - started}


def failed(failure: StageFailure) -> dict[str, Any]:
    """The result of a call that did not come to run."""
    return {"failure": failure.to_json(), "notes": [], "seconds": 0.0}


def _run(request: StageRequest, reporter: kernel.Reporter) -> kernel.StageResult:
    stage_type = kernel.stages()[request.stage]
    context = kernel.StageContext(
        inputs={name: Path(path) for name, path in request.inputs.items()},
        workspace=Path(request.workspace),
        outputs=Path(request.outputs),
        reporter=reporter,
        hardware=request.hardware,
        soft_deadline=time.monotonic() + soft if (soft := request.limits.soft_seconds) is not None else None,
        kinds=request.kinds,
    )
    return stage_type().run(context, stage_type.Options.model_validate(request.options))


def _translate(error: BaseException, stage: str) -> StageFailure:
    if isinstance(error, AppError):
        where = {"node": error.node, "tensor": error.tensor, "remedy": error.remedy}
        kind = FailureKind.INFRASTRUCTURE if error.retryable else FailureKind.MODEL
        return StageFailure(error.code, error.detail, kind, stage, cacheable=not error.retryable, **where)
    text = str(error)
    if isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate memory" in text:
        return out_of_memory(stage)
    if isinstance(error, OSError) and error.errno is not None:
        detail = f"{os.strerror(error.errno)} while the stage wrote its files."
        remedy = "Free disk space on the worker, or raise WORKER_STAGE_DISK_MB."
        return StageFailure(
            "storage_full" if error.errno in (27, 28, 122) else "io_error",
            detail,
            FailureKind.INFRASTRUCTURE,
            stage,
            remedy=remedy,
            cacheable=False,
        )
    if isinstance(error, ValidationError):
        return StageFailure("invalid_options", text[:500], FailureKind.REQUEST, stage)
    return StageFailure(
        "internal",
        f"The {stage} stage failed on this model: {type(error).__name__}: {text[:500]}",
        FailureKind.MODEL,
        stage,
        remedy="Report this with the job's id: the worker's log holds the trace.",
        cacheable=False,
    )


def out_of_memory(stage: str, limit_bytes: int | None = None) -> StageFailure:
    limit = f" of {limit_bytes >> 20} MiB" if limit_bytes else ""
    return StageFailure(
        "out_of_memory",
        f"The {stage} stage needed more memory than the limit{limit}.",
        FailureKind.MODEL,
        stage,
        remedy="Use a smaller model or batch size, or a worker with a higher WORKER_STAGE_MEMORY_MB.",
        cacheable=False,
    )


def write_result(workspace: str, result: dict[str, Any]) -> None:
    """Whole or not at all: the worker takes a missing file for a crash."""
    path = Path(workspace) / RESULT_FILE
    temp = path.with_suffix(".tmp")
    temp.write_text(json.dumps(result))
    temp.rename(path)


if __name__ == "__main__":
    _request = StageRequest.decode(Path(sys.argv[1]).read_bytes())
    for _folder in (_request.workspace, _request.outputs):
        Path(_folder).mkdir(parents=True, exist_ok=True)
    apply_limits(_request.limits)
    sys.stdout.write(json.dumps(run_request(_request, None), indent=2) + "\n")
