"""Is this a graph that the service can optimize? Typed answers that name the node or the tensor."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, shape_inference

from app.domain.failures import FailureKind, StageFailure, model_failure
from app.domain.shapes import ShapeRange
from workers.graph.onnx_graph import (
    STANDARD_DOMAINS,
    all_nodes,
    dtype_name,
    node_label,
    opset_of,
    real_inputs,
    subgraphs,
)
from workers.kernel import TensorSpec

# Domains whose ops ONNX Runtime brings along; whether it has the op itself shows when it loads the model.
_RUNTIME_DOMAINS = ("com.microsoft", "com.ms.", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview")
_FEEDABLE = frozenset(
    {"float16", "float32", "float64", "bool"} | {f"{s}int{bits}" for s in ("", "u") for bits in (8, 16, 32, 64)}
)


def check_interface(model: ModelProto) -> None:
    """Inputs and outputs: some, tensors, of types a data set can hold, of fixed rank."""
    inputs, outputs = real_inputs(model.graph), model.graph.output
    if not inputs:
        raise model_failure(
            "no_inputs", "The model has no inputs.", remedy="Export it with at least one input that has a batch axis."
        )
    if not outputs:
        raise model_failure("no_outputs", "The model has no outputs.", remedy="Export it with its outputs.")
    for info in inputs:
        _check_input(info)
    for info in outputs:
        kind = info.type.WhichOneof("value")
        if kind not in (None, "tensor_type") or info.type.tensor_type.elem_type == TensorProto.STRING:
            raise model_failure(
                "unsupported_output_type",
                f"Output {info.name!r} is no tensor of numbers.",
                tensor=info.name,
                remedy="Export the model without the step that makes sequences, maps or strings.",
            )


def _check_input(info: ValueInfoProto) -> None:
    kind = info.type.WhichOneof("value")
    dtype = dtype_name(info.type.tensor_type.elem_type) if kind == "tensor_type" else str(kind)
    if dtype not in _FEEDABLE:
        raise model_failure(
            "unsupported_input_type",
            f"Input {info.name!r} has type {dtype}; inputs must be tensors of numbers or booleans.",
            tensor=info.name,
            remedy="Move text processing out of the model, and export it with numeric tensors as inputs.",
        )
    if not info.type.tensor_type.HasField("shape"):
        raise dynamic_rank(info.name, "Input")


def dynamic_rank(name: str, what: str) -> StageFailure:
    return model_failure(
        "dynamic_rank",
        f"{what} {name!r} has no fixed number of dimensions.",
        tensor=name,
        remedy="Export the model with a known rank; single dimensions may stay symbolic.",
    )


def check_ops(model: ModelProto) -> None:
    """Every op of a standard domain must be in its operator set, every other one in a local function or one of ONNX
    Runtime's domains; raises `unsupported_op`, or `unsupported_opset` where the whole set is too new."""
    newest = onnx.defs.onnx_opset_version()
    opset = opset_of(model)
    if opset > newest:
        raise model_failure(
            "unsupported_opset",
            f"The model needs opset {opset}; this service knows those up to {newest}.",
            remedy=f"Export it with opset {newest} or lower.",
        )
    functions = {(f.domain, f.name) for f in model.functions}
    for node in all_nodes(model):
        if (node.domain, node.op_type) in functions:
            continue
        standard = node.domain in STANDARD_DOMAINS
        if standard and opset == 0:
            raise model_failure(
                "invalid_model", "The model does not say which operator set it needs.", remedy="Export it again."
            )
        known = onnx.defs.has(node.op_type, opset, "") if standard else node.domain.startswith(_RUNTIME_DOMAINS)
        if not known:
            raise unsupported_op(node, f"opset {opset}" if standard else f"domain {node.domain!r}")


def unsupported_op(node: NodeProto, where: str) -> StageFailure:
    return model_failure(
        "unsupported_op",
        f"Node {node_label(node)!r} uses op {node.op_type!r}, which is unknown in {where}.",
        node=node_label(node),
        remedy=f"Export the model without {node.op_type}, with standard ONNX operators only.",
    )


def _reads(node: NodeProto) -> Iterator[str]:
    """The tensors a node needs: its inputs, and what its bodies take from around them."""
    yield from node.input
    for body in subgraphs(node):
        local = {i.name for i in body.input} | {t.name for t in body.initializer}
        local |= {t.values.name for t in body.sparse_initializer}
        local |= {name for inner in body.node for name in inner.output}
        for inner in body.node:
            yield from (name for name in _reads(inner) if name not in local)
        yield from (o.name for o in body.output if o.name not in local)


def sort_nodes(graph: GraphProto) -> bool:
    """Put the nodes in an order in which every tensor is made before it is used; returns whether that changed it.

    Raises `invalid_graph` with a node for cycles, tensors that nobody makes and tensors made twice.
    """
    given = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    given |= {t.values.name for t in graph.sparse_initializer}
    maker: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in maker or name in given:
                raise _invalid(node, f"makes the tensor {name!r}, which already exists", name)
            maker[name] = index
    needs: list[set[int]] = []
    users: dict[int, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.node):
        names = [n for n in _reads(node) if n and n not in given]
        for name in names:
            if name not in maker:
                raise _invalid(node, f"reads the tensor {name!r}, which nothing makes", name)
        needs.append({maker[n] for n in names})
        for before in needs[-1]:
            users[before].append(index)
    open_needs = [len(n) for n in needs]
    ready = [i for i, count in enumerate(open_needs) if count == 0]
    order: list[int] = []
    while ready:  # the smallest index first: a sorted graph keeps its order
        index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            open_needs[user] -= 1
            if open_needs[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(graph.node):
        raise _invalid(graph.node[_on_cycle(needs, open_needs)], "lies on a cycle: it needs its own output")
    if order == list(range(len(order))):
        return False
    nodes = [NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(nodes)
    return True


def _on_cycle(needs: Sequence[set[int]], open_needs: Sequence[int]) -> int:
    """A node on a cycle: go back through nodes that are still waiting until one comes again."""
    index = next(i for i, count in enumerate(open_needs) if count)
    seen: set[int] = set()
    while index not in seen:
        seen.add(index)
        index = min(i for i in needs[index] if open_needs[i])
    return index


def _invalid(node: NodeProto, what: str, tensor: str | None = None) -> StageFailure:
    return model_failure(
        "invalid_graph",
        f"Node {node_label(node)!r} ({node.op_type}) {what}.",
        node=node_label(node),
        tensor=tensor,
        remedy="Export the model again; the graph must be acyclic and complete.",
    )


_NODE_IN_MESSAGE = (
    re.compile(r"node name: ([^)\s]+)\)"),
    re.compile(r"\bName: (\S+) OpType"),
    re.compile(r"name: (\S+) OpType"),
)


def graph_failure(error: Exception) -> StageFailure:
    """`invalid_graph` for what the checker or shape inference raised, with the node its message names."""
    text = " ".join(str(error).split())
    text = re.sub(r"\S*/(?:[\w.+-]+/)+", "", text)
    node = next((m.group(1) for pattern in _NODE_IN_MESSAGE if (m := pattern.search(text))), None)
    return model_failure(
        "invalid_graph", f"The graph is not valid: {text[:600]}", node=node, remedy="Repair or export the model again."
    )


def run_checker(path: Path) -> None:
    """onnx.checker on a file, which also serves models above 2 GB; raises `invalid_graph`."""
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except Exception as error:  # ValidationError, and whatever else the native code throws
        raise graph_failure(error) from None


def infer_shapes(path: Path, target: Path) -> Exception | None:
    """Strict shape and type inference from file to file. Returns the error where strict inference fails; then the
    target holds what inference that tolerates errors found, or is missing."""
    problem: Exception | None = None
    try:
        shape_inference.infer_shapes_path(str(path), str(target), check_type=True, strict_mode=True, data_prop=True)
        return None
    except Exception as error:  # InferenceError, RuntimeError of the native code
        problem = error
    target.unlink(missing_ok=True)
    try:
        shape_inference.infer_shapes_path(str(path), str(target), check_type=False, strict_mode=False, data_prop=False)
    except Exception:  # the first error tells more
        target.unlink(missing_ok=True)
    return problem


def check_shapes(inputs: Sequence[TensorSpec], shapes: Mapping[str, ShapeRange] | None) -> None:
    """The user's shape ranges must fit the model's inputs; raises `shape_mismatch` (kind REQUEST) with the tensor."""
    by_name = {spec.name: spec for spec in inputs}
    bound: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for name, wanted in (shapes or {}).items():
        if name not in by_name:
            raise _mismatch(name, f"The model has no input {name!r}; it has {', '.join(sorted(by_name))}.")
        dims = by_name[name].shape
        if len(wanted.opt) != len(dims):
            raise _mismatch(name, f"Input {name!r} has shape {list(dims)}, the range has {len(wanted.opt)} dimensions.")
        for axis, dim in enumerate(dims):
            limits = (wanted.min[axis], wanted.opt[axis], wanted.max[axis])
            if isinstance(dim, int):
                if set(limits) != {dim}:
                    raise _mismatch(name, f"Axis {axis} of input {name!r} is fixed at {dim}, the range asks {limits}.")
                continue
            other, known = bound.setdefault(dim, (name, limits))
            if known != limits:
                raise _mismatch(
                    name, f"Dimension {dim!r} is {known} (min, opt, max) in input {other!r} and {limits} in {name!r}."
                )


def check_axes(inputs: Sequence[TensorSpec], axes: Mapping[str, int | None]) -> None:
    """The user's batch axes must be ones of the model's inputs; raises `batch_axis_mismatch` (kind REQUEST)."""
    by_name = {spec.name: spec for spec in inputs}
    for name, axis in axes.items():
        if name not in by_name:
            detail = f"The model has no input {name!r}; it has {', '.join(sorted(by_name))}."
        elif axis is not None and axis >= len(by_name[name].shape):
            detail = f"Input {name!r} has shape {list(by_name[name].shape)}, without an axis {axis}."
        else:
            continue
        raise StageFailure(
            "batch_axis_mismatch",
            detail,
            FailureKind.REQUEST,
            tensor=name,
            remedy=f"Name an axis of the model's input in `inputs.{name}.batch_axis`, or null where it has no batch.",
        )


def _mismatch(tensor: str, detail: str) -> StageFailure:
    return StageFailure(
        "shape_mismatch",
        detail,
        FailureKind.REQUEST,
        tensor=tensor,
        remedy="Give `shapes` that fit the model's inputs, or leave them out.",
    )
