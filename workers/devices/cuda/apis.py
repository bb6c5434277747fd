"""The two CUDA libraries that `runtime` can work with, brought to one shape.

Handles are whatever the library uses; `…_handle` and `mem_pointer` give the plain integers that others take.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from app.domain.failures import StageFailure
from workers.devices.cuda.graphs import bindings, cuda_error, cuda_unavailable, gpu_out_of_memory

Array = np.ndarray[Any, Any]


class Api(ABC):
    """What `runtime` needs of a library. All methods but `device_count` and `retain` need the context to be current."""

    name: ClassVar[str]

    @abstractmethod
    def device_count(self) -> int: ...

    @abstractmethod
    def retain(self, device: int) -> None:
        """Retain the primary context of `device`; `push`, `pop` and `release` mean this one."""

    @abstractmethod
    def push(self) -> None: ...

    @abstractmethod
    def pop(self) -> None: ...

    @abstractmethod
    def release(self) -> None: ...

    @abstractmethod
    def stream_create(self) -> Any: ...

    @abstractmethod
    def stream_handle(self, stream: Any) -> int: ...

    @abstractmethod
    def stream_synchronize(self, stream: Any) -> None: ...

    @abstractmethod
    def stream_destroy(self, stream: Any) -> None: ...

    @abstractmethod
    def event_create(self) -> Any: ...

    @abstractmethod
    def event_record(self, event: Any, stream: Any) -> None: ...

    @abstractmethod
    def event_synchronize(self, event: Any) -> None: ...

    @abstractmethod
    def event_elapsed_ms(self, start: Any, end: Any) -> float: ...

    @abstractmethod
    def event_destroy(self, event: Any) -> None: ...

    @abstractmethod
    def mem_alloc(self, nbytes: int) -> Any: ...

    @abstractmethod
    def mem_pointer(self, memory: Any) -> int: ...

    @abstractmethod
    def mem_free(self, memory: Any) -> None: ...

    @abstractmethod
    def copy_to_device(self, memory: Any, array: Array, stream: Any) -> None: ...

    @abstractmethod
    def copy_to_host(self, array: Array, memory: Any, stream: Any) -> None: ...

    @abstractmethod
    def pinned(self, nbytes: int) -> Array:
        """Page-locked bytes as an array of uint8."""

    @abstractmethod
    def mem_info(self) -> tuple[int, int]: ...


def installed() -> bool:
    """Whether one of the libraries is there; imports neither."""
    return _has("pycuda.driver") or _has("cuda.bindings.driver")


def open_api(library: str = "auto") -> Api:
    """PyCUDA where it can be imported (`auto`), else cuda-bindings. Raises StageFailure(`cuda_unavailable`)."""
    reasons = []
    for kind in (PyCudaApi, BindingsApi):
        if library not in ("auto", kind.name):
            continue
        try:
            return kind()
        except StageFailure:
            raise
        except Exception as error:  # not installed, built for another CUDA, or no driver: each raises its own class
            reasons.append(f"{kind.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    raise cuda_unavailable("CUDA cannot be used here. " + "; ".join(reasons))


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


class PyCudaApi(Api):
    name: ClassVar[str] = "pycuda"

    def __init__(self) -> None:
        from pycuda import driver

        self._driver = driver
        self._context: Any = None
        with self._errors():
            driver.init()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._driver.MemoryError as error:
            raise gpu_out_of_memory(str(error)) from error
        except self._driver.Error as error:
            if "no device" in str(error) or "no CUDA-capable device" in str(error):
                raise cuda_unavailable(f"There is no usable NVIDIA GPU: {error}") from error
            raise cuda_error(str(error)) from error

    def device_count(self) -> int:
        with self._errors():
            return int(self._driver.Device.count())

    def retain(self, device: int) -> None:
        with self._errors():
            self._context = self._driver.Device(device).retain_primary_context()

    def push(self) -> None:
        with self._errors():
            self._context.push()

    def pop(self) -> None:
        with self._errors():
            self._driver.Context.pop()

    def release(self) -> None:
        self._context = None  # PyCUDA releases it with the last object made in it

    def stream_create(self) -> Any:
        with self._errors():
            return self._driver.Stream(1)  # CU_STREAM_NON_BLOCKING: not in step with the default stream

    def stream_handle(self, stream: Any) -> int:
        return int(stream.handle)

    def stream_synchronize(self, stream: Any) -> None:
        with self._errors():
            stream.synchronize()

    def stream_destroy(self, stream: Any) -> None:
        """PyCUDA destroys it when its last reference goes."""

    def event_create(self) -> Any:
        with self._errors():
            return self._driver.Event()

    def event_record(self, event: Any, stream: Any) -> None:
        with self._errors():
            event.record(stream)

    def event_synchronize(self, event: Any) -> None:
        with self._errors():
            event.synchronize()

    def event_elapsed_ms(self, start: Any, end: Any) -> float:
        with self._errors():
            return float(end.time_since(start))

    def event_destroy(self, event: Any) -> None:
        """As `stream_destroy`."""

    def mem_alloc(self, nbytes: int) -> Any:
        with self._errors():
            return self._driver.mem_alloc(nbytes)

    def mem_pointer(self, memory: Any) -> int:
        return int(memory)

    def mem_free(self, memory: Any) -> None:
        with self._errors():
            memory.free()

    def copy_to_device(self, memory: Any, array: Array, stream: Any) -> None:
        with self._errors():
            self._driver.memcpy_htod_async(memory, array, stream)

    def copy_to_host(self, array: Array, memory: Any, stream: Any) -> None:
        with self._errors():
            self._driver.memcpy_dtoh_async(array, memory, stream)

    def pinned(self, nbytes: int) -> Array:
        with self._errors():
            raw: Array = self._driver.pagelocked_empty((nbytes,), np.uint8)
            return raw

    def mem_info(self) -> tuple[int, int]:
        with self._errors():
            free, total = self._driver.mem_get_info()
            return int(free), int(total)


class BindingsApi(Api):
    name: ClassVar[str] = "cuda-bindings"

    def __init__(self) -> None:
        self._driver, self._call = bindings()
        self._device: Any = None
        self._context: Any = None

    def device_count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def retain(self, device: int) -> None:
        self._device = self._call("cuDeviceGet", device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)

    def push(self) -> None:
        self._call("cuCtxPushCurrent", self._context)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent")

    def release(self) -> None:
        self._context = None
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def stream_create(self) -> Any:
        return self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def stream_handle(self, stream: Any) -> int:
        return int(stream)

    def stream_synchronize(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def stream_destroy(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def event_create(self) -> Any:
        return self._call("cuEventCreate", 0)

    def event_record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def event_synchronize(self, event: Any) -> None:
        self._call("cuEventSynchronize", event)

    def event_elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def event_destroy(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def mem_alloc(self, nbytes: int) -> Any:
        pointer = self._call("cuMemAlloc", nbytes)
        memory = _Memory(int(pointer))
        # A buffer nobody frees is freed with its object; where the context is gone, so is the memory.
        memory.finalizer = weakref.finalize(memory, _quietly, self._driver.cuMemFree, int(pointer))
        memory.finalizer.atexit = False
        return memory

    def mem_pointer(self, memory: Any) -> int:
        return int(memory.pointer)

    def mem_free(self, memory: Any) -> None:
        memory.finalizer.detach()
        self._call("cuMemFree", memory.pointer)

    def copy_to_device(self, memory: Any, array: Array, stream: Any) -> None:
        self._call("cuMemcpyHtoDAsync", memory.pointer, array.ctypes.data, array.nbytes, stream)

    def copy_to_host(self, array: Array, memory: Any, stream: Any) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, memory.pointer, array.nbytes, stream)

    def pinned(self, nbytes: int) -> Array:
        # PORTABLE: locked for every context, as its finalizer may run in another.
        pointer = int(self._call("cuMemHostAlloc", nbytes, int(self._driver.CU_MEMHOSTALLOC_PORTABLE)))
        memory = (ctypes.c_uint8 * nbytes).from_address(pointer)
        weakref.finalize(memory, _quietly, self._driver.cuMemFreeHost, pointer).atexit = False
        return np.ctypeslib.as_array(memory)

    def mem_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)


class _Memory:
    finalizer: Any

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer


def _quietly(function: Any, pointer: int) -> None:
    """A finalizer's call: nobody is there to tell, and at worst the context is gone with its memory."""
    with contextlib.suppress(Exception):
        function(pointer)
