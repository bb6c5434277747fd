"""Running a TensorRT plan: execution contexts on one stream, buffers by name, every returned flag checked.

The way of a call: choose a profile, set input shapes, copy inputs in, `infer_shapes`, set addresses, enqueue, copy
outputs back. A data-dependent output is allocated by TensorRT's callback while it runs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from app.domain.failures import FailureKind, StageFailure
from workers.backends.tensorrt import messages, profiles
from workers.backends.tensorrt.buffers import Binding, IoTensor, io_tensors, may_be, profiles_of, spec_of
from workers.backends.tensorrt.compiled import Compiled
from workers.backends.tensorrt.context import Execution
from workers.backends.tensorrt.cuda import Cuda
from workers.backends.tensorrt.inspect import inspection_of, profile_layers, read_inspection, weights_bytes
from workers.backends.tensorrt.library import Library
from workers.backends.tensorrt.options import RuntimeOptions
from workers.kernel import WARM_UP_RUNS, LayerTime, Session, TensorSpec
from workers.measure.layers import median_times

if TYPE_CHECKING:
    import tensorrt

    from workers.kernel import Arrays


PROFILE_RUNS = 50


class TensorRtSession(Session):
    """A loaded plan. `graph_status`: "captured", or why a CUDA graph is not used; None where none was asked for."""

    def __init__(
        self,
        library: Library,
        runtime: tensorrt.Runtime,
        engine: tensorrt.ICudaEngine,
        cuda: Cuda,
        log: messages.Log,
        options: RuntimeOptions,
        specs: Mapping[str, TensorSpec],
        opened: ExitStack,
        compiled: Compiled,
    ) -> None:
        """`opened` is what `close` ends last: the CUDA context. Raises StageFailure: `gpu_out_of_memory`,
        `load_failed`, `unsupported_io`."""
        self._library, self._compiled = library, compiled
        self._cuda, self._log, self._options, self._opened = cuda, log, options, opened
        # Freed in this order's reverse: context, engine, runtime.
        self._runtime: tensorrt.Runtime | None = runtime
        self._engine: tensorrt.ICudaEngine | None = engine
        io = io_tensors(library, engine)
        self._inputs = [t for t in io if t.is_input]
        self._outputs = [t for t in io if not t.is_input]
        self._host = frozenset(t.name for t in io if t.host)
        self.inputs = [spec_of(t, specs, options) for t in self._inputs]
        self.outputs = [spec_of(t, specs, options) for t in self._outputs]
        self.profiles = profiles_of(engine, self._inputs)
        self.graph_status: str | None = None
        self._stream = cuda.stream()
        self._live: Execution | None = self._execution()
        self._own = Binding(library, cuda, self._host)
        self._made = [weakref.ref(self._own)]

    @property
    def _bindings(self) -> list[Binding]:
        """This session's own, and those whose calls are still held."""
        return [b for b in (made() for made in self._made) if b is not None]

    @property
    def _main(self) -> Execution:
        assert self._live is not None, "the session is open"
        return self._live

    def _execution(self) -> Execution:
        """A new context of the engine; raises StageFailure: `gpu_out_of_memory`, `load_failed`."""
        assert self._engine is not None, "the session is open"
        engine, graph = self._engine, self._options.cuda_graph
        make = self._library.new_context
        context, cache = messages.guarded(
            "make a context", self._log, lambda: make(engine, cuda_graph=graph, cached=self._compiled.read())
        )
        if context is None:
            raise messages.load_failure(self._log)
        self._compiled.hold(cache)
        return Execution(context, self._stream, self._log, self._outputs, self._host)

    def run(self, feeds: Arrays) -> Arrays:
        """All outputs by name; raises StageFailure: `inference_failed`, `shape_outside_profiles`,
        `gpu_out_of_memory`."""
        binding = self._own
        self._fill(binding, feeds)
        self._copy_in(binding)
        self._main.apply(binding)
        self._main.enqueue(binding)
        host = self._copy_out(binding)
        self._stream.synchronize()
        return {t.name: self._as_declared(t, host[t.name]) for t in self._outputs}

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        """The call on these feeds, set up once: inputs in pinned memory, buffers of its own, enqueue (or the replay of
        a CUDA graph), outputs in pinned memory. Without the option `transfers` the inputs are on the GPU already and
        the outputs stay there."""
        binding = self._bound(feeds)
        launch = self._launcher(binding)
        synchronize = self._stream.synchronize
        if not self._options.transfers:

            def compute() -> None:
                launch()
                synchronize()

            return compute

        def call() -> None:
            self._copy_in(binding)
            launch()
            self._copy_out(binding)
            synchronize()

        return call

    def timings(self, feeds: Arrays, iterations: int) -> list[dict[str, float]]:
        """Milliseconds per call by CUDA events: h2d, compute, d2h; and by the host's clock: enqueue (until the launch
        returned) and total. The GPU's parts do not sum to the total: waiting and Python are in it too."""
        binding = self._bound(feeds)
        launch = self._launcher(binding)
        marks = [self._cuda.event() for _ in range(4)]
        found = []
        for _ in range(iterations):
            start = time.perf_counter_ns()
            marks[0].record(self._stream)
            self._copy_in(binding)
            marks[1].record(self._stream)
            before = time.perf_counter_ns()
            launch()
            after = time.perf_counter_ns()
            marks[2].record(self._stream)
            self._copy_out(binding)
            marks[3].record(self._stream)
            self._stream.synchronize()
            end = time.perf_counter_ns()
            h2d, compute, d2h = (marks[i + 1].elapsed_ms(marks[i]) for i in range(3))
            times = {"h2d_ms": h2d, "compute_ms": compute, "d2h_ms": d2h}
            found.append({**times, "enqueue_ms": (after - before) / 1e6, "total_ms": (end - start) / 1e6})
        return found

    def profile(self, feeds: Arrays) -> dict[str, Any]:
        """Medians of `timings` in ms, `latency_ms`, the GPU's parts together, `memory`, and how the CUDA graph went."""
        times = self.timings(feeds, PROFILE_RUNS)
        found: dict[str, Any] = {k: float(np.median([t[k] for t in times])) for k in times[0]}
        found["latency_ms"] = float(np.median([t["h2d_ms"] + t["compute_ms"] + t["d2h_ms"] for t in times]))
        return {**found, "memory": self.memory(), "cuda_graph": self.graph_status}

    def layer_times(self, feeds: Arrays, runs: int) -> list[LayerTime]:
        """Median milliseconds by layer, the slowest first, by TensorRT's own profiler. The session is of no other use
        afterwards: every call of it is profiled from then on."""
        assert self._engine is not None, "the session is open"
        found = read_inspection(inspection_of(self._library, self._engine), {})
        types = {layer["name"]: str(layer["type"] or "") for layer in found["layers"]}
        for _ in range(WARM_UP_RUNS):
            self.run(feeds)
        times = profile_layers(self._library, self._main.context)
        each: list[dict[tuple[str, str], float]] = []
        for _ in range(runs):
            times.clear()
            self.run(feeds)
            each.append({(name, types.get(name[:500], "")): ms for name, ms in times.items()})
        return median_times(each)

    def memory(self) -> dict[str, Any]:
        """Bytes: weights, activations of the profile in use, inputs and outputs; and the GPU's free and total."""
        engine = self._engine
        assert engine is not None, "the session is open"
        free, total = self._cuda.mem_info()
        return {
            "weights_bytes": weights_bytes(self._library, engine),
            "activation_bytes": int(engine.get_device_memory_size_for_profile_v2(self._main.profile)),
            "io_bytes": sum(b.buffers.total_bytes() for b in self._bindings),
            "gpu_free_bytes": free,
            "gpu_total_bytes": total,
        }

    def close(self) -> None:
        """Free everything, in the order that TensorRT wants; any number of times."""
        if self._live is None:
            return
        with suppress(StageFailure):  # what went wrong in the stream was told where it happened
            self._stream.synchronize()
        for binding in self._bindings:  # with their graphs, and the contexts of those
            binding.free()
        self._made.clear()
        self._live = None
        self._compiled.keep()
        self._engine = None
        self._runtime = None
        self._stream.close()
        self._opened.close()

    def _bound(self, feeds: Arrays) -> Binding:
        """A binding of its own that ran once: TensorRT does its lazy work, and says why where it does not run."""
        binding = Binding(self._library, self._cuda, self._host)
        self._made = [weakref.ref(b) for b in [*self._bindings, binding]]
        self._fill(binding, feeds)
        self._copy_in(binding)
        self._main.apply(binding)
        self._main.enqueue(binding)
        self._copy_out(binding)
        self._stream.synchronize()
        return binding

    def _fill(self, binding: Binding, feeds: Arrays) -> None:
        """Check the feeds, choose their profile, and lay them into pinned memory in the engine's types."""
        missing = [t.name for t in self._inputs if t.name not in feeds]
        if missing:
            raise StageFailure("inference_failed", f"There is no value for input {missing[0]!r}.", tensor=missing[0])
        binding.outputs.clear()  # of the feeds before
        binding.profile = self._profile_for({t.name: tuple(feeds[t.name].shape) for t in self._inputs})
        for tensor, spec in zip(self._inputs, self.inputs, strict=True):
            given = feeds[tensor.name]
            if given.dtype != tensor.dtype and str(given.dtype) != spec.dtype:
                raise StageFailure(
                    "inference_failed",
                    f"Input {tensor.name!r} has type {given.dtype}, the model takes {spec.dtype}.",
                    FailureKind.MODEL,
                    tensor=tensor.name,
                )
            array = binding.buffers.host(tensor.name, given.shape, tensor.dtype)
            array[...] = given
            binding.arrays[tensor.name] = array

    def _profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        wrong = next((t for t in self._inputs if not may_be(t.shape, shapes[t.name])), None)
        if wrong is not None:
            raise profiles.outside_profiles(wrong.name, shapes[wrong.name], self.profiles)
        if not self.profiles:
            return self._options.profile or 0
        first = self._options.profile
        allowed = self.profiles if first is None else self.profiles[first : first + 1]
        if not allowed:
            count = len(self.profiles)
            raise StageFailure("invalid_profile", f"The engine has {count} profiles, none with number {first}.")
        found = profiles.best_profile(allowed, shapes)
        if found is None:
            # The input that no profile holds; where each is held by some, but never all by one, the first.
            alone = (n for n in allowed[0] if not any(profiles.fits(p[n], shapes[n]) for p in allowed))
            name = next(alone, next(iter(allowed[0])))
            raise profiles.outside_profiles(name, shapes[name], allowed)
        return found + (first or 0)

    def _copy_in(self, binding: Binding) -> None:
        """Inputs to the GPU. Shape tensors stay on the host, where TensorRT reads them."""
        for name, array in binding.arrays.items():
            if name not in self._host:
                binding.buffers.device(name, array.nbytes).copy_from_host(array, self._stream)

    def _copy_out(self, binding: Binding) -> dict[str, Any]:
        """Outputs in pinned memory, once the stream is synchronized."""
        if any(shape is None for shape in binding.outputs.values()):
            self._stream.synchronize()  # only then are their shapes known
        host = {}
        for tensor in self._outputs:
            shape = binding.outputs[tensor.name]
            if shape is None:
                shape = binding.allocator.shapes[tensor.name]
            array = binding.buffers.host(tensor.name, shape, tensor.dtype)
            if not tensor.host:
                binding.buffers.device(tensor.name, array.nbytes).copy_to_host(array, self._stream)
            host[tensor.name] = array
        return host

    def _as_declared(self, tensor: IoTensor, array: Any) -> Any:
        """A copy of its own, in the type that the model declares."""
        return np.array(array, dtype=self._options.declared.get(tensor.name, tensor.dtype))

    def _launcher(self, binding: Binding) -> Callable[[], None]:
        """One enqueue, or the replay of a captured one. As trtexec does it: an uncaptured run came first, the capture
        is on a stream of its own, and where it fails the eager way is taken and the reason kept. A graph has a context
        of its own, which nobody tells anything else afterwards."""

        def eager() -> None:
            self._main.apply(binding)
            self._main.enqueue(binding)

        if not self._options.cuda_graph:
            return eager
        if self._library.compiles_when_loaded:
            self.graph_status = "left to the runtime"
            return eager
        if any(shape is None for shape in binding.outputs.values()):
            self.graph_status = "not captured: an output's shape depends on the data"
            return eager
        try:
            own = self._execution()
            own.apply(binding)
            own.enqueue(binding)
            self._stream.synchronize()
            with self._cuda.capture(self._stream) as graph:
                own.enqueue(binding)
        except StageFailure as failure:
            self.graph_status = f"not captured: {failure.detail}"
            self._stream.synchronize()
            return eager
        self.graph_status = "captured"
        binding.graph, binding.execution = graph, own
        return lambda: binding.graph.launch(self._stream)  # holds the binding, whose addresses are in the graph
