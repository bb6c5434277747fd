"""What is quantized where, and model files before and after: names, shapes, counts.

Which ops and signs follow what was measured on x86 with VNNI: unsigned activations and signed weights; transformers
only in MatMul and Gemm (quantized LayerNorm, masks and sums break them); never dynamic int8 on convolutions (4–22 times
slower).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import uses_external_data

from workers.graph.qdq import surgery
from workers.kernel import TensorSpec
from workers.graph.onnx_files import DATA_FILE, INLINE_LIMIT_BYTES, MODEL_FILE, files_of, load_model, read_external
from workers.graph.onnx_graph import metadata, with_values

TRANSFORMER_OPS = ("MatMul", "Gemm")
# Convolutions with what stands between them, so that int8 values pass from one to the next.
CNN_OPS = (
    *("Conv", "ConvTranspose", "MatMul", "Gemm", "Add", "Mul", "Concat", "Resize", "Pad"),
    *("Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
)
DYNAMIC_OPS = ("MatMul", "Gemm", "Attention", "LSTM")
DYNAMIC_FORBIDDEN = ("Conv", "ConvTranspose")
_SMALL_CONSTANT = 256  # elements
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
    return with_values(interface(model.graph.input, {i.name for i in model.graph.initializer}), metadata(model))


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
    folder = workspace / "prepared"
    folder.mkdir(exist_ok=True)
    model = onnx.load(source, load_external_data=False)
    _complete(model)
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= _SMALL_CONSTANT:
            read_external(tensor, source.parent)  # shape inference reads axes and shapes, and no other file
    if _has_external(model):
        for file in files_of(source.parent):
            if file.name != source.name:
                shutil.copyfile(file, folder / file.name)  # onnx refuses data with a second hard link
        onnx.save(model, folder / MODEL_FILE)
    else:
        save_model(model, folder)
    external = (folder / DATA_FILE).exists() or _has_external(model)
    del model
    return _inferred_in_place(folder) if external else _inferred(folder / MODEL_FILE, workspace / "inferred.onnx")


def _inferred(model: Path, out: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    for skip_symbolic in (False, True):
        try:
            quant_pre_process(
                str(model),
                str(out),
                skip_optimization=True,  # `simplify` did what is safe; node names stay as the caller knows them
                skip_symbolic_shape=skip_symbolic,
            )
        except MemoryError:
            raise
        except Exception:  # noqa: S112  (shape inference is a help, not a condition: the next form is weaker)
            continue
        _complete_types(out)
        return out
    _complete_types(model)
    return model


def _inferred_in_place(folder: Path) -> Path:
    """As `_inferred`, for a model with external weights: they are neither read nor written again."""
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    path, scratch = folder / MODEL_FILE, folder / "inferred.onnx"

    def symbolic() -> None:
        skeleton = onnx.load(path, load_external_data=False)
        onnx.save(SymbolicShapeInference.infer_shapes(skeleton), scratch)

    def plain() -> None:
        onnx.shape_inference.infer_shapes_path(str(path), str(scratch))

    for infer in (symbolic, plain):
        try:
            infer()
        except MemoryError:
            raise
        except Exception:
            scratch.unlink(missing_ok=True)  # as above
        else:
            scratch.replace(path)
    model = onnx.load(path, load_external_data=False)
    add_pre_process_metadata(model)
    onnx.save(model, path)
    _complete_types(path)
    return path


def named(source: Path) -> ModelProto:
    """The model with a name on every node, and constants and weights as initializers only."""
    model = load_model(source)
    _complete(model)
    return model


def _complete(model: ModelProto) -> None:
    _name_nodes(model)
    _hide_initializers(model)
    _constants_to_initializers(model)


def _has_external(model: ModelProto) -> bool:
    return any(uses_external_data(i) for i in model.graph.initializer)


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


def count_quantized(model: ModelProto, op_types: Collection[str], excluded: Collection[str] = ()) -> dict[str, int]:
    """Nodes that compute on quantized values, by op type: integer kernels, and nodes of `op_types` whose first input is
    dequantized, and of products and convolutions the second one too. (A float node behind a quantized one reads a
    DequantizeLinear as well, and does not count; nor do those named by `excluded`.)"""
    dequantized = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        needed = 2 if node.op_type in COMPUTE_OPS else 1
        reads = node.op_type in op_types and bool(node.input) and dequantized.issuperset(node.input[:needed])
        if (reads and node.name not in excluded) or node.op_type in _INTEGER_OPS:
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


def has_external_weights(model: Path) -> bool:
    """Of a model file: what is made of it may not fit into one file either."""
    return _has_external(onnx.load(model, load_external_data=False))
