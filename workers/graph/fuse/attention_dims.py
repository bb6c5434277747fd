"""Dimensions of a graph's tensors: which are numbers, and which free ones are known to be the same.

ONNX's inference gives free dimensions names of its own where it does not see that they are those of an input, and sees
other things when it starts from what an exporter or simplifier noted than when it does not. So it is asked both ways,
and of the graph before other fusions too; what is said of one tensor is one and the same size.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, helper

Dims = tuple[int | str, ...]

_INVENTED = "unk__"  # how ONNX's inference begins the names that it makes up
_FEW = 1024  # elements of a constant that may tell a shape


class _Equal:
    """Sizes that are known to be the same; a number stands for those that are equal to it."""

    def __init__(self) -> None:
        self._parent: dict[int | str, int | str] = {}

    def find(self, dim: int | str) -> int | str:
        while (above := self._parent.get(dim, dim)) != dim:
            dim = above
        return dim

    def join(self, a: int | str, b: int | str) -> None:
        a, b = self.find(a), self.find(b)
        if a == b or (isinstance(a, int) and isinstance(b, int)):
            return  # two numbers: one of the notes is wrong, and the inference stands
        # Numbers before names, names that somebody gave before invented ones.
        first, second = sorted((a, b), key=lambda d: (isinstance(d, str), str(d).startswith("~"), str(d)))
        self._parent[second] = first


def inferred(*models: ModelProto) -> tuple[dict[str, Dims], dict[str, int]]:
    """Dimensions (numbers, or names: one for all that are known to be the same) and element types by tensor, of all
    these graphs, which are one and the same model: tensors of one name are the same."""
    equal = _Equal()
    dims: dict[str, Dims] = {}
    types: dict[str, int] = {}
    for number, model in enumerate(models):
        for noted in (True, False):
            found, kinds = _infer(model, noted=noted, tag=f"~{number}{'n' if noted else ''}")
            types = {**kinds, **types}
            for name, shape in found.items():
                if name not in dims:
                    dims[name] = shape
                elif len(dims[name]) == len(shape):
                    for a, b in zip(dims[name], shape, strict=True):
                        equal.join(a, b)
    return {name: tuple(equal.find(d) for d in shape) for name, shape in dims.items()}, types


def _infer(model: ModelProto, *, noted: bool, tag: str) -> tuple[dict[str, Dims], dict[str, int]]:
    skeleton = _skeleton(model, noted=noted)
    try:
        known = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except Exception:  # a graph that the inference stumbles over still has what stands in it
        known = skeleton
    dims: dict[str, Dims] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    types = {t.name: t.data_type for t in model.graph.initializer}
    for value in [*known.graph.value_info, *known.graph.input, *known.graph.output]:
        tensor = value.type.tensor_type
        if tensor.elem_type:
            types.setdefault(value.name, tensor.elem_type)
        if tensor.HasField("shape"):
            shape: list[int | str] = []
            for axis, dim in enumerate(tensor.shape.dim):
                name = dim.dim_param or f"{value.name}.{axis}"
                invented = not dim.dim_param or name.startswith(_INVENTED)
                shape.append(dim.dim_value if dim.HasField("dim_value") else f"{tag} {name}" if invented else name)
            dims.setdefault(value.name, tuple(shape))
    return dims, types


def _skeleton(model: ModelProto, *, noted: bool) -> ModelProto:
    """The graph with its weights as inputs: their sizes are enough."""
    small = [t for t in model.graph.initializer if np.prod(t.dims) <= _FEW]
    large = [t for t in model.graph.initializer if np.prod(t.dims) > _FEW]
    given = {i.name for i in model.graph.input}
    weights = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large if t.name not in given]
    graph = helper.make_graph(
        list(model.graph.node), "skeleton", [*model.graph.input, *weights], list(model.graph.output), small
    )
    if noted:
        graph.value_info.extend(model.graph.value_info)
    skeleton = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    skeleton.functions.extend(model.functions)
    return skeleton


def same(a: int | str, b: int | str) -> bool:
    """Whether two dimensions are known to be equal."""
    return a == b
