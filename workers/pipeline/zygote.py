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
from collections.abc import Sequence
from pathlib import Path

from workers import kernel
from workers.pipeline import child
from workers.pipeline.protocol import LOG_FILE, MAX_DATAGRAM, Call, ChildEnd, StageRequest, Started, encode

SOCKET_FD = 3
# Only what every stage needs. Engines are measured in children of this process, and what it holds counts as theirs:
# onnxslim and the transformer optimizer (with sympy, 50 MB) are imported where they are used, torch even more so.
_PRELOAD = ("numpy", "onnx", "onnx.checker", "onnx.shape_inference", "onnxruntime")


def serve(extra_modules: Sequence[str] = ()) -> None:
    """Answer requests one at a time until the worker closes the socket."""
    child.die_with_parent(os.getppid())
    child.name_process("anneal-zygote")
    child.adopt_orphans()
    # Ctrl-C reaches the whole foreground group; the worker decides when its children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=SOCKET_FD) as channel:
        guard = Guard(channel)  # before the imports: it stays small
        for name in _PRELOAD:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        kernel.stages()
        for name in extra_modules:
            importlib.import_module(name)
        kernel.backends()
        gc.freeze()  # keep the collector from touching, and so copying, what the children share
        channel.send(b"ready")
        while True:
            raw, fds, _flags, _address = socket.recv_fds(channel, MAX_DATAGRAM, 1)
            if not raw:
                return
            _serve_one(channel, guard, Call(**json.loads(raw)), fds[0])


class Guard:
    """A process that ends a stage's process group when the zygote is gone, however it went: the stage itself dies with
    its parent, but not what a library has started in it."""

    def __init__(self, channel: socket.socket) -> None:
        read_fd, self._fd = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                channel.close()
                os.close(self._fd)
                os.setsid()
                child.name_process("anneal-guard")
                _stand_guard(read_fd)
            finally:
                os._exit(0)
        os.close(read_fd)

    def watch(self, pgid: int) -> None:
        """From now on this group; 0 = none. Raises BrokenPipeError where the guard is gone: so has the zygote to be."""
        os.write(self._fd, b"%d\n" % pgid)

    def let_go(self) -> None:
        """In a fork of the zygote, which must not look to the guard as if the zygote lived on."""
        os.close(self._fd)


def _stand_guard(fd: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    group = 0
    while raw := os.read(fd, 4096):
        group = int(raw.split()[-1])  # a line is written at once, and far shorter than what a pipe takes at once
    if group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def _serve_one(channel: socket.socket, guard: Guard, call: Call, progress_fd: int) -> None:
    parent = os.getpid()
    guard.watch(0)  # is it there?
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            channel.close()
            guard.let_go()
            _child(call, progress_fd, parent)
            code = 0
        finally:
            os._exit(code)
    os.close(progress_fd)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # also done by the child: whichever comes first, the group exists before the reply
    guard.watch(pid)
    channel.send(encode(Started(call.call, pid)))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    # What the stage has started must not outlive it. Not reaped yet: until then the number is nobody else's.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    guard.watch(0)
    _pid, status, usage = os.wait4(pid, 0)
    _end_orphans(guard.pid)
    channel.send(encode(ChildEnd(call.call, status, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)))


def _end_orphans(spare: int) -> None:
    """End what left the stage's group (a daemon, say): with its parent gone it became a child of this process."""
    while left := [pid for pid in child.children_of(os.getpid()) if pid != spare]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _child(call: Call, progress_fd: int, parent: int) -> None:
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    child.die_with_parent(parent)
    child.name_process("anneal-stage")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = StageRequest.decode(Path(call.path).read_bytes())
    os.chdir(request.workspace)
    log = os.open(Path(request.workspace) / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    child.apply_limits(request.limits)
    os.environ["HOME"] = os.environ["TMPDIR"] = request.workspace
    result = child.run_request(request, progress_fd)
    child.write_result(request.workspace, result)
