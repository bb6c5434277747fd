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
import sys
from collections.abc import Sequence
from pathlib import Path

from workers import kernel
from workers.pipeline import child
from workers.pipeline.protocol import LOG_FILE, MAX_DATAGRAM, StageRequest

SOCKET_FD = 3
# Only what every stage needs. Engines are measured in children of this process, and what it holds counts as theirs:
# onnxslim and the transformer optimizer (with sympy, 50 MB) are imported where they are used, torch even more so.
_PRELOAD = ("numpy", "onnx", "onnx.checker", "onnx.shape_inference", "onnxruntime")


def serve(extra_modules: Sequence[str] = ()) -> None:
    """Answer requests one at a time until the worker closes the socket."""
    child.die_with_parent(os.getppid())
    # Ctrl-C reaches the whole foreground group; the worker decides when its children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    kernel.stages()
    for name in extra_modules:
        importlib.import_module(name)
    kernel.backends()
    gc.freeze()  # keep the collector from touching, and so copying, what the children share
    with socket.socket(fileno=SOCKET_FD) as channel:
        channel.send(b"ready")
        while True:
            raw, fds, _flags, _address = socket.recv_fds(channel, MAX_DATAGRAM, 1)
            if not raw:
                return
            _serve_one(channel, StageRequest.decode(Path(raw.decode()).read_bytes()), fds[0])


def _serve_one(channel: socket.socket, request: StageRequest, progress_fd: int) -> None:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            channel.close()
            _child(request, progress_fd, parent)
            code = 0
        finally:
            os._exit(code)
    os.close(progress_fd)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)  # also done by the child: whichever comes first, the group exists before the reply
    channel.send(json.dumps({"pid": pid}).encode())
    _pid, status, usage = os.wait4(pid, 0)
    # What the stage has started must not outlive it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    end = {
        "wait_status": status,
        "max_rss_bytes": usage.ru_maxrss * 1024,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    channel.send(json.dumps(end).encode())


def _child(request: StageRequest, progress_fd: int, parent: int) -> None:
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    child.die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    sys.stdout.flush()
    sys.stderr.flush()
