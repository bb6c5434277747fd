"""Small seeded models with the graphs of well-known architectures, built without torch; each is made in milliseconds.

`bert`, `vit` and `gpt2` hold the node patterns that PyTorch's TorchScript exporter writes and that ONNX Runtime's
transformer optimizer fuses (attention from MatMul/Add/Reshape/Transpose, GELU from Erf, decomposed LayerNorm).
`residual_cnn` and `depthwise_cnn` hold Conv + BatchNormalization + activation, `lstm` one recurrent layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8


class GraphBuilder:
    """Collects nodes and initializers; every method that adds a node returns the name of its first output."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.initializers: dict[str, TensorProto] = {}
        self._count = 0

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def weight(self, name: str, shape: Sequence[int], scale: float | None = None) -> str:
        fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
        std = scale if scale is not None else (1.0 / fan_in) ** 0.5
        return self.constant(name, self.rng.normal(0, std, shape))

    def ints(self, *values: int) -> str:
        return self.constant("ints_" + "_".join(str(v).replace("-", "m") for v in values), values, np.int64)

    def add(self, op: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        self._count += 1
        name = f"{op}_{self._count}"
        outs = list(outputs) or [f"{name}_out"]
        self.nodes.append(helper.make_node(op, list(inputs), outs, name=name, **attributes))
        return outs[0]

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> ModelProto:
        graph = helper.make_graph(self.nodes, "graph", list(inputs), list(outputs), list(self.initializers.values()))
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="pytorch"
        )

    # Blocks

    def linear(self, x: str, name: str, features_in: int, features_out: int) -> str:
        product = self.add("MatMul", x, self.weight(f"{name}.weight", (features_in, features_out)))
        return self.add("Add", self.weight(f"{name}.bias", (features_out,), 0.02), product)

    def layer_norm(self, x: str, name: str, features: int) -> str:
        """As exporters write it below opset 17."""
        centred = self.add("Sub", x, self.add("ReduceMean", x, axes=[-1]))
        variance = self.add("ReduceMean", self.add("Pow", centred, self.constant("two", 2.0)), axes=[-1])
        deviation = self.add("Sqrt", self.add("Add", variance, self.constant("epsilon", 1e-5)))
        gain = self.constant(f"{name}.weight", self.rng.normal(1, 0.1, features))
        scaled = self.add("Mul", self.add("Div", centred, deviation), gain)
        return self.add("Add", scaled, self.weight(f"{name}.bias", (features,), 0.1))

    def gelu(self, x: str) -> str:
        erf = self.add("Erf", self.add("Div", x, self.constant("sqrt2", 2.0**0.5)))
        product = self.add("Mul", x, self.add("Add", erf, self.constant("one", 1.0)))
        return self.add("Mul", product, self.constant("half", 0.5))

    def attention(self, x: str, name: str, hidden: int, heads: int, mask: str | None) -> str:
        size = hidden // heads
        split = self.ints(0, 0, heads, size)
        q, k, v = (self.add("Reshape", self.linear(x, f"{name}.{p}", hidden, hidden), split) for p in "qkv")
        q = self.add("Transpose", q, perm=[0, 2, 1, 3])
        v = self.add("Transpose", v, perm=[0, 2, 1, 3])
        k = self.add("Transpose", k, perm=[0, 2, 3, 1])
        scores = self.add("Div", self.add("MatMul", q, k), self.constant("sqrt_head", size**0.5))
        if mask is not None:
            scores = self.add("Add", scores, mask)
        context = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        merged = self.add("Reshape", self.add("Transpose", context, perm=[0, 2, 1, 3]), self.ints(0, 0, hidden))
        return self.linear(merged, f"{name}.out", hidden, hidden)

    def conv_bn(
        self, x: str, name: str, channels_in: int, channels_out: int, kernel: int = 3, **attributes: Any
    ) -> str:
        group = attributes.get("group", 1)
        weight = self.weight(f"{name}.weight", (channels_out, channels_in // group, kernel, kernel))
        y = self.add("Conv", x, weight, kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, **attributes)
        gain = self.constant(f"{name}.bn.weight", self.rng.uniform(0.8, 1.6, channels_out))
        bias = self.weight(f"{name}.bn.bias", (channels_out,), 0.1)
        mean = self.weight(f"{name}.bn.mean", (channels_out,), 0.1)
        variance = self.constant(f"{name}.bn.var", self.rng.uniform(0.5, 1.5, channels_out))
        return self.add("BatchNormalization", y, gain, bias, mean, variance, epsilon=1e-5)


def _floats(name: str, shape: Sequence[int | str]) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def bert(*, layers: int = 2, hidden: int = 32, heads: int = 4, vocabulary: int = 64, seed: int = 0) -> ModelProto:
    """`input_ids`, `attention_mask`, `token_type_ids` int64 [batch, sequence ≤ 64] → `logits` [batch, 4] and
    `last_hidden_state` [batch, sequence, hidden]."""
    b = GraphBuilder(seed)
    mask = b.add("Unsqueeze", b.add("Unsqueeze", "attention_mask", b.ints(1)), b.ints(2))
    kept = b.add("Cast", mask, to=TensorProto.FLOAT)
    mask = b.add("Mul", b.add("Sub", b.constant("one", 1.0), kept), b.constant("mask_value", -10000.0))
    words = b.add("Gather", b.weight("word_embeddings", (vocabulary, hidden), 1.0), "input_ids")
    types = b.add("Gather", b.weight("type_embeddings", (2, hidden), 0.1), "token_type_ids")
    length = b.add("Gather", b.add("Shape", "input_ids"), b.ints(1), axis=0)
    table = b.weight("position_embeddings", (1, 64, hidden), 0.1)
    positions = b.add("Slice", table, b.ints(0), length, b.ints(1))
    x = b.layer_norm(b.add("Add", b.add("Add", words, types), positions), "embeddings.norm", hidden)
    for i in range(layers):
        attended = b.attention(x, f"{i}.attention", hidden, heads, mask)
        x = b.layer_norm(b.add("Add", attended, x), f"{i}.norm1", hidden)
        inner = b.gelu(b.linear(x, f"{i}.up", hidden, 2 * hidden))
        x = b.layer_norm(b.add("Add", b.linear(inner, f"{i}.down", 2 * hidden, hidden), x), f"{i}.norm2", hidden)
    b.add("Identity", x, outputs=["last_hidden_state"])
    first = b.add("Gather", x, b.constant("zero", 0, np.int64), axis=1)
    b.add("Gemm", first, b.weight("head.weight", (hidden, 4)), b.weight("head.bias", (4,), 0.1), outputs=["logits"])
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    hidden_state = _floats("last_hidden_state", ["batch", "sequence", hidden])
    return b.model(ids, [_floats("logits", ["batch", 4]), hidden_state])


def vit(*, layers: int = 2, hidden: int = 32, heads: int = 4, seed: int = 0) -> ModelProto:
    """`pixel_values` float32 [batch, 3, 16, 16] → `logits` [batch, 10]. Patches by a Conv, pre-norm blocks, no mask."""
    b = GraphBuilder(seed)
    patches = b.add(
        "Conv", "pixel_values", b.weight("patch.weight", (hidden, 3, 4, 4)), kernel_shape=[4, 4], strides=[4, 4]
    )
    x = b.add("Transpose", b.add("Reshape", patches, b.ints(0, hidden, 16)), perm=[0, 2, 1])
    x = b.add("Add", x, b.weight("positions", (1, 16, hidden), 0.1))
    for i in range(layers):
        x = b.add("Add", b.attention(b.layer_norm(x, f"{i}.norm1", hidden), f"{i}.attention", hidden, heads, None), x)
        inner = b.gelu(b.linear(b.layer_norm(x, f"{i}.norm2", hidden), f"{i}.up", hidden, 2 * hidden))
        x = b.add("Add", b.linear(inner, f"{i}.down", 2 * hidden, hidden), x)
    pooled = b.add("ReduceMean", b.layer_norm(x, "norm", hidden), axes=[1], keepdims=0)
    b.add("Gemm", pooled, b.weight("head.weight", (hidden, 10)), outputs=["logits"])
    return b.model([_floats("pixel_values", ["batch", 3, 16, 16])], [_floats("logits", ["batch", 10])])


def gpt2(*, layers: int = 2, hidden: int = 32, heads: int = 4, vocabulary: int = 64, seed: int = 0) -> ModelProto:
    """`input_ids` int64 [batch, sequence ≤ 64] → `logits` [batch, sequence, vocabulary]. One packed QKV projection and
    a causal mask that is sliced from a constant, as Hugging Face's GPT-2 exports."""
    b = GraphBuilder(seed)
    size = hidden // heads

    def conv1d(x: str, name: str, features_in: int, features_out: int) -> str:
        flat = b.add("Reshape", x, b.ints(-1, features_in))
        weight, bias = (
            b.weight(f"{name}.weight", (features_in, features_out)),
            b.weight(f"{name}.bias", (features_out,), 0.02),
        )
        return b.add(
            "Reshape", b.add("Gemm", flat, weight, bias), b.add("Concat", batch, length, b.ints(features_out), axis=0)
        )

    shape = b.add("Shape", "input_ids")
    batch = b.add("Slice", shape, b.ints(0), b.ints(1), b.ints(0))
    length = b.add("Slice", shape, b.ints(1), b.ints(2), b.ints(0))
    words = b.weight("word_embeddings", (vocabulary, hidden), 0.5)
    positions = b.add("Slice", b.weight("position_embeddings", (1, 64, hidden), 0.1), b.ints(0), length, b.ints(1))
    x = b.add("Add", b.add("Gather", words, "input_ids"), positions)
    causal = b.constant("causal_mask", np.tril(np.ones((1, 1, 64, 64), bool)), bool)
    for i in range(layers):
        packed = conv1d(b.layer_norm(x, f"{i}.norm1", hidden), f"{i}.qkv", hidden, 3 * hidden)
        names = [f"{i}.q", f"{i}.k", f"{i}.v"]
        b.add("Split", packed, b.ints(hidden, hidden, hidden), outputs=names, axis=2)
        q, k, v = (b.add("Reshape", name, b.ints(0, 0, heads, size)) for name in names)
        q, v = b.add("Transpose", q, perm=[0, 2, 1, 3]), b.add("Transpose", v, perm=[0, 2, 1, 3])
        product = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 2, 3, 1]))
        scores = b.add("Div", product, b.constant("sqrt_head", size**0.5))
        dims = b.add("Shape", scores)
        rows = b.add("Squeeze", b.add("Slice", dims, b.ints(2), b.ints(3), b.ints(0)), b.ints(0))
        columns = b.add("Squeeze", b.add("Slice", dims, b.ints(3), b.ints(4), b.ints(0)), b.ints(0))
        start = b.add("Unsqueeze", b.add("Sub", columns, rows), b.ints(0))
        end = b.add("Unsqueeze", columns, b.ints(0))
        mask = b.add("Slice", b.add("Slice", causal, start, end, b.ints(2)), b.ints(0), end, b.ints(3))
        scores = b.add("Where", mask, scores, b.constant("mask_value", -10000.0))
        context = b.add("MatMul", b.add("Softmax", scores, axis=-1), v)
        merged = b.add("Reshape", b.add("Transpose", context, perm=[0, 2, 1, 3]), b.ints(0, 0, hidden))
        x = b.add("Add", x, conv1d(merged, f"{i}.out", hidden, hidden))
        inner = b.gelu(conv1d(b.layer_norm(x, f"{i}.norm2", hidden), f"{i}.up", hidden, 2 * hidden))
        x = b.add("Add", x, conv1d(inner, f"{i}.down", 2 * hidden, hidden))
    head = b.weight("head.weight", (hidden, vocabulary))
    b.add("MatMul", b.layer_norm(x, "norm", hidden), head, outputs=["logits"])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    return b.model([ids], [_floats("logits", ["batch", "sequence", vocabulary])])


def residual_cnn(*, channels: int = 8, blocks: int = 2, batch: int | str = "batch", seed: int = 0) -> ModelProto:
    """`input` float32 [batch, 3, 16, 16] → `logits` [batch, 10]. Conv + BN + ReLU, residual sums, pooling, Gemm."""
    b = GraphBuilder(seed)
    x = b.add("Relu", b.conv_bn("input", "stem", 3, channels))
    x = b.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    for i in range(blocks):
        y = b.add("Relu", b.conv_bn(x, f"{i}.conv1", channels, channels))
        y = b.conv_bn(y, f"{i}.conv2", channels, channels)
        x = b.add("Relu", b.add("Add", y, x))
    pooled = b.add("Flatten", b.add("GlobalAveragePool", x), axis=1)
    b.add("Gemm", pooled, b.weight("fc.weight", (channels, 10)), b.weight("fc.bias", (10,), 0.1), outputs=["logits"])
    return b.model([_floats("input", [batch, 3, 16, 16])], [_floats("logits", [batch, 10])])


def depthwise_cnn(*, channels: int = 8, blocks: int = 2, seed: int = 0) -> ModelProto:
    """`input` float32 [batch, 3, 16, 16] → `logits` [batch, 10]. MobileNetV2's inverted residuals with ReLU6."""
    b = GraphBuilder(seed)

    def relu6(y: str) -> str:
        return b.add("Clip", y, b.constant("zero", 0.0), b.constant("six", 6.0))

    x = relu6(b.conv_bn("input", "stem", 3, channels, strides=[2, 2]))
    for i in range(blocks):
        y = relu6(b.conv_bn(x, f"{i}.expand", channels, 3 * channels, 1))
        y = relu6(b.conv_bn(y, f"{i}.depthwise", 3 * channels, 3 * channels, group=3 * channels))
        x = b.add("Add", b.conv_bn(y, f"{i}.project", 3 * channels, channels, 1), x)
    pooled = b.add("Reshape", b.add("GlobalAveragePool", x), b.ints(0, -1))
    b.add("Gemm", pooled, b.weight("fc.weight", (channels, 10)), b.weight("fc.bias", (10,), 0.1), outputs=["logits"])
    return b.model([_floats("input", ["batch", 3, 16, 16])], [_floats("logits", ["batch", 10])])


def lstm(*, features: int = 8, hidden: int = 16, seed: int = 0) -> ModelProto:
    """`sequence` float32 [batch, time, features] → `logits` [batch, 4]."""
    b = GraphBuilder(seed)
    x = b.add("Transpose", "sequence", perm=[1, 0, 2])
    weights = [b.weight("lstm.w", (1, 4 * hidden, features), 0.3), b.weight("lstm.r", (1, 4 * hidden, hidden), 0.3)]
    bias = b.weight("lstm.b", (1, 8 * hidden), 0.1)
    b.add("LSTM", x, *weights, bias, outputs=["steps", "last"], hidden_size=hidden)
    last = b.add("Squeeze", "last", b.ints(0))
    b.add("Gemm", last, b.weight("fc.weight", (hidden, 4)), b.weight("fc.bias", (4,), 0.1), outputs=["logits"])
    return b.model([_floats("sequence", ["batch", "time", features])], [_floats("logits", ["batch", 4])])
