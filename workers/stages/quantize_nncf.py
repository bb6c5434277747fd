"""quantize_nncf: the model as an OpenVINO IR whose nodes compute in int8, with ranges from the user's data.

Inputs `model` (a folder with `model.onnx`), `calibration` (a data set) and, with `exclude_nodes`, optionally
`quantized`: what this stage made of the same model with fewer nodes excluded. The others are then put back into
floating point there, and nothing is calibrated anew. Output `model` (an IR folder: model.xml, model.bin,
interface.json). The samples are streamed, and the same inputs give the same bytes. A "quantized" model without any
quantized product or convolution, or one that does not run, is a failure of the candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from onnx import ModelProto
from pydantic import Field

from app.domain.failures import FailureKind, StageFailure, model_failure
from workers.artifacts import OPENVINO_IR
from workers.candidates import Rounding, StepPart
from workers.data import Samples
from workers.graph.ir import files as ir
from workers.graph.nncf import quantize as nncf_quantize
from workers.graph.nncf import revert as nncf_revert
from workers.graph.onnx_files import size_of
from workers.graph.onnx_graph import all_nodes, describe_structure
from workers.kernel import Stage, StageContext, StageOptions, StageResult, runner_of
from workers.measure.axes import fixed_batch

_FEWEST_SAMPLES = 16  # that a calibration takes whatever the deadline

Arrays = dict[str, np.ndarray[Any, Any]]


class QuantizeNncfOptions(StageOptions):
    """`preset`: activations symmetric (`performance`) or asymmetric (`mixed`). `model_type`: `transformer` keeps what
    is sensitive there in floating point and equalizes channels (SmoothQuant) before products. `method`: how ranges
    follow from the samples, see `workers.graph.nncf.quantize`. `max_samples` and `part` say what to calibrate on.
    `smooth_quant_alpha`: of the products, 0…1; -1 switches it off, None is NNCF's own. `exclude_nodes`: ONNX node names
    that stay in floating point. `shapes`: as in the job's spec; the trial run is on samples, which have theirs."""

    preset: Literal["performance", "mixed"] = "performance"
    model_type: Literal["transformer"] | None = None
    method: Literal["auto", "minmax", "percentile", "histogram"] = "auto"
    max_samples: int = Field(default=300, ge=1)
    part: Literal["all", "calibration"] = "all"
    smooth_quant_alpha: float | None = Field(default=None, ge=-1, le=1)
    fast_bias_correction: bool = True
    exclude_nodes: list[str] = Field(default_factory=list)
    target_device: Literal["CPU"] = "CPU"
    shapes: dict[str, dict[str, list[int]]] | None = None


class QuantizeNncf(Stage[QuantizeNncfOptions]):
    """See the module. `data`: recipe, qdq_by_op (OpenVINO op type → nodes that compute on quantized values),
    quantized_nodes (their number), quantized_onnx_nodes (ONNX names), revertible_nodes (those of them that compute
    otherwise where they are excluded), excluded_nodes, calibration {method, samples (None where that was done before:
    `reused`), dataset}, trial_run, size_bytes_before, size_bytes."""

    name = "quantize_nncf"
    version = 7
    Options = QuantizeNncfOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx", "openvino", "nncf")
    gives: ClassVar[Mapping[str, str]] = {"model": OPENVINO_IR}
    weight: ClassVar[float] = 3.0
    rounds: ClassVar[bool] = True
    reuses: ClassVar[Mapping[str, str]] = {"quantized": "model"}  # these nodes are put back there
    reported: ClassVar[tuple[str, ...]] = ("qdq_by_op", "quantized_nodes", "excluded_nodes", "calibration")

    @classmethod
    def rounding(cls, options: Mapping[str, Any]) -> Rounding | None:  # noqa: ARG003
        return Rounding(("histogram", "auto", "percentile"))

    @classmethod
    def part(cls, options: Mapping[str, Any]) -> StepPart:  # noqa: ARG003
        return StepPart("quantization (nncf)")

    def run(self, ctx: StageContext, options: QuantizeNncfOptions) -> StageResult:
        """Raises StageFailure: `already_quantized`, `calibration_data_missing`, `unknown_node`, `nothing_to_quantize`,
        `quantization_failed`, `not_quantized`, `quantized_model_fails`, `nncf_missing`, and those of the data set and
        of the conversion (`load_failed`, `unsupported_op`)."""
        _check_available(ctx)
        ctx.reporter.progress(0.02, "conversion")
        model, interface, graph = ir.read_onnx(ctx.inputs["model"])
        _check_source(graph)
        by_name = ir.nodes_by_onnx_name(model, graph)
        excluded = _excluded(options, graph, by_name)
        samples = Samples(
            ctx.only_file("calibration"),
            interface.inputs,
            interface.outputs,
            part=options.part,
            max_samples=options.max_samples,
        )
        batch = fixed_batch(interface.inputs) or 1
        passes = _Passes(ctx, samples, batch)
        again = "quantized" in ctx.inputs
        if again:
            quantized, _ = ir.read_ir(ctx.inputs["quantized"])
            nncf_revert.revert(quantized, excluded, model)
        else:
            quantized = _quantized(ctx, options, model, passes, excluded)
        del model
        nodes = nncf_quantize.quantized_nodes(quantized)
        counts = _checked(nncf_quantize.count_by_type(nodes))
        out = ctx.output("model")
        ir.write_ir(quantized, interface, out)
        del quantized
        ctx.reporter.progress(0.9, "trial run")
        computing = {name for name, kind in nodes.items() if nncf_revert.computes(kind)}
        data = {
            "recipe": "nncf_int8",
            "qdq_by_op": counts,
            "quantized_nodes": len(nodes),
            "quantized_onnx_nodes": sorted(name for name, made in by_name.items() if nodes.keys() & set(made)),
            "revertible_nodes": sorted(name for name, made in by_name.items() if computing & set(made)),
            "excluded_nodes": sorted(options.exclude_nodes),
            "calibration": {
                "method": options.method,
                "samples": None if again else passes.read,
                "reused": again,
                "dataset": samples.digest(),
                "batch_size": batch,
            },
            "trial_run": _trial_run(out, next(passes())),
            "size_bytes_before": size_of(ctx.inputs["model"]),
            "size_bytes": size_of(out),
        }
        return StageResult(outputs=("model",), data=data, reusable=passes.read == len(samples))


def _check_available(ctx: StageContext) -> None:
    if "calibration" not in ctx.inputs:
        raise StageFailure(
            "calibration_data_missing",
            "Static int8 needs calibration data.",
            FailureKind.REQUEST,
            remedy="Name a data set under calibration.dataset_id.",
        )
    if runner_of(OPENVINO_IR).probe(ctx.hardware) is None:
        raise StageFailure(
            "backend_unavailable",
            "OpenVINO is not installed on this worker.",
            FailureKind.REQUEST,
            remedy="Choose a backend that GET /v1/capabilities lists.",
            cacheable=False,
        )


def _check_source(graph: ModelProto) -> None:
    structure = describe_structure(graph)
    if structure["quantized"]:
        raise model_failure(
            "already_quantized",
            "The model already holds quantized operators.",
            remedy="Upload the float32 model, or ask for no further precision.",
        )
    if not any(structure["ops"].get(op) for op in ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum")):
        raise model_failure(
            "nothing_to_quantize",
            "There is nothing to quantize: the model has no convolution and no matrix product.",
            remedy="Use another precision for this model.",
        )


def _excluded(options: QuantizeNncfOptions, graph: ModelProto, by_name: Mapping[str, list[str]]) -> list[str]:
    """The OpenVINO nodes of `exclude_nodes`. A node that conversion removed needs no exclusion."""
    known = {node.name for node in all_nodes(graph)}  # those inside If and Loop are never quantized anyway
    for name in sorted(options.exclude_nodes):
        if name not in known:
            raise StageFailure(
                "unknown_node",
                f"exclude_nodes names {name!r}, which is no node of the model.",
                FailureKind.REQUEST,
                node=name,
                remedy="Use node names of the simplified model.",
            )
    return sorted({made for name in options.exclude_nodes for made in by_name.get(name, ())})


class _Passes:
    """Every call starts a new pass over the samples, `batch` at a time; a batch that is not full repeats its samples.

    After the soft deadline a pass ends early; `read` is then the number of samples in the shortest pass."""

    def __init__(self, ctx: StageContext, samples: Samples, batch: int) -> None:
        self._ctx, self._samples, self._batch = ctx, samples, batch
        self.read = len(samples)
        self.batches = -(-len(samples) // batch)

    def __call__(self) -> Iterator[Arrays]:
        done = 0
        for part in self._samples.batches(self._batch):
            if done >= _FEWEST_SAMPLES and self._ctx.seconds_left() <= 0:
                self.read = min(self.read, done)
                return
            yield part.filled(self._batch)
            done += len(part)


def _quantized(
    ctx: StageContext, options: QuantizeNncfOptions, model: Any, passes: _Passes, excluded: list[str]
) -> Any:
    return nncf_quantize.quantize(
        model,
        passes,
        passes.batches,
        preset=options.preset,
        model_type=options.model_type,
        method=options.method,
        smooth_quant_alpha=options.smooth_quant_alpha,
        fast_bias_correction=options.fast_bias_correction,
        excluded=excluded,
        progress=lambda fraction: ctx.reporter.progress(0.05 + 0.8 * fraction, "calibration"),
    )


def _checked(counts: dict[str, int]) -> dict[str, int]:
    if not nncf_quantize.computes_on_integers(counts):
        raise model_failure(
            "not_quantized",
            "NNCF left every convolution and matrix product in floating point.",
            remedy="Use another precision for this model.",
        )
    return counts


def _trial_run(made: Path, feeds: Arrays) -> dict[str, Any]:
    """Load the artifact and run it once on real samples."""
    backend = runner_of(OPENVINO_IR)
    try:
        session = backend.load(made, {})
        try:
            outputs = session.run(feeds)
        finally:
            session.close()
    except StageFailure as failure:
        if not failure.cacheable:
            raise
        raise model_failure(
            "quantized_model_fails",
            f"The quantized model does not run: {failure.detail}",
            node=failure.node,
            remedy="Use another precision for this model, or exclude the node.",
        ) from failure
    finite = all(bool(np.isfinite(v).all()) for v in outputs.values() if v.dtype.kind == "f")
    return {"batch": len(next(iter(feeds.values()))), "finite": finite}
