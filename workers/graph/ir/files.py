"""Model files for OpenVINO: ONNX in, IR out, the same bytes for the same model.

An IR folder holds `model.xml` and `model.bin`, and `interface.json`: the inputs and outputs under their ONNX names,
types and symbolic shapes, by position. The IR itself has no symbolic dimensions, and conversion can lose an output's
name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from onnx import ModelProto

from app.domain.failures import StageFailure
from workers.graph.interface import Interface
from workers.graph.ir.faults import ignores_lengths
from workers.graph.ir.library import fuse_common, library, read_model
from workers.graph.onnx_files import MODEL_FILE, read_skeleton
from workers.graph.onnx_graph import all_nodes, external_tensors, model_specs, node_label

XML_FILE = "model.xml"
BIN_FILE = "model.bin"
_READINGS = 8
_MERGED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "BatchNormalization", "Mul", "Add")


def read_onnx(folder: Path) -> tuple[Any, Interface, ModelProto]:
    """`model.onnx` as an `openvino.Model` with stable node names, its interface, and the ONNX graph without weights.

    Raises StageFailure: `load_failed`, `unsupported_op` (also for strings and other types that are no numbers).
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise StageFailure("load_failed", f"The model has no file {MODEL_FILE}.")
    graph = read_skeleton(path)
    interface = Interface(*map(tuple, model_specs(graph)))
    for spec in (*interface.inputs, *interface.outputs):
        if spec.dtype in ("string", "undefined"):
            readers = (node_label(n) for n in graph.graph.node if spec.name in (*n.input, *n.output))
            raise StageFailure(
                "unsupported_op",
                f"Tensor {spec.name!r} is no tensor of numbers; this backend runs on numbers only.",
                node=next(readers, None),
                tensor=spec.name,
                remedy="Use another backend for this model.",
            )
    deaf = ignores_lengths(graph)
    if deaf is not None:
        raise StageFailure(
            "unsupported_op",
            f"Node {node_label(deaf)!r} ({deaf.op_type}) reads the lengths of its sequences, which OpenVINO ignores.",
            node=node_label(deaf),
            tensor=deaf.input[4],
            remedy="Use another backend for this model.",
        )
    if graph.functions and not external_tensors(graph):
        from onnx.inliner import inline_local_functions

        graph = inline_local_functions(graph)  # the reader knows no functions of the model's own
        model = _read_unambiguously(graph.SerializeToString(), graph)
    else:
        model = _read_unambiguously(path, graph)
    stable_names(model)
    named = {node.get_friendly_name() for body in _bodies(model) for node in body.get_ops()}
    fuse_common(model, graph=graph)
    check_interface(model, interface)
    if any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):  # Q/DQ nodes become these
        keep_reduced_axes(model)
    stable_names(model, named)
    return model, interface, graph


def _read_unambiguously(source: Path | bytes, graph: ModelProto) -> Any:
    """Read until no automatic name (`MatMul_34`) is also one of the model's own, which it cannot be told from. The
    numbers grow with every reading, so that a second one nearly always does."""
    own = {name for node in all_nodes(graph) for name in (node.name, *node.output)}
    own |= {tensor.name for tensor in (*graph.graph.initializer, *graph.graph.input)}
    for _ in range(_READINGS):
        model = read_model(source, graph=graph)
        automatic = {n.get_name() for body in _bodies(model) for n in body.get_ops() if _is_automatic(n)}
        if not automatic & own:
            break
    return model


def read_ir(folder: Path) -> tuple[Any, Interface]:
    """The `openvino.Model` of an IR folder and its interface; raises StageFailure (`load_failed`)."""
    interface = Interface.read(folder)
    model = read_model(folder / XML_FILE)
    check_interface(model, interface)
    return model, interface


def write_ir(model: Any, interface: Interface, out: Path) -> None:
    """Write the three files of an IR folder; weights keep their type."""
    stable_names(model)
    library().save_model(model, str(out / XML_FILE), compress_to_fp16=False)
    interface.write(out)


def check_interface(model: Any, interface: Interface) -> None:
    """Raises `load_failed` where the model's tensors are not those of the interface, in its order."""
    for kind, ports, specs in (
        ("inputs", model.inputs, interface.inputs),
        ("outputs", model.outputs, interface.outputs),
    ):
        names = [port.get_names() for port in ports]
        fits = len(names) == len(specs) and all(
            not known or spec.name in known for known, spec in zip(names, specs, strict=True)
        )
        if not fits:
            wanted = [spec.name for spec in specs]
            raise StageFailure(
                "load_failed",
                f"OpenVINO reads other {kind} than the model has: {sorted(map(sorted, names))} instead of {wanted}.",
                remedy="Check that the graph is valid ONNX; use another backend for this model.",
            )


def stable_names(model: Any, named: Collection[str] | None = None) -> None:
    """Give a name to every node that has none. OpenVINO would number it by all nodes the process ever made: the same
    model would be written differently every time, and NNCF names what it adds after its neighbours. `named`: the only
    names that count, where later steps have named nodes after others that had such a number."""
    for body in _bodies(model):
        nodes = body.get_ordered_ops()
        automatic = [n for n in nodes if _is_automatic(n) or (named and n.get_friendly_name() not in named)]
        taken = {n.get_friendly_name() for n in nodes} - {n.get_friendly_name() for n in automatic}
        for node in automatic:
            node.set_friendly_name(_free(node.get_type_name(), 0, taken))
        seen: set[str] = set()
        for node in nodes:  # a name that stands twice: NNCF would tell them apart in an order of its own
            name = node.get_friendly_name()
            if name in seen:
                node.set_friendly_name(_free(name, 1, taken))
            seen.add(name)


def _is_automatic(node: Any) -> bool:
    return bool(node.get_friendly_name() == node.get_name())


def _free(stem: str, start: int, taken: set[str]) -> str:
    name = next(n for i in count(start) if (n := f"{stem}.{i}") not in taken)
    taken.add(name)
    return name


def _bodies(model: Any) -> Iterator[Any]:
    """The model and the bodies of its If, Loop and TensorIterator nodes, at any depth."""
    yield model
    for node in model.get_ops():
        if node.get_type_name() == "If":
            for index in (0, 1):
                yield from _bodies(node.get_function(index))
        elif node.get_type_name() in ("Loop", "TensorIterator"):
            yield from _bodies(node.get_function())


def keep_reduced_axes(model: Any) -> None:
    """Give every mean, sum, … that drops its axes the axes back, and drop them in a node of its own.

    OpenVINO 2026.4 computes nonsense on a CPU where a per-channel product or sum and a FakeQuantize follow a reduction
    that drops an axis before the last (it fuses them and takes another axis for the channels): mean pooling over tokens
    behind which channels are equalized.
    """
    opset = library().opset13
    for node in model.get_ordered_ops():
        if not node.get_type_name().startswith("Reduce") or node.get_attributes().get("keep_dims", True):
            continue
        output, name = node.output(0), node.get_friendly_name()
        readers, tensors = output.get_target_inputs(), output.get_names()
        node.set_attribute("keep_dims", True)
        node.validate_and_infer_types()
        squeeze = opset.squeeze(output, node.input_value(1))
        squeeze.set_friendly_name(f"{name}/squeeze")
        output.set_names(set())
        squeeze.output(0).set_names(tensors)
        for reader in readers:
            reader.replace_source_output(squeeze.output(0))
    model.validate_nodes_and_infer_types()


def nodes_by_onnx_name(model: Any, graph: ModelProto) -> dict[str, list[str]]:
    """ONNX node name → names of the OpenVINO nodes it became; nodes that vanished (folded, merged) are left out.

    One ONNX node may become several (Gemm: a product, scales and a sum), and its name goes to one of them only. Tensor
    names are what both sides share: to a node belongs what lies between its inputs and its outputs.
    """
    by_tensor: dict[str, Any] = {}
    for node in model.get_ordered_ops():
        for output in node.outputs():
            for name in output.get_names():
                by_tensor[name] = output
    known = set(by_tensor)
    found: dict[str, list[str]] = {}
    for onnx_node in graph.graph.node:
        own = set(onnx_node.output)
        start = [by_tensor[name].get_node() for name in onnx_node.output if name in by_tensor]
        names: dict[str, None] = {}
        while start:
            node = start.pop()
            name = node.get_friendly_name()
            if name in names or node.get_type_name() in ("Parameter", "Constant"):
                continue
            names[name] = None
            for value in node.input_values():
                if not ((value.get_names() & known) - own):
                    start.append(value.get_node())
        if names:
            found[onnx_node.name] = list(names)
    _add_merged(found, graph)
    return found


def _add_merged(found: dict[str, list[str]], graph: ModelProto) -> None:
    """A product, a convolution or a scale of one whose output is no tensor any more was merged with what reads it: it
    is one of those nodes."""
    readers: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in reversed(graph.graph.node):  # a reader that vanished, too, comes first
        if node.op_type not in _MERGED or node.name in found:
            continue
        into = {made: None for name in node.output for r in readers.get(name, ()) for made in found.get(r.name, ())}
        if into:
            found[node.name] = list(into)
