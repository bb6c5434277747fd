"""Names in a graph: of nodes, which reports and exclusions rely on, and of symbolic dimensions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from onnx import GraphProto, ModelProto, ValueInfoProto

from app.domain.axes import PLACEHOLDER
from workers.graph.onnx_graph import all_nodes, nodes_of, subgraphs, tensor_spec
from workers.kernel import TensorSpec


def name_nodes(model: ModelProto) -> list[str]:
    """Give nodes without a name one, and those whose name another has, so that reports and exclusions can name every
    node; returns notes."""
    named = {node.name for node in all_nodes(model)}
    seen: set[str] = set()
    renamed: list[str] = []
    top = {id(node) for node in model.graph.node}
    for node in all_nodes(model):
        if node.name and node.name not in seen:
            seen.add(node.name)
        elif node.name or id(node) in top:
            stem, counter = node.name or node.op_type, 1 if node.name else 0
            while (name := f"{stem}_{counter}") in named:
                counter += 1
            if node.name:
                renamed.append(f"{node.name!r} ({node.op_type}) is {name!r} now")
            named.add(name)
            seen.add(name)
            node.name = name
    if not renamed:
        return []
    more = f", and {len(renamed) - 5} more" if len(renamed) > 5 else ""
    return [
        f"Nodes shared names, which ONNX does not allow; of each the first kept it: {', '.join(renamed[:5])}{more}."
    ]


def forget_placeholders(model: ModelProto) -> None:
    """Take symbols like '?' for what they are: unknown sizes, which need not be equal."""
    for info in _infos(model):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param and PLACEHOLDER.fullmatch(dim.dim_param.strip()):
                dim.ClearField("dim_param")


def rename_apart(model: ModelProto, sizes: Mapping[str, Sequence[Sequence[int]]], who: str) -> list[str]:
    """Where one symbol stands on several axes of an input, and `who` (the job's shapes, the data) knows them to differ,
    the axes get names of their own: an exporter's name is no proof. `sizes`: input → shapes. Returns notes."""
    notes = []
    for info in model.graph.input:
        spec = tensor_spec(info)
        known = [shape for shape in sizes.get(info.name, ()) if len(shape) == len(spec.shape)]
        for symbol in dict.fromkeys(d for d in spec.shape if isinstance(d, str) and spec.shape.count(d) > 1):
            axes = [axis for axis, dim in enumerate(spec.shape) if dim == symbol]
            if any(len({shape[axis] for axis in axes}) > 1 for shape in known):
                for axis in axes:
                    info.type.tensor_type.shape.dim[axis].dim_param = f"{info.name}_dim_{axis}"
                notes.append(f"Axes {axes} of input {info.name!r} are both {symbol!r}; by {who} they differ.")
    return notes


def write_symbols(model: ModelProto, before: Sequence[TensorSpec], after: Sequence[TensorSpec]) -> None:
    """Give the inputs the symbols of `after`. Where every input's axis of a symbol got the same new one, so do outputs
    and the tensors between."""
    infos = {info.name: info for info in model.graph.input}
    renamed: dict[str, set[str]] = {}
    for old, new in zip(before, after, strict=True):
        for axis, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)):
            if isinstance(a, str) and isinstance(b, str):
                renamed.setdefault(a, set()).add(b)
                infos[old.name].type.tensor_type.shape.dim[axis].dim_param = b
    for symbol, found in renamed.items():
        if len(found) == 1 and found != {symbol}:
            rename_symbol(model, symbol, found.pop())


# What quantizers and converters make of the name of a tensor, for those that they put beside it.
_MADE = re.compile(
    r"_(?:scale|zero(?:_point)?|quantized|dequantized|QuantizeLinear|DequantizeLinear|convert|int4|axis\d+|float|wide"
    r"|float16|bfloat16|fp16|bf16|unrounded|factor|equalized|MatMul|Add|quant|output_quantized|matmul)(?:_\w+)?"
)


def make_room(model: ModelProto) -> list[str]:
    """Rename tensors that are called as a quantizer would call what it makes of another one (`x_scale` beside `x`, `b2`
    where several nodes read the initializer `b`); inputs and outputs of the model keep theirs. Returns notes."""
    graph = model.graph
    initializers = {t.name for t in graph.initializer}
    reads = Counter(name for node in nodes_of(graph.node) for name in node.input)
    made = {name for node in graph.node for name in node.output if name}
    known = initializers | made | {i.name for i in graph.input}
    fixed = {i.name for i in (*graph.input, *graph.output)}
    renamed: dict[str, str] = {}
    for name in sorted(known):
        bases = [name[: m.start()] for m in _MADE.finditer(name) if m.end() == len(name)]
        if name in made and (digits := re.search(r"\d+$", name)):
            ends = range(digits.start(), len(name))
            bases += [name[:i] for i in ends if name[:i] in initializers and reads[name[:i]] > 1]
        for base in bases:
            if base not in known or base in renamed or name in renamed:
                continue
            loser = next((n for n in (name, base) if n not in fixed), None)
            if loser is not None:
                renamed[loser] = _fresh(f"{loser}.original", known)
    if not renamed:
        return []
    _rename_tensors(graph, renamed)
    told = ", ".join(f"{old!r} is {new!r}" for old, new in list(renamed.items())[:5])
    return [f"Tensors made room for the names that quantizers give: {told}."]


def name_inputs(model: ModelProto, names: Sequence[str]) -> list[str]:
    """Give the inputs these names, in their order: torch's exporter calls an input `x_orig` where the program hands it
    on as it is, and its copy, the output, `x`. That one is `x_out` then. Returns notes; nothing to do where there are
    more or fewer inputs than names."""
    graph = model.graph
    if len(graph.input) != len(names):
        return []
    renamed = {info.name: name for info, name in zip(graph.input, names, strict=True) if info.name != name}
    known = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    known |= {name for node in graph.node for name in node.output if name}
    handed_on = [name for name in renamed.values() if name in known and name not in renamed]
    renamed |= {name: _fresh(f"{name}_out", known) for name in handed_on}
    if renamed:
        _rename_tensors(graph, renamed)
    return [f"Output {renamed[name]!r} is input {name!r} as it is." for name in handed_on]


def _fresh(name: str, known: set[str]) -> str:
    while name in known:
        name += "_"
    known.add(name)
    return name


def _rename_tensors(graph: GraphProto, names: Mapping[str, str]) -> None:
    """In the graph and its bodies, whose own names are renamed likewise."""
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = names.get(sparse.values.name, sparse.values.name)
    for info in (*graph.input, *graph.output, *graph.value_info):
        info.name = names.get(info.name, info.name)
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
        for body in subgraphs(node):
            _rename_tensors(body, names)


def _infos(model: ModelProto) -> Iterator[ValueInfoProto]:
    for graph in (model.graph, *(body for node in nodes_of(model.graph.node) for body in subgraphs(node))):
        yield from (*graph.input, *graph.output, *graph.value_info)


def rename_symbol(model: ModelProto, old: str, new: str) -> None:
    """Rename a symbolic dimension wherever the graph's types mention it, in expressions like `2*s0` too."""
    pattern = re.compile(rf"\b{re.escape(old)}\b")
    for info in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(new, dim.dim_param)
