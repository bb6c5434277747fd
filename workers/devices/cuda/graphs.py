"""Graph capture through cuda-bindings, its checked calls, and how CUDA fails."""

from __future__ import annotations

import contextlib
from typing import Any

from app.domain.failures import StageFailure, infrastructure_failure

_INSTALL = "Install a CUDA driver, and PyCUDA or cuda-bindings (the extra `gpu`), on a machine with an NVIDIA GPU."


def cuda_unavailable(reason: str) -> StageFailure:
    return infrastructure_failure("cuda_unavailable", reason, remedy=_INSTALL)


def cuda_error(what: str) -> StageFailure:
    return infrastructure_failure(
        "cuda_error", f"CUDA failed: {what[:400]}", remedy="Try again; look at the GPU's state with nvidia-smi."
    )


def gpu_out_of_memory(what: str, node: str | None = None) -> StageFailure:
    return StageFailure(
        "gpu_out_of_memory",
        f"The GPU has not enough free memory: {what[:400]}",
        node=node,
        remedy="Use smaller shapes or batch sizes, a lower precision, or a GPU with more memory.",
        cacheable=False,
    )


class Capture:
    """A CUDA graph through cuda-bindings: `begin`, the work, `end` (or `abandon`), then `launch` as often as wanted."""

    def __init__(self) -> None:
        try:
            self._driver, self._call = bindings()
        except ImportError as error:
            raise cuda_unavailable("CUDA graphs need cuda-bindings, which is not installed.") from error
        self._graph: Any = None
        self._executable: Any = None

    def begin(self, stream: int) -> None:
        """Thread-local: what other threads do does not end the capture."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._driver.CUstream(stream), mode)

    def end(self, stream: int) -> None:
        self._graph = self._call("cuStreamEndCapture", self._driver.CUstream(stream))
        try:
            self._executable = self._call("cuGraphInstantiate", self._graph, 0)
        except StageFailure:
            self.destroy()
            raise

    def abandon(self, stream: int) -> None:
        """End a capture whose work failed; what it recorded is thrown away."""
        with contextlib.suppress(StageFailure):
            self._graph = self._call("cuStreamEndCapture", self._driver.CUstream(stream))
        self.destroy()

    def launch(self, stream: int) -> None:
        if self._executable is None:
            raise cuda_error("there is no graph to launch: its capture has not ended, or failed")
        self._call("cuGraphLaunch", self._executable, self._driver.CUstream(stream))

    def destroy(self) -> None:
        executable, self._executable = self._executable, None
        graph, self._graph = self._graph, None
        if executable is not None:
            self._call("cuGraphExecDestroy", executable)
        if graph is not None and int(graph):
            self._call("cuGraphDestroy", graph)


def bindings() -> tuple[Any, Any]:
    """The driver module of cuda-bindings, initialized, and a function that calls it by name and checks."""
    from cuda.bindings import driver

    def call(name: str, *args: Any) -> Any:
        status, *values = getattr(driver, name)(*args)
        if status != driver.CUresult.CUDA_SUCCESS:
            _, text = driver.cuGetErrorString(status)
            words = f"{name}: {text.decode(errors='replace') if text else status}"
            if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise gpu_out_of_memory(words)
            if status in (driver.CUresult.CUDA_ERROR_NO_DEVICE, driver.CUresult.CUDA_ERROR_INVALID_DEVICE):
                raise cuda_unavailable(f"There is no usable NVIDIA GPU: {words}")
            raise cuda_error(words)
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    call("cuInit", 0)
    return driver, call
