"""A process that looks into uploaded files, one at a time, until its input ends: `python -m app.inspection.child`.

Requests and answers are lines of JSON on stdin and stdout. It imports the parsers and nothing else, holds no secret,
and looks into no file itself: that is done by a fork for each of them, which can open that one and no other, has no
network, starts nothing, and leaves nothing behind for the next. Its limits on memory and CPU time are the kernel's:
whoever hits them dies, and the pool says so to the client.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from app.archives import ArchiveLimits
from app.datasets.inspect import describe_dataset
from app.errors import AppError
from app.sandbox.confine import close_descriptors, confine
from app.sandbox.features import NOTHING, Features, found
from app.sandbox.policy import Grounds, Host, Policy
from app.sandbox.syscalls import die_with_parent
from app.scratch import scratch_folder
from app.source_models.inspect import describe_model

MOST_ANSWER_BYTES = 64 << 20
_DATA_SET = "data set"
_CHUNK = 1 << 20
_NOT_THE_FILE = 0  # the status that the pool takes for no fault of the file
_OF_THE_MACHINE = (errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ENFILE)


def main() -> None:
    host = Host.from_json(json.loads(sys.argv[1])) if len(sys.argv) > 1 else Host()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # whoever answers short requests goes first
    features = NOTHING if host.mode == "off" else found()
    grounds = Grounds.of(host)
    while line := sys.stdin.buffer.readline():
        answer = _in_fork(json.loads(line), grounds, features)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _in_fork(request: dict[str, Any], grounds: Grounds, features: Features) -> dict[str, Any]:
    """{columns}, {error}, {limit}; {ended: as of `Popen.returncode`} where there came none of them."""
    read_fd, write_fd = os.pipe()
    parent = os.getpid()
    with ExitStack() as stack:
        scratch = None
        if request["kind"] == _DATA_SET:  # for its compressed shards
            scratch = stack.enter_context(scratch_folder(Path(request["scratch"])))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _fork(request, write_fd, parent, _Ground(scratch, grounds, features))
                code = 0
            finally:
                os._exit(code)
        os.close(write_fd)
        try:
            told = _read(read_fd)
        finally:
            os.close(read_fd)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it has said what it had to say
            _pid, status = os.waitpid(pid, 0)
    return {"ended": os.waitstatus_to_exitcode(status)} if told is None else told


@dataclass(frozen=True)
class _Ground:
    """What a fork stands on."""

    scratch: Path | None
    grounds: Grounds
    features: Features


def _fork(request: dict[str, Any], write_fd: int, parent: int, ground: _Ground) -> None:
    """Whatever takes this process over finds no descriptor but that of its own answer."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    close_descriptors((0, 1, 2, write_fd))
    if ground.features != NOTHING:
        own = () if ground.scratch is None else (str(ground.scratch),)
        try:
            confine(Policy(inputs=(request["path"],), own=own, processes=False), ground.grounds, ground.features)
        except OSError:
            os._exit(_NOT_THE_FILE)
    die_with_parent(parent)
    try:
        found = _answer(request, ground.scratch)
    except OSError as error:
        if error.errno in _OF_THE_MACHINE:
            os._exit(_NOT_THE_FILE)
        raise
    answer = memoryview(json.dumps(found).encode())
    while answer:
        answer = answer[os.write(write_fd, answer) :]


def _read(fd: int) -> dict[str, Any] | None:
    """What the fork says, as far as it is an answer. Ends this process, and so the fork, as soon as the pool is gone,
    in the middle of a file too."""
    found, poll = bytearray(), select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(sys.stdin.buffer.fileno(), 0)  # its end is told unasked
    while len(found) <= MOST_ANSWER_BYTES:
        ready = dict(poll.poll())
        if fd not in ready:
            os._exit(0)
        chunk = os.read(fd, _CHUNK)
        if not chunk:
            break
        found += chunk
    with contextlib.suppress(ValueError, RecursionError):
        told = json.loads(found)
        if isinstance(told, dict) and any(isinstance(told.get(n), dict | str) for n in ("columns", "error", "limit")):
            return told
    return None


def _answer(request: dict[str, Any], scratch: Path | None) -> dict[str, Any]:
    limits = cast(ArchiveLimits, SimpleNamespace(**request["limits"]))
    path, filename = Path(request["path"]), request["filename"]
    _limit(request["cpu_s"], request["memory_bytes"])
    try:
        if scratch is not None:
            return {"columns": describe_dataset(path, filename, limits, scratch)}
        return {"columns": describe_model(path, filename, limits)}
    except AppError as error:
        return {"error": {**vars(error), "errors": []}}
    except MemoryError:
        return {"limit": "memory"}


def _limit(cpu_s: float, memory_bytes: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
