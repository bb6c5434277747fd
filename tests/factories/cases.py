"""Small models as users bring them, each with what an optimizer stumbles over: data, held-out inputs, the job's spec.

Every case is seeded. `held`: inputs that the delivered engine must answer as the original does, at their own batch
sizes and lengths, in any order of calls. `data`: None where the job is to have none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from tests.factories.architectures import GraphBuilder
from tests.factories.onnx_models import Dim, value

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
Tensor = tuple[str, int, Sequence[Dim]]  # name, type, shape


@dataclass(frozen=True)
class ModelCase:
    """`spec`: fields of the job beside model, data and budgets. `random`: two calls of the model never agree."""

    name: str
    model: ModelProto
    held: Mapping[str, Feeds]
    data: Feeds | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    random: bool = False


CASES: dict[str, Callable[[], ModelCase]] = {}


def case(build: Callable[[str], ModelCase]) -> Callable[[str], ModelCase]:
    CASES[build.__name__] = lambda: build(build.__name__)
    return build


def floats(rng: np.random.Generator, *shape: int) -> Array:
    return np.asarray(rng.standard_normal(shape), dtype=np.float32)


def finished(
    net: GraphBuilder,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    opset: int = 17,
    ir: int = 8,
) -> ModelProto:
    model = net.model([value(n, s, t) for n, t, s in inputs], [value(n, s, t) for n, t, s in outputs])
    model.opset_import[0].version, model.ir_version = opset, ir
    return model


F, I32, I64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
BATCHES = (1, 3, 7)


def without_node_names(model: ModelProto) -> ModelProto:
    """A copy that ONNX Runtime takes, which refuses two nodes of one name."""
    copy = ModelProto.FromString(model.SerializeToString())
    for node in copy.graph.node:
        node.name = ""
    return copy


def _rows(make: Callable[[np.random.Generator, int], Feeds], batches: Sequence[int] = BATCHES) -> dict[str, Feeds]:
    return {f"b{n}": make(np.random.default_rng(1000 + n), n) for n in batches}


def _drawn(make: Callable[[np.random.Generator, int], Feeds], samples: int = 160) -> Feeds:
    return make(np.random.default_rng(7), samples)


def _head(net: GraphBuilder, x: str, sizes: Sequence[int], last: str) -> str:
    """Linear layers with Relu between them; `last` names the output."""
    for i, (before, after) in enumerate(itertools.pairwise(sizes[:-1])):
        x = net.add("Relu", net.add("Gemm", x, net.weight(f"head{i}.w", (before, after))))
    return net.add("Gemm", x, net.weight("head.w", (sizes[-2], sizes[-1])), outputs=[last])


@case
def dup_names(name: str) -> ModelCase:
    """Two nodes carry one name; ONNX asks for unique names, many exporters do not."""
    net = GraphBuilder(1)
    _head(net, "x", (20, 40, 6), "y")
    net.nodes[0].name = net.nodes[1].name = "same"
    net.nodes[2].name = "other"
    model = finished(net, [("x", F, ["N", 20])], [("y", F, ["N", 6])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"x": floats(rng, n, 20)}

    return ModelCase(name, model, _rows(make), _drawn(make))


@case
def random_original(name: str) -> ModelCase:
    """Dropout in training mode and a RandomNormalLike: two calls never agree."""
    net = GraphBuilder(2)
    x = net.add("Relu", net.add("MatMul", "x", net.weight("w0", (16, 64))))
    x = net.add("Dropout", x, net.constant("ratio", 0.3), net.constant("training", True, np.bool_))
    x = net.add("Relu", net.add("MatMul", x, net.weight("w1", (64, 64))))
    noise = net.add("Mul", net.add("RandomNormalLike", x), net.constant("scale", 0.05))
    net.add("MatMul", net.add("Add", x, noise), net.weight("w2", (64, 10)), outputs=["logits"])
    model = finished(net, [("x", F, ["n", 16])], [("logits", F, ["n", 10])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"x": floats(rng, n, 16)}

    return ModelCase(name, model, _rows(make), _drawn(make), random=True)


@case
def lstm_lengths(name: str) -> ModelCase:
    """A bidirectional LSTM with `sequence_lens` as an input: random lengths of 0 to 9 do not fit its 6 steps."""
    net, steps, size, hidden = GraphBuilder(3), 6, 10, 24
    x = net.add("Transpose", "x", perm=[1, 0, 2])
    weights = [
        net.weight("lstm.w", (2, 4 * hidden, size), 0.3),
        net.weight("lstm.r", (2, 4 * hidden, hidden), 0.3),
        net.weight("lstm.b", (2, 8 * hidden), 0.1),
    ]
    outputs = ["steps", "last", "cell"]
    net.add("LSTM", x, *weights, "lengths", outputs=outputs, hidden_size=hidden, direction="bidirectional")
    flat = net.add("Reshape", net.add("Transpose", "last", perm=[1, 0, 2]), net.ints(-1, 2 * hidden))
    _head(net, flat, (2 * hidden, 4), "logits")
    model = finished(net, [("x", F, ["n", steps, size]), ("lengths", I32, ["n"])], [("logits", F, ["n", 4])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"x": floats(rng, n, steps, size), "lengths": rng.integers(1, steps + 1, n).astype(np.int32)}

    return ModelCase(name, model, _rows(make), _drawn(make))


@case
def small_vocab(name: str) -> ModelCase:
    """Categories of 2, 7 and 4 values, columns of one input: random ids of 0 to 9 are out of range."""
    net, sizes = GraphBuilder(4), (2, 7, 4)
    parts = []
    for i, count in enumerate(sizes):
        column = net.add("Gather", "cats", net.constant(f"column{i}", i, np.int64), axis=1)
        parts.append(net.add("Gather", net.weight(f"table{i}", (count, 8), 1.0), column))
    _head(net, net.add("Concat", *parts, "numbers", axis=1), (30, 64, 64, 1), "raw")
    net.add("Sigmoid", "raw", outputs=["prob"])
    model = finished(net, [("cats", I64, ["n", 3]), ("numbers", F, ["n", 6])], [("prob", F, ["n", 1])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        cats = np.stack([rng.integers(0, count, n) for count in sizes], axis=1)
        return {"cats": cats, "numbers": floats(rng, n, 6)}

    return ModelCase(name, model, _rows(make), _drawn(make, 300))


@case
def weekday(name: str) -> ModelCase:
    """One category of 7 values: a random id of 0 to 9 fits by chance at one batch size and not at the other."""
    net = GraphBuilder(5)
    day = net.add("Gather", net.weight("days", (7, 8), 1.0), "weekday")
    _head(net, net.add("Concat", day, "numbers", axis=1), (14, 48, 1), "raw")
    net.add("Sigmoid", "raw", outputs=["prob"])
    model = finished(net, [("weekday", I64, ["n"]), ("numbers", F, ["n", 6])], [("prob", F, ["n", 1])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"weekday": rng.integers(0, 7, n), "numbers": floats(rng, n, 6)}

    return ModelCase(name, model, _rows(make), _drawn(make, 300))


@case
def lstm_state(name: str) -> ModelCase:
    """Recurrent state as input and output, with the batch on its second axis; no data."""
    net, size, hidden = GraphBuilder(6), 8, 16
    x = net.add("Transpose", "x", perm=[1, 0, 2])
    net.add("Split", "state", outputs=["h0", "c0"], axis=0)
    weights = [
        net.weight("lstm.w", (1, 4 * hidden, size), 0.3),
        net.weight("lstm.r", (1, 4 * hidden, hidden), 0.3),
        net.weight("lstm.b", (1, 8 * hidden), 0.1),
    ]
    net.add("LSTM", x, *weights, "", "h0", "c0", outputs=["steps", "h", "c"], hidden_size=hidden)
    net.add("Concat", "h", "c", outputs=["stateN"], axis=0)
    _head(net, net.add("Squeeze", "h", net.ints(0)), (hidden, 1), "raw")
    net.add("Sigmoid", "raw", outputs=["output"])
    inputs: list[Tensor] = [("x", F, ["batch", "t", size]), ("state", F, [2, "batch", hidden])]
    model = finished(net, inputs, [("output", F, ["batch", 1]), ("stateN", F, [2, "batch", hidden])])

    def make(batch: int, steps: int) -> Feeds:
        rng = np.random.default_rng(batch * 100 + steps)
        return {"x": floats(rng, batch, steps, size), "state": 0.1 * floats(rng, 2, batch, hidden)}

    held = {f"b{b}t{t}": make(b, t) for b, t in ((1, 12), (2, 12), (2, 30), (5, 12))}
    return ModelCase(name, model, held)


@case
def scalar_output(name: str) -> ModelCase:
    """A second output of rank 0, the mean of the first."""
    net = GraphBuilder(7)
    _head(net, "x", (8, 64, 4), "y")
    net.add("ReduceMean", "y", outputs=["mean"], keepdims=0)
    model = finished(net, [("x", F, ["n", 8])], [("y", F, ["n", 4]), ("mean", F, [])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"x": floats(rng, n, 8)}

    return ModelCase(name, model, _rows(make), _drawn(make))


@case
def ir3_plain(name: str) -> ModelCase:
    """IR version 3, opset 8, initializers that are also inputs: as every exporter wrote until 2019."""
    net = GraphBuilder(8)
    x = net.add("Conv", "x", net.weight("conv.w", (6, 2, 3, 3)), pads=[1, 1, 1, 1])
    shift = net.weight("bn.b", (6,), 0.1), net.weight("bn.m", (6,), 0.1)
    x = net.add("BatchNormalization", x, net.constant("bn.s", np.ones(6)), *shift, net.constant("bn.v", np.ones(6)))
    flat = net.add("Reshape", net.add("Relu", x), net.constant("rs", (-1, 216), np.int64))
    net.add("Gemm", flat, net.weight("fc.w", (216, 4)), net.weight("fc.b", (4,), 0.1), outputs=["y"])
    constants: list[Tensor] = [(t.name, t.data_type, list(t.dims)) for t in net.initializers.values()]
    model = finished(net, [("x", F, ["n", 2, 6, 6]), *constants], [("y", F, ["n", 4])], opset=8, ir=3)

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"x": floats(rng, n, 2, 6, 6)}

    return ModelCase(name, model, _rows(make, (1, 2, 3)), _drawn(make))


@case
def conv_lstm(name: str) -> ModelCase:
    """A recurrent network with convolutions and without MatMul or Gemm, as voice-activity models are."""
    net, hidden = GraphBuilder(9), 24
    x = net.add(
        "Relu", net.add("Conv", "x", net.weight("c0.w", (16, 8, 3), 0.2), net.weight("c0.b", (16,)), pads=[1, 1])
    )
    x = net.add("Transpose", x, perm=[2, 0, 1])
    weights = [
        net.weight("lstm.w", (1, 4 * hidden, 16), 0.3),
        net.weight("lstm.r", (1, 4 * hidden, hidden), 0.3),
        net.weight("lstm.b", (1, 8 * hidden), 0.1),
    ]
    net.add("LSTM", x, *weights, outputs=["steps", "h", "c"], hidden_size=hidden)
    x = net.add("Transpose", "h", perm=[1, 2, 0])
    x = net.add("Conv", x, net.weight("c1.w", (1, hidden, 1), 0.3), net.weight("c1.b", (1,)))
    net.add("Sigmoid", net.add("Squeeze", x, net.ints(2)), outputs=["prob"])
    model = finished(net, [("x", F, ["n", 8, 20])], [("prob", F, ["n", 1])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"x": floats(rng, n, 8, 20)}

    return ModelCase(name, model, _rows(make), _drawn(make))


@case
def bias_name_clash(name: str) -> ModelCase:
    """One zero bias `c` shared by three Convs, and a tensor named `c2`, as the quantizer names the bias's copies."""
    net, size = GraphBuilder(10), 12
    bias = net.constant("c", np.zeros(size))
    same: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    x = net.add("Relu", net.add("Conv", "x", net.weight("w0", (size, 3, 3, 3)), bias, **same))
    x = net.add("Neg", net.add("Conv", x, net.weight("w1", (size, size, 3, 3)), bias, outputs=["c1"], **same))
    x = net.add("Neg", net.add("Conv", x, net.weight("w2", (size, size, 3, 3)), bias, outputs=["c2"], **same))
    x = net.add("Transpose", x, perm=[0, 2, 3, 1])
    net.add("ReduceMean", x, outputs=["y"], axes=[1, 2], keepdims=0)
    model = finished(net, [("x", F, ["n", 3, 16, 16])], [("y", F, ["n", size])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"x": floats(rng, n, 3, 16, 16)}

    return ModelCase(name, model, _rows(make), _drawn(make))


@case
def dup_dim_symbol(name: str) -> ModelCase:
    """Height and width carry one symbol, '?', as in exported text detectors; the job gives 24 × 96."""
    net = GraphBuilder(11)
    x = net.add("Relu", net.add("Conv", "x", net.weight("w", (12, 3, 3, 3)), strides=[2, 2], pads=[1, 1, 1, 1]))
    x = net.add("ReduceMean", x, axes=[2, 3], keepdims=0)
    net.add("Softmax", net.add("Gemm", x, net.weight("fc", (12, 2))), outputs=["probs"], axis=-1)
    model = finished(net, [("x", F, ["n", 3, "?", "?"])], [("probs", F, ["n", 2])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"x": floats(rng, n, 3, 24, 96)}

    held = _rows(make) | {"b2_24x48": {"x": floats(np.random.default_rng(3), 2, 3, 24, 48)}}
    wanted = {"min": [1, 3, 24, 96], "opt": [1, 3, 24, 96], "max": [8, 3, 24, 96]}
    return ModelCase(name, model, held, _drawn(make, 100), {"shapes": {"x": wanted}})


@case
def roialign(name: str) -> ModelCase:
    """Features [n, …], boxes [r, 4] and the picture of each box [r]; pictures of 0 to 9 do not exist; no data."""
    net = GraphBuilder(12)
    x = net.add("Relu", net.add("Conv", "features", net.weight("w", (8, 8, 3, 3)), pads=[1, 1, 1, 1]))
    sizes: dict[str, Any] = {"output_height": 4, "output_width": 4, "sampling_ratio": 2, "spatial_scale": 1.0}
    x = net.add("Flatten", net.add("RoiAlign", x, "rois", "batch_ids", **sizes))
    _head(net, x, (128, 6), "scores")
    inputs: list[Tensor] = [("features", F, ["n", 8, 20, 20]), ("rois", F, ["r", 4]), ("batch_ids", I64, ["r"])]
    model = finished(net, inputs, [("scores", F, ["r", 6])], opset=16)

    def make(n: int, r: int) -> Feeds:
        rng = np.random.default_rng(n * 100 + r)
        corners = np.sort(rng.uniform(0, 20, (r, 2, 2)), axis=1).reshape(r, 4).astype(np.float32)
        return {"features": floats(rng, n, 8, 20, 20), "rois": corners, "batch_ids": rng.integers(0, n, r)}

    return ModelCase(name, model, {"n1r5": make(1, 5), "n3r9": make(3, 9)})


@case
def lstm_state_said(name: str) -> ModelCase:
    """As `lstm_state`, with data in the model's layout, symbols that tell nothing, and a job that says where the batch
    is."""
    plain = lstm_state(name)
    for info in (plain.model.graph.input[1], plain.model.graph.output[1]):
        info.type.tensor_type.shape.dim[1].dim_param = "unk__7"
    rng = np.random.default_rng(70)
    data = {"x": floats(rng, 120, 12, 8), "state": 0.1 * floats(rng, 2, 120, 16)}
    return replace(plain, data=data, spec={"inputs": {"state": {"batch_axis": 1}}})


def graph(nodes: int, edges: int) -> Feeds:
    """A node is the target of one edge at most: which of several wins, ONNX leaves open."""
    rng = np.random.default_rng(nodes)
    targets = rng.permutation(nodes)[:edges]
    return {"x": floats(rng, nodes, 8), "edges": np.stack([rng.integers(0, nodes, len(targets)), targets])}


@case
def graph_net(name: str) -> ModelCase:
    """Messages along edges: a set of nodes and pairs of their numbers, neither of them a batch; no data."""
    net = GraphBuilder(20)
    source = net.add("Gather", "edges", net.constant("zero", 0, np.int64), axis=0)
    target = net.add("Gather", "edges", net.constant("one", 1, np.int64), axis=0)
    messages = net.add("MatMul", net.add("Gather", "x", source), net.weight("w", (8, 8)))
    index = net.add("Unsqueeze", target, net.ints(1))
    index = net.add("Expand", index, net.add("Shape", messages))
    nothing = net.add("Mul", "x", net.constant("none", 0.0))
    summed = net.add("ScatterElements", nothing, index, messages, axis=0)
    pooled = net.add("ReduceMean", net.add("Relu", summed), axes=[0], keepdims=1)
    net.add("MatMul", pooled, net.weight("head", (8, 3)), outputs=["y"])
    inputs: list[Tensor] = [("x", F, ["nodes", 8]), ("edges", I64, [2, "e"])]
    model = finished(net, inputs, [("y", F, [1, 3])], opset=16)
    whole = {"inputs": {"x": {"batch_axis": None}, "edges": {"batch_axis": None}}}
    return ModelCase(name, model, {f"n{n}": graph(n, n // 2) for n in (4, 12, 50)}, spec=whole)
