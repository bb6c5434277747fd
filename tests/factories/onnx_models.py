"""Small real ONNX models, made in the test. Weights are seeded; every function returns a fresh `ModelProto`.

Good models: `mlp`, `conv_net`, `transformer_block`, `lstm`, `embedding`, `quantized_mlp`, `with_if`, `with_loop`,
`with_function`. Bad ones: `cyclic`, `unknown_op`, `unknown_standard_op`, `string_input`, `no_inputs`, `no_outputs`,
`dynamic_rank`, `type_error`, `shape_error`, `makes_nan`, `hangs`, `wants_memory`. Files: `save`, `save_external`,
`folder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

IR_VERSION = 10
OPSET = 17

Dim = int | str
Array = np.ndarray[Any, Any]


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tensor(name: str, value: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype=dtype), name)


def value(name: str, shape: Sequence[Dim] | None, dtype: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def make_model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    initializers: Sequence[TensorProto] = (),
    *,
    opset: int = OPSET,
    extra_opsets: Sequence[tuple[str, int]] = (),
    **kwargs: Any,
) -> ModelProto:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in extra_opsets)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, **kwargs)


# Good models


def mlp(
    *,
    features: int = 8,
    hidden: int = 16,
    classes: int = 4,
    batch: Dim = "batch",
    opset: int = OPSET,
    initializers_as_inputs: bool = False,
    seed: int = 0,
) -> ModelProto:
    """`input` [batch, features] → Gemm, Relu, Gemm → `logits` [batch, classes]."""
    rng = _rng(seed)
    weights = [
        tensor("w1", rng.normal(0, 0.3, (features, hidden))),
        tensor("b1", rng.normal(0, 0.1, hidden)),
        tensor("w2", rng.normal(0, 0.3, (hidden, classes))),
        tensor("b2", rng.normal(0, 0.1, classes)),
    ]
    nodes = [
        helper.make_node("Gemm", ["input", "w1", "b1"], ["h"], name="fc1"),
        helper.make_node("Relu", ["h"], ["a"], name="act"),
        helper.make_node("Gemm", ["a", "w2", "b2"], ["logits"], name="fc2"),
    ]
    inputs = [value("input", [batch, features])]
    if initializers_as_inputs:
        inputs += [value(w.name, list(w.dims)) for w in weights]
    return make_model(nodes, inputs, [value("logits", [batch, classes])], weights, opset=opset)


def conv_net(
    *, channels: int = 8, size: int = 16, classes: int = 4, batch: Dim = "batch", opset: int = OPSET, seed: int = 0
) -> ModelProto:
    """`input` [batch, 3, size, size] → (Conv, BatchNormalization, Relu) ×2, GlobalAveragePool, Gemm → `logits`."""
    rng = _rng(seed)
    weights: list[TensorProto] = []
    nodes: list[NodeProto] = []
    before, depth = "input", 3
    for i in (1, 2):
        weights += [tensor(f"conv{i}.w", rng.normal(0, 0.2, (channels, depth, 3, 3)))]
        for part, mean in (("scale", 1.0), ("bias", 0.0), ("mean", 0.0)):
            weights.append(tensor(f"bn{i}.{part}", rng.normal(mean, 0.1, channels)))
        weights.append(tensor(f"bn{i}.var", rng.uniform(0.5, 1.5, channels)))
        bn = [f"bn{i}.{part}" for part in ("scale", "bias", "mean", "var")]
        nodes += [
            helper.make_node("Conv", [before, f"conv{i}.w"], [f"c{i}"], name=f"conv{i}", pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", [f"c{i}", *bn], [f"n{i}"], name=f"bn{i}"),
            helper.make_node("Relu", [f"n{i}"], [f"r{i}"], name=f"relu{i}"),
        ]
        before, depth = f"r{i}", channels
    weights += [tensor("fc.w", rng.normal(0, 0.3, (channels, classes))), tensor("fc.b", rng.normal(0, 0.1, classes))]
    nodes += [
        helper.make_node("GlobalAveragePool", [before], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "fc.w", "fc.b"], ["logits"], name="fc"),
    ]
    inputs = [value("input", [batch, 3, size, size])]
    return make_model(nodes, inputs, [value("logits", [batch, classes])], weights, opset=opset)


def transformer_block(
    *,
    hidden: int = 32,
    heads: int = 4,
    vocabulary: int = 50,
    batch: Dim = "batch",
    sequence: Dim = "sequence",
    seed: int = 0,
) -> ModelProto:
    """`input_ids`, `attention_mask` int64 [batch, sequence] → one post-norm attention + GELU block →
    `last_hidden_state` [batch, sequence, hidden]."""
    rng = _rng(seed)
    head = hidden // heads
    weights = [
        tensor("embeddings", rng.normal(0, 0.5, (vocabulary, hidden))),
        tensor("one", 1.0),
        tensor("half", 0.5),
        tensor("sqrt2", np.sqrt(2.0)),
        tensor("scale", np.sqrt(head)),
        tensor("minus_many", -10000.0),
        tensor("split", [0, 0, heads, head], np.int64),
        tensor("merge", [0, 0, hidden], np.int64),
        tensor("axes12", [1, 2], np.int64),
    ]
    nodes: list[NodeProto] = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["x"], name="embed"),
        helper.make_node("Unsqueeze", ["attention_mask", "axes12"], ["mask4"], name="mask/unsqueeze"),
        helper.make_node("Cast", ["mask4"], ["maskf"], name="mask/cast", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "maskf"], ["mask_inv"], name="mask/sub"),
        helper.make_node("Mul", ["mask_inv", "minus_many"], ["mask_add"], name="mask/mul"),
    ]

    def dense(name: str, x: str, width_in: int, width_out: int) -> str:
        weights.append(tensor(f"{name}.w", rng.normal(0, 0.15, (width_in, width_out))))
        weights.append(tensor(f"{name}.b", rng.normal(0, 0.05, width_out)))
        nodes.append(helper.make_node("MatMul", [x, f"{name}.w"], [f"{name}.mm"], name=f"{name}/matmul"))
        nodes.append(helper.make_node("Add", [f"{name}.mm", f"{name}.b"], [f"{name}.out"], name=f"{name}/add"))
        return f"{name}.out"

    def norm(name: str, x: str, out: str) -> None:
        weights.append(tensor(f"{name}.g", rng.normal(1, 0.05, hidden)))
        weights.append(tensor(f"{name}.b", rng.normal(0, 0.05, hidden)))
        inputs = [x, f"{name}.g", f"{name}.b"]
        nodes.append(helper.make_node("LayerNormalization", inputs, [out], name=name, axis=-1, epsilon=1e-5))

    for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        out = dense(f"attn/{part}", "x", hidden, hidden)
        nodes.append(helper.make_node("Reshape", [out, "split"], [f"{part}.r"], name=f"attn/{part}/reshape"))
        nodes.append(
            helper.make_node("Transpose", [f"{part}.r"], [f"{part}.t"], name=f"attn/{part}/transpose", perm=perm)
        )
    nodes += [
        helper.make_node("MatMul", ["q.t", "k.t"], ["scores"], name="attn/qk"),
        helper.make_node("Div", ["scores", "scale"], ["scaled"], name="attn/scale"),
        helper.make_node("Add", ["scaled", "mask_add"], ["masked"], name="attn/mask"),
        helper.make_node("Softmax", ["masked"], ["probs"], name="attn/softmax", axis=-1),
        helper.make_node("MatMul", ["probs", "v.t"], ["context"], name="attn/pv"),
        helper.make_node("Transpose", ["context"], ["context.t"], name="attn/merge/transpose", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["context.t", "merge"], ["context.r"], name="attn/merge/reshape"),
    ]
    out = dense("attn/o", "context.r", hidden, hidden)
    nodes.append(helper.make_node("Add", [out, "x"], ["res1"], name="attn/residual"))
    norm("norm1", "res1", "n1")
    up = dense("ffn/up", "n1", hidden, 2 * hidden)
    nodes += [  # GELU as exporters spell it: 0.5 x (1 + erf(x / sqrt 2))
        helper.make_node("Div", [up, "sqrt2"], ["g1"], name="ffn/gelu/div"),
        helper.make_node("Erf", ["g1"], ["g2"], name="ffn/gelu/erf"),
        helper.make_node("Add", ["g2", "one"], ["g3"], name="ffn/gelu/add"),
        helper.make_node("Mul", [up, "g3"], ["g4"], name="ffn/gelu/mul"),
        helper.make_node("Mul", ["g4", "half"], ["g5"], name="ffn/gelu/half"),
    ]
    down = dense("ffn/down", "g5", 2 * hidden, hidden)
    nodes.append(helper.make_node("Add", [down, "n1"], ["res2"], name="ffn/residual"))
    norm("norm2", "res2", "last_hidden_state")
    inputs = [value(n, [batch, sequence], TensorProto.INT64) for n in ("input_ids", "attention_mask")]
    return make_model(nodes, inputs, [value("last_hidden_state", [batch, sequence, hidden])], weights)


def lstm(
    *, features: int = 6, hidden: int = 8, batch: Dim = "batch", sequence: Dim = "sequence", seed: int = 0
) -> ModelProto:
    """`input` [batch, sequence, features] → one LSTM → `output` [batch, sequence, hidden]."""
    rng = _rng(seed)
    weights = [
        tensor("w", rng.normal(0, 0.3, (1, 4 * hidden, features))),
        tensor("r", rng.normal(0, 0.3, (1, 4 * hidden, hidden))),
        tensor("b", rng.normal(0, 0.1, (1, 8 * hidden))),
        tensor("axis1", [1], np.int64),
    ]
    nodes = [
        helper.make_node("Transpose", ["input"], ["seq_first"], name="in", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["seq_first", "w", "r", "b"], ["y"], name="lstm", hidden_size=hidden),
        helper.make_node("Squeeze", ["y", "axis1"], ["y3"], name="squeeze"),
        helper.make_node("Transpose", ["y3"], ["output"], name="out", perm=[1, 0, 2]),
    ]
    inputs = [value("input", [batch, sequence, features])]
    return make_model(nodes, inputs, [value("output", [batch, sequence, hidden])], weights)


def embedding(*, vocabulary: int = 50, hidden: int = 8, sequence: Dim = "sequence", seed: int = 0) -> ModelProto:
    """`input_ids` int64 [batch, sequence] → Gather, ReduceMean, MatMul → `embedding` [batch, hidden]."""
    rng = _rng(seed)
    weights = [
        tensor("table", rng.normal(0, 0.5, (vocabulary, hidden))),
        tensor("proj", rng.normal(0, 0.3, (hidden, hidden))),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], name="embed"),
        helper.make_node("ReduceMean", ["x"], ["mean"], name="mean", axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "proj"], ["embedding"], name="project"),
    ]
    inputs = [value("input_ids", ["batch", sequence], TensorProto.INT64)]
    return make_model(nodes, inputs, [value("embedding", ["batch", hidden])], weights)


def quantized_mlp(*, features: int = 8, classes: int = 4) -> ModelProto:
    """QDQ around one MatMul: U8 activations, S8 weights."""
    rng = _rng(1)
    weights = [
        tensor("wq", rng.integers(-127, 127, (features, classes)), np.int8),
        tensor("ws", 0.01),
        tensor("wz", 0, np.int8),
        tensor("xs", 0.02),
        tensor("xz", 128, np.uint8),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "xs", "xz"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], name="dqw"),
        helper.make_node("MatMul", ["xd", "wd"], ["logits"], name="mm"),
    ]
    return make_model(nodes, [value("input", ["batch", features])], [value("logits", ["batch", classes])], weights)


def with_if(features: int = 4) -> ModelProto:
    """An If whose branches capture an outer value: doubles or negates `input` by the sign of its sum."""
    doubled = [helper.make_node("Add", ["input", "input"], ["then_out"], name="double")]
    then = helper.make_graph(doubled, "then", [], [value("then_out", None)])
    negated = [helper.make_node("Neg", ["input"], ["else_out"], name="negate")]
    other = helper.make_graph(negated, "else", [], [value("else_out", None)])
    nodes = [
        helper.make_node("ReduceSum", ["input"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"], name="greater"),
        helper.make_node("If", ["positive"], ["output"], name="if", then_branch=then, else_branch=other),
    ]
    inputs = [value("input", ["batch", features])]
    return make_model(nodes, inputs, [value("output", ["batch", features])], [tensor("zero", 0.0)])


def with_loop(features: int = 4, trips: int = 3) -> ModelProto:
    """A Loop that adds `input` to itself `trips` times."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["acc_in", "input"], ["acc_out"], name="step"),
            helper.make_node("Identity", ["cond_in"], ["cond_out"], name="go_on"),
        ],
        "body",
        [value("i", [], TensorProto.INT64), value("cond_in", [], TensorProto.BOOL), value("acc_in", None)],
        [value("cond_out", [], TensorProto.BOOL), value("acc_out", None)],
    )
    nodes = [helper.make_node("Loop", ["trips", "true", "input"], ["output"], name="loop", body=body)]
    weights = [tensor("trips", trips, np.int64), tensor("true", True, np.bool_)]
    inputs = [value("input", ["batch", features])]
    return make_model(nodes, inputs, [value("output", ["batch", features])], weights)


def with_function(features: int = 4) -> ModelProto:
    """A model-local function `local.Swish`, used twice."""
    function = helper.make_function(
        "local",
        "Swish",
        ["x"],
        ["y"],
        [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])],
        [helper.make_opsetid("", OPSET)],
    )
    nodes = [
        helper.make_node("Swish", ["input"], ["h"], name="swish1", domain="local"),
        helper.make_node("Swish", ["h"], ["output"], name="swish2", domain="local"),
    ]
    return make_model(
        nodes,
        [value("input", ["batch", features])],
        [value("output", ["batch", features])],
        extra_opsets=[("local", 1)],
        functions=[function],
    )


# Bad models


def cyclic() -> ModelProto:
    """`a` needs `b`, `b` needs `a`."""
    nodes = [
        helper.make_node("Add", ["input", "y"], ["x"], name="first"),
        helper.make_node("Relu", ["x"], ["y"], name="second"),
    ]
    return make_model(nodes, [value("input", ["batch", 4])], [value("y", ["batch", 4])])


def unknown_op() -> ModelProto:
    """The op `Frobnicate` of the domain `com.example`, that nobody knows."""
    nodes = [helper.make_node("Frobnicate", ["input"], ["output"], name="frob", domain="com.example")]
    shape: list[Dim] = ["batch", 4]
    return make_model(nodes, [value("input", shape)], [value("output", shape)], extra_opsets=[("com.example", 1)])


def unknown_standard_op() -> ModelProto:
    """An op `Frobnicate` that claims to be of the standard domain."""
    nodes = [helper.make_node("Frobnicate", ["input"], ["output"], name="frob")]
    return make_model(nodes, [value("input", ["batch", 4])], [value("output", ["batch", 4])])


def string_input() -> ModelProto:
    nodes = [helper.make_node("Identity", ["text"], ["output"], name="id")]
    strings = [value("text", ["batch"], TensorProto.STRING)]
    return make_model(nodes, strings, [value("output", ["batch"], TensorProto.STRING)])


def no_inputs() -> ModelProto:
    nodes = [helper.make_node("Identity", ["c"], ["output"], name="id")]
    return make_model(nodes, [], [value("output", [2])], [tensor("c", [1.0, 2.0])])


def no_outputs() -> ModelProto:
    nodes = [helper.make_node("Relu", ["input"], ["x"], name="relu")]
    return make_model(nodes, [value("input", ["batch", 4])], [])


def dynamic_rank() -> ModelProto:
    """`input` has no shape at all."""
    nodes = [helper.make_node("Relu", ["input"], ["output"], name="relu")]
    return make_model(nodes, [value("input", None)], [value("output", None)])


def type_error() -> ModelProto:
    """Adds a float and an int64."""
    nodes = [helper.make_node("Add", ["input", "ids"], ["output"], name="mixed")]
    inputs = [value("input", ["batch", 4]), value("ids", ["batch", 4], TensorProto.INT64)]
    return make_model(nodes, inputs, [value("output", ["batch", 4])])


def shape_error() -> ModelProto:
    """A MatMul of [batch, 4] and [5, 3]."""
    nodes = [helper.make_node("MatMul", ["input", "w"], ["output"], name="mm")]
    return make_model(
        nodes, [value("input", ["batch", 4])], [value("output", ["batch", 3])], [tensor("w", np.ones((5, 3)))]
    )


def makes_nan() -> ModelProto:
    """log of a number that is surely negative."""
    nodes = [
        helper.make_node("Abs", ["input"], ["a"], name="abs"),
        helper.make_node("Sub", ["minus_one", "a"], ["n"], name="sub"),
        helper.make_node("Log", ["n"], ["output"], name="log"),
    ]
    inputs = [value("input", ["batch", 4])]
    return make_model(nodes, inputs, [value("output", ["batch", 4])], [tensor("minus_one", -1.0)])


def hangs() -> ModelProto:
    """A Loop of 2^62 turns: loads well, and never ends its first run."""
    return with_loop(trips=2**62)


def wants_memory(gibibytes: int = 64) -> ModelProto:
    """Expands one number to a tensor of this size at every run; `output` is its largest value."""
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], name="mean", keepdims=0),
        helper.make_node("Expand", ["mean", "shape"], ["huge"], name="expand"),
        helper.make_node("ReduceMax", ["huge"], ["output"], name="max", keepdims=0),
    ]
    weights = [tensor("shape", [gibibytes, 1 << 28], np.int64)]
    return make_model(nodes, [value("input", ["batch", 4])], [value("output", [])], weights)


# Files


def save(model: ModelProto, path: Path) -> Path:
    """Write `model` as one file; makes the folder. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def save_external(model: ModelProto, path: Path, *, location: str = "weights.bin") -> Path:
    """Write `model` with all its weights in the file `location` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=location, size_threshold=0
    )
    return path


def folder(model: ModelProto, path: Path) -> Path:
    """A model artifact: folder `path` with `model.onnx`. Returns the folder."""
    save(model, path / "model.onnx")
    return path
