"""An execution context of TensorRT, and what it was told last: telling it again costs time in every call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from app.domain.failures import StageFailure
from workers.backends.tensorrt import messages
from workers.backends.tensorrt.buffers import Binding, IoTensor
from workers.backends.tensorrt.cuda import Stream

if TYPE_CHECKING:
    import tensorrt


class Execution:
    """One context on one stream. `host`: names of tensors that TensorRT reads or writes in host memory."""

    def __init__(
        self,
        context: tensorrt.IExecutionContext,
        stream: Stream,
        log: messages.Log,
        outputs: Sequence[IoTensor],
        host: Collection[str],
    ) -> None:
        self.context = context
        self.profile = 0
        self._stream, self._log, self._outputs, self._host = stream, log, outputs, host
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocating: Any = None

    def apply(self, binding: Binding) -> None:
        """Tell the context profile, shapes and addresses of this binding, where they differ from what it was told."""
        log, context = self._log, self.context
        if binding.profile != self.profile:
            ok = context.set_optimization_profile_async(binding.profile, self._stream.handle)
            messages.called(f"switch to optimization profile {binding.profile}", ok, log)
            self._stream.synchronize()
            self.profile = binding.profile
            self._shapes.clear()
        changed = bool(self._host) or not binding.outputs
        for name, array in binding.arrays.items():
            if self._shapes.get(name) != array.shape:
                ok = context.set_input_shape(name, tuple(array.shape))
                messages.called(f"take shape {list(array.shape)}", ok, log, tensor=name)
                self._shapes[name] = array.shape
                changed = True
            on_host = name in self._host
            self._set_address(
                name, int(array.ctypes.data if on_host else binding.buffers.device(name, array.nbytes).ptr)
            )
        if changed:
            self._infer_outputs(binding)
        for tensor in self._outputs:
            self._place_output(binding, tensor)

    def enqueue(self, binding: Binding) -> None:
        ok = messages.guarded("run", self._log, lambda: self.context.execute_async_v3(self._stream.handle))
        self._allocating = binding.allocator
        failure, binding.allocator.failure = binding.allocator.failure, None
        if failure is not None:
            raise failure
        messages.called("run the engine", ok, self._log)

    def _infer_outputs(self, binding: Binding) -> None:
        lacking = messages.guarded("infer shapes", self._log, self.context.infer_shapes)
        if lacking:
            raise StageFailure(
                "inference_failed", f"TensorRT needs more to know the shapes: {', '.join(lacking)}.", tensor=lacking[0]
            )
        for tensor in self._outputs:
            shape = tuple(self.context.get_tensor_shape(tensor.name))
            binding.outputs[tensor.name] = None if any(d < 0 for d in shape) else shape

    def _place_output(self, binding: Binding, tensor: IoTensor) -> None:
        shape, name = binding.outputs[tensor.name], tensor.name
        if shape is None:
            if self._allocating is not binding.allocator or name in self._addresses:
                ok = self.context.set_output_allocator(name, binding.allocator)
                messages.called("take an output allocator", ok, self._log, tensor=name)
                self._addresses.pop(name, None)
        elif tensor.host:
            self._set_address(name, int(binding.buffers.host(name, shape, tensor.dtype).ctypes.data))
        else:
            nbytes = int(np.prod(shape, dtype=np.int64)) * tensor.dtype.itemsize
            self._set_address(name, int(binding.buffers.device(name, nbytes).ptr))

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            ok = self.context.set_tensor_address(name, address)
            messages.called("take a memory address", ok, self._log, tensor=name)
            self._addresses[name] = address
