"""Inputs and outputs of a TensorRT engine, and the memory they live in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from app.domain.failures import StageFailure
from workers.backends.tensorrt.cuda import Cuda
from workers.backends.tensorrt.library import Library
from workers.backends.tensorrt.options import RuntimeOptions
from workers.backends.tensorrt.profiles import Range
from workers.kernel import TensorSpec

if TYPE_CHECKING:
    import tensorrt

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class IoTensor:
    """An input or output of the engine. `dtype`: the engine's; `host`: its data lies in host memory (shape tensors)."""

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    dtype_name: str
    shape: tuple[int, ...]  # -1 where it depends on the inputs
    host: bool


def io_tensors(library: Library, engine: tensorrt.ICudaEngine) -> list[IoTensor]:
    """All inputs and outputs, in the engine's order; raises StageFailure(`unsupported_io`) for what numpy has not."""
    trt = library.load()
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = str(engine.get_tensor_dtype(name).name)
        linear = engine.get_tensor_format(name) == trt.TensorFormat.LINEAR
        if kind not in _DTYPES or not linear:
            raise StageFailure(
                "unsupported_io",
                f"The engine's tensor {name!r} has type {kind}{'' if linear else ' in a vectorized layout'}, which "
                "cannot be handed over as an array.",
                tensor=name,
                remedy="Export the model with float32, float16 or integer inputs and outputs.",
            )
        dtype = _numpy(_DTYPES[kind])
        if engine.get_tensor_bytes_per_component(name) not in (dtype.itemsize, -1):
            raise StageFailure("unsupported_io", f"TensorRT stores {name!r} in another size than {dtype}.", tensor=name)
        found.append(
            IoTensor(
                name,
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                dtype,
                _DTYPES[kind],
                tuple(engine.get_tensor_shape(name)),
                engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            )
        )
    return found


def may_be(declared: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(declared) == len(shape) and all(d in (-1, s) for d, s in zip(declared, shape, strict=True))


def spec_of(tensor: IoTensor, specs: Mapping[str, TensorSpec], options: RuntimeOptions) -> TensorSpec:
    """As the model names its axes, where the sidecar knows; in the model's type."""
    known = specs.get(tensor.name)
    if known is not None and len(known.shape) == len(tensor.shape):
        named = tuple(k if d < 0 else d for k, d in zip(known.shape, tensor.shape, strict=True))
    else:
        named = tuple(d if d >= 0 else f"{tensor.name}_dim_{i}" for i, d in enumerate(tensor.shape))
    return TensorSpec(tensor.name, options.declared.get(tensor.name, tensor.dtype_name), named)


def profiles_of(engine: tensorrt.ICudaEngine, inputs: Sequence[IoTensor]) -> list[dict[str, Range]]:
    """Of the inputs whose shapes are free; shape tensors have ranges of values, which TensorRT checks itself."""
    free = [t for t in inputs if any(d < 0 for d in t.shape)]
    if not free:
        return []
    found = []
    for index in range(engine.num_optimization_profiles):
        ranges = {}
        for tensor in free:
            low, opt, high = (tuple(d) for d in engine.get_tensor_profile_shape(tensor.name, index))
            ranges[tensor.name] = (low, opt, high)
        found.append(ranges)
    return found


def _numpy(name: str) -> np.dtype[Any]:
    if name in ("bfloat16", "float8_e4m3fn"):
        import ml_dtypes

        narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return narrow
    return np.dtype(name)


class Buffers:
    """Device and pinned host memory by name, which only grow. A host array is a view of the memory's front."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._device: dict[str, Any] = {}
        self._host: dict[str, Any] = {}

    def device(self, name: str, nbytes: int) -> Any:
        """At least `nbytes`, at the same address as long as it is large enough."""
        found = self._device.get(name)
        if found is None or found.nbytes < nbytes:
            if found is not None:
                del self._device[name]
                found.free()  # before the larger one: both may not fit
            found = self._device[name] = self._cuda.alloc(max(nbytes, 1))
        return found

    def host(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        found = self._host.get(name)
        if found is None or found.nbytes < nbytes:
            found = self._host[name] = self._cuda.pinned((max(nbytes, 1),), np.uint8)
        return found[:nbytes].view(dtype).reshape(shape)

    def total_bytes(self) -> int:
        return sum(b.nbytes for b in self._device.values())

    def free(self) -> None:
        for buffer in self._device.values():
            buffer.free()
        self._device.clear()
        self._host.clear()


def make_allocator(library: Library, buffers: Buffers, host: Collection[str]) -> Any:
    """A `trt.IOutputAllocator` that allocates in `buffers` (for tensors of `host`, where the dimensions are an output,
    in host memory) and keeps the shapes that it was told, by tensor name."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.load()

    class Allocator(trt.IOutputAllocator):
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.failure: Exception | None = None

        def reallocate_output(self, tensor_name: str, _memory: int, size: int, _alignment: int) -> int:
            try:
                if tensor_name in host:
                    return int(buffers.host(tensor_name, (max(size, 1),), np.dtype(np.uint8)).ctypes.data)
                return int(buffers.device(tensor_name, size).ptr)
            except Exception as error:  # TensorRT takes a null address for "no memory"; the reason is kept
                self.failure = error
                return 0

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, _stream: int
        ) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shapes[tensor_name] = tuple(shape)

    return Allocator()


class Binding:
    """Feeds with memory of their own: what one call needs, so that calls on several feeds can alternate. It lives as
    long as its call: a benchmark binds many, one batch size after the other."""

    def __init__(self, library: Library, cuda: Cuda, host: Collection[str]) -> None:
        self.buffers = Buffers(cuda)
        self.allocator = make_allocator(library, self.buffers, host)
        self.arrays: dict[str, Any] = {}  # inputs, pinned, in the engine's types
        self.profile = 0
        self.outputs: dict[str, tuple[int, ...] | None] = {}  # None: known once it ran
        self.graph: Any = None
        self.execution: Any = None  # the context that the graph was captured from

    def free(self) -> None:
        graph, self.graph = self.graph, None
        if graph is not None:
            graph.close()
        self.execution = None
        self.arrays.clear()
        self.buffers.free()

    def __del__(self) -> None:
        with suppress(Exception):  # nobody is there to tell
            self.free()
