"""Sessions on ONNX Runtime's CPU provider: options, and a loaded model that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from app.domain.failures import StageFailure
from workers.graph import onnxruntime_messages as messages
from workers.graph.onnx_graph import with_values
from workers.kernel import Session, TensorSpec

if TYPE_CHECKING:
    from workers.kernel import Arrays

PROVIDER = "CPUExecutionProvider"
Level = Literal["disable", "basic", "extended", "all"]


class RuntimeOptions(BaseModel):
    """Session options as JSON. What is not set stays ONNX Runtime's default; `{}` is the pure default session.

    `intra_op_num_threads`: threads inside one op, 0 = one per physical core. `allow_spinning`: idle threads wait by
    spinning (less latency, more CPU). `enable_cpu_mem_arena`: False gives memory back between runs (less memory, slower
    allocations). `enable_mem_pattern`: False suits inputs whose shapes change at every run. `denormal_as_zero`: numbers
    below 1e-38, which are slow, count as 0. `session_config`: further session config entries by their own names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    graph_optimization_level: Level | None = None
    intra_op_num_threads: int | None = Field(default=None, ge=0, le=1024)
    inter_op_num_threads: int | None = Field(default=None, ge=0, le=1024)
    execution_mode: Literal["sequential", "parallel"] | None = None
    allow_spinning: bool | None = None
    enable_cpu_mem_arena: bool | None = None
    enable_mem_pattern: bool | None = None
    denormal_as_zero: bool | None = None
    session_config: dict[str, str] = Field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, exclude_defaults=True)


class BuildOptions(RuntimeOptions):
    """`graph_optimization_level` is applied offline, when the engine is built. `offline`: False keeps the model as it
    is and lets ONNX Runtime optimize at every load. `shapes`: as in the job's spec, for the trial run."""

    graph_optimization_level: Level | None = "all"
    offline: bool = True
    shapes: dict[str, Any] | None = None


def session_options(runtime: RuntimeOptions) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    levels = {
        "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
    if runtime.graph_optimization_level is not None:
        options.graph_optimization_level = levels[runtime.graph_optimization_level]
    if runtime.intra_op_num_threads is not None:
        options.intra_op_num_threads = runtime.intra_op_num_threads
    if runtime.inter_op_num_threads is not None:
        options.inter_op_num_threads = runtime.inter_op_num_threads
    if runtime.execution_mode == "parallel":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    if runtime.allow_spinning is not None:
        spin = "1" if runtime.allow_spinning else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", spin)
    if runtime.enable_cpu_mem_arena is not None:
        options.enable_cpu_mem_arena = runtime.enable_cpu_mem_arena
    if runtime.enable_mem_pattern is not None:
        options.enable_mem_pattern = runtime.enable_mem_pattern
    if runtime.denormal_as_zero is not None:
        options.add_session_config_entry("session.set_denormal_as_zero", "1" if runtime.denormal_as_zero else "0")
    for key, value in runtime.session_config.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(model: Path, options: Any) -> Any:
    """An `InferenceSession` on the CPU; raises StageFailure(`load_failed`, or a narrower code)."""
    import onnxruntime as ort

    if not model.is_file():
        raise StageFailure("load_failed", f"The engine has no file {model.name}.")
    try:
        return ort.InferenceSession(str(model), options, providers=[PROVIDER])
    except Exception as error:  # the binding raises its own classes, RuntimeError and ValueError
        raise messages.runtime_failure(
            "load_failed", error, remedy="Check that ONNX Runtime runs the model."
        ) from error


class OnnxRuntimeSession(Session):
    """A loaded model. Outputs that are no tensors (sequences, maps) are not returned."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._raw_inputs = list(session.get_inputs())
        self._raw_outputs = [o for o in session.get_outputs() if o.type.startswith("tensor(")]
        self._output_names = [o.name for o in self._raw_outputs]
        properties = session.get_modelmeta().custom_metadata_map
        self.inputs = tuple(with_values([_spec(i) for i in self._raw_inputs], properties))
        self.outputs = tuple(_spec(o) for o in self._raw_outputs)

    def run(self, feeds: Arrays) -> Arrays:
        """All outputs by name. `feeds`: one array per input, of its dtype; raises StageFailure(`inference_failed`)."""
        try:
            values = self._session.run(self._output_names, feeds)
        except Exception as error:  # as in `open_session`
            failure = messages.runtime_failure("inference_failed", error)
            if "input data type" in failure.detail:  # the one message that does not name the input
                odd = (i.name for i in self.inputs if i.name in feeds and str(feeds[i.name].dtype) != i.dtype)
                failure.tensor = next(odd, None)
            raise failure from error
        return {name: np.asarray(v) for name, v in zip(self._output_names, values, strict=True)}

    def call(self, feeds: Arrays) -> Callable[[], Any]:
        """`InferenceSession.run` and a dict of what it gave, as in `script`."""
        run, names = self._session.run, [o.name for o in self._session.get_outputs()]

        def call() -> Arrays:
            try:
                return dict(zip(names, run(None, feeds), strict=False))
            except Exception as error:  # as in `open_session`
                raise messages.runtime_failure("inference_failed", error) from error

        return call

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        """The call on inputs that are bound once and outputs that stay where ONNX Runtime put them: no copy, no
        conversion, only the model. Strings and other types that cannot be bound go through `run`."""
        if not all(messages.is_plain_tensor(v.type) for v in [*self._raw_inputs, *self._raw_outputs]):
            return lambda: self.run(feeds)
        import onnxruntime as ort

        try:
            binding = self._session.io_binding()
            # The values share the arrays' memory, so they live as long as the closure.
            kept = [(n, ort.OrtValue.ortvalue_from_numpy(np.asarray(a, order="C"), "cpu", 0)) for n, a in feeds.items()]
            for name, value in kept:
                binding.bind_ortvalue_input(name, value)
            for name in self._output_names:
                binding.bind_output(name, "cpu")
        except Exception:  # e.g. a dtype that numpy and the binding do not share
            return lambda: self.run(feeds)
        run = self._session.run_with_iobinding

        def call(_kept: Any = kept) -> None:
            try:
                run(binding)
            except Exception as error:  # as in `open_session`
                raise messages.runtime_failure("inference_failed", error) from error

        return call

    def close(self) -> None:
        self._session = None


def _spec(node: Any) -> TensorSpec:
    return TensorSpec(node.name, messages.dtype_of(node.type), messages.shape_of(node.name, node.shape))
