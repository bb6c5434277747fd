"""The worker's side of child processes: runs one stage call under limits, and turns every way a child can end into an
outputs-and-data result or a typed failure. Whatever happens in there, the worker lives."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from app.domain.failures import FailureKind, StageFailure, infrastructure_failure
from app.sandbox.features import NOTHING, Features
from app.sandbox.policy import Host
from app.settings import child_environment
from workers.pipeline.answers import read_result, tail_of_log
from workers.pipeline.child import out_of_memory
from workers.pipeline.folders import Written
from workers.pipeline.memory import TreeMemory
from workers.pipeline.protocol import (
    MAX_DATAGRAM,
    REQUEST_FILE,
    Call,
    ChildEnd,
    Limits,
    StageRequest,
    Started,
    decode_answer,
    decode_ready,
    encode,
)
from workers.pipeline.zygote import SOCKET_FD

log = structlog.get_logger(__name__)

_LOOK_S = 0.05
_START_S = 60.0
_END_S = 30.0  # a large process takes a while to die


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


class _ZygoteLost(Exception):
    """The process that starts the stages is gone, or does not answer any more."""


@dataclass
class _Watch:
    """One call as the worker sees it. `pid` = 0 before it has started and after it was reaped."""

    call: int
    request: StageRequest
    memory: TreeMemory
    written: Written
    pid: int = 0
    stopped: StageFailure | None = None
    interrupted: bool = False
    peak_bytes: int = 0
    buffer: bytes = b""
    ends_at: float = math.inf  # the stage's own limit
    deadline: float = field(default_factory=lambda: time.monotonic() + _START_S)  # the zygote's, for its next answer

    def kill(self) -> None:
        """End it; the zygote then has a while to say so."""
        self.deadline = time.monotonic() + _END_S
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    @property
    def ending(self) -> bool:
        return self.interrupted or self.stopped is not None


class IsolatedRunner:
    """Runs stage calls in children of a zygote process, one at a time. Start it in the thread that outlives it."""

    def __init__(self, extra_modules: Sequence[str] = (), host: Host | None = None) -> None:
        """`extra_modules` are imported beside `workers.stages`: where further stages register themselves. `host`: how
        this installation confines calls."""
        self._extra = tuple(extra_modules)
        self.host = host or Host()
        self.features: Features = NOTHING  # what calls are confined with, once it has started
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._zygote: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._open: _Watch | None = None  # a call that the zygote was given and whose end was not received

    def start(self) -> None:
        """Start the zygote ahead of the first call."""
        with self._lock:
            self._ensure()

    def close(self) -> None:
        with self._lock:
            self._stop()

    def interrupt(self) -> None:
        """End the call that runs now, from any thread, whatever the caller's own thread waits for: its `run` then
        raises `Interrupted`."""
        watch = self._open
        if watch is not None:
            watch.interrupted = True
            watch.kill()

    def run(
        self,
        request: StageRequest,
        *,
        on_progress: Callable[[float, str], None],
        should_stop: Callable[[], bool],
    ) -> StageOutcome:
        """Run one stage call to its end. Raises `StageFailure`, `Interrupted` when `should_stop` says so, and whatever
        the two callbacks raise; in every case no process of the call is left and the next call starts afresh."""
        with self._lock:
            try:
                return self._run(request, on_progress, should_stop)
            except _ZygoteLost as error:
                self._stop()
                raise _lost(request.stage, f"the process that starts the stages was lost ({error})") from error
            finally:
                self._abandon()

    def _run(
        self, request: StageRequest, on_progress: Callable[[float, str], None], should_stop: Callable[[], bool]
    ) -> StageOutcome:
        # The request goes by file: a datagram holds some 200 kB, a model may have thousands of inputs.
        path = Path(request.workspace) / REQUEST_FILE
        path.touch(mode=0o600)  # it holds the key that engines are signed with
        path.write_bytes(request.encode())
        channel = self._ensure()
        limits = request.limits
        written = Written([Path(request.workspace), Path(request.outputs)], limits.file_bytes)
        watch = _Watch(next(self._numbers), request, TreeMemory(limits.memory_bytes), written)
        read_fd, write_fd = os.pipe()
        try:
            try:
                self._open = watch
                socket.send_fds(channel, [encode(Call(watch.call, str(path), limits.processes))], [write_fd])
            except OSError as error:
                raise _ZygoteLost(error) from error
            finally:
                os.close(write_fd)
            end = self._wait(channel, read_fd, watch, on_progress, should_stop)
        finally:
            os.close(read_fd)
        if watch.interrupted:
            raise Interrupted
        return _outcome(watch, end)

    def _wait(
        self,
        channel: socket.socket,
        read_fd: int,
        watch: _Watch,
        on_progress: Callable[[float, str], None],
        should_stop: Callable[[], bool],
    ) -> ChildEnd:
        fds: list[Any] = [channel, read_fd]
        while True:
            ready, _, _ = select.select(fds, [], [], _LOOK_S)
            if read_fd in ready and not _read_progress(read_fd, watch, on_progress):
                fds.remove(read_fd)
            if channel in ready and (end := self._answer(channel, watch)) is not None:
                return end
            if not watch.ending and should_stop():
                watch.interrupted = True
                watch.kill()
            if watch.pid and not watch.ending and (failure := _over_limit(watch)) is not None:
                watch.stopped = failure
                watch.kill()
            if time.monotonic() > watch.deadline:
                raise _ZygoteLost("it does not answer")

    def _abandon(self) -> None:
        """After an exception in mid-call: end the call and take what the zygote still says about it, so that the next
        call does not. Where that does not work, the zygote goes, and the call with it."""
        watch, channel = self._open, self._channel
        if watch is None or channel is None:
            return
        watch.interrupted = True
        watch.kill()
        with contextlib.suppress(_ZygoteLost):
            while self._open is not None and (left := watch.deadline - time.monotonic()) > 0:
                ready, _, _ = select.select([channel], [], [], left)
                if ready:
                    self._answer(channel, watch)
        if self._open is not None:
            self._stop()

    def _answer(self, channel: socket.socket, watch: _Watch) -> ChildEnd | None:
        """Take one answer; the end of the call where it was that. What belongs to another call is passed over."""
        try:
            answer = decode_answer(_receive(channel))
        except (OSError, ValueError, TypeError) as error:
            raise _ZygoteLost(error) from error
        if answer.call != watch.call:
            log.warning("answer_of_another_call", call=watch.call, answer=answer.call)
            return None
        if isinstance(answer, Started):
            watch.pid = answer.pid
            watch.deadline = math.inf
            watch.ends_at = time.monotonic() + watch.request.limits.seconds
            if watch.ending:
                watch.kill()
            return None
        watch.pid = 0  # reaped: the number may be somebody else's by now
        self._open = None
        return answer

    def _ensure(self) -> socket.socket:
        alive = self._zygote is not None and self._zygote.poll() is None
        if self._channel is not None and alive and self._open is None:
            return self._channel
        self._stop()
        try:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._zygote = _spawn(theirs.fileno(), self._extra, self.host)
            ready, _, _ = select.select([self._channel], [], [], _START_S)
            if ready:
                self.features = Features(**decode_ready(_receive(self._channel)).features)
                return self._channel
        except (OSError, ValueError, TypeError) as error:
            raise _ZygoteLost(error) from error
        raise _ZygoteLost("it did not come up")

    def _stop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
            self._zygote = None
        if self._open is not None:
            self._open.kill()
            self._open = None


def _receive(channel: socket.socket) -> bytes:
    raw = channel.recv(MAX_DATAGRAM)
    if not raw:
        raise ConnectionResetError("closed")
    return raw


def _spawn(fd: int, extra: Sequence[str], host: Host) -> subprocess.Popen[bytes]:
    # A shell-free way to place the socket at a fixed number in the child, whatever its number is here.
    code = f"import os; os.dup2({fd}, {SOCKET_FD}); from workers.pipeline.zygote import serve"
    code += f"; serve({extra!r}, {host.to_json()!r})"
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join((root, *filter(None, [os.environ.get("PYTHONPATH")])))  # where plug-ins may lie
    env = {**child_environment(), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    # -P: what lies in the current folder (somebody's own app.py) is not what is meant.
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code], env=env, pass_fds=[fd], stdin=subprocess.DEVNULL, start_new_session=True
    )


def _read_progress(fd: int, watch: _Watch, on_progress: Callable[[float, str], None]) -> bool:
    """Pass on the newest progress; False at the end of the pipe."""
    raw = os.read(fd, 65536)
    if not raw:
        return False
    *lines, rest = (watch.buffer + raw).split(b"\n")
    watch.buffer = rest[-MAX_DATAGRAM:]
    if lines and (progress := _parse_progress(lines[-1])) is not None:
        on_progress(*progress)
    return True


def _parse_progress(line: bytes) -> tuple[float, str] | None:
    """None for what a stage's code has written there by itself."""
    try:
        value = json.loads(line)
        fraction, message = float(value["progress"]), str(value["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (fraction, message) if math.isfinite(fraction) else None


def _over_limit(watch: _Watch) -> StageFailure | None:
    limits: Limits = watch.request.limits
    stage = watch.request.stage
    used = watch.memory.used(watch.pid)
    watch.peak_bytes = max(watch.peak_bytes, used)
    if used > limits.memory_bytes:
        return out_of_memory(stage, limits.memory_bytes)
    if watch.memory.processes >= limits.processes:
        return _too_many_processes(stage, limits.processes)
    if (too_much := watch.written.too_much()) is not None:
        return _too_much_written(stage, too_much)
    if time.monotonic() > watch.ends_at:
        return StageFailure(
            "timed_out",
            f"The {stage} stage did not end within {limits.seconds:.0f} s.",
            FailureKind.MODEL,
            stage,
            remedy="Use a smaller model, or ask the operator to raise WORKER_STAGE_TIMEOUT_S.",
            cacheable=False,
        )
    return None


def _outcome(watch: _Watch, end: ChildEnd) -> StageOutcome:
    request = watch.request
    if watch.stopped is not None:
        raise watch.stopped
    workspace = Path(request.workspace)
    try:
        result = read_result(workspace, request.stage) if os.WIFEXITED(end.wait_status) else None
    except StageFailure as failure:
        if failure.code in ("internal", "invalid_output"):
            log.error("stage_internal_error", stage=request.stage, code=failure.code, log=tail_of_log(workspace))
        raise
    if result is not None:
        return StageOutcome(result["outputs"], result["data"], result["notes"], result["seconds"], result["reusable"])
    log.warning("stage_died", stage=request.stage, status=end.wait_status, log=tail_of_log(workspace))
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


def _too_many_processes(stage: str, limit: int) -> StageFailure:
    return StageFailure(
        "too_many_processes",
        f"The {stage} stage started {limit} processes and more.",
        FailureKind.MODEL,
        stage,
        remedy="Check that the model comes from a source that you trust; report this if it does.",
        cacheable=False,
    )


def _too_much_written(stage: str, what: str) -> StageFailure:
    return infrastructure_failure(
        "storage_full",
        f"The {stage} stage wrote too much: {what}.",
        stage=stage,
        remedy="Free disk space on the worker, or raise WORKER_STAGE_DISK_MB.",
    )
