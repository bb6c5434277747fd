"""One engine in a process of its own, and what a batch goes there and back through: memory that both processes map, and
a socket on which each side tells the other that something lies there.

As a script it is that process: it loads the `infer.py` of a bundle and answers until the other side is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import inspect
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

if __package__:
    from .rows import Array, Spec, dtype_of, name_of, nbytes
    from .serving_settings import Failed, InvalidRequest, ServingError
else:  # beside this file, in a bundle
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from rows import Array, Spec, dtype_of, name_of, nbytes  # type: ignore[import-not-found,no-redef]
    from serving_settings import (  # type: ignore[import-not-found,no-redef]
        Failed,
        InvalidRequest,
        ServingError,
    )

_FRAME = struct.Struct("=II")  # what it is, and the length of the JSON at the start of the region
_CALL, _READY, _DONE, _FAILED = range(4)
_ALIGNED = 64
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_KEPT, _MOST_KEPT = 32 << 20, 128 << 20  # bytes of an array (glibc allows no more), and of all that are free
_LARGEST_REGION = 16 << 30  # reserved, not used: a page costs memory from its first use on
_BACK_OFF_S = (0.0, 0.1, 0.5, 2.0, 5.0)  # before it is started once more
_WARM_UP_S = 2.0
_REFUSALS = ("ShapeRefused", "ValueError", "InvalidArgument")  # of `run`: the inputs are to blame


class Region:
    """Half of the shared memory: arrays one after the other, behind a JSON of their names, types and shapes.

    What lies there mostly has the form of what lay there before: then the JSON and the arrays over the memory stay."""

    def __init__(self, memory: mmap.mmap, start: int, size: int) -> None:
        self._memory, self._start, self._size = memory, start, size
        self._placed: tuple[list[Spec], int, list[Array]] | None = None
        self._read: tuple[bytes, dict[str, Array]] | None = None

    def place(self, specs: list[Spec]) -> tuple[int, list[Array]]:
        """Length of the JSON, and arrays to be written to; raises `InvalidRequest` (`too_large`)."""
        if self._placed is not None and self._placed[0] == specs:
            return self._placed[1:]
        self.forget()
        head = json.dumps(specs).encode()
        needed = len(head) + sum(nbytes(s) + _ALIGNED for s in specs)
        if needed > self._size:
            raise InvalidRequest(
                "too_large", f"{needed} bytes do not fit into the {self._size} of an instance's memory"
            )
        self._memory[self._start : self._start + len(head)] = head
        views = self._views(specs, len(head))
        self._placed = (list(specs), len(head), views)
        return len(head), views

    def read(self, length: int) -> dict[str, Array]:
        """The arrays that lie there, by name; they are good until the next batch."""
        head = self._memory[self._start : self._start + length]
        if self._read is None or self._read[0] != head:
            specs = json.loads(head)
            views = self._views(specs, length)
            self._read = (head, {spec[0]: view for spec, view in zip(specs, views, strict=True)})
        return dict(self._read[1])

    def write_text(self, value: Any) -> int:
        self.forget()
        head = json.dumps(value).encode()
        self._memory[self._start : self._start + len(head)] = head
        return len(head)

    def read_text(self, length: int) -> Any:
        return json.loads(self._memory[self._start : self._start + length])

    def forget(self) -> None:
        """Nothing points into the memory from here any more."""
        self._placed = self._read = None

    def _views(self, specs: Sequence[Spec], length: int) -> list[Array]:
        at, found = self._start + length, []
        for spec in specs:
            at += -at % _ALIGNED
            found.append(np.ndarray(tuple(spec[2]), dtype_of(spec[1]), self._memory, at))
            at += nbytes(spec)
        return found


def _shared_file() -> tuple[int, int]:
    """A file without a name that takes memory only where it is written to, and its size."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("engine")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    size = 2 * _LARGEST_REGION
    while True:
        try:
            os.ftruncate(fd, size)
            mmap.mmap(fd, size).close()
            return fd, size
        except (OSError, OverflowError, ValueError):
            if size < 1 << 20:
                os.close(fd)
                raise
            size //= 2  # a limit on the address space


class Owner(Protocol):
    """Who is told what becomes of an instance; in the event loop."""

    def instance_ready(self, instance: Instance) -> None:
        """It takes batches."""

    def instance_answered(self, instance: Instance, outputs: Mapping[str, Array] | ServingError) -> None:
        """The batch is done; the arrays are good until the next one is given."""

    def instance_ended(self, instance: Instance, why: str) -> None:
        """The process is gone, with the batch that it had; another one is being started."""


class Instance:
    """The parent's side. It starts the process again whenever it ends, later each time it ends before it was ready."""

    def __init__(
        self, owner: Owner, number: int, folder: Path, threads: int | None, cores: Sequence[int], limit_s: float
    ) -> None:
        self._owner, self.number, self._folder, self._threads, self._cores = owner, number, folder, threads, cores
        self._limit_s = limit_s
        self.busy = self.is_ready = False
        self.failures = 0  # starts in a row that came to nothing
        self.names: list[str] = []
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0  # in the loop's time: when the call began that runs now
        self._process: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._why = ""
        fd, size = _shared_file()
        self._fd, self._memory = fd, mmap.mmap(fd, size)
        self._inputs = Region(self._memory, 0, size // 2)
        self._outputs = Region(self._memory, size // 2, size // 2)
        self._size = size
        self._length = 0
        self._channel: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process; `Owner.instance_ready` follows, or `Owner.instance_ended`."""
        if self._closing:
            return
        ours, theirs = socket.socketpair()
        told = {"folder": str(self._folder), "threads": self._threads, "cores": list(self._cores), "size": self._size}
        command = [sys.executable, str(Path(__file__).resolve()), str(theirs.fileno()), str(self._fd), json.dumps(told)]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(), self._fd), stdin=subprocess.DEVNULL, stdout=2
        )
        theirs.close()
        ours.setblocking(False)
        self._channel, self._why = ours, ""
        self._loop.add_reader(ours.fileno(), self._readable)

    def begin(self, specs: list[Spec]) -> list[Array]:
        """Arrays to write a batch into, which `run` then starts. Raises `InvalidRequest`."""
        self._length, views = self._inputs.place(specs)
        return views

    def run(self) -> None:
        """`Owner.instance_answered` follows, or `Owner.instance_ended`."""
        self.busy, self._since = True, self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._since + self._limit_s, self._watch)
        assert self._channel is not None
        with contextlib.suppress(OSError):  # it is gone: its end is told next
            self._channel.send(_FRAME.pack(_CALL, self._length))

    async def close(self) -> None:
        """End the process and free the memory."""
        self._closing = True
        if self._task is not None:
            await self._task
        if self._channel is not None:
            await self._end()
        if self._timer is not None:
            self._timer.cancel()
        self._inputs.forget()
        self._outputs.forget()
        with contextlib.suppress(BufferError):  # a caller may still hold a view
            self._memory.close()
        os.close(self._fd)

    def kill(self) -> None:
        """End the process, as whatever may befall it does."""
        if self._process is not None:
            self._process.kill()

    def _readable(self) -> None:
        assert self._channel is not None
        try:
            frame = self._channel.recv(_FRAME.size)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        if len(frame) < _FRAME.size:
            self._loop.remove_reader(self._channel.fileno())
            self._task = self._loop.create_task(self._lost())
            return
        what, length = _FRAME.unpack(frame)
        if what == _READY:
            self.names = self._outputs.read_text(length)["inputs"]
            self.is_ready, self.busy, self.failures = True, False, 0
            self._owner.instance_ready(self)
        elif not self.is_ready:
            self._why = self._outputs.read_text(length)["detail"]
        else:
            self._answer(what, length)

    def _answer(self, what: int, length: int) -> None:
        self.busy = False
        if what == _DONE:
            self._owner.instance_answered(self, self._outputs.read(length))
            return
        told = self._outputs.read_text(length)
        kind = InvalidRequest if told["code"] in ("input_refused", "too_large") else Failed
        self._owner.instance_answered(self, kind(told["code"], told["detail"]))

    def _watch(self) -> None:
        """One timer for many calls: to set one for each would take longer than some calls."""
        self._timer = None
        if not self.busy:
            return
        until = self._since + self._limit_s
        if self._loop.time() < until:
            self._timer = self._loop.call_at(until, self._watch)
            return
        self._why = f"it did not answer within {self._limit_s:g} s"
        self.kill()

    async def _lost(self) -> None:
        was_ready, self.is_ready, self.busy = self.is_ready, False, False
        how = await self._end()
        if not was_ready:
            self.failures += 1
        self._owner.instance_ended(self, self._why or how)
        if not self._closing:
            self._loop.call_later(_BACK_OFF_S[min(self.failures, len(_BACK_OFF_S) - 1)], self.start)
        self._task = None

    async def _end(self) -> str:
        """How the process ended."""
        assert self._channel is not None
        assert self._process is not None
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        self._channel = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            await self._loop.run_in_executor(None, self._process.wait, 0.2)
        self._process.kill()
        code = await self._loop.run_in_executor(None, self._process.wait)
        return f"it ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"


def keep_freed_memory() -> None:
    """Of this process: by default glibc gives that of a large array back as soon as it is free, and each page of the
    next request's is a fault."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def cores_for(instances: int, threads: int | None) -> list[list[int]]:
    """The cores of each instance, where several have so many of their own; else none are chosen."""
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if threads is None or instances < 2 or instances * threads > len(here):
        return [[] for _ in range(instances)]
    return [here[i * threads : (i + 1) * threads] for i in range(instances)]


def _load(folder: Path, threads: int | None) -> tuple[list[str], Callable[[dict[str, Array]], Mapping[str, Any]]]:
    """What the bundle's `infer.py` gives; `threads` is told to it only where it is known."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [str(folder), *(p for p in sys.path if p not in (here, str(folder)))]
    spec = importlib.util.spec_from_file_location("infer", folder / "infer.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no infer.py in {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["infer"] = module
    spec.loader.exec_module(module)
    names, run = module.load(threads=threads) if _takes_threads(module.load, threads) else module.load()
    return list(names), run


def _takes_threads(load: Callable[..., Any], threads: int | None) -> bool:
    if threads is None:
        return False
    if "threads" in inspect.signature(load).parameters:
        return True
    sys.stderr.write(f"infer.py of this engine takes no number of threads: it runs with its own, not {threads}\n")
    return False


def _warm_up(folder: Path, run: Callable[[dict[str, Array]], Any]) -> None:
    """The sample twice: the first call of an engine is slower than all others."""
    path, until = folder / "sample_input.npz", time.monotonic() + _WARM_UP_S
    if not path.exists():
        return
    with np.load(path, allow_pickle=False) as arrays:
        feeds = {name: arrays[name] for name in arrays.files}
    for _ in range(2):
        if time.monotonic() < until:
            run(feeds)


def _failure(error: BaseException) -> dict[str, str]:
    names = {kind.__name__ for kind in type(error).__mro__}
    code = "input_refused" if names.intersection(_REFUSALS) else "inference_failed"
    detail = str(error) or type(error).__name__
    return {"code": error.code if isinstance(error, ServingError) else code, "detail": detail[:2000]}


def _answer_calls(channel: socket.socket, inputs: Region, outputs: Region, run: Callable[..., Any]) -> None:
    while True:
        frame = channel.recv(_FRAME.size, socket.MSG_WAITALL)
        if len(frame) < _FRAME.size:
            return  # the other side is gone
        try:
            found = {n: np.asarray(a) for n, a in run(inputs.read(_FRAME.unpack(frame)[1])).items()}
            length, views = outputs.place([(n, name_of(a.dtype), a.shape) for n, a in found.items()])
            for view, array in zip(views, found.values(), strict=True):
                view[...] = array
            what = _DONE
        except (Exception, SystemExit) as error:  # whatever a library raises ends this batch, not the process
            what, length = _FAILED, outputs.write_text(_failure(error))
        channel.send(_FRAME.pack(what, length))


def main(arguments: Sequence[str]) -> int:
    """The process. It ends when the other side of the socket does."""
    keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):  # of the whole group: what runs is still to be answered
        signal.signal(number, signal.SIG_IGN)
    channel, told = socket.socket(fileno=int(arguments[0])), json.loads(arguments[2])
    size = told["size"]
    memory = mmap.mmap(int(arguments[1]), size)
    inputs, outputs = Region(memory, 0, size // 2), Region(memory, size // 2, size // 2)
    with contextlib.suppress(ConnectionError):  # the other side is gone
        try:
            if told["cores"]:
                os.sched_setaffinity(0, told["cores"])
            names, run = _load(Path(told["folder"]), told["threads"])
            _warm_up(Path(told["folder"]), run)
        except (Exception, SystemExit) as error:
            detail = f"{type(error).__name__}: {error}"
            channel.send(_FRAME.pack(_FAILED, outputs.write_text({"code": "start_failed", "detail": detail[:2000]})))
            return 1
        channel.send(_FRAME.pack(_READY, outputs.write_text({"inputs": names})))
        _answer_calls(channel, inputs, outputs, run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
