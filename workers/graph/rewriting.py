"""What the precision converters share: opsets, tensor types, weights, and placing new nodes in order."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from app.domain.failures import model_failure
from workers.graph.onnx_graph import CONTRIB_DOMAIN, keep_values, opset_of, reads, real_inputs, subgraphs

Array = np.ndarray[Any, Any]
WEIGHTED_OPS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_LARGEST_CONVERTED = 1_900_000_000  # bytes; a protobuf message cannot pass 2 GiB


def raise_opset(model: ModelProto, minimum: int) -> ModelProto:
    """The model in at least opset `minimum`, converted by ONNX's own converter. Raises `opset_conversion_failed`."""
    have = opset_of(model)
    if have >= minimum:
        return model
    detail = f"The model has opset {have}, this precision needs {minimum}"
    remedy = f"Export the model with opset {minimum} or later."
    if model.ByteSize() > _LARGEST_CONVERTED:
        raise model_failure("opset_conversion_failed", f"{detail}; it is too large to convert.", remedy=remedy)
    try:
        converted = onnx.version_converter.convert_version(model, minimum)
    except Exception as error:  # the C++ converter raises RuntimeError and its own
        words = " ".join(str(error).split())[:300]
        raise model_failure(
            "opset_conversion_failed", f"{detail}; the conversion fails: {words}", remedy=remedy
        ) from None
    converted.ir_version = max(converted.ir_version, helper.find_min_ir_version_for(list(converted.opset_import)))
    return converted


@dataclass(frozen=True)
class FormalTypes:
    """Of an operator: the type, or the name of a set of types, of each input and output; and what the sets hold."""

    inputs: Sequence[str]
    outputs: Sequence[str]
    types: Mapping[str, Collection[str]]

    def input(self, position: int) -> str:
        """The last one may be given several times."""
        return self.inputs[min(position, len(self.inputs) - 1)]

    def output(self, position: int) -> str:
        return self.outputs[min(position, len(self.outputs) - 1)]


def formal_types(node: NodeProto, opset: int) -> FormalTypes | None:
    """Of an ONNX operator in this opset, or of one that ONNX Runtime fuses (`com.microsoft`); None for others."""
    if node.domain == CONTRIB_DOMAIN:
        return _contrib_types().get(node.op_type)
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return None
    return FormalTypes(
        [i.type_str for i in schema.inputs],
        [o.type_str for o in schema.outputs],
        {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints},
    )


@functools.cache
def _contrib_types() -> Mapping[str, FormalTypes]:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return {
        schema.name: FormalTypes(
            [i.typeStr for i in schema.inputs],
            [o.typeStr for o in schema.outputs],
            {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints},
        )
        for schema in get_all_operator_schema()
        if schema.domain == CONTRIB_DOMAIN
    }


def float_tensors(model: ModelProto) -> set[str]:
    """Names of the float32 tensors of the main graph; needs inferred types."""
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    names = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {i.name for i in graph.initializer if i.data_type == TensorProto.FLOAT}


def shapes(model: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Known shapes by tensor; an unknown dimension is an empty string."""
    found: dict[str, tuple[int | str, ...]] = {}
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return found


def float_weights(model: ModelProto) -> dict[str, TensorProto]:
    return {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT}


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def output_axis(node: NodeProto, rank: int) -> int:
    """The axis of the second input's weights that numbers the output channels."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1


def captured(graph: GraphProto) -> set[str]:
    """Names that nested graphs (branches, loop bodies) read, and that may come from outside of them."""
    names: set[str] = set()
    for node in graph.node:
        for body in subgraphs(node):
            names |= {name for inner in body.node for name in reads(inner)} | {o.name for o in body.output}
    return names


def replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def drop_unused(graph: GraphProto) -> None:
    """Remove initializers that nothing reads any more."""
    used = {name for node in graph.node for name in node.input} | captured(graph) | {o.name for o in graph.output}
    kept = [i for i in graph.initializer if i.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def restore_interface(model: ModelProto, original: ModelProto) -> None:
    """Inputs and outputs with the names, types, symbolic shapes and order that they came with, where a pass lost or
    renamed no more than dimensions or types; and the values that inputs may hold."""
    for made, wanted in (
        (model.graph.input, real_inputs(original.graph)),
        (model.graph.output, list(original.graph.output)),
    ):
        types = {v.name: v.type.tensor_type.elem_type for v in wanted}
        if {v.name for v in made} == set(types) and all(
            v.type.tensor_type.elem_type in (TensorProto.UNDEFINED, types[v.name]) for v in made
        ):
            del made[:]
            made.extend(wanted)
    keep_values(model, original)


def forget_inferred(model: ModelProto, changed: Mapping[str, Any] | None = None) -> None:
    """Drop inferred types, which the conversion has made wrong; all of them, or those of `changed` tensors."""
    kept = [] if changed is None else [v for v in model.graph.value_info if v.name not in changed]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def array_of(tensor: TensorProto) -> Array:
    array: Array = numpy_helper.to_array(tensor)
    return array
