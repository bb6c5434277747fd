"""Several ONNX graphs as one, in which what each gives goes to the next; and that one cut apart again at the same
tensors. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, inliner

from app.domain.chain import Joined, outputs_of
from workers.graph.onnx_graph import STANDARD_DOMAINS, opset_of, reads, real_inputs, subgraphs
from workers.kernel import TensorSpec

# What computes sizes and indices of tensors: cheap, and the same for every model that it is done for.
_SIZES = frozenset(
    ("Shape", "Size", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast", "Constant", "Range")
) | frozenset(("Add", "Sub", "Mul", "Div", "Reshape", "Identity", "ConstantOfShape", "Equal", "Where", "Expand"))


class NotMerged(Exception):
    """Graphs that cannot stand in one model; the message says why."""


class NotCut(Exception):
    """A graph that cannot be cut at these tensors; the message says why."""


def merge(models: Sequence[ModelProto], joined: Joined) -> tuple[ModelProto, list[dict[str, str]]]:
    """One model with the inputs and outputs that `joined` tells, and of each joint (of every model behind the first:
    input → output of the one before) the name of its tensor in it. Everything inside is named `1/…`, `2/…` by its
    model; the models' weights are in them. Raises `NotMerged`."""
    whole = ModelProto()
    whole.ir_version = max(int(model.ir_version) for model in models)
    whole.producer_name = models[-1].producer_name
    whole.graph.name = " then ".join(model.graph.name or str(place) for place, model in enumerate(models, 1))
    _import_opsets(whole, models)
    between = _between(models, joined)
    metadata: dict[str, str] = {}
    for place, model in enumerate(models):
        metadata |= {entry.key: entry.value for entry in model.metadata_props}  # the last one's name its outputs
        part = ModelProto()
        part.CopyFrom(model)
        if part.functions:  # those of two models may have one name
            part = inliner.inline_local_functions(part)
        entries = {info.name for info in real_inputs(part.graph)}
        passed = next((output.name for output in part.graph.output if output.name in entries), None)
        if passed is not None:
            raise NotMerged(f"model {place + 1} gives its input {passed!r} back as it is")
        names = {name: name for name in joined.taken[place]}
        if place > 0:
            names |= {own: between[place - 1][given] for own, given in joined.joints[place - 1].items()}
        last = place == len(models) - 1
        names |= joined.renamed if last else between[place]
        _rename(part.graph, names, f"{place + 1}/")
        for tensors in (part.graph.input, part.graph.output):
            _set_sizes(tensors, joined, place)
        known = {tensor.name for tensor in whole.graph.input}
        taken = [tensor for tensor in real_inputs(part.graph) if tensor.name in joined.taken[place]]
        whole.graph.input.extend(tensor for tensor in taken if tensor.name not in known)
        whole.graph.node.extend(part.graph.node)
        whole.graph.initializer.extend(part.graph.initializer)
        whole.graph.sparse_initializer.extend(part.graph.sparse_initializer)
        if last:
            whole.graph.output.extend(part.graph.output)
    helper.set_model_props(whole, metadata)
    joints = [
        {own: between[place][given] for own, given in joints.items()} for place, joints in enumerate(joined.joints)
    ]
    return whole, joints


def _import_opsets(whole: ModelProto, models: Sequence[ModelProto]) -> None:
    standard = {opset_of(model) for model in models}
    if len(standard) > 1:
        raise NotMerged(f"they are of the opsets {', '.join(map(str, sorted(standard)))}, which could not be made one")
    found: dict[str, int] = {"": standard.pop()}
    for opset in (opset for model in models for opset in model.opset_import):
        if opset.domain in STANDARD_DOMAINS:
            continue
        if found.setdefault(opset.domain, int(opset.version)) != opset.version:
            raise NotMerged(f"they import different versions of the operators {opset.domain!r}")
    whole.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in found.items())


def _between(models: Sequence[ModelProto], joined: Joined) -> list[dict[str, str]]:
    """Of each model but the last, what its outputs that go on are called in the whole: as in the model, where nothing
    else that is seen from outside has that name."""
    taken = {str(tensor["name"]) for tensor in (*joined.inputs, *joined.outputs)}
    found: list[dict[str, str]] = []
    for model, joints in zip(models, joined.joints, strict=False):
        used = [output.name for output in model.graph.output if output.name in joints.values()]
        names = outputs_of(used, taken)
        taken |= set(names.values())
        found.append(names)
    return found


def _rename(graph: GraphProto, names: Mapping[str, str], prefix: str) -> None:
    """Every value as `names` has it, else with the prefix; bodies, too. Shapes that were inferred are forgotten: the
    whole is inferred anew."""

    def new(name: str) -> str:
        return names.get(name, prefix + name) if name else name

    del graph.value_info[:]
    del graph.quantization_annotation[:]
    for tensor in (*graph.input, *graph.output, *graph.initializer):
        tensor.name = new(tensor.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = new(sparse.values.name)
    for node in graph.node:
        node.name = prefix + node.name if node.name else ""
        for values in (node.input, node.output):
            values[:] = [new(name) for name in values]
        for body in subgraphs(node):
            _rename(body, names, prefix)


def _set_sizes(tensors: Sequence[ValueInfoProto], joined: Joined, place: int) -> None:
    for tensor in tensors:
        for dim in tensor.type.tensor_type.shape.dim:
            if dim.dim_param:
                (size,) = joined.sized(place, [dim.dim_param]) or [dim.dim_param]
                if isinstance(size, int):
                    dim.dim_value = size
                else:
                    dim.dim_param = size


def cut(model: ModelProto, borders: Sequence[Sequence[TensorSpec]]) -> list[ModelProto]:
    """The models that it falls apart into where each border is computed by one and taken by the next. What computes
    sizes may be in several of them. Raises `NotCut`."""
    nodes = list(model.graph.node)
    makers = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    entries = {info.name: info for info in real_inputs(model.graph)}
    results = [*([spec.name for spec in border] for border in borders), [output.name for output in model.graph.output]]
    told = {info.name: info for info in (*model.graph.output, *map(_info, chain.from_iterable(borders)))}
    found, before = list[ModelProto](), set[int]()
    for targets, sources in zip(results, [[], *results], strict=False):
        passed = next((name for name in targets if name not in makers or name in sources), None)
        if passed is not None:
            raise NotCut(f"no operator of the optimized graph computes {passed!r} for one of the models alone")
        own, taken = _needed(targets, nodes, makers, set(sources), entries)
        again = next((nodes[i] for i in sorted(own & before) if nodes[i].op_type not in _SIZES), None)
        if again is not None:
            raise NotCut(f"the optimized graph computes {again.name or again.op_type!r} for two of the models at once")
        before |= own
        inputs = [*(entries[n] for n in entries if n in taken), *(told[n] for n in sources if n in taken)]
        found.append(_part(model, [nodes[i] for i in sorted(own)], inputs, [told[n] for n in targets]))
    return found


def _info(spec: TensorSpec) -> ValueInfoProto:
    try:
        named = None if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
    except TypeError as error:
        raise NotCut(f"there is no type {spec.dtype!r} to hand {spec.name!r} over in") from error
    kind = TensorProto.BFLOAT16 if named is None else helper.np_dtype_to_tensor_dtype(named)
    return helper.make_tensor_value_info(spec.name, kind, spec.shape)


def _needed(
    targets: Sequence[str],
    nodes: Sequence[NodeProto],
    makers: Mapping[str, int],
    sources: AbstractSet[str],
    entries: Mapping[str, ValueInfoProto],
) -> tuple[set[int], set[str]]:
    """Which nodes compute `targets` of `sources` and the model's own inputs; and which of both they take."""
    wanted, seen = [*targets], set[str]()
    own, taken = set[int](), set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in sources or name in entries:
            taken.add(name)
        elif name in makers:  # else it is a weight, or what a body makes for itself
            own.add(makers[name])
            wanted += reads(nodes[makers[name]])
    return own, taken


def _part(
    model: ModelProto, nodes: Sequence[NodeProto], inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
) -> ModelProto:
    part = ModelProto()
    part.ir_version, part.producer_name = model.ir_version, model.producer_name
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.metadata_props.extend(model.metadata_props)
    graph = part.graph
    graph.name = model.graph.name
    graph.node.extend(nodes)  # in the order that they stood in
    read = {name for node in nodes for name in reads(node)}
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    graph.sparse_initializer.extend(t for t in model.graph.sparse_initializer if t.values.name in read)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    made = {name for node in nodes for name in node.output} - {info.name for info in outputs}
    graph.value_info.extend(info for info in model.graph.value_info if info.name in made)
    return part
