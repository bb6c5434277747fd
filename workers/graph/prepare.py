"""A model as the quantizing passes want it: names on all nodes, weights as initializers, inferred types."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import uses_external_data

from workers.artifacts import DATA_FILE
from workers.graph.interpreter import open_session
from workers.graph.onnx_files import MODEL_FILE, files_of, load_model, read_external, save_model
from workers.graph.onnx_graph import all_nodes

_SMALL_CONSTANT = 256  # elements


def node_names(model: ModelProto) -> set[str]:
    """Names of the nodes at every depth, as `prepare` completes them."""
    _name_nodes(model)
    return {node.name for node in all_nodes(model) if node.name}


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

    model, out = model.absolute(), out.absolute()
    for skip_symbolic in (False, True):
        try:
            with contextlib.chdir(out.parent):  # where it gives up, it leaves the model and its weights where it stands
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
        with contextlib.chdir(folder):  # as above
            found = SymbolicShapeInference.infer_shapes(skeleton)
        onnx.save(found, scratch)

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
    try:
        session = open_session(probe)
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


def has_external_weights(model: Path) -> bool:
    """Of a model file: what is made of it may not fit into one file either."""
    return _has_external(onnx.load(model, load_external_data=False))
