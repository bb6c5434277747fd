"""What a training learned is what ships: the scales of the Q/DQ graph, and so the answers of the engines."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.factories import programs
from tests.unit.test_export import Notes
from tests.unit.test_quantize import SEVEN_BITS
from workers.graph import learned_ranges
from workers.graph.onnx_files import MODEL_FILE
from workers.kernel import StageContext, StageResult

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of its own deprecations
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`")

SMALL = {"input": ("float32", ("batch", 1, 8, 8))}
TEXT = {"ids": ("int64", ("batch", "time")), "mask": ("int64", ("batch", "time"))}
CNN = ["Conv", "Gemm", "Relu", "Add"]
DIMS = {"batch": (1, 64), "time": (2, 32)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Made:
    """A program that was trained, and the int8 graph of it."""

    folder: Path
    op_types: list[str]
    quantized: StageResult

    @property
    def graph(self) -> onnx.ModelProto:
        return onnx.load(self.folder / "quantize" / "model" / MODEL_FILE)

    @property
    def learned(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "train/model" / learned_ranges.LEARNED_FILE).read_text())
        return found


def _made(folder: Path, net: Any, inputs: Any, outputs: Any, op_types: list[str], feeds: Any) -> Made:
    from workers.stages.export import Export, ExportOptions
    from workers.stages.quantize import Quantize, QuantizeOptions
    from workers.stages.simplify import Simplify, SimplifyOptions
    from workers.stages.train import Train, TrainOptions

    programs.folder(net, folder / "program", inputs, outputs, DIMS)
    for part, seed in (("training", 1), ("data", 2)):
        (folder / part).mkdir()
        np.savez(folder / part / "data.npz", **feeds(np.random.default_rng(seed)))

    def call(stage: Any, options: Any, **paths: str) -> StageResult:
        work = folder / f"{stage.name}-work"
        work.mkdir()
        context = StageContext({n: folder / p for n, p in paths.items()}, work, folder / stage.name, Notes(), {})
        result: StageResult = stage().run(context, options)
        return result

    train = TrainOptions(op_types=op_types, epochs=3, learning_rate=1e-3, reduce_range=SEVEN_BITS)
    call(Train, train, model="program", training="training", data="data")
    call(Export, ExportOptions(format="pt2"), source="train/model")
    call(Simplify, SimplifyOptions(), model="export/model")
    quantize = QuantizeOptions(recipe="static_int8", op_types=op_types, reduce_range=SEVEN_BITS)
    made = call(Quantize, quantize, model="simplify/model", calibration="training")
    return Made(folder, op_types, made)


def _pictures(chance: np.random.Generator) -> dict[str, Any]:
    return {"input": chance.standard_normal((96, 1, 8, 8), dtype=np.float32)}


def _texts(chance: np.random.Generator) -> dict[str, Any]:
    return {"ids": chance.integers(0, 50, (96, 6)), "mask": np.ones((96, 6), np.int64)}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Made:
    outputs = {"linear": ("float32", ("batch", 5))}
    return _made(tmp_path_factory.mktemp("cnn"), programs.separable(), SMALL, outputs, CNN, _pictures)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Made:
    outputs = {"y": ("float32", ("batch", 4))}
    folder = tmp_path_factory.mktemp("transformer")
    return _made(folder, programs.scores_of(programs.transformer()), TEXT, outputs, ["MatMul", "Gemm"], _texts)


def _scales(model: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    """(scale, zero point) of what each QuantizeLinear reads."""
    known = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    return {n.input[0]: (float(known[n.input[1]]), int(known[n.input[2]])) for n in pairs}


def _simulated(made: Made, feeds: dict[str, Any], *, rounding: bool) -> Any:
    """The trained program with its rounding, in torch."""
    import torch

    from workers.graph.exported_program import load_program
    from workers.graph.qat import placement
    from workers.graph.qat import rounding as rounded

    module = load_program(made.folder / "train" / "model" / "program.pt2").module()
    placed = placement.place(module, made.op_types, "uint8", 64 if SEVEN_BITS else 127)
    learned, parts = made.learned, dict(module.named_modules())
    limits = {p["value"]: (p["low"], p["high"]) for p in learned["points"]}
    found = [(parts[name], limits[value]) for name, value in placed.points if value in limits]
    for name, inner in zip(placed.attentions, learned["attentions"], strict=True):
        found += [(getattr(parts[name], side), ends) for side, ends in inner.items()]
    for part, (low, high) in found:
        part.low.fill_(low)
        part.high.fill_(high)
        part.settle()
    rounded.observe(module, observing=False, rounding=rounding)
    with torch.no_grad():
        answer = module(*(torch.from_numpy(a) for a in feeds.values()))
    return (answer[0] if isinstance(answer, tuple) else answer).numpy()


def _by_onnxruntime(made: Made, feeds: dict[str, Any]) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(made.graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def _by_openvino(made: Made, feeds: dict[str, Any]) -> Any:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.read_model(made.folder / "quantize" / "model" / MODEL_FILE)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(feeds)[0]


@needs_torch
@pytest.mark.parametrize("net", ["cnn", "transformer"])
def test_engines_answer_as_the_training_simulated(net: str, request: pytest.FixtureRequest) -> None:
    """ONNX Runtime to the last level but for few answers; OpenVINO, which fuses sums into convolutions and rounds there
    by itself, as close as rounding moves the answers at all."""
    made = request.getfixturevalue(net)
    feeds = {n: a[:48] for n, a in (_pictures if net == "cnn" else _texts)(np.random.default_rng(3)).items()}
    exact = _simulated(made, feeds, rounding=False)
    wanted = _simulated(made, feeds, rounding=True)
    moved = np.linalg.norm(wanted - exact)
    assert moved > 0
    for run, share in ((_by_onnxruntime, 0.4), (_by_openvino, 1.5)):
        assert np.linalg.norm(run(made, feeds) - wanted) < share * moved, run.__name__


@needs_torch
@pytest.mark.parametrize("net", ["cnn", "transformer"])
def test_every_learned_scale_is_in_the_graph(net: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(net)
    learned, scales = made.learned, _scales(made.graph)
    found = {scale for scale, _ in scales.values()}
    everything = [(p["low"], p["high"]) for p in learned["points"]]
    everything += [tuple(ends) for inner in learned["attentions"] for ends in inner.values()]
    missing = [e for e in everything if not np.isclose((e[1] - e[0]) / 255, list(found), rtol=1e-5).any()]
    assert not missing
    assert made.quantized.data["calibration"]["learned"] >= len(everything)
    assert learned_ranges.attached(made.graph) is None, "an engine's file carries no notes of ours"


# Placing, on graphs made by hand


def _graph() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["getitem"]),
        helper.make_node("Relu", ["getitem"], ["relu"]),
        helper.make_node("MaxPool", ["relu"], ["pool"], kernel_shape=[2, 2]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    weights = [
        numpy_helper.from_array(np.ones(shape, np.float32), n) for n, shape in (("w", (2, 1, 1, 1)), ("b", (2,)))
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [info("y", TensorProto.FLOAT, ["n", 3])],
        [*weights, numpy_helper.from_array(np.ones((18, 3), np.float32), "v")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def _point(tensor: str, high: float, low: float = 0.0) -> dict[str, Any]:
    return {"value": "of the program", "tensors": [tensor], "low": low, "high": high}


def test_values_are_found_again_by_what_they_hold(tmp_path: Path) -> None:
    model = onnx.shape_inference.infer_shapes(_graph())
    onnx.save(model, tmp_path / MODEL_FILE)
    image = np.random.default_rng(0).standard_normal((2, 1, 4, 4), dtype=np.float32)
    conv = np.repeat(image + 1, 2, 1)
    points = [{"value": n, "low": 0.0, "high": 1.0} for n in ("input_1", "relu_7", "zeros")]
    values = {"input_1": image, "relu_7": np.maximum(conv, 0), "zeros": np.zeros((2, 3), np.float32)}
    text = json.dumps(learned_ranges.document(points, []))
    assert learned_ranges.values_of(text) == ["input_1", "relu_7", "zeros"]
    known = json.loads(learned_ranges.resolved(text, values, tmp_path / MODEL_FILE, {"x": image}))
    assert [p["tensors"] for p in known["points"]] == [["x"], ["relu"], []]
    assert [p.name for p in tmp_path.iterdir()] == [MODEL_FILE]


def test_ranges_hold_behind_what_moves_values() -> None:
    model = _graph()
    points = [_point("relu", 1.0), _point("getitem", 2.0), _point("gone", 3.0)]
    assert learned_ranges.attach(model, json.dumps(learned_ranges.document(points, [])))
    assert not learned_ranges.attach(model, learned_ranges.attached(model))
    found = learned_ranges.of(model, model)
    assert found == {"relu": (0.0, 1.0), "getitem": (0.0, 2.0), "pool": (0.0, 1.0), "flat": (0.0, 1.0)}
    assert learned_ranges.attach(model, None)
    assert learned_ranges.of(model, model) == {}


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", '{"points": [1]}', '{"points": [{"tensors": ["relu"], "low": 0, "high": "x"}]}']
    + [json.dumps({"points": [_point("relu", high, low)]}) for high, low in ((-1.0, -2.0), (0.0, 0.0))],
)
def test_what_an_upload_pretends_to_carry_is_no_range(text: str) -> None:
    model = _graph()
    learned_ranges.attach(model, text)
    assert learned_ranges.of(model, model) == {}
