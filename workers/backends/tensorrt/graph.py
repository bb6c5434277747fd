"""What an ONNX graph asks of TensorRT, read before TensorRT sees it: precisions, tensors it has no type for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from app.domain.failures import StageFailure, model_failure
from workers.backends.tensorrt.probe import Gpu, capability
from workers.graph.onnx_files import MODEL_FILE, read_skeleton, size_of
from workers.graph.onnx_graph import all_nodes, all_tensors, dtype_name, node_label, real_inputs, tensor_spec
from workers.kernel import TensorSpec

# Types of inputs and outputs that a plan can have and numpy (with ml_dtypes) can hold.
IO_TYPES = frozenset({"float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "int32", "int64", "uint8", "bool"})
# The parser casts float64 down to float32.
NARROWED = {"float64": "float32"}

# The compute capability from which TensorRT has kernels of a precision (NVIDIA's support matrix).
NEEDS: dict[str, tuple[int, int]] = {
    "fp16": (7, 5),
    "int8": (7, 5),
    "bf16": (8, 0),
    "int4": (8, 0),
    "fp8": (8, 9),
    "fp4": (10, 0),
}
_PRECISION_OF: dict[int, str] = {
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
    TensorProto.INT4: "int4",
}


@dataclass(frozen=True)
class GraphFacts:
    """`declared`: dtype by input or output that the plan has in a narrower type. `precisions`: what the graph holds
    beside fp32. `weights_bytes`: of all files of the model. `int64`: inputs and outputs of that type."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precisions: tuple[str, ...]
    weights_bytes: int
    declared: dict[str, str] = field(default_factory=dict)
    int64: tuple[str, ...] = ()
    float64_tensors: int = 0


def read_graph(model: Path) -> GraphFacts:
    """Facts of `model / model.onnx`; raises StageFailure: `dynamic_rank`, `unsupported_input_type`,
    `unsupported_output_type`, `asymmetric_quantization`."""
    graph = read_skeleton(model / MODEL_FILE)
    inputs = [_checked(i, "input") for i in real_inputs(graph.graph)]
    outputs = [_checked(o, "output") for o in graph.graph.output]
    _check_zero_points(graph)
    specs = [*inputs, *outputs]
    stored = {t.data_type for t in all_tensors(graph)} | _cast_types(graph)
    found = {_PRECISION_OF[t] for t in stored if t in _PRECISION_OF}
    if any(n.op_type == "QuantizeLinear" for n in all_nodes(graph)) and TensorProto.INT8 in stored:
        found.add("int8")
    return GraphFacts(
        tuple(inputs),
        tuple(outputs),
        tuple(sorted(found)),
        size_of(model),
        {s.name: s.dtype for s in specs if s.dtype in NARROWED},
        tuple(s.name for s in specs if s.dtype == "int64"),
        sum(t.data_type == TensorProto.DOUBLE for t in all_tensors(graph)),
    )


def check_gpu(facts: GraphFacts, gpu: Gpu) -> None:
    """Raises StageFailure: `precision_unsupported` for a precision this GPU has no kernels for, `gpu_out_of_memory` for
    weights that its memory cannot hold."""
    for precision in facts.precisions:
        least = NEEDS.get(precision, (0, 0))
        if capability(gpu.compute_capability) < least:
            raise precision_unsupported(precision, gpu.name, gpu.compute_capability)
    if gpu.here and facts.weights_bytes > gpu.memory_bytes:
        raise gpu_out_of_memory(
            f"the weights take {facts.weights_bytes / 1e9:.1f} GB, and {gpu.name} has {gpu.memory_bytes / 1e9:.1f} GB"
        )


def precision_unsupported(precision: str, name: str, found: str) -> StageFailure:
    return model_failure(
        "precision_unsupported",
        f"{precision} needs compute capability {least_capability(precision)}; {name} has {found}.",
        remedy="Ask for fp16 or int8, which this GPU has, or for a worker with a newer GPU.",
        cacheable=False,
    )


def gpu_out_of_memory(why: str) -> StageFailure:
    return model_failure(
        "gpu_out_of_memory",
        f"The GPU's memory is too small: {why}.",
        remedy="Use fp16, int8 or int4, smaller shapes or batch sizes, or a GPU with more memory.",
        cacheable=False,
    )


def precisions_of(found: str) -> tuple[str, ...]:
    """Those that a GPU of this compute capability has kernels for, of what a job may ask for."""
    return ("fp32", *(p for p in ("fp16", "bf16", "int8", "fp8", "int4") if capability(found) >= NEEDS[p]))


def least_capability(precision: str) -> str:
    return ".".join(map(str, NEEDS.get(precision, (0, 0))))


def _checked(info: ValueInfoProto, what: str) -> TensorSpec:
    kind = info.type.WhichOneof("value")
    dtype = dtype_name(info.type.tensor_type.elem_type) if kind == "tensor_type" else str(kind)
    if dtype not in IO_TYPES and dtype not in NARROWED:
        raise model_failure(
            f"unsupported_{what}_type",
            f"TensorRT has no {what}s of type {dtype}: {info.name!r}.",
            tensor=info.name,
            remedy=f"Export the model with this {what} as float32, int32 or int64; the onnxruntime backend runs it "
            "as it is.",
        )
    if what == "input" and not info.type.tensor_type.HasField("shape"):
        raise model_failure(
            "dynamic_rank",
            f"Input {info.name!r} has no fixed number of dimensions, which TensorRT needs.",
            tensor=info.name,
            remedy="Export the model with a known rank; single dimensions may stay symbolic.",
        )
    return tensor_spec(info)


def _cast_types(model: ModelProto) -> set[int]:
    casts = (n for n in all_nodes(model) if n.op_type == "Cast")
    return {a.i for n in casts for a in n.attribute if a.name == "to"}


def _check_zero_points(model: ModelProto) -> None:
    """TensorRT quantizes symmetrically: int8 with zero point 0, never uint8."""
    stored = {t.name: t for t in all_tensors(model)}
    for node in _constants(model):
        stored[node.output[0]] = next(a.t for a in node.attribute if a.name == "value")
    for node in all_nodes(model):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if len(node.input) < 3 or not node.input[2]:  # without a zero point ONNX quantizes to uint8
            kind = next((a.i for a in node.attribute if a.name == "output_dtype"), 0) or TensorProto.UINT8
            zero, asymmetric = None, node.op_type == "QuantizeLinear" and kind == TensorProto.UINT8
        else:
            zero = stored.get(node.input[2])
            if zero is None:  # computed: TensorRT's own parser judges
                continue
            asymmetric = zero.data_type == TensorProto.UINT8
        if (
            zero is not None
            and not asymmetric
            and zero.data_type == TensorProto.INT8
            and zero.data_location != TensorProto.EXTERNAL
        ):
            asymmetric = bool(numpy_helper.to_array(zero).any())
        if asymmetric:
            raise model_failure(
                "asymmetric_quantization",
                f"Node {node_label(node)!r} quantizes with a zero point; TensorRT takes symmetric int8 only.",
                node=node_label(node),
                remedy="Quantize activations to int8 without a zero point, or upload the float32 model; the "
                "onnxruntime backend runs it as it is.",
            )


def _constants(model: ModelProto) -> Iterable[NodeProto]:
    return (n for n in all_nodes(model) if n.op_type == "Constant" and any(a.name == "value" for a in n.attribute))
