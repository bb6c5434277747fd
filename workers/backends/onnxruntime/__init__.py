"""ONNX Runtime on the CPU: the baseline of every report, and the first backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from app.domain.failures import StageFailure
from workers.graph import onnxruntime_messages as messages
from workers.backends.onnxruntime import profile as profiling
from workers.backends.onnxruntime import recipes as ort_recipes
from workers.backends.onnxruntime.script import infer_script
from workers.backends.options import parsed
from workers.candidates import Candidate, Case, Proposal
from workers.kernel import WARM_UP_RUNS, Backend, BackendInfo, LayerTime, Reporter, Session, TensorSpec
from workers.graph.onnx_files import DATA_FILE, INLINE_LIMIT_BYTES, MODEL_FILE, files_of, link_or_copy, size_of
from workers.graph.onnx_graph import with_values

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


def _session_options(runtime: RuntimeOptions) -> Any:
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


def _open(model: Path, options: Any) -> Any:
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
        except Exception as error:  # as in `_open`
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
            except Exception as error:  # as in `_open`
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
            except Exception as error:  # as in `_open`
                raise messages.runtime_failure("inference_failed", error) from error

        return call

    def close(self) -> None:
        self._session = None


def _spec(node: Any) -> TensorSpec:
    return TensorSpec(node.name, messages.dtype_of(node.type), messages.shape_of(node.name, node.shape))


class OnnxRuntimeBackend(Backend):
    """Engine = the model as ONNX Runtime optimized it for this machine, and the session options to run it with."""

    name: ClassVar[str] = "onnxruntime"
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    engine_format: ClassVar[str] = "onnx"

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        """None where ONNX Runtime is not installed."""
        try:
            import onnxruntime as ort

            if PROVIDER not in ort.get_available_providers():
                return None
            version = str(ort.__version__)
        except Exception:  # a broken installation must not take the worker down
            return None
        # fp16 and bf16 do not gain on the CPU provider: it casts to fp32 around almost every op. int8 kernels need
        # AVX2; they gain most with VNNI (avx512_vnni, avx_vnni) or AMX, without which U8S8 may also saturate.
        isa = set(hardware.get("isa") or ())
        int8 = any(flag == "avx2" or flag.startswith(("avx512", "amx")) for flag in isa)
        return BackendInfo(self.name, {"onnxruntime": version}, ("cpu",), ("fp32", "int8") if int8 else ("fp32",))

    def propose(self, case: Case) -> Proposal:
        return ort_recipes.propose(case)

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        return ort_recipes.variants(case, candidate)

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        return {**runtime, "intra_op_num_threads": threads}

    def build(self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
        """Write the optimized model; its memory layout is made for this machine's instruction set.

        `options`: `BuildOptions`. Where the optimized file does not load or run, the engine is the plain model with
        the same session options, and a note says so.
        """
        wanted = parsed(BuildOptions, options, "ONNX Runtime")
        assert isinstance(wanted, BuildOptions)
        runtime = RuntimeOptions(**wanted.model_dump(exclude={"offline", "shapes"}))
        if wanted.offline and runtime.graph_optimization_level != "disable":
            try:
                loaded = self._optimized(model, out, runtime, wanted.shapes)
                return {"runtime": loaded, "offline_optimized": True}
            except StageFailure as failure:
                if failure.code == "out_of_memory":
                    raise
                for path in files_of(out):
                    path.unlink()
                reporter.note(
                    "The model that ONNX Runtime optimized offline cannot be used; the engine is optimized at load.",
                    reason=failure.detail,
                    node=failure.node,
                )
        for path in files_of(model):
            link_or_copy(path, out / path.name)
        self.load(out, runtime.to_json()).close()
        return {"runtime": runtime.to_json(), "offline_optimized": False}

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        """Raises StageFailure: `load_failed`, `unsupported_op`, `out_of_memory`, `invalid_backend_options`."""
        return OnnxRuntimeSession(
            _open(engine / MODEL_FILE, _session_options(parsed(RuntimeOptions, runtime, "ONNX Runtime")))
        )

    def layer_times(self, engine: Path, runtime: Mapping[str, Any], feeds: Arrays, runs: int) -> list[LayerTime] | None:
        options = _session_options(parsed(RuntimeOptions, runtime, "ONNX Runtime"))
        options.enable_profiling = True
        options.profile_file_prefix = "profile"  # in the current folder: the stage's workspace
        trace = profiling.profiled(_open(engine / MODEL_FILE, options), feeds, runs + WARM_UP_RUNS)
        return profiling.layer_times(trace, WARM_UP_RUNS)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        info = self.probe({})
        return infer_script(runtime, info.versions["onnxruntime"] if info else "any version")

    def _optimized(
        self, model: Path, out: Path, runtime: RuntimeOptions, shapes: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Optimize into `out`, try the file, and return the session options to load it with."""
        options = _session_options(runtime)
        options.optimized_model_filepath = str(out / MODEL_FILE)
        if size_of(model) > INLINE_LIMIT_BYTES or (model / DATA_FILE).exists():
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        session = _open(model / MODEL_FILE, options)
        del session  # before the second one: two copies of the weights at most, never three
        # Everything is in the file; to optimize again at load would only cost start-up time.
        loaded = runtime.model_copy(update={"graph_optimization_level": "disable"}).to_json()
        failure = self._try(out, loaded, shapes)
        # Inputs of our own making may not suit the model: then it refuses them unoptimized, too.
        if failure is not None and self._try(model, {"graph_optimization_level": "disable"}, shapes) is None:
            raise failure
        return loaded

    def _try(self, folder: Path, runtime: Mapping[str, Any], shapes: Mapping[str, Any] | None) -> StageFailure | None:
        """Load, run once on random inputs, and return how the run failed; a failed load is raised."""
        from workers.data import synthetic_feeds

        session = self.load(folder, runtime)
        try:
            session.run(synthetic_feeds(session.inputs, 1, shapes, 0))
        except StageFailure as failure:  # also where there is no array for an input, e.g. strings
            return failure
        finally:
            session.close()
        return None
