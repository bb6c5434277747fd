"""A stand-in for one GPU: the CUDA layer on host memory, and the driver's answer. With `tensorrt_standin` it lets the
TensorRT backend build, load and run for real, on a machine without a GPU."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.domain.failures import StageFailure
from tests.factories import tensorrt_standin
from workers import installation

GPU: dict[str, Any] = {
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-00000000-0000-0000-0000-000000000000",
    "compute_capability": "9.0",
    "memory_bytes": 80 << 30,
    "cuda": "13.1",
    "driver": "590.44.01",
    "devices": 1,
}
HARDWARE = {"id": "cpu-test", "kind": "cuda", "isa": ["avx2"], "cores": 2, "gpu": GPU}
_handles = itertools.count(1000)


class Buffer:
    live = 0

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._memory: Any = np.zeros(max(nbytes, 1), np.uint8)
        self.ptr = int(self._memory.ctypes.data)
        Buffer.live += 1

    def copy_from_host(self, array: Any, stream: Any) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= self.nbytes
        self._memory[: array.nbytes] = array.reshape(-1).view(np.uint8)

    def copy_to_host(self, array: Any, stream: Any) -> None:
        array.reshape(-1).view(np.uint8)[...] = self._memory[: array.nbytes]

    def free(self) -> None:
        assert self._memory is not None, "freed twice"
        self._memory = None
        Buffer.live -= 1


class Event:
    def record(self, stream: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_ms(self, since: Event) -> float:
        return (self.at - since.at) * 1e3


class Graph:
    def __init__(self, work: list[Any]) -> None:
        self.work, self.launched = work, 0

    def launch(self, stream: Any) -> None:
        self.launched += 1
        for call in self.work:
            assert call()

    def close(self) -> None:
        self.work = []


class Cuda:
    depth = 0  # contexts that are current
    buffer_limit: int | None = None

    @contextmanager
    def context(self) -> Iterator[Cuda]:
        Cuda.depth += 1
        try:
            yield self
        finally:
            Cuda.depth -= 1

    def stream(self) -> Any:
        return SimpleNamespace(handle=next(_handles), synchronize=lambda: None, close=lambda: None)

    def alloc(self, nbytes: int) -> Buffer:
        assert Cuda.depth, "no context is current"
        if self.buffer_limit is not None and nbytes > self.buffer_limit:
            raise StageFailure("gpu_out_of_memory", "The GPU has not enough free memory.")
        return Buffer(nbytes)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    def event(self) -> Event:
        return Event()

    @contextmanager
    def capture(self, stream: Any) -> Iterator[Graph]:
        work: list[Any] = []
        tensorrt_standin.captures[stream.handle] = work
        try:
            yield Graph(work)
        finally:
            del tensorrt_standin.captures[stream.handle]

    def mem_info(self) -> tuple[int, int]:
        return 70 << 30, 80 << 30

    def close(self) -> None:
        assert not Cuda.depth, "closed while its context was current"


def install() -> None:
    """Put the stand-ins in the place of TensorRT, the CUDA layer and the driver, in this process and its forks."""
    from workers.backends import tensorrt as backend
    from workers.backends.tensorrt import probe as trt_probe

    sys.modules["tensorrt"] = tensorrt_standin  # type: ignore[assignment]
    trt_probe.ask_driver = lambda: dict(GPU)
    trt_probe.probe_gpu.cache_clear()
    backend.open_cuda = Cuda


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[tensorrt_standin.Behaviour]:
    """The stand-ins for the length of a test, with a signing key and a folder for timing caches."""
    from workers.backends import tensorrt as backend
    from workers.backends.tensorrt import probe as trt_probe

    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_standin)
    monkeypatch.setattr(trt_probe, "ask_driver", lambda: dict(GPU))
    monkeypatch.setattr(backend, "open_cuda", Cuda)
    behaviour = tensorrt_standin.Behaviour()
    monkeypatch.setattr(tensorrt_standin, "behaviour", behaviour)
    monkeypatch.setattr(Cuda, "depth", 0)
    monkeypatch.setattr(Buffer, "live", 0)
    trt_probe.probe_gpu.cache_clear()
    with installation.using(installation.Installation(b"k" * installation.KEY_BYTES, folder)):
        yield behaviour
    trt_probe.probe_gpu.cache_clear()
