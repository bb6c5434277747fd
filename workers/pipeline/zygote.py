"""A small server process that has the libraries imported and forks one child per stage call.

Starting Python and importing ONNX Runtime takes most of a second, a fork of this process some 10 ms; and a fork from
here inherits neither the worker's secrets nor its threads, locks and connections. It holds no session and runs no model
itself. Started by `workers.pipeline.isolated` with a bare environment; the request socket is file descriptor 3.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.domain.failures import StageFailure
from app.sandbox.confine import close_descriptors
from app.sandbox.features import NOTHING, Features, found
from app.sandbox.landlock import scope_signals
from app.sandbox.policy import Grounds, Host
from app.sandbox.processes import wait_counting
from app.sandbox.syscalls import die_with_parent, no_new_privileges
from workers import kernel
from workers.pipeline import child
from workers.pipeline.confining import confine_call
from workers.pipeline.memory import descendants
from workers.pipeline.protocol import LOG_FILE, MAX_DATAGRAM, Call, ChildEnd, Ready, StageRequest, Started, encode

SOCKET_FD = 3
# Only what every stage needs. Engines are measured in children of this process, and what it holds counts as theirs:
# onnxslim and the transformer optimizer (with sympy, 50 MB) are imported where they are used, torch even more so.
_PRELOAD = ("numpy", "onnx", "onnx.checker", "onnx.shape_inference", "onnxruntime")


@dataclass(frozen=True)
class _Ground:
    """What the children of this process stand on. `scoped`: it can signal them and nobody else."""

    grounds: Grounds
    features: Features
    scoped: bool
    tasks: int  # of this user on this machine, before there was any child


def serve(extra_modules: Sequence[str] = (), host: Mapping[str, Any] | None = None) -> None:
    """Answer requests one at a time until the worker closes the socket. `host`: a `Host` as JSON."""
    confined = Host.from_json(host) if host else Host()
    worker = os.getppid()
    die_with_parent(worker)
    child.name_process("anneal-zygote")
    child.adopt_orphans()
    # Ctrl-C reaches the whole foreground group; the worker decides when its children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    features = NOTHING if confined.mode == "off" else found()
    with socket.socket(fileno=SOCKET_FD) as channel:
        # The guard ends this process's children, and they cannot end it: it is outside of the second scope.
        reached = _reaches(worker)
        scoped = _scope(features) and reached and not _reaches(worker)
        guard = Guard(channel, scoped=scoped)  # before the imports: it stays small
        scoped = scoped and _scope(features)
        for name in _PRELOAD:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        kernel.stages()
        for name in extra_modules:
            importlib.import_module(name)
        kernel.backends()
        gc.freeze()  # keep the collector from touching, and so copying, what the children share
        ground = _Ground(Grounds.of(confined), features, scoped, child.tasks_of_user())
        channel.send(encode(Ready(asdict(features))))
        while True:
            raw, fds, _flags, _address = socket.recv_fds(channel, MAX_DATAGRAM, 1)
            if not raw:
                return
            _serve_one(channel, guard, Call(**json.loads(raw)), fds[0], ground)


class Guard:
    """A process that ends a stage's process group when the zygote is gone, however it went: the stage itself dies with
    its parent, but not what a library has started in it."""

    def __init__(self, channel: socket.socket, *, scoped: bool) -> None:
        """`scoped`: it can signal this process's children and nobody else but this process."""
        read_fd, self._fd = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                channel.close()
                os.close(self._fd)
                os.setsid()
                child.name_process("anneal-guard")
                _stand_guard(read_fd, scoped)
            finally:
                os._exit(0)
        os.close(read_fd)

    def watch(self, pgid: int) -> None:
        """From now on this group; 0 = none. Raises BrokenPipeError where the guard is gone: so has the zygote to be."""
        os.write(self._fd, b"%d\n" % pgid)

    def let_go(self) -> None:
        """In a fork of the zygote, which must not look to the guard as if the zygote lived on."""
        os.close(self._fd)


def _scope(features: Features) -> bool:
    """This process and its children signal nobody else from now on; False where the kernel cannot have it so."""
    try:
        no_new_privileges()
        return scope_signals(features.landlock)
    except OSError:
        return False


def _reaches(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return False
    return True


def _kill_all() -> None:
    """Every process that this one may signal, at once: no process that forks, in whatever session, gets away. For who
    is scoped, which was seen: it could signal the worker before and could not after, and no scope is ever lifted."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(-1, signal.SIGKILL)


def _stand_guard(fd: int, scoped: bool) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    group = 0
    while raw := os.read(fd, 4096):
        group = int(raw.split()[-1])  # a line is written at once, and far shorter than what a pipe takes at once
    if scoped:
        _kill_all()
    if group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def _serve_one(channel: socket.socket, guard: Guard, call: Call, progress_fd: int, ground: _Ground) -> None:
    parent = os.getpid()
    guard.watch(0)  # is it there?
    counted, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            channel.close()
            guard.let_go()
            counted.close()
            _child(call, progress_fd, parent, ground, theirs)
            code = 0
        finally:
            os._exit(code)
    os.close(progress_fd)
    theirs.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # also done by the child: whichever comes first, the group exists before the reply
    guard.watch(pid)
    channel.send(encode(Started(call.call, pid)))
    with counted:
        listeners = socket.recv_fds(counted, 1, 1)[1]
    for listener in listeners:
        wait_counting(pid, listener, call.processes, _processes)
        os.close(listener)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    # What the stage has started must not outlive it. Not reaped yet: until then the number is nobody else's.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if ground.scoped:
        _kill_all()
    guard.watch(0)
    _pid, status, usage = os.wait4(pid, 0)
    _end_orphans(guard.pid)
    channel.send(encode(ChildEnd(call.call, status, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)))


def _processes() -> int:
    """Of the call that runs: all below this process but the guard, also those whose parent has ended."""
    return len(descendants(os.getpid())) - 2


def _end_orphans(spare: int) -> None:
    """End what left the stage's group (a daemon, say): with its parent gone it became a child of this process."""
    while left := [pid for pid in child.children_of(os.getpid()) if pid != spare]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _child(call: Call, progress_fd: int, parent: int, ground: _Ground, counted: socket.socket) -> None:
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    die_with_parent(parent)
    child.name_process("anneal-stage")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = StageRequest.decode(Path(call.path).read_bytes())
    os.chdir(request.workspace)
    log = os.open(Path(request.workspace) / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    close_descriptors((0, 1, 2, progress_fd, counted.fileno()))
    child.apply_limits(request.limits, ground.tasks)
    os.environ["HOME"] = os.environ["TMPDIR"] = request.workspace
    tempfile.tempdir = None  # that of the zygote is none of this process's
    try:
        with counted:
            listener = confine_call(request, ground.grounds, ground.features)
            if listener is not None:
                socket.send_fds(counted, [b"."], [listener])
                os.close(listener)
        die_with_parent(parent)  # a change of rights takes the signal
    except StageFailure as failure:
        child.write_result(request.workspace, child.failed(failure))
    else:
        child.write_result(request.workspace, child.run_request(request, progress_fd))
