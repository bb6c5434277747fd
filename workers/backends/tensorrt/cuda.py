"""What the TensorRT runner needs of CUDA, as a protocol, and the one place that opens it."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

from app.domain.failures import FailureKind, StageFailure


class Stream(Protocol):
    @property
    def handle(self) -> int:
        """The CUDA stream as an integer; never the default stream."""

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class DeviceBuffer(Protocol):
    @property
    def ptr(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def copy_from_host(self, array: Any, stream: Any) -> None:
        """Asynchronous where `array` is pinned; it must stay alive until the stream has passed."""

    def copy_to_host(self, array: Any, stream: Any) -> None: ...

    def free(self) -> None: ...


class Event(Protocol):
    def record(self, stream: Any) -> None: ...

    def elapsed_ms(self, since: Any) -> float:
        """Milliseconds from `since` to this event; waits for this one."""


class Graph(Protocol):
    def launch(self, stream: Any) -> None: ...

    def close(self) -> None: ...


class Cuda(Protocol):
    """One GPU in its primary context, which TensorRT uses too. Everything it gives belongs to the thread that has the
    context."""

    def context(self) -> AbstractContextManager[Any]:
        """Makes the primary context current in this thread."""

    def stream(self) -> Any: ...

    def alloc(self, nbytes: int) -> Any: ...

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A page-locked numpy array."""

    def event(self) -> Any: ...

    def capture(self, stream: Any) -> AbstractContextManager[Any]:
        """Captures, thread-local, what is enqueued on `stream` inside the block; gives the graph. Where the block
        raises, the capture is ended and the stream usable again."""

    def mem_info(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""

    def close(self) -> None: ...


def open_cuda() -> Cuda:
    """Raises StageFailure(`cuda_unavailable`) where PyCUDA is not installed or there is no driver."""
    try:
        layer = importlib.import_module("workers.devices.cuda.runtime")
        return cast("Cuda", layer.Cuda())
    except StageFailure:
        raise
    except ImportError as error:
        raise StageFailure(
            "cuda_unavailable",
            f"The CUDA libraries for Python cannot be imported: {error}.",
            FailureKind.INFRASTRUCTURE,
            remedy="Install the extra with pip install 'anneal[tensorrt]' on a machine with an NVIDIA driver.",
            cacheable=False,
        ) from error
