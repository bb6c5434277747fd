"""int8 graphs, made with ONNX Runtime's quantizer and repaired where it rounds what should stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from workers.graph import quantizable as quantization
from workers.graph.onnx_files import save_model
from workers.graph.prepare import has_external_weights
from workers.graph.qdq import surgery


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
    wanted = {"MatMul" if op == "Gemm" else op for op in op_types} - set(quantization.DYNAMIC_FORBIDDEN)
    quantize_dynamic(
        str(source),
        str(out),
        op_types_to_quantize=sorted(wanted),
        per_channel=per_channel,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=sorted(skip),
        use_external_data_format=has_external_weights(source),
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
    convolutional = quantization.rounds_outputs(op_types)
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
    quantizer.model.save_model_to_file(str(out), has_external_weights(source))
