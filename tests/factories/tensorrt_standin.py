"""A stand-in for the `tensorrt` module, for machines without TensorRT: what the service uses of its API and no more.

`tests/contract/test_tensorrt_binding.py` checks its surface against the real binding. A plan holds the ONNX; ONNX
Runtime executes it on host memory that the addresses point to. How it misbehaves is set in `behaviour`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import onnx
import onnxruntime

__version__ = "11.4.0.106"
MAGIC = b"STANDIN1"
# Work that is being captured, by stream handle: `tests.factories.cuda_standin` opens the list.
captures: dict[int, list[Any]] = {}


@dataclass
class Behaviour:
    """`unknown_ops`: the parser refuses them. `build_error`: what is logged before a build gives None;
    `build_error_ops`: the same, for graphs with such an op. `step_seconds`: how long a build step takes; `slow_ops`: in
    graphs with such an op. `shape_inputs`: inputs that set shapes. `fail_capture`: an enqueue in a capture fails.
    `old_inspector`: TensorRT 10's field names."""

    unknown_ops: frozenset[str] = frozenset()
    build_error: str | None = None
    build_error_ops: Mapping[str, str] = field(default_factory=dict)
    slow_ops: Mapping[str, float] = field(default_factory=dict)
    load_error: str | None = None
    no_driver: bool = False
    step_seconds: float = 0.0
    shape_inputs: frozenset[str] = frozenset()
    fail_capture: bool = False
    fail_enqueue: bool = False
    old_inspector: bool = False
    builds: list[Any] = field(default_factory=list)
    enqueued: int = 0
    plugins_registered: bool = False


behaviour = Behaviour()


class DataType(IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


class BuilderFlag(IntEnum):
    (
        TF32,
        SPARSE_WEIGHTS,
        VERSION_COMPATIBLE,
        EXCLUDE_LEAN_RUNTIME,
        EDITABLE_TIMING_CACHE,
        DISABLE_TIMING_CACHE,
        ERROR_ON_TIMING_CACHE_MISS,
    ) = range(7)


class HardwareCompatibilityLevel(IntEnum):
    NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)


class ProfilingVerbosity(IntEnum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(IntEnum):
    WORKSPACE = 0


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(IntEnum):
    DEVICE, HOST = range(2)


class TensorFormat(IntEnum):
    LINEAR = 0


class LayerInformationFormat(IntEnum):
    ONELINE, JSON = range(2)


class EngineStat(IntEnum):
    TOTAL_WEIGHTS_SIZE = 0


class ErrorCode(IntEnum):
    INTERNAL_ERROR, UNSUPPORTED_NODE, MODEL_DESERIALIZE_FAILED = 1, 8, 3


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.made = True

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    WARNING = ILogger.Severity.WARNING

    def __init__(self, min_severity: ILogger.Severity = ILogger.Severity.WARNING) -> None:
        super().__init__()

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        sys.stderr.write(f"{severity.name} {msg}\n")


def nptype(trt_type: DataType) -> Any:
    return next(dtype.type for kind, dtype in _TYPES.values() if kind == trt_type)


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    behaviour.plugins_registered = True
    return True


class IProgressMonitor:
    def __init__(self) -> None:
        self.made = True


class IProfiler:
    def __init__(self) -> None:
        self.made = True


class IOutputAllocator:
    def __init__(self) -> None:
        self.made = True


class Dims(tuple[int, ...]):
    def __new__(cls, shape: Any = ()) -> Dims:
        return super().__new__(cls, [int(d) for d in shape])


def _host_memory(content: bytes) -> Any:
    """What gives a buffer, as `IHostMemory` does; before Python 3.12 only C types can."""
    return np.frombuffer(content, np.uint8)


class ITensor:
    def __init__(self, info: onnx.ValueInfoProto, *, is_shape_tensor: bool) -> None:
        self.name = info.name
        self.is_shape_tensor = is_shape_tensor
        self.shape = _dims(info)


def _dims(info: onnx.ValueInfoProto) -> Dims:
    dims = info.type.tensor_type.shape.dim
    return Dims([d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1 for d in dims])


_TYPES = {
    onnx.TensorProto.FLOAT: (DataType.FLOAT, np.dtype(np.float32)),
    onnx.TensorProto.DOUBLE: (DataType.FLOAT, np.dtype(np.float32)),
    onnx.TensorProto.FLOAT16: (DataType.HALF, np.dtype(np.float16)),
    onnx.TensorProto.INT64: (DataType.INT64, np.dtype(np.int64)),
    onnx.TensorProto.INT32: (DataType.INT32, np.dtype(np.int32)),
    onnx.TensorProto.INT8: (DataType.INT8, np.dtype(np.int8)),
    onnx.TensorProto.UINT8: (DataType.UINT8, np.dtype(np.uint8)),
    onnx.TensorProto.BOOL: (DataType.BOOL, np.dtype(np.bool_)),
}


class INetworkDefinition:
    def __init__(self) -> None:
        self._model = onnx.ModelProto()
        self._inputs: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._model.graph.output)

    def get_input(self, index: int) -> ITensor:
        info = self._inputs[index]
        return ITensor(info, is_shape_tensor=info.name in behaviour.shape_inputs)


class ParserError:
    def __init__(self, index: int, node: onnx.NodeProto) -> None:
        self._index, self._node = index, node

    def code(self) -> ErrorCode:
        return ErrorCode.UNSUPPORTED_NODE

    def desc(self) -> str:
        return f"No importer registered for op: {self._node.op_type}"

    def node(self) -> int:
        return self._index

    def func(self) -> str:
        return f"check{self._node.op_type}"

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    def parse_from_file(self, model: str) -> bool:
        try:
            found = onnx.load(model)
        except Exception as error:
            self._logger.log(ILogger.Severity.ERROR, f"MODEL_DESERIALIZE_FAILED: {error}")
            return False
        nodes = enumerate(found.graph.node)
        self._errors = [ParserError(i, n) for i, n in nodes if n.op_type in behaviour.unknown_ops]
        stored = {t.name for t in found.graph.initializer}
        self._network._model = found
        self._network._inputs = [i for i in found.graph.input if i.name not in stored]
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}
        self._values: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._shapes or self._values)

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        if not len(min) == len(opt) == len(max):
            raise ValueError("the ranks differ")
        self._shapes[input] = [list(min), list(opt), list(max)]

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._values[input] = (min, opt, max)


class ITimingCache:
    def __init__(self, keys: set[str]) -> None:
        self._keys = keys

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._keys |= input_cache._keys
        return True

    def serialize(self) -> Any:
        return _host_memory(json.dumps({"version": __version__, "keys": sorted(self._keys)}).encode())


class IBuilderConfig:
    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._pools: dict[MemoryPoolType, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self.builder_optimization_level = 3
        self.avg_timing_iterations = 1
        self.max_num_tactics = -1
        self.max_aux_streams = -1
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.progress_monitor: Any = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache | None:
        content = bytes(serialized_timing_cache)
        if not content:
            return ITimingCache(set())
        try:
            found = json.loads(content)
        except ValueError:
            return None
        return ITimingCache(set(found["keys"])) if found["version"] == __version__ else None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if behaviour.no_driver:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        if not getattr(logger, "made", False):
            raise TypeError("the base class of the logger was not initialized")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        behaviour.builds.append(config)
        model = network._model
        dynamic = [i.name for i in network._inputs if -1 in _dims(i)]
        for profile in config._profiles or [IOptimizationProfile()]:
            if any(name not in profile._shapes for name in dynamic):
                return self._refuse("Network has dynamic inputs, but no optimization profile has been defined.")
        keys = {f"{n.op_type}:{n.name}" for n in model.graph.node}
        known = config._cache._keys if config._cache is not None else set()
        if BuilderFlag.ERROR_ON_TIMING_CACHE_MISS in config._flags and keys - known:
            return self._refuse("Timing cache miss: a layer is not in the timing cache.")
        ops = {n.op_type for n in model.graph.node}
        seconds = max([behaviour.step_seconds, *(s for op, s in behaviour.slow_ops.items() if op in ops)])
        if not self._steps(config.progress_monitor, len(model.graph.node), seconds):
            return None
        errors = [
            *filter(None, [behaviour.build_error]),
            *(e for o, e in behaviour.build_error_ops.items() if o in ops),
        ]
        if errors:
            return self._refuse(errors[0])
        if config._cache is not None:
            config._cache._keys |= keys
        flags = sorted(str(flag) for flag in config._flags)  # another plan where they differ, as with TensorRT
        facts = {"version": __version__, "profiles": [p._shapes for p in config._profiles], "flags": flags}
        head = json.dumps(facts).encode()
        content = model.SerializeToString()
        return _host_memory(MAGIC + len(head).to_bytes(8, "little") + head + content)

    def _refuse(self, why: str) -> None:
        self._logger.log(ILogger.Severity.ERROR, why)

    def _steps(self, monitor: Any, count: int, seconds: float) -> bool:
        """As TensorRT: nested phases, told from another thread, whose exceptions end the build without a word."""
        going = [True]

        def work() -> None:
            try:
                monitor.phase_start("Building Engine", None, 2)
                monitor.phase_start("Timing", "Building Engine", count)
                for step in range(count):
                    time.sleep(seconds)
                    if not monitor.step_complete("Timing", step):
                        going[0] = False
                        break
                monitor.phase_finish("Timing")
                going[0] = going[0] and monitor.step_complete("Building Engine", 0)
                monitor.phase_finish("Building Engine")
            except Exception:
                going[0] = False

        if monitor is not None:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return going[0]


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes | memoryview) -> ICudaEngine | None:
        serialized_engine = bytes(serialized_engine)
        if behaviour.load_error is not None or not serialized_engine.startswith(MAGIC):
            self._logger.log(ILogger.Severity.ERROR, behaviour.load_error or "Magic tag does not match")
            return None
        size = int.from_bytes(serialized_engine[8:16], "little")
        head = json.loads(serialized_engine[16 : 16 + size])
        return ICudaEngine(onnx.load_from_string(serialized_engine[16 + size :]), head["profiles"], self._logger)


class ICudaEngine:
    def __init__(self, model: onnx.ModelProto, profiles: list[dict[str, Any]], logger: ILogger) -> None:
        self._model, self._profiles, self._logger = model, profiles, logger
        stored = {t.name for t in model.graph.initializer}
        self._inputs = [i for i in model.graph.input if i.name not in stored]
        self._io = {i.name: i for i in [*self._inputs, *model.graph.output]}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._profiles))

    @property
    def device_memory_size_v2(self) -> int:
        return 4096

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 4096 * (profile_index + 1)

    def get_engine_stat(self, stat: EngineStat) -> int:
        return sum(len(t.raw_data) for t in self._model.graph.initializer)

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in {i.name for i in self._inputs} else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self._io[name].type.tensor_type.elem_type][0]

    def get_tensor_shape(self, name: str) -> Dims:
        return _dims(self._io[name])

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in behaviour.shape_inputs else TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> TensorFormat:
        return TensorFormat.LINEAR

    def get_tensor_bytes_per_component(self, name: str) -> int:
        return _TYPES[self._io[name].type.tensor_type.elem_type][1].itemsize

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims(shape) for shape in self._profiles[profile_index][name]]

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        """Conv, BatchNormalization and Relu in a row are one layer; every other node is one of its own."""
        groups: list[list[onnx.NodeProto]] = []
        for node in self._engine._model.graph.node:
            joins = node.op_type in ("BatchNormalization", "Relu") and groups and groups[-1][0].op_type == "Conv"
            if joins:
                groups[-1].append(node)
            else:
                groups.append([node])
        layers = [
            {
                "Name": " + ".join(n.name for n in group),
                "LayerType": "CaskConvolution" if group[0].op_type == "Conv" else "Myelin",
                "Outputs": [{"Name": group[-1].output[0], "Format/Datatype": "Float"}],
                "TacticName": "sm90_tactic",
                "Metadata": "\x1e".join(f"[ONNX Layer: {n.name}]" for n in group),
            }
            for group in groups
        ]
        names = list(self._engine._io)
        return json.dumps({"Layers": layers, "Bindings" if behaviour.old_inspector else "I/O Tensors": names})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self.profiler: Any = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        self._shapes.clear()
        return profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if -1 in self._engine.get_tensor_shape(name):
            low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
            if len(shape) != len(low) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
                self._engine._logger.log(ILogger.Severity.ERROR, f"setInputShape: {name} is out of the profile")
                return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [i.name for i in self._engine._inputs if i.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        """By ONNX's shape inference: what depends on the data stays -1."""
        model = onnx.ModelProto()
        model.CopyFrom(self._engine._model)
        for info in model.graph.input:
            for dim, size in zip(info.type.tensor_type.shape.dim, self._shapes.get(info.name, ()), strict=False):
                dim.dim_value = size
        for info in model.graph.output:
            info.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        return _dims(next(i for i in [*inferred.graph.input, *inferred.graph.output] if i.name == name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        self._allocators.pop(name, None)
        return memory != 0

    def set_output_allocator(self, name: str, output_allocator: Any) -> bool:
        self._allocators[name] = output_allocator
        return bool(getattr(output_allocator, "made", False))

    def execute_async_v3(self, stream_handle: int) -> bool:
        if stream_handle == 0 or behaviour.fail_enqueue:
            self._engine._logger.log(ILogger.Severity.ERROR, "enqueue failed")
            return False
        if stream_handle in captures:
            if behaviour.fail_capture:
                return False
            addresses, shapes = dict(self._addresses), dict(self._shapes)
            captures[stream_handle].append(lambda: self._execute(addresses, shapes, {}, 0))
            return True
        return self._execute(self._addresses, self._shapes, self._allocators, stream_handle)

    def _execute(
        self, addresses: dict[str, int], shapes: dict[str, Any], allocators: dict[str, Any], stream: int
    ) -> bool:
        behaviour.enqueued += 1
        for index, node in enumerate(self._engine._model.graph.node if self.profiler else ()):
            self.profiler.report_layer_time(node.name, 0.1 * (index + 1))
        feeds = {}
        for info in self._engine._inputs:
            dtype = _TYPES[info.type.tensor_type.elem_type][1]
            array = _view(addresses[info.name], shapes[info.name], dtype).copy()
            feeds[info.name] = array.astype(onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
        outputs = self._engine._session.run(None, feeds)
        for info, found in zip(self._engine._model.graph.output, outputs, strict=True):
            value = np.ascontiguousarray(found, dtype=_TYPES[info.type.tensor_type.elem_type][1])
            address = addresses.get(info.name, 0)
            if info.name in allocators:
                address = allocators[info.name].reallocate_output_async(info.name, 0, value.nbytes, 256, stream)
                allocators[info.name].notify_shape(info.name, Dims(value.shape))
                if not address:
                    return False
            _view(address, value.shape, value.dtype)[...] = value
        return True


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)
