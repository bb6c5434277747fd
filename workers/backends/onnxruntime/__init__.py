"""ONNX Runtime on the CPU: the baseline of every report, and the first backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from app.domain.failures import StageFailure
from workers.artifacts import DATA_FILE, ONNX
from workers.backends.bundle_script import HURRY
from workers.backends.onnxruntime import profile as profiling
from workers.backends.onnxruntime import recipes as ort_recipes
from workers.backends.onnxruntime.script import infer_script
from workers.backends.onnxruntime.serving import in_triton
from workers.backends.onnxruntime.session import (
    PROVIDER,
    BuildOptions,
    OnnxRuntimeSession,
    RuntimeOptions,
    open_session,
    session_options,
)
from workers.backends.options import parsed
from workers.candidates import Candidate, Case, Proposal
from workers.graph.onnx_files import INLINE_LIMIT_BYTES, MODEL_FILE, files_of, link_or_copy, size_of
from workers.kernel import WARM_UP_RUNS, Backend, BackendInfo, LayerTime, Reporter, Session
from workers.serving.native import Instances, InTriton

if TYPE_CHECKING:
    from workers.kernel import Arrays


class OnnxRuntimeBackend(Backend):
    """Engine = the model as ONNX Runtime optimized it for this machine, and the session options to run it with."""

    name: ClassVar[str] = "onnxruntime"
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    engine_format: ClassVar[str] = ONNX
    reference: ClassVar[bool] = True
    script_hurry: ClassVar[tuple[str, ...]] = HURRY

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

    def build(
        self,
        model: Path,
        out: Path,
        options: Mapping[str, Any],
        reporter: Reporter,
        kind: str = ONNX,  # noqa: ARG002  (the one that it accepts)
    ) -> dict[str, Any]:
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
            open_session(engine / MODEL_FILE, session_options(parsed(RuntimeOptions, runtime, "ONNX Runtime")))
        )

    def layer_times(self, engine: Path, runtime: Mapping[str, Any], feeds: Arrays, runs: int) -> list[LayerTime] | None:
        options = session_options(parsed(RuntimeOptions, runtime, "ONNX Runtime"))
        options.enable_profiling = True
        options.profile_file_prefix = "profile"  # in the current folder: the stage's workspace
        trace = profiling.profiled(open_session(engine / MODEL_FILE, options), feeds, runs + WARM_UP_RUNS)
        return profiling.layer_times(trace, WARM_UP_RUNS)

    def in_triton(self, instances: Instances) -> InTriton:
        options = parsed(RuntimeOptions, instances.runtime, "ONNX Runtime")
        assert isinstance(options, RuntimeOptions)
        return in_triton([path.name for path in files_of(instances.engine)], options)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        info = self.probe({})
        return infer_script(runtime, info.versions["onnxruntime"] if info else "any version")

    def _optimized(
        self, model: Path, out: Path, runtime: RuntimeOptions, shapes: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Optimize into `out`, try the file, and return the session options to load it with."""
        options = session_options(runtime)
        options.optimized_model_filepath = str(out / MODEL_FILE)
        if size_of(model) > INLINE_LIMIT_BYTES or (model / DATA_FILE).exists():
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        session = open_session(model / MODEL_FILE, options)
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
