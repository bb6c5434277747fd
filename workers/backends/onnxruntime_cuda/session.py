"""Sessions on ONNX Runtime's CUDA provider: options, the check that nothing fell back, bound runs, CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx.shape_inference
from pydantic import BaseModel, ConfigDict, Field

from app.domain.failures import FailureKind, StageFailure
from workers.devices.cuda.graphs import gpu_out_of_memory
from workers.devices.cuda.runtime import Cuda, DeviceBuffer, Event, Stream
from workers.graph import onnxruntime_messages as messages
from workers.graph.onnx_files import MODEL_FILE, read_skeleton
from workers.graph.onnx_graph import with_values
from workers.kernel import Session, TensorSpec

if TYPE_CHECKING:
    from workers.kernel import Arrays

PROVIDER = "CUDAExecutionProvider"
_NO_GRAPH = "-1"  # gpu_graph_id of runs that shall be neither captured nor replayed
_GRAPH_RUNS = 3  # allocate, capture, replay
_PROFILE_RUNS = 30
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
# Arithmetic on shapes, which ONNX Runtime computes on the CPU by design: a few bytes, and needed there.
_SHAPE_OPS = frozenset(
    (
        *("Shape", "Size", "Gather", "GatherND", "ScatterND", "Concat", "ConcatFromSequence", "Slice", "Split", "Tile"),
        *("Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Expand", "Range", "Constant", "ConstantOfShape"),
        *("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Neg", "Abs", "Sign", "Sqrt", "Floor", "Ceil", "Cast"),
        *("Where", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Not", "And", "Or", "Identity"),
        *("ReduceProd", "ReduceMax", "ReduceMin", "ReduceSum", "If", "Loop", "MemcpyToHost", "MemcpyFromHost"),
    )
)


class RuntimeOptions(BaseModel):
    """Session and provider options as JSON. What is not set stays ONNX Runtime's default; `{}` is the pure default
    session of the CUDA provider, the GPU baseline.

    `cuda_graph`: bound runs are captured once and replayed. `gpu_mem_limit_mb`: of the provider's arena. `tf32`: False
    computes float32 products in full precision. `conv_algo_search`: how cuDNN's algorithm is chosen at the first run.
    `cpu_fallback`: `refuse` fails where a node that is no shape arithmetic would run on the CPU; `report` lets it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    graph_optimization_level: Literal["disable", "basic", "extended", "all"] | None = None
    cuda_graph: bool = False
    gpu_mem_limit_mb: int | None = Field(default=None, ge=1)
    arena_extend_strategy: Literal["kNextPowerOfTwo", "kSameAsRequested"] | None = None
    tf32: bool | None = None
    prefer_nhwc: bool | None = None
    conv_algo_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"] | None = None
    cpu_fallback: Literal["refuse", "report"] = "refuse"
    session_config: dict[str, str] = Field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, exclude_defaults=True)

    def provider_options(self) -> dict[str, str]:
        named = {
            "enable_cuda_graph": "1" if self.cuda_graph else None,
            "gpu_mem_limit": None if self.gpu_mem_limit_mb is None else str(self.gpu_mem_limit_mb << 20),
            "arena_extend_strategy": self.arena_extend_strategy,
            "use_tf32": None if self.tf32 is None else str(int(self.tf32)),
            "prefer_nhwc": None if self.prefer_nhwc is None else str(int(self.prefer_nhwc)),
            "cudnn_conv_algo_search": self.conv_algo_search,
        }
        return {"device_id": "0", **{k: v for k, v in named.items() if v is not None}}


class BuildOptions(RuntimeOptions):
    """`shapes`: as in the job's spec, for the trial run."""

    shapes: dict[str, Any] | None = None


def gpu_failure(code: str, error: BaseException, *, remedy: str | None = None) -> StageFailure:
    """As `messages.runtime_failure`, with the GPU's memory told apart from the host's."""
    failure = messages.runtime_failure(code, error, remedy=remedy)
    signs = ("CUDA error 2", "CUDA failure 2", "out of memory", "BFCArena", "smaller than requested bytes")
    short = any(sign in str(error) for sign in signs)
    if failure.code == "out_of_memory" or short:
        return gpu_out_of_memory(messages.clean_message(error), failure.node)
    return failure


def open_session(model: Path, runtime: RuntimeOptions, **provider_options: str) -> tuple[Any, list[tuple[str, str]]]:
    """(An `InferenceSession` on the GPU, op type and name of its nodes on the CPU). Raises StageFailure: `load_failed`,
    `gpu_provider_missing` where the provider could not be loaded, `gpu_fallback` where nodes that are no shape
    arithmetic by their operator would run on the CPU."""
    import onnxruntime as ort

    if not model.is_file():
        raise StageFailure("load_failed", f"The engine has no file {model.name}.")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if runtime.graph_optimization_level is not None:
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel,
            {
                "disable": "ORT_DISABLE_ALL",
                "basic": "ORT_ENABLE_BASIC",
                "extended": "ORT_ENABLE_EXTENDED",
                "all": "ORT_ENABLE_ALL",
            }[runtime.graph_optimization_level],
        )
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in runtime.session_config.items():
        options.add_session_config_entry(key, value)
    _preload()
    provider = (PROVIDER, {**runtime.provider_options(), **provider_options})
    try:
        session = ort.InferenceSession(str(model), options, providers=[provider])
    except Exception as error:  # the binding raises its own classes, RuntimeError and ValueError
        raise gpu_failure("load_failed", error, remedy="Check that ONNX Runtime runs the model.") from error
    if session.get_providers()[0] != PROVIDER:  # ONNX Runtime goes on without it, on the CPU
        raise StageFailure(
            "gpu_provider_missing",
            "ONNX Runtime could not load its CUDA provider and would have run on the CPU.",
            FailureKind.INFRASTRUCTURE,
            remedy="Install the extra `gpu` (CUDA runtime, cuBLAS, cuDNN of the same CUDA version) beside the driver.",
            cacheable=False,
        )
    session.disable_fallback()  # a failed run raises; it is not tried again on the CPU
    parts = [p for p in session.get_provider_graph_assignment_info() if p.ep_name != PROVIDER]
    on_cpu = [(str(node.op_type), str(node.name)) for part in parts for node in part.get_nodes()]
    refuse_fallback(fallen_nodes(on_cpu), runtime)
    return session, on_cpu


def refuse_fallback(fallen: Mapping[str, Sequence[str]], runtime: RuntimeOptions) -> None:
    """Raises StageFailure(`gpu_fallback`) where there are any and the options refuse it."""
    if runtime.cpu_fallback == "report" or not fallen:
        return
    op, nodes = next(iter(fallen.items()))
    raise StageFailure(
        "gpu_fallback",
        f"{sum(map(len, fallen.values()))} node(s) of {', '.join(fallen)} would run on the CPU: the CUDA provider "
        "has no kernel for them.",
        node=nodes[0] or None,
        remedy=f"Use another precision or backend for this model, or replace {op}.",
    )


def fallen_nodes(on_cpu: Sequence[tuple[str, str]], model: Path | None = None) -> dict[str, list[str]]:
    """Names of the nodes that are no shape arithmetic, by op type: by their operator, and where the `model` is given
    also by what they give (`values_of_float`), which takes reading it."""
    computing = values_of_float(model, {name for op, name in on_cpu if op in _SHAPE_OPS}) if model else set()
    fallen: dict[str, list[str]] = {}
    for op, name in on_cpu:
        if op not in _SHAPE_OPS or name in computing:
            fallen.setdefault(op, []).append(name)
    return dict(sorted(fallen.items()))


@functools.cache
def _preload() -> None:
    """Load CUDA's libraries where they came as Python packages; the system's are found otherwise."""
    import onnxruntime as ort

    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
        ort.preload_dlls()


def values_of_float(model: Path, names: Collection[str]) -> set[str]:
    """Of these nodes of the main graph, those that compute on the model's inputs, and not on their shapes alone, and
    give a floating-point tensor of two axes or more: that is no shape arithmetic, whatever the operator. What ONNX's
    shape inference cannot tell is not among them."""
    if not names:  # most models
        return set()
    source = read_skeleton(model)
    with contextlib.suppress(Exception):  # it raises its own classes, for what it does not know
        source = onnx.shape_inference.infer_shapes(source)
    large = {
        value.name
        for value in (*source.graph.value_info, *source.graph.output)
        if value.type.tensor_type.elem_type in _FLOATS and len(value.type.tensor_type.shape.dim) >= 2
    }
    data = {i.name for i in source.graph.input} - {i.name for i in source.graph.initializer}
    found = set()
    for node in source.graph.node:  # in topological order
        if node.op_type in ("Shape", "Size") or not data & {*node.input}:
            continue
        data |= {*node.output}
        if node.name and node.name in names and large & {*node.output}:
            found.add(node.name)
    return found


class OnnxRuntimeCudaSession(Session):
    """A model on the GPU. `run` takes and gives host arrays; `bind` keeps inputs and outputs on the GPU. `stream`: the
    handle of a stream of the caller's to work in."""

    def __init__(self, engine: Path, runtime: RuntimeOptions, stream: int | None = None) -> None:
        self._engine = engine
        self._runtime = runtime
        ours = {} if stream is None else {"user_compute_stream": str(stream)}
        self._session, self.on_cpu = open_session(engine / MODEL_FILE, runtime, **ours)
        self._raw_inputs = list(self._session.get_inputs())
        self._raw_outputs = [o for o in self._session.get_outputs() if o.type.startswith("tensor(")]
        self._output_names = [o.name for o in self._raw_outputs]
        self._graphs = 0
        properties = self._session.get_modelmeta().custom_metadata_map
        self.inputs = tuple(with_values([_spec(i) for i in self._raw_inputs], properties))
        self.outputs = tuple(_spec(o) for o in self._raw_outputs)

    def run(self, feeds: Arrays) -> Arrays:
        """All outputs by name; raises StageFailure(`inference_failed`, `gpu_out_of_memory`)."""
        try:
            values = self._session.run(self._output_names, feeds, self._run_options(_NO_GRAPH))
        except Exception as error:  # as in `open_session`
            raise gpu_failure("inference_failed", error) from error
        return {name: np.asarray(v) for name, v in zip(self._output_names, values, strict=True)}

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        """The call on inputs that lie on the GPU and outputs that stay there; it returns when the GPU is done. With
        `cuda_graph` it is captured here and replayed by every call."""
        return self.bound(feeds)

    def bound(self, feeds: Arrays, *, wait: bool = True) -> Callable[[], Any]:
        """As `bind`; without `wait` the call returns once the work is submitted."""
        if not all(messages.is_plain_tensor(v.type) for v in [*self._raw_inputs, *self._raw_outputs]):
            return lambda: self.run(feeds)
        import onnxruntime as ort

        kept = {n: ort.OrtValue.ortvalue_from_numpy(np.asarray(a, order="C"), "cuda", 0) for n, a in feeds.items()}
        binding = self._session.io_binding()
        for name, value in kept.items():
            binding.bind_ortvalue_input(name, value)
        options = self._run_options(_NO_GRAPH)
        if self._runtime.cuda_graph:
            for name, array in self.run(feeds).items():  # a graph writes to fixed addresses: their sizes first
                place = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, "cuda", 0)
                binding.bind_ortvalue_output(name, place)
                kept[f"output {name}"] = place
            self._graphs += 1
            options = self._run_options(str(self._graphs))
            waiting = self._run_options(str(self._graphs))
        else:
            waiting = options
            for name in self._output_names:
                binding.bind_output(name, "cuda", 0)
        run = self._session.run_with_iobinding
        for _ in range(_GRAPH_RUNS if self._runtime.cuda_graph else 0):
            _checked(run, binding, waiting)
        if not wait:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def call(_kept: Any = kept) -> None:
            _checked(run, binding, options)

        return call

    def profile(self, feeds: Arrays) -> Mapping[str, Any] | None:
        """Medians in ms by CUDA events: `h2d_ms`, `compute_ms`, `d2h_ms`, `latency_ms` (their sum), and `enqueue_ms`,
        the CPU's time to submit the work; and `gpu_memory_mb`, by which the device's free memory shrank. On a session
        of its own, whose stream is ours."""
        if not all(messages.is_plain_tensor(v.type) for v in [*self._raw_inputs, *self._raw_outputs]):
            return None
        cuda = Cuda()
        with cuda.context():
            figures = _Profile(cuda, self._engine, self._runtime).measure(feeds, self.run(feeds))
        cuda.close()
        return figures

    def close(self) -> None:
        self._session = None

    def _run_options(self, graph_id: str) -> Any:
        import onnxruntime as ort

        options = ort.RunOptions()
        if self._runtime.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", graph_id)
        return options


def _checked(run: Callable[..., None], binding: Any, options: Any) -> None:
    try:
        run(binding, options)
    except Exception as error:  # as in `open_session`
        raise gpu_failure("inference_failed", error) from error


class _Profile:
    """One profiled session: page-locked host arrays, buffers on the GPU, and events between the steps."""

    def __init__(self, cuda: Cuda, engine: Path, runtime: RuntimeOptions) -> None:
        self._cuda = cuda
        self._stream: Stream = cuda.stream()
        before, _ = cuda.mem_info()
        runtime = runtime.model_copy(update={"cuda_graph": False})
        handle = str(self._stream.handle)
        self._session, _ = open_session(engine / MODEL_FILE, runtime, user_compute_stream=handle)
        self._before = before
        self._buffers: list[DeviceBuffer] = []

    def measure(self, feeds: Arrays, outputs: Arrays) -> dict[str, Any]:
        import onnxruntime as ort

        binding = self._session.io_binding()
        up = [(self._place(a, binding.bind_input, name), a) for name, a in feeds.items()]
        down = [(self._place(a, binding.bind_output, name), a) for name, a in outputs.items()]
        host_up = [self._pinned_copy(a) for _, a in up]
        host_down = [self._cuda.pinned(a.shape, a.dtype) for _, a in down]
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        marks: list[Event] = [self._cuda.event() for _ in range(4)]
        rows = []
        for _ in range(_PROFILE_RUNS + 3):
            marks[0].record(self._stream)
            for (buffer, _), array in zip(up, host_up, strict=True):
                buffer.copy_from_host(array, self._stream)
            marks[1].record(self._stream)
            start = time.perf_counter()
            self._session.run_with_iobinding(binding, options)
            enqueue = time.perf_counter() - start
            marks[2].record(self._stream)
            for (buffer, _), array in zip(down, host_down, strict=True):
                buffer.copy_to_host(array, self._stream)
            marks[3].record(self._stream)
            self._stream.synchronize()
            steps = [b.elapsed_ms(a) for a, b in pairwise(marks)]
            rows.append([*steps, sum(steps), enqueue * 1e3])
        free, _ = self._cuda.mem_info()
        del binding
        self._session = None
        for buffer in self._buffers:
            buffer.free()
        for mark in marks:
            mark.close()
        self._stream.close()
        names = ("h2d_ms", "compute_ms", "d2h_ms", "latency_ms", "enqueue_ms")
        medians = np.median(np.asarray(rows[3:]), axis=0)
        figures = {name: round(float(v), 4) for name, v in zip(names, medians, strict=True)}
        return {**figures, "gpu_memory_mb": round(max(self._before - free, 0) / 1e6, 1), "runs": _PROFILE_RUNS}

    def _place(self, array: np.ndarray[Any, Any], bind: Callable[..., None], name: str) -> DeviceBuffer:
        buffer = self._cuda.alloc(array.nbytes)
        self._buffers.append(buffer)
        bind(name, "cuda", 0, array.dtype.type, list(array.shape), buffer.ptr)
        return buffer

    def _pinned_copy(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        host = self._cuda.pinned(array.shape, array.dtype)
        host[...] = array
        return host


def _spec(node: Any) -> TensorSpec:
    return TensorSpec(node.name, messages.dtype_of(node.type), messages.shape_of(node.name, node.shape))
