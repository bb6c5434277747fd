"""Quantized and reduced-precision graphs, made with ONNX Runtime's quantizer; model files in and out.

Which ops and signs follow what was measured on x86 with VNNI: unsigned activations and signed weights; transformers
only in MatMul and Gemm (quantized LayerNorm, masks and sums break them); never dynamic int8 on convolutions (4–22 times
slower).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from workers.backends import _qdq_surgery as surgery
from workers.kernel import TensorSpec
from workers.onnx_files import DATA_FILE, INLINE_LIMIT_BYTES, MODEL_FILE

TRANSFORMER_OPS = ("MatMul", "Gemm")
# Convolutions with what stands between them, so that int8 values pass from one to the next.
CNN_OPS = (
    *("Conv", "ConvTranspose", "MatMul", "Gemm", "Add", "Mul", "Concat", "Resize", "Pad"),
    *("Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
)
DYNAMIC_OPS = ("MatMul", "Gemm", "Attention", "LSTM")
DYNAMIC_FORBIDDEN = ("Conv", "ConvTranspose")
COMPUTE_OPS = ("Conv", "ConvTranspose", "MatMul", "Gemm")

_FOLLOWING_OPS = (
    *("Relu", "Clip", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"),
    *("Split", "Slice", "Expand", "Resize", "Pad"),
)
_INTEGER_OPS = (
    *("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("QAttention", "QGemm", "QLinearMatMul", "QLinearConv", "MatMulNBits"),
)
_QUANTIZATION_OPS = (*_INTEGER_OPS, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def interface(values: Iterable[onnx.ValueInfoProto], exclude: Collection[str] = ()) -> list[TensorSpec]:
    """Specs of graph inputs or outputs; an unnamed or unknown dimension is an empty string."""
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
        dtype = TensorProto.DataType.Name(tensor.elem_type).lower()
        dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
        if value.name not in exclude:
            specs.append(TensorSpec(value.name, dtype, tuple(dims)))
    return specs


def graph_inputs(model: ModelProto) -> list[TensorSpec]:
    """The inputs a caller has to feed: initializers that are also listed as inputs are left out."""
    return interface(model.graph.input, {i.name for i in model.graph.initializer})


def save_model(model: ModelProto, folder: Path) -> Path:
    """Write `model.onnx`, with `model.onnx.data` beside it where the model is large; the same model, the same bytes.

    A graph whose references to external data were not loaded is written as it is.
    """
    path = folder / MODEL_FILE
    if _is_large(model):
        onnx.save_model(model, str(path), save_as_external_data=True, location=DATA_FILE, size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def is_quantized(model: ModelProto) -> bool:
    return any(node.op_type in _QUANTIZATION_OPS for node in surgery.all_nodes(model.graph))


def node_names(model: ModelProto) -> set[str]:
    """Names of the nodes at every depth, as `prepare` completes them."""
    _name_nodes(model)
    return {node.name for node in surgery.all_nodes(model.graph) if node.name}


def default_op_types(model: ModelProto, recipe: Literal["dynamic_int8", "static_int8"]) -> tuple[str, ...]:
    """The ops to quantize, by architecture: anything with attention or normalized features counts as a transformer."""
    if recipe == "dynamic_int8":
        return DYNAMIC_OPS
    ops = Counter(node.op_type for node in model.graph.node)
    attention = ops["Attention"] + ops["MultiHeadAttention"] + ops["LayerNormalization"] + ops["SkipLayerNormalization"]
    products = ops["MatMul"] > ops["Conv"] and ops["Softmax"] > 0
    return TRANSFORMER_OPS if attention or products or not (ops["Conv"] + ops["ConvTranspose"]) else CNN_OPS


def rounds_outputs(op_types: Collection[str]) -> bool:
    """Whether static quantization rounds what the nodes write, too: integer convolutions need it."""
    return not {"Conv", "ConvTranspose"}.isdisjoint(op_types)


def follows_its_input(op_type: str) -> bool:
    """Whether the op only moves, picks or clips values: it is rounded exactly where its input is."""
    return op_type in _FOLLOWING_OPS


def computes_on_weights(node: NodeProto, weights: Collection[str]) -> bool:
    """Whether dynamic quantization takes this node: its weights are constants."""
    position = {"Gather": 0, "EmbedLayerNormalization": 2}.get(node.op_type, 1)
    return len(node.input) > position and node.input[position] in weights


def quantizable_nodes(model: ModelProto, op_types: Collection[str], excluded: Collection[str]) -> list[str]:
    """Names of the nodes with weights that `op_types` covers."""
    heavy = {*COMPUTE_OPS, "Attention", "LSTM", "Gather", "EmbedLayerNormalization"} & set(op_types)
    return [n.name for n in model.graph.node if n.op_type in heavy and n.name not in excluded]


def prepare(source: Path, workspace: Path) -> Path:
    """A copy of the model file in `workspace` with node names, constants as initializers and inferred shapes.

    The quantizer finds weights only as initializers, and quantizes only tensors whose type is known.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = named(source)
    large = _is_large(model)
    folder = workspace / "prepared"
    folder.mkdir(exist_ok=True)
    save_model(model, folder)
    out = workspace / "inferred.onnx"
    del model
    for skip_symbolic in (False, True):
        try:
            quant_pre_process(
                str(folder / MODEL_FILE),
                str(out),
                skip_optimization=True,  # `simplify` did what is safe; node names stay as the caller knows them
                skip_symbolic_shape=skip_symbolic,
                save_as_external_data=large,
                external_data_location="inferred.onnx.data" if large else None,
            )
        except MemoryError:
            raise
        except Exception:  # noqa: S112  (shape inference is a help, not a condition: the next form is weaker)
            continue
        _complete_types(out)
        return out
    _complete_types(folder / MODEL_FILE)
    return folder / MODEL_FILE


def named(source: Path) -> ModelProto:
    """The model with a name on every node, and constants and weights as initializers only."""
    model = onnx.load(source)
    _name_nodes(model)
    _hide_initializers(model)
    _constants_to_initializers(model)
    return model


def _complete_types(path: Path) -> None:
    """Add the element types that shape inference did not find (behind contrib ops) by asking the runtime, which knows
    them; the quantizer fails on a tensor without a type. A model that does not load stays as it is."""
    import onnxruntime as ort

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    typed = {v.name for v in [*graph.value_info, *graph.input, *graph.output] if v.type.tensor_type.elem_type}
    untyped = [o for n in graph.node for o in n.output if o and o not in typed]
    if not untyped:
        return
    probe = path.with_name(f"probe-{path.name}")
    asked = ModelProto()
    asked.CopyFrom(model)
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in untyped)
    onnx.save(asked, probe)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
    except Exception:
        return  # the trial run of the result will say what is wrong with the model
    finally:
        probe.unlink()
    known = {o.name: o.type for o in session.get_outputs()}
    floats = [name for name in untyped if known.get(name) == "tensor(float)"]
    for name in floats:
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    if floats:
        onnx.save(model, path)


def _name_nodes(model: ModelProto) -> None:
    used = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            name = f"{node.op_type}_{index}"
            while name in used:
                name += "_"
            used.add(name)
            node.name = name


def _hide_initializers(model: ModelProto) -> None:
    """Weights are no inputs: below IR 4 they are listed as both, and would stay as inputs when they are quantized."""
    weights = {i.name for i in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _constants_to_initializers(model: ModelProto) -> None:
    graph = model.graph
    kept: list[NodeProto] = []
    outputs = {o.name for o in graph.output}
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type != "Constant" or value is None or node.output[0] in outputs:
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def dynamic_int8(
    source: Path,
    out: Path,
    *,
    op_types: Collection[str],
    excluded: Collection[str],
    per_channel: bool,
    reduce_range: bool,
) -> None:
    """Weights to int8 now, activations to uint8 while running. `source` in a folder that takes scratch files; `out` is
    `model.onnx` in a folder of its own."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source, load_external_data=False)
    # The quantizer rewrites every Gemm to MatMul + Add, whatever the op types say.
    skip = {*excluded} | {f"{name}_MatMul" for name in excluded}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.op_type not in op_types:
            skip |= {node.name, f"{node.name}_MatMul"}
    wanted = {"MatMul" if op == "Gemm" else op for op in op_types} - set(DYNAMIC_FORBIDDEN)
    quantize_dynamic(
        str(source),
        str(out),
        op_types_to_quantize=sorted(wanted),
        per_channel=per_channel,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=sorted(skip),
        use_external_data_format=_is_large_file(source),
        extra_options={"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True},
    )
    if any(n.op_type == surgery.DQ for n in onnx.load(out, load_external_data=False).graph.node):
        made = onnx.load(out)
        surgery.undo_dequantized_weights(made, source)
        surgery.drop_unread(made)
        for old in out.parent.glob(f"{out.name}*"):
            old.unlink()  # external data would be appended to the old file
        save_model(made, out.parent)


def static_int8(
    source: Path,
    out: Path,
    *,
    ranges: Mapping[str, tuple[float, float]],
    op_types: Collection[str],
    excluded: Collection[str],
    activations: Literal["uint8", "int8"],
    per_channel: bool,
    reduce_range: bool,
) -> None:
    """Q/DQ pairs around the nodes of `op_types`, with weights and biases stored as integers.

    uint8 activations are asymmetric (x86), int8 ones symmetric (what TensorRT takes). Without convolutions the outputs
    stay in floating point (sums, norms and Softmax follow: rounding there cost accuracy and 6 % of the time), and so
    does what other nodes read, such as the residual sums.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in sorted(ranges.items())
    }
    signed = activations == "int8"
    convolutional = rounds_outputs(op_types)
    quantizer = QDQQuantizer(
        load_model_with_shape_infer(source),
        per_channel,
        reduce_range,
        QuantType.QInt8,
        QuantType.QInt8 if signed else QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, data),
        [],
        sorted(excluded),
        sorted(op_types),
        {
            "ActivationSymmetric": signed,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": [] if convolutional else sorted(op_types),
        },
    )
    quantizer.quantize_model()
    surgery.keep_float(quantizer.model.model, source, op_types, excluded, rounded_outputs=convolutional)
    quantizer.model.save_model_to_file(str(out), _is_large_file(source))


def count_quantized(model: ModelProto, op_types: Collection[str]) -> dict[str, int]:
    """Nodes that compute on quantized values, by op type: integer kernels, and nodes of `op_types` whose first input is
    dequantized, and of products and convolutions the second one too. (A float node behind a quantized one reads a
    DequantizeLinear as well, and does not count.)"""
    dequantized = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        needed = 2 if node.op_type in COMPUTE_OPS else 1
        reads = node.op_type in op_types and bool(node.input) and dequantized.issuperset(node.input[:needed])
        if reads or node.op_type in _INTEGER_OPS:
            counts[node.op_type] += 1
    return dict(sorted(counts.items()))


def computes_on_integers(counts: Mapping[str, int]) -> bool:
    """Whether a node that does real work is among the counted ones (a quantized Flatten alone is worth nothing)."""
    return any(op in counts for op in (*COMPUTE_OPS, *_INTEGER_OPS)) or bool(counts.get("Gather"))


def _is_large(model: ModelProto) -> bool:
    """By the loaded weights: protobuf cannot tell the size of a message over 2 GiB."""
    loaded = [i for i in model.graph.initializer if i.data_location != TensorProto.EXTERNAL]
    sizes = (int(np.prod(i.dims)) * helper.tensor_dtype_to_np_dtype(i.data_type).itemsize for i in loaded)
    return sum(sizes) > INLINE_LIMIT_BYTES


def _is_large_file(model: Path) -> bool:
    return sum(f.stat().st_size for f in model.parent.glob(f"{model.name}*")) > INLINE_LIMIT_BYTES
