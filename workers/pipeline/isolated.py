"""The worker's side of child processes: runs one stage call under limits, and turns every way a child can end into an
outputs-and-data result or a typed failure. Whatever happens in there, the worker lives."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from app.domain.failures import FailureKind, StageFailure, infrastructure_failure
from app.settings import child_environment
from workers.pipeline.child import out_of_memory
from workers.pipeline.protocol import LOG_FILE, MAX_DATAGRAM, REQUEST_FILE, RESULT_FILE, ChildEnd, Limits, StageRequest
from workers.pipeline.zygote import SOCKET_FD

log = structlog.get_logger(__name__)

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LOOK_S = 0.05
_START_S = 60.0


class Interrupted(Exception):
    """The stage was stopped from outside: cancelled, lease lost, or the worker shuts down."""


@dataclass(frozen=True)
class StageOutcome:
    """What a stage call gave: output names, data, notes, and the seconds that it worked."""

    outputs: list[str]
    data: dict[str, Any]
    notes: list[dict[str, Any]]
    seconds: float
    reusable: bool = True


@dataclass
class _Watch:
    """One running child as the worker sees it."""

    request: StageRequest
    pid: int = 0
    stopped: StageFailure | None = None
    peak_bytes: int = 0
    buffer: bytes = b""
    deadline: float = field(default_factory=time.monotonic)

    def kill(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class IsolatedRunner:
    """Runs stage calls in children of a zygote process, one at a time. Start it in the thread that outlives it."""

    def __init__(self, extra_modules: Sequence[str] = ()) -> None:
        """`extra_modules` are imported beside `workers.stages`: where further stages register themselves."""
        self._extra = tuple(extra_modules)
        self._lock = threading.Lock()
        self._zygote: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(self) -> None:
        """Start the zygote ahead of the first call."""
        with self._lock:
            self._ensure()

    def close(self) -> None:
        with self._lock:
            self._stop()

    def run(
        self,
        request: StageRequest,
        *,
        on_progress: Callable[[float, str], None],
        should_stop: Callable[[], bool],
    ) -> StageOutcome:
        """Run one stage call to its end. Raises `StageFailure`, or `Interrupted` when `should_stop` says so; either way
        no process of the call is left."""
        with self._lock:
            try:
                return self._run(request, on_progress, should_stop)
            except OSError as error:
                self._stop()
                raise _lost(request.stage, f"the process that starts the stages was lost ({error})") from error

    def _run(
        self, request: StageRequest, on_progress: Callable[[float, str], None], should_stop: Callable[[], bool]
    ) -> StageOutcome:
        channel = self._ensure()
        read_fd, write_fd = os.pipe()
        watch = _Watch(request)
        try:
            try:
                # The request goes by file: a datagram holds some 200 kB, a model may have thousands of inputs.
                path = Path(request.workspace) / REQUEST_FILE
                path.touch(mode=0o600)  # it holds the key that engines are signed with
                path.write_bytes(request.encode())
                socket.send_fds(channel, [str(path).encode()], [write_fd])
            finally:
                os.close(write_fd)
            watch.pid = int(json.loads(self._receive(channel))["pid"])
            watch.deadline = time.monotonic() + request.limits.seconds
            end = self._wait(channel, read_fd, watch, on_progress, should_stop)
        finally:
            watch.kill()
            os.close(read_fd)
        return _outcome(watch, end)

    def _wait(
        self,
        channel: socket.socket,
        read_fd: int,
        watch: _Watch,
        on_progress: Callable[[float, str], None],
        should_stop: Callable[[], bool],
    ) -> ChildEnd:
        interrupted = False
        fds: list[Any] = [channel, read_fd]
        while True:
            ready, _, _ = select.select(fds, [], [], _LOOK_S)
            if read_fd in ready and not _read_progress(read_fd, watch, on_progress):
                fds.remove(read_fd)
            if channel in ready:
                end = ChildEnd(**json.loads(self._receive(channel)))
                watch.pid = 0  # reaped: the number may be somebody else's by now
                if interrupted:
                    raise Interrupted
                return end
            if not interrupted and should_stop():
                interrupted = True
                watch.kill()
            if watch.stopped is None and watch.pid:
                watch.stopped = _over_limit(watch)
                if watch.stopped is not None:
                    watch.kill()

    def _receive(self, channel: socket.socket) -> bytes:
        raw = channel.recv(MAX_DATAGRAM)
        if not raw:
            raise ConnectionResetError("closed")
        return raw

    def _ensure(self) -> socket.socket:
        if self._channel is not None and self._zygote is not None and self._zygote.poll() is None:
            return self._channel
        self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._zygote = _spawn(theirs.fileno(), self._extra)
        self._channel = ours
        ready, _, _ = select.select([ours], [], [], _START_S)
        if not ready or self._receive(ours) != b"ready":
            self._stop()
            raise TimeoutError("the process that starts the stages did not come up")
        return ours

    def _stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
            self._zygote = None


def _spawn(fd: int, extra: Sequence[str]) -> subprocess.Popen[bytes]:
    # A shell-free way to place the socket at a fixed number in the child, whatever its number is here.
    code = f"import os; os.dup2({fd}, {SOCKET_FD}); from workers.pipeline.zygote import serve; serve({extra!r})"
    root = str(Path(__file__).resolve().parents[2])
    env = {**child_environment(), "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, pass_fds=[fd], stdin=subprocess.DEVNULL, start_new_session=True
    )


def _read_progress(fd: int, watch: _Watch, on_progress: Callable[[float, str], None]) -> bool:
    """Pass on the newest progress; False at the end of the pipe."""
    raw = os.read(fd, 65536)
    if not raw:
        return False
    *lines, watch.buffer = (watch.buffer + raw).split(b"\n")
    for line in lines[-1:]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            value = json.loads(line)
            on_progress(float(value["progress"]), str(value["message"]))
    return True


def _over_limit(watch: _Watch) -> StageFailure | None:
    limits: Limits = watch.request.limits
    stage = watch.request.stage
    used = sum(_private_bytes(pid) for pid in _group(watch.pid))
    watch.peak_bytes = max(watch.peak_bytes, used)
    if used > limits.memory_bytes:
        return out_of_memory(stage, limits.memory_bytes)
    if time.monotonic() > watch.deadline:
        return StageFailure(
            "timed_out",
            f"The {stage} stage did not end within {limits.seconds:.0f} s.",
            FailureKind.MODEL,
            stage,
            remedy="Use a smaller model, or ask the operator to raise WORKER_STAGE_TIMEOUT_S.",
            cacheable=False,
        )
    return None


def _group(pgid: int) -> Iterator[int]:
    """The processes of a group: the stage's own, and what it has started (its descendants, by /proc)."""
    yield pgid
    todo = [pgid]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError, ValueError):
            children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            yield from children
            todo += children


def _private_bytes(pid: int) -> int:
    """Resident memory less what is shared with files: a large model that is mapped read-only costs nothing."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * _PAGE if len(fields) > 2 else 0


def _outcome(watch: _Watch, end: ChildEnd) -> StageOutcome:
    request = watch.request
    if watch.stopped is not None:
        raise watch.stopped
    result_path = Path(request.workspace) / RESULT_FILE
    if os.WIFEXITED(end.wait_status) and result_path.exists():
        result = json.loads(result_path.read_text())
        if "failure" in result:
            failure = StageFailure.from_json(result["failure"])
            if failure.code == "internal":
                log.error("stage_internal_error", stage=request.stage, log=_tail(request))
            raise failure
        return StageOutcome(result["outputs"], result["data"], result["notes"], result["seconds"], result["reusable"])
    log.warning("stage_died", stage=request.stage, status=end.wait_status, log=_tail(request))
    raise _death(watch, end)


def _death(watch: _Watch, end: ChildEnd) -> StageFailure:
    """The failure behind a child that left no result."""
    stage, limits = watch.request.stage, watch.request.limits
    if not os.WIFSIGNALED(end.wait_status):
        return _lost(stage, "it exited without a result")
    name = signal.Signals(os.WTERMSIG(end.wait_status)).name
    if name == "SIGABRT" and max(watch.peak_bytes, 0) > 0.8 * limits.memory_bytes:
        return out_of_memory(stage, limits.memory_bytes)
    if name in ("SIGKILL", "SIGTERM"):
        # Not ours (ours set `stopped`): the kernel's OOM killer or somebody on the machine. Worth another try.
        return _lost(stage, f"it was ended by {name} from outside")
    return StageFailure(
        "runtime_crashed",
        f"The native runtime crashed ({name}) in the {stage} stage on this model.",
        FailureKind.MODEL,
        stage,
        remedy="Check that the model runs in ONNX Runtime on its own; export it with another opset or exporter.",
    )


def _lost(stage: str, why: str) -> StageFailure:
    return infrastructure_failure(
        "child_lost",
        f"The process that ran the {stage} stage was lost: {why}.",
        stage=stage,
        remedy="Submit again; if it comes back, the worker's machine is short of memory.",
    )


def _tail(request: StageRequest) -> str:
    try:
        return (Path(request.workspace) / LOG_FILE).read_text(errors="replace")[-4000:]
    except OSError:
        return ""
