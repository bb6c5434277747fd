"""OpenVINO on the CPU: fp32, bf16 where the processor has it, and int8 graphs that NNCF made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from onnx import ModelProto, TensorProto
from pydantic import BaseModel, ConfigDict, Field

from app.domain.failures import FailureKind, StageFailure
from workers.artifacts import ONNX, OPENVINO_IR
from workers.backends.bundle_script import HURRY
from workers.backends.openvino import recipes
from workers.backends.openvino.script import infer_script
from workers.backends.openvino.serving import in_triton
from workers.backends.openvino.session import OpenVinoSession
from workers.backends.options import parsed
from workers.candidates import BF16_FLAGS, INT8_FLAGS, Candidate, Case, Proposal
from workers.graph.interface import INTERFACE_FILE, Interface
from workers.graph.ir import faults
from workers.graph.ir import files as ir
from workers.graph.ir.library import compile_model, library
from workers.graph.onnx_files import link_or_copy
from workers.kernel import Backend, BackendInfo, LayerTime, Reporter, Session, runner_of
from workers.serving.native import Instances, InTriton

if TYPE_CHECKING:
    from workers.kernel import Arrays


class RuntimeOptions(BaseModel):
    """Properties of the compiled model as JSON.

    `inference_precision`: what floating-point nodes compute in; never left to OpenVINO, which takes bf16 where the
    processor has it. `performance_hint`: `latency` is one stream over all cores, `throughput` several streams, which
    serve parallel requests. `num_streams`, `inference_num_threads` (of all streams together; 0 = all cores),
    `enable_cpu_pinning` and `enable_hyper_threading` override what the hint decides. `snippets`: False switches off the
    plug-in's compiler of fused kernels, whose attention is not to be trusted in some models (see
    `workers.graph.ir.faults`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    inference_precision: Literal["f32", "bf16"] = "f32"
    performance_hint: Literal["latency", "throughput"] = "latency"
    num_streams: int | None = Field(default=None, ge=1, le=1024)
    inference_num_threads: int | None = Field(default=None, ge=0, le=1024)
    enable_cpu_pinning: bool | None = None
    enable_hyper_threading: bool | None = None
    snippets: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """What is set, and always the precision."""
        return {"inference_precision": self.inference_precision, **self.model_dump(exclude_defaults=True)}

    def properties(self) -> dict[str, Any]:
        """OpenVINO's own names and values. Rounding activations to 8 bits on the fly, which it does by default for
        compressed weights, is switched off: precision is the candidate's choice."""
        values = {
            "INFERENCE_PRECISION_HINT": self.inference_precision,
            "PERFORMANCE_HINT": self.performance_hint.upper(),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "NUM_STREAMS": self.num_streams,
            "INFERENCE_NUM_THREADS": self.inference_num_threads,
            "ENABLE_CPU_PINNING": self.enable_cpu_pinning,
            "ENABLE_HYPER_THREADING": self.enable_hyper_threading,
            "SNIPPETS_MODE": "DISABLE" if self.snippets is False else None,
        }
        return {name: value for name, value in values.items() if value is not None}


class BuildOptions(RuntimeOptions):
    """`shapes`: as in the job's spec, for the trial run."""

    shapes: dict[str, Any] | None = None


class OpenVinoBackend(Backend):
    """Engine = the intermediate representation (IR), and the properties to compile it with at load.

    The IR is the same for every machine; what is made for this one (kernels, memory layout) is made at load.
    """

    name: ClassVar[str] = "openvino"
    libraries: ClassVar[tuple[str, ...]] = ("openvino", "numpy")
    accepts: ClassVar[tuple[str, ...]] = (ONNX, OPENVINO_IR)
    engine_format: ClassVar[str] = OPENVINO_IR
    reference: ClassVar[bool] = True
    script_hurry: ClassVar[tuple[str, ...]] = HURRY
    plain_runtime: ClassVar[Mapping[str, Any]] = {"inference_precision": "f32"}

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        """None where OpenVINO is not installed. Makes no `Core`: a process that forks must not hold its threads."""
        try:
            library()
            version = importlib.metadata.version("openvino")
            nncf = importlib.util.find_spec("nncf") is not None
        except Exception:  # a broken installation must not take the worker down
            return None
        isa = set(hardware.get("isa") or ())
        precisions = ["fp32"]
        if isa & BF16_FLAGS:
            precisions.append("bf16")
        if nncf and (isa & INT8_FLAGS or "avx2" in isa):
            precisions.append("int8")
        return BackendInfo(self.name, {"openvino": version}, ("cpu",), tuple(precisions))

    def propose(self, case: Case) -> Proposal:
        return recipes.propose(case)

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        return recipes.variants(case, candidate)

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """One stream, and no pinning: every instance would be pinned to the same first cores."""
        wanted = {"num_streams": 1, "inference_num_threads": threads, "enable_cpu_pinning": False}
        return {**runtime, **wanted}

    def build(
        self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter, kind: str = ONNX
    ) -> dict[str, Any]:
        """Write the IR, compile it and run it once.

        `model`: an ONNX model, or an IR as `quantize_nncf` writes it. `options`: `BuildOptions`.
        Returns `runtime`; `compiled`: the properties that OpenVINO chose; `layers`: executed layers by precision;
        `trial_run`: {"batch"}, or None where nothing is known because the generated inputs do not suit the model.
        """
        wanted = parsed(BuildOptions, options, "OpenVINO")
        assert isinstance(wanted, BuildOptions)
        runtime = RuntimeOptions(**wanted.model_dump(exclude={"shapes"}))
        graph = None
        if kind == OPENVINO_IR:
            for name in (ir.XML_FILE, ir.BIN_FILE, INTERFACE_FILE):
                if (model / name).is_file():
                    link_or_copy(model / name, out / name)
        else:
            converted, interface, graph = ir.read_onnx(model)
            _tell_doubles(graph, reporter)
            ir.write_ir(converted, interface, out)
            del converted  # the weights are read again from the file that is shipped
        reporter.progress(0.5, "compiling")
        model_read, read = ir.read_ir(out)
        if faults.first_call_decides(model_read):
            runtime = runtime.model_copy(update={"snippets": False})
        session = _compiled(model_read, read, runtime, graph)
        del model_read
        try:
            facts = {"compiled": session.properties(), "layers": session.layers()}
            trial = self._try(session, None if kind == OPENVINO_IR else model, wanted.shapes, reporter)
        finally:
            session.close()
        return {"runtime": runtime.to_json(), **facts, "trial_run": trial}

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        """Raises StageFailure: `load_failed`, `unsupported_op`, `out_of_memory`, `invalid_backend_options`."""
        model, interface = ir.read_ir(engine)
        return _compiled(model, interface, parsed(RuntimeOptions, runtime, "OpenVINO"), None)

    def layer_times(self, engine: Path, runtime: Mapping[str, Any], feeds: Arrays, runs: int) -> list[LayerTime] | None:
        model, interface = ir.read_ir(engine)
        properties = {**parsed(RuntimeOptions, runtime, "OpenVINO").properties(), "PERF_COUNT": True}
        session = OpenVinoSession(compile_model(model, properties, graph=None), interface)
        try:
            return session.layer_times(feeds, runs)
        finally:
            session.close()

    def in_triton(self, instances: Instances) -> InTriton:
        return in_triton(instances, parsed(RuntimeOptions, instances.runtime, "OpenVINO"))

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        wanted = parsed(RuntimeOptions, runtime, "OpenVINO")
        info = self.probe({})
        return infer_script(wanted.properties(), info.versions["openvino"] if info else "any version")

    def _try(
        self, session: OpenVinoSession, original: Path | None, shapes: Mapping[str, Any] | None, reporter: Reporter
    ) -> dict[str, Any] | None:
        """Run once on random inputs. Where the original does not take them either, nothing is known."""
        from workers.data import synthetic_feeds
        from workers.measure.axes import fixed_batch

        batch = fixed_batch(session.inputs) or 1
        feeds: dict[str, Any] = {}
        try:
            feeds = synthetic_feeds(session.inputs, batch, shapes, 0)
            session.run(feeds)
        except StageFailure as failure:
            ours = failure.code != "out_of_memory" and not (feeds and original and _runs(original, feeds))
            if not ours:
                raise
            reporter.note("The trial run tells nothing: generated inputs do not suit the model.", reason=failure.detail)
            return None
        return {"batch": batch}


def _compiled(model: Any, interface: Interface, runtime: RuntimeOptions, graph: ModelProto | None) -> OpenVinoSession:
    session = OpenVinoSession(compile_model(model, runtime.properties(), graph=graph), interface)
    computes_in = session.properties()["inference_precision"]
    if computes_in != runtime.inference_precision:
        raise StageFailure(
            "invalid_backend_options",
            f"This processor computes in {computes_in}, not in {runtime.inference_precision}.",
            FailureKind.MODEL,  # of this engine alone: the job has others
            remedy="Use inference_precision f32, or a processor with bf16 instructions.",
        )
    return session


def _runs(model: Path, feeds: dict[str, Any]) -> bool:
    """Whether ONNX Runtime runs the original on these inputs."""
    try:
        runner_of(ONNX).load(model, {}).run(feeds)
    except StageFailure:
        return False
    return True


def _tell_doubles(graph: ModelProto, reporter: Reporter) -> None:
    doubles = [i.name for i in graph.graph.initializer if i.data_type == TensorProto.DOUBLE]
    tensors = (*graph.graph.input, *graph.graph.output)
    if doubles or any(v.type.tensor_type.elem_type == TensorProto.DOUBLE for v in tensors):
        reporter.note("OpenVINO computes float64 in float32 on a CPU.", tensors=doubles[:5])
