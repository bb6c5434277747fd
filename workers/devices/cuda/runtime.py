"""One small interface over CUDA: device and pinned memory, streams, events, graph capture.

PyCUDA where it is installed, the driver API of cuda-bindings otherwise (`apis`); graph capture is always
cuda-bindings', which PyCUDA lacks, on the same stream handles. Everything works in the device's **primary** context,
which TensorRT, ONNX Runtime and PyTorch use too: memory and streams can be handed over as plain integers.

A context belongs to the thread that pushed it: use a `Cuda` and what it made in `with cuda.context():` of one thread.
CUDA does not survive a fork: `probe` asks in a process of its own, so that the worker may fork its stages later.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from app.domain.failures import StageFailure
from workers.devices.cuda import apis
from workers.devices.cuda.graphs import Capture, cuda_unavailable

Array = np.ndarray[Any, Any]
Library = Literal["auto", "pycuda", "cuda-bindings"]
_PROBE_LIMIT_S = 60.0
_PROBE = """
import json
from workers.devices.cuda.runtime import Cuda
cuda = Cuda()
with cuda.context():
    free, total = cuda.mem_info()
    print(json.dumps({"library": cuda.library, "devices": cuda.device_count(), "free": free, "total": total}))
cuda.close()
"""


class Cuda:
    """One GPU. `device`: its number among the visible ones (`CUDA_VISIBLE_DEVICES`).

    Raises StageFailure: `cuda_unavailable` (no driver, no GPU, no library), `gpu_out_of_memory`, `cuda_error`.
    """

    def __init__(self, device: int = 0, library: Library = "auto") -> None:
        self._api = apis.open_api(library)
        count = self._api.device_count()
        if not 0 <= device < count:
            raise cuda_unavailable(f"There is no CUDA device {device}; {count} are visible.")
        self.device = device
        self._retained = False

    @property
    def library(self) -> str:
        """Which library does the work: `pycuda` or `cuda-bindings`."""
        return self._api.name

    def device_count(self) -> int:
        return self._api.device_count()

    @contextmanager
    def context(self) -> Iterator[Cuda]:
        """Make the primary context current in this thread; retained at the first use, and until `close`."""
        if not self._retained:
            self._api.retain(self.device)
            self._retained = True
        self._api.push()
        try:
            yield self
        finally:
            self._api.pop()

    def close(self) -> None:
        """Let go of the primary context; after everything that was made in it is freed. Any number of times."""
        if self._retained:
            self._retained = False
            self._api.release()

    def stream(self) -> Stream:
        """A stream of its own: never the default stream, which waits for all others and cannot be captured."""
        return Stream(self._api)

    def event(self) -> Event:
        return Event(self._api)

    def alloc(self, nbytes: int) -> DeviceBuffer:
        return DeviceBuffer(self._api, nbytes)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Page-locked host memory: copies from and to it run at full speed and beside other work. It is unlocked when
        the last view of the array goes."""
        dtype = np.dtype(dtype)
        count = math.prod(shape)
        raw = self._api.pinned(max(count * dtype.itemsize, 1))
        array: Array = raw[: count * dtype.itemsize].view(dtype).reshape(shape)
        return array

    def mem_info(self) -> tuple[int, int]:
        """(free, total) bytes of the device, as all its users leave it."""
        return self._api.mem_info()

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[Graph]:
        """Record what the block submits to `stream` instead of running it; the graph can be launched afterwards.

        Run the same work once uncaptured before: libraries allocate and tune in their first call. Where the block
        raises, or submits what cannot be captured, the capture is ended, the stream is usable again, and the block's
        exception (or `cuda_error`) is raised: run eagerly then.
        """
        capturing = Capture()
        capturing.begin(stream.handle)
        graph = Graph(capturing)
        try:
            yield graph
        except BaseException:
            capturing.abandon(stream.handle)
            raise
        capturing.end(stream.handle)


class Stream:
    """An order of work on the GPU. `handle` is what other libraries take."""

    def __init__(self, api: apis.Api) -> None:
        self._api = api
        self.raw = api.stream_create()
        self.handle: int = api.stream_handle(self.raw)

    def synchronize(self) -> None:
        """Wait until all work submitted so far is done; raises what went wrong in it."""
        self._api.stream_synchronize(self.raw)

    def close(self) -> None:
        raw, self.raw = self.raw, None
        if raw is not None:
            self._api.stream_destroy(raw)


class Event:
    """A mark in a stream; the time between two is the GPU's own."""

    def __init__(self, api: apis.Api) -> None:
        self._api = api
        self.raw = api.event_create()

    def record(self, stream: Stream) -> None:
        self._api.event_record(self.raw, stream.raw)

    def synchronize(self) -> None:
        """Wait until the GPU has reached the mark."""
        self._api.event_synchronize(self.raw)

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds from `since` to this event; waits for this one."""
        self.synchronize()
        return self._api.event_elapsed_ms(since.raw, self.raw)

    def close(self) -> None:
        raw, self.raw = self.raw, None
        if raw is not None:
            self._api.event_destroy(raw)


class DeviceBuffer:
    """Device memory. Copies are asynchronous where the host array is pinned: synchronize the stream before reading it,
    and keep the array alive until then. `free` it in its context; a buffer that is collected frees itself."""

    def __init__(self, api: apis.Api, nbytes: int) -> None:
        self._api = api
        self.nbytes = nbytes
        self._raw: Any = api.mem_alloc(max(nbytes, 1))  # CUDA has no empty allocation
        self.ptr: int = api.mem_pointer(self._raw)

    def copy_from_host(self, array: Array, stream: Stream) -> None:
        self._check(array)
        if array.nbytes:
            self._api.copy_to_device(self._raw, array, stream.raw)

    def copy_to_host(self, array: Array, stream: Stream) -> None:
        self._check(array)
        if array.nbytes:
            self._api.copy_to_host(array, self._raw, stream.raw)

    def free(self) -> None:
        raw, self._raw = self._raw, None
        if raw is not None:
            self.ptr = 0
            self._api.mem_free(raw)

    def _check(self, array: Array) -> None:
        if self._raw is None:
            raise ValueError("the device buffer is freed")
        if not array.flags.c_contiguous:
            raise ValueError("only C-contiguous arrays can be copied")
        if array.nbytes > self.nbytes:
            raise ValueError(f"{array.nbytes} bytes do not fit a device buffer of {self.nbytes}")


class Graph:
    """Recorded work: one call submits all of it. It holds addresses: buffers must stay where they were."""

    def __init__(self, captured: Capture) -> None:
        self._captured = captured

    def launch(self, stream: Stream) -> None:
        self._captured.launch(stream.handle)

    def close(self) -> None:
        self._captured.destroy()


@dataclass(frozen=True)
class Probed:
    """What `probe` found: the library in use, visible devices, free and total bytes of device 0."""

    library: str
    devices: int
    free: int
    total: int


def probe() -> Probed:
    """Ask for a usable GPU in a process of its own, once per process and set of visible devices.

    Raises StageFailure(`cuda_unavailable`) with the reason. This process does not touch CUDA."""
    found = _probed(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if isinstance(found, str):
        raise cuda_unavailable(found)
    return found


def available() -> bool:
    """Whether `probe` finds a usable GPU. Never raises."""
    return isinstance(_probed(os.environ.get("CUDA_VISIBLE_DEVICES")), Probed)


@functools.cache
def _probed(_visible: str | None) -> Probed | str:
    if not apis.installed():
        return "Neither PyCUDA nor cuda-bindings is installed."
    code = f"import sys\nsys.path[:0] = {[p for p in sys.path if p]!r}\n{_PROBE}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_PROBE_LIMIT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"The GPU could not be asked: {type(error).__name__}."
    if done.returncode == 0:
        try:
            facts: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return Probed(str(facts["library"]), int(facts["devices"]), int(facts["free"]), int(facts["total"]))
        except (IndexError, KeyError, ValueError):
            return "The GPU could not be asked: its process answered nothing."
    last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
    return last.rpartition("cuda_unavailable: ")[2][:300]


__all__ = [
    "Cuda", "DeviceBuffer", "Event", "Graph", "Library", "Probed", "StageFailure", "Stream", "available",
    "cuda_unavailable", "probe",
]  # fmt: skip
