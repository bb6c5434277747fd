"""Seeded mutations of ONNX graphs, and of the bytes that they are stored as: most are not valid."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from onnx import ModelProto, TensorProto, helper

from tests.factories import onnx_models as models

_BASES: tuple[Callable[[], ModelProto], ...] = (
    models.mlp,
    models.conv_net,
    models.transformer_block,
    models.lstm,
    models.embedding,
    models.quantized_mlp,
    models.with_if,
    models.with_loop,
    models.with_function,
)
_OPS = (
    *(
        "Relu",
        "Conv",
        "MatMul",
        "Gemm",
        "Reshape",
        "Transpose",
        "Concat",
        "Slice",
        "Gather",
        "Softmax",
        "LSTM",
        "Resize",
    ),
    *("TopK", "NonZero", "Unique", "Det", "Einsum", "Loop", "If", "Scan", "QuantizeLinear", "DequantizeLinear", "Cast"),
    *("Pad", "Expand", "Tile", "Where", "LayerNormalization", "Attention", "Frobnicate"),
)
_SIZES = (-7, -1, 0, 1, 3, 1 << 20, 1 << 31, (1 << 63) - 1)


def mutated(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(what it is, the bytes of `model.onnx`), the same for the same seed."""
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        make = rng.choice(_BASES)
        model = make()
        done = [
            change.__name__.strip("_") for change in rng.choices(_CHANGES, k=rng.randint(1, 3)) if change(model, rng)
        ]
        content = model.SerializeToString()
        if rng.random() < 0.2:
            content = _damaged(content, rng)
            done.append("bytes")
        yield f"{number}: {make.__name__}, {'+'.join(done)}", content


def _node(model: ModelProto, rng: random.Random) -> int:
    return rng.randrange(len(model.graph.node))


def _op(model: ModelProto, rng: random.Random) -> bool:
    model.graph.node[_node(model, rng)].op_type = rng.choice(_OPS)
    return True


def _domain(model: ModelProto, rng: random.Random) -> bool:
    model.graph.node[_node(model, rng)].domain = rng.choice(("com.microsoft", "ai.onnx.ml", "x", ""))
    return True


def _rewired(model: ModelProto, rng: random.Random) -> bool:
    node = model.graph.node[_node(model, rng)]
    names = (
        [o for n in model.graph.node for o in n.output] + [i.name for i in model.graph.initializer] + ["", "nowhere"]
    )
    if not node.input:
        return False
    node.input[rng.randrange(len(node.input))] = rng.choice(names)
    return True


def _inputs(model: ModelProto, rng: random.Random) -> bool:
    node = model.graph.node[_node(model, rng)]
    if rng.random() < 0.5 and node.input:
        del node.input[rng.randrange(len(node.input))]
    else:
        node.input.append(rng.choice(["", model.graph.input[0].name if model.graph.input else "x"]))
    return True


def _removed(model: ModelProto, rng: random.Random) -> bool:
    del model.graph.node[_node(model, rng)]
    if not model.graph.node:
        model.graph.node.append(helper.make_node("Relu", ["input"], ["y"]))
    return True


def _doubled(model: ModelProto, rng: random.Random) -> bool:
    model.graph.node.append(model.graph.node[_node(model, rng)])
    return True


def _attribute(model: ModelProto, rng: random.Random) -> bool:
    node = model.graph.node[_node(model, rng)]
    if not node.attribute:
        node.attribute.append(
            helper.make_attribute(rng.choice(("axis", "to", "group", "kernel_shape")), rng.choice(_SIZES))
        )
        return True
    attribute = node.attribute[rng.randrange(len(node.attribute))]
    kind = rng.randrange(4)
    if kind == 0:
        attribute.i = rng.choice(_SIZES)
    elif kind == 1 and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_SIZES)
    elif kind == 2:
        attribute.type = rng.choice((1, 2, 3, 4, 5, 6, 7, 8))
    else:
        attribute.name = rng.choice(("axis", "perm", "axes", "nonsense"))
    return True


def _shape(model: ModelProto, rng: random.Random) -> bool:
    infos = [*model.graph.input, *model.graph.output]
    if not infos:
        return False
    info = rng.choice(infos)
    dims = info.type.tensor_type.shape.dim
    if not dims:
        info.type.tensor_type.shape.dim.add().dim_value = rng.choice(_SIZES)
        return True
    dims[rng.randrange(len(dims))].dim_value = rng.choice(_SIZES)
    return True


def _type(model: ModelProto, rng: random.Random) -> bool:
    infos = [*model.graph.input, *model.graph.output]
    if infos:
        rng.choice(infos).type.tensor_type.elem_type = rng.choice((*range(24), 99))
    return bool(infos)


def _weight(model: ModelProto, rng: random.Random) -> bool:
    if not model.graph.initializer:
        return False
    tensor = model.graph.initializer[rng.randrange(len(model.graph.initializer))]
    kind = rng.randrange(5)
    if kind == 0:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == 1:
        tensor.dims.append(rng.choice(_SIZES))
    elif kind == 2 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_SIZES)
    elif kind == 3:
        tensor.data_type = rng.choice((*range(24), 99))
    else:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(("/etc/passwd", "../x", "nothing.bin")))
    return True


def _opset(model: ModelProto, rng: random.Random) -> bool:
    model.opset_import[0].version = rng.choice((0, 1, 7, 13, 21, 99, -1))
    return True


_CHANGES: tuple[Callable[[ModelProto, random.Random], bool], ...] = (
    *(
        _op,
        _op,
        _domain,
        _rewired,
        _rewired,
        _inputs,
        _removed,
        _doubled,
        _attribute,
        _attribute,
        _shape,
        _type,
        _weight,
    ),
    *(_weight, _opset),
)


def _damaged(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged[: rng.randint(1, len(damaged))] if rng.random() < 0.3 else damaged)
