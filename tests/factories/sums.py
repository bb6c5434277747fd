"""Models that only add constants, one after the other: slow node by node, and exact in any order."""

from __future__ import annotations

import time

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

WIDTH = 16


def sum_of_constants(adds: int, *, takes: str = "input", gives: str = "output", seed: int = 7) -> ModelProto:
    """`takes` [batch, WIDTH] and so many whole numbers for each column → `gives`, of the same shape."""
    rng = np.random.default_rng(seed)
    names = [f"v{i}" for i in range(adds - 1)]
    pairs = zip([takes, *names], [*names, gives], strict=True)
    nodes = [helper.make_node("Add", [a, f"c{i}"], [b], name=f"add{i}") for i, (a, b) in enumerate(pairs)]
    constants = [numpy_helper.from_array(rng.integers(-4, 5, WIDTH).astype(np.float32), f"c{i}") for i in range(adds)]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", WIDTH]) for n in (takes, gives)]
    graph = helper.make_graph(nodes, "sum", tensors[:1], tensors[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def added(model: ModelProto) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """What such a model adds to each column."""
    total: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = sum(map(numpy_helper.to_array, model.graph.initializer))
    return total


def seconds_of(model: ModelProto) -> float:
    """What one sample takes in ONNX Runtime here beside nothing else: the shortest of many calls, for the machine may
    be busy now and quiet when the job measures."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: np.zeros((1, WIDTH), np.float32)}
    took = []
    for _ in range(200):
        began = time.perf_counter()
        session.run(None, feeds)
        took.append(time.perf_counter() - began)
    return min(took)
