"""ONNX Runtime on an NVIDIA GPU: the GPU baseline, and a backend of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from app.domain.failures import StageFailure
from workers.artifacts import ONNX
from workers.backends.bundle_script import HURRY
from workers.backends.onnxruntime_cuda import recipes as cuda_recipes
from workers.backends.onnxruntime_cuda.script import infer_script
from workers.backends.onnxruntime_cuda.serving import in_triton
from workers.backends.onnxruntime_cuda.session import (
    PROVIDER,
    BuildOptions,
    OnnxRuntimeCudaSession,
    RuntimeOptions,
    fallen_nodes,
    refuse_fallback,
)
from workers.backends.options import parsed
from workers.candidates import Candidate, Case, Proposal
from workers.devices.cuda import runtime as cuda_runtime
from workers.graph.onnx_files import MODEL_FILE, files_of, link_or_copy
from workers.kernel import Backend, BackendInfo, Reporter, Session
from workers.serving.native import Instances, InTriton


class OnnxRuntimeCudaBackend(Backend):
    """Engine = the model as it is, and the options to run it with: ONNX Runtime optimizes it at every load, since what
    it fuses and lays out for a GPU is not meant to be saved."""

    name: ClassVar[str] = "onnxruntime-cuda"
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    engine_format: ClassVar[str] = ONNX
    device: ClassVar[str] = "cuda"
    script_hurry: ClassVar[tuple[str, ...]] = HURRY

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        """None where ONNX Runtime has no CUDA provider or there is no usable GPU. Does not touch CUDA itself: the
        caller may fork."""
        try:
            import onnxruntime as ort

            if PROVIDER not in ort.get_available_providers() or not cuda_runtime.available():
                return None
            versions = {"onnxruntime": str(ort.__version__), "cuda": str(ort.cuda_version)}
        except Exception:  # a broken installation must not take the worker down
            return None
        return BackendInfo(self.name, versions, ("cuda",), cuda_recipes.precisions(hardware))

    def propose(self, case: Case) -> Proposal:
        return cuda_recipes.propose(case)

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        return cuda_recipes.variants(case, candidate)

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:  # noqa: ARG002
        return dict(runtime)

    def build(
        self,
        model: Path,
        out: Path,
        options: Mapping[str, Any],
        reporter: Reporter,
        kind: str = ONNX,  # noqa: ARG002  (the one that it accepts)
    ) -> dict[str, Any]:
        """Copy the model and try it on the GPU; `cpu_nodes` tells what runs on the CPU by op type (only where
        `cpu_fallback` is `report`). Where it cannot be captured as a CUDA graph, a note says so and it runs without."""
        from workers.data import synthetic_feeds

        wanted = parsed(BuildOptions, options, "ONNX Runtime's CUDA provider")
        runtime = RuntimeOptions(**wanted.model_dump(exclude={"shapes"}))
        for path in files_of(model):
            link_or_copy(path, out / path.name)
        session = OnnxRuntimeCudaSession(out, runtime)
        found = fallen_nodes(session.on_cpu, out / MODEL_FILE)
        fallen = {op: len(nodes) for op, nodes in found.items()}
        try:
            refuse_fallback(found, runtime)
        except StageFailure:
            session.close()
            raise
        if fallen:
            reporter.note("Some nodes run on the CPU: the CUDA provider has no kernel for them.", nodes=fallen)
        try:
            if runtime.cuda_graph:
                session.bind(synthetic_feeds(session.inputs, 1, wanted.shapes, 0))()
        except StageFailure as failure:
            if failure.code == "gpu_out_of_memory":
                raise
            reporter.note("The model cannot be captured as a CUDA graph; it runs without.", reason=failure.detail)
            runtime = runtime.model_copy(update={"cuda_graph": False})
        finally:
            session.close()
        return {"runtime": runtime.to_json(), "cpu_nodes": fallen}

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        """Raises StageFailure: `load_failed`, `unsupported_op`, `gpu_fallback`, `gpu_provider_missing`,
        `gpu_out_of_memory`, `invalid_backend_options`."""
        return OnnxRuntimeCudaSession(engine, parsed(RuntimeOptions, runtime, "ONNX Runtime's CUDA provider"))

    def in_triton(self, instances: Instances) -> InTriton:
        options: RuntimeOptions = parsed(RuntimeOptions, instances.runtime, "ONNX Runtime's CUDA provider")
        return in_triton([path.name for path in files_of(instances.engine)], options)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        info = self.probe({})
        options: RuntimeOptions = parsed(RuntimeOptions, runtime, "ONNX Runtime's CUDA provider")
        return infer_script(
            runtime, options.provider_options(), info.versions["onnxruntime"] if info else "any version"
        )
