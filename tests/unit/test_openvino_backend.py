"""The OpenVINO backend on real models: IR, sessions, typed failures, forks, and the bundle's `infer.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from tests.factories import architectures
from tests.factories import onnx_models as models
from workers.backends.openvino import OpenVinoBackend
from workers.candidates import BF16_FLAGS, Candidate, Case
from workers.data import synthetic_feeds
from workers.graph.ir.library import clean_message, unsupported_ops
from workers.hardware import describe
from workers.kernel import Reporter, Session, StageContext, TensorSpec, backends
from workers.measure.engine_process import EngineProcess
from workers.stages.benchmark import Benchmark, BenchmarkOptions
from workers.stages.build import Build, BuildStageOptions
from workers.stages.validate import Validate, ValidateOptions

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    name: {k: [batch, 12] for k, batch in (("min", 1), ("opt", 2), ("max", 4))}
    for name in ("input_ids", "attention_mask", "token_type_ids")
}
SHAPES["sequence"] = {"min": [1, 6, 8], "opt": [2, 6, 8], "max": [4, 6, 8]}


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[tuple[str, dict[str, Any]]] = []

    def progress(self, fraction: float, message: str = "") -> None:
        assert 0 <= fraction <= 1

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append((message, facts))


@pytest.fixture
def backend() -> OpenVinoBackend:
    return OpenVinoBackend()


def build(
    backend: OpenVinoBackend, model: ModelProto, tmp_path: Path, **options: Any
) -> tuple[dict[str, Any], Path, Notes]:
    source, out, notes = models.folder(model, tmp_path / "model"), tmp_path / "engine", Notes()
    out.mkdir()
    return backend.build(source, out, {"shapes": SHAPES, **options}, notes), out, notes


def original(tmp_path: Path) -> Session:
    return backends()["onnxruntime"]().load(tmp_path / "model", {})


def odd_outputs() -> ModelProto:
    """Outputs that are inputs, the same tensor twice, int64, bool, a scalar, a constant and a shape."""
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="relu"),
        helper.make_node("Identity", ["y"], ["again"], name="id1"),
        helper.make_node("Identity", ["x"], ["same"], name="id2"),
        helper.make_node("ArgMax", ["x"], ["best"], name="argmax", axis=1, keepdims=0),
        helper.make_node("Greater", ["x", "zero"], ["positive"], name="greater"),
        helper.make_node("ReduceMean", ["x"], ["mean"], name="mean", keepdims=0),
        helper.make_node("Shape", ["x"], ["size"], name="shape"),
    ]
    outputs = [
        *(models.value(name, ["n", 4]) for name in ("again", "y", "same", "x")),
        models.value("best", ["n"], TensorProto.INT64),
        models.value("positive", ["n", 4], TensorProto.BOOL),
        models.value("mean", []),
        models.value("size", [2], TensorProto.INT64),
        models.value("fixed", [2]),
    ]
    inputs = [models.value("unused", ["n", 2]), models.value("x", ["n", 4])]
    return models.make_model(nodes, inputs, outputs, [models.tensor("zero", 0.0), models.tensor("fixed", [1, 2])])


def odd_inputs() -> ModelProto:
    """uint8, bool, float16 and a scalar."""
    nodes = [
        *(helper.make_node("Cast", [n], [f"{n}f"], name=f"cast_{n}", to=TensorProto.FLOAT) for n in "abc"),
        helper.make_node("Sum", ["af", "bf", "cf", "d"], ["output"], name="sum"),
    ]
    types = {"a": TensorProto.UINT8, "b": TensorProto.BOOL, "c": TensorProto.FLOAT16}
    inputs = [*(models.value(n, ["n", 3], t) for n, t in types.items()), models.value("d", [])]
    return models.make_model(nodes, inputs, [models.value("output", ["n", 3])])


# Precision, and equality with ONNX Runtime


@pytest.mark.parametrize(
    "make",
    [
        models.mlp,
        models.conv_net,
        models.transformer_block,
        models.lstm,
        models.quantized_mlp,
        models.with_if,
        models.with_loop,
        models.with_function,
        models.no_inputs,
        architectures.residual_cnn,
        architectures.depthwise_cnn,
        architectures.bert,
        architectures.gpt2,
        architectures.lstm,
        odd_outputs,
        odd_inputs,
    ],
)
def test_fp32_computes_what_onnxruntime_does(
    make: Callable[[], ModelProto], backend: OpenVinoBackend, tmp_path: Path
) -> None:
    built, engine, notes = build(backend, make(), tmp_path)
    assert built["runtime"] == {"inference_precision": "f32"}
    assert built["compiled"]["inference_precision"] == "f32"
    assert "bf16" not in built["layers"]
    assert notes.notes == []
    assert sorted(p.name for p in engine.iterdir()) == ["interface.json", "model.bin", "model.xml"]
    baseline, session = original(tmp_path), backend.load(engine, built["runtime"])
    assert list(session.inputs) == list(baseline.inputs)
    assert [(o.name, o.dtype) for o in session.outputs] == [(o.name, o.dtype) for o in baseline.outputs]
    for batch in (1, 3):
        feeds = synthetic_feeds(baseline.inputs, batch, SHAPES, seed=batch)
        wanted, got = baseline.run(feeds), session.run(feeds)
        assert list(wanted) == list(got)
        for name in wanted:
            assert (got[name].dtype, got[name].shape) == (wanted[name].dtype, wanted[name].shape)
            np.testing.assert_allclose(got[name], wanted[name], atol=1e-5, rtol=1e-5)


def test_bf16_is_chosen_by_the_option_alone(backend: OpenVinoBackend, tmp_path: Path) -> None:
    emulated = "avx512bw"  # OpenVINO computes it there too, though nothing becomes faster: no job asks for it
    if not {*BF16_FLAGS, emulated} & set(describe()["isa"]):
        with pytest.raises(StageFailure, match="computes in f32"):
            build(backend, models.transformer_block(), tmp_path, inference_precision="bf16")
        return
    built, engine, _ = build(backend, models.transformer_block(), tmp_path, inference_precision="bf16")
    assert built["runtime"] == {"inference_precision": "bf16"}
    assert built["layers"].get("bf16", 0) > 0
    feeds = synthetic_feeds(original(tmp_path).inputs, 2, SHAPES, 0)
    wanted = original(tmp_path).run(feeds)["last_hidden_state"]

    def error(runtime: dict[str, Any]) -> float:
        return float(np.abs(backend.load(engine, runtime).run(feeds)["last_hidden_state"] - wanted).max())

    assert error({}) < 1e-5 < error({"inference_precision": "bf16"}) < 0.1


def test_weights_outside_the_file_and_a_fixed_batch(backend: OpenVinoBackend, tmp_path: Path) -> None:
    model = models.conv_net(batch=4)
    models.save_external(model, tmp_path / "model" / "model.onnx", location="model.onnx.data")
    (tmp_path / "engine").mkdir()
    built = backend.build(tmp_path / "model", tmp_path / "engine", {}, Notes())
    assert built["trial_run"] == {"batch": 4}
    feeds = synthetic_feeds(original(tmp_path).inputs, 4, None, 1)
    got = backend.load(tmp_path / "engine", built["runtime"]).run(feeds)["logits"]
    np.testing.assert_allclose(got, original(tmp_path).run(feeds)["logits"], atol=1e-5)


def test_a_quantized_model_with_mean_pooling(backend: OpenVinoBackend, tmp_path: Path) -> None:
    """OpenVINO's own fusion of pooling, product and rounding is wrong by more than the values."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("ReduceMean", ["tokens"], ["pooled"], name="pool", axes=[1], keepdims=0),
        helper.make_node("Mul", ["pooled", "gain"], ["scaled"], name="gain"),
        helper.make_node("QuantizeLinear", ["scaled", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], name="dq"),
        helper.make_node("MatMul", ["dq", "w"], ["output"], name="project"),
    ]
    weights = [
        models.tensor("gain", rng.uniform(0.5, 2, (1, 32))),
        models.tensor("s", 0.01),
        models.tensor("z", 128, np.uint8),
        models.tensor("w", rng.normal(size=(32, 10))),
    ]
    outputs = [models.value("output", ["n", 10])]
    model = models.make_model(nodes, [models.value("tokens", ["n", 16, 32])], outputs, weights)
    built, engine, _ = build(backend, model, tmp_path)
    feeds = {"tokens": rng.normal(size=(8, 16, 32)).astype(np.float32)}
    got = backend.load(engine, built["runtime"]).run(feeds)["output"]
    np.testing.assert_allclose(got, original(tmp_path).run(feeds)["output"], atol=0.05)


def test_specs_keep_the_symbolic_names(backend: OpenVinoBackend, tmp_path: Path) -> None:
    built, engine, _ = build(backend, models.transformer_block(), tmp_path)
    session = backend.load(engine, built["runtime"])
    assert list(session.inputs) == [
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "sequence")),
    ]
    assert list(session.outputs) == [TensorSpec("last_hidden_state", "float32", ("batch", "sequence", 32))]


# The files

_WRITE = """
import sys
from pathlib import Path
from tests.factories import architectures, onnx_models
from workers.backends.openvino import OpenVinoBackend
from tests.unit.test_openvino_backend import Notes, SHAPES

root = Path(sys.argv[1])
for name in sys.argv[2:]:
    make = getattr(architectures, name, None) or getattr(onnx_models, name)
    (root / name / "engine").mkdir(parents=True)
    onnx_models.folder(make(), root / name / "model")
    OpenVinoBackend().build(root / name / "model", root / name / "engine", {"shapes": SHAPES}, Notes())
"""


def in_a_process(source: str, *args: str, **env: str) -> str:
    command = [sys.executable, "-W", "error", "-c", source, *args]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    """Also in another process, in another folder, and after other models, which move OpenVINO's counters."""
    names = ["gpt2", "lstm", "with_if", "residual_cnn"]
    in_a_process(_WRITE, str(tmp_path / "a"), *names)
    in_a_process(_WRITE, str(tmp_path / "elsewhere" / "b"), *reversed(names))
    for name in names:
        for file in ("model.xml", "model.bin", "interface.json"):
            one, other = (tmp_path / p / name / "engine" / file for p in ("a", "elsewhere/b"))
            assert one.read_bytes() == other.read_bytes(), (name, file)
            assert str(tmp_path).encode() not in one.read_bytes()


def test_missing_and_damaged_files(backend: OpenVinoBackend, tmp_path: Path) -> None:
    _, engine, _ = build(backend, models.mlp(), tmp_path)
    for name in ("interface.json", "model.bin", "model.xml"):
        whole = (engine / name).read_bytes()
        for content in (None, b"", whole[: len(whole) // 2], b"{}", b'{"format": 1, "inputs": 7, "outputs": []}'):
            (engine / name).unlink()
            if content is not None:
                (engine / name).write_bytes(content)
            with pytest.raises(StageFailure) as caught:
                backend.load(engine, {}).run({"input": np.ones((1, 8), np.float32)})
            assert caught.value.code == "load_failed", (name, content)
            assert str(tmp_path) not in caught.value.detail
            (engine / name).write_bytes(whole)
    with pytest.raises(StageFailure) as caught:
        backend.build(tmp_path / "engine2", tmp_path / "engine2", {}, Notes())
    assert caught.value.code == "load_failed"


# Sessions


def test_bind_shares_the_input_and_outputs_of_run_are_copies(backend: OpenVinoBackend, tmp_path: Path) -> None:
    built, engine, _ = build(backend, models.mlp(), tmp_path)
    session = backend.load(engine, built["runtime"])
    first, second = (synthetic_feeds(session.inputs, batch, None, batch) for batch in (1, 4))
    wanted = session.run(first)["logits"]
    kept = wanted.copy()
    calls = [session.bind(first), session.bind(second)]
    session.run(second)
    del second
    for call in calls * 3:
        call()
    np.testing.assert_array_equal(wanted, kept)
    frozen = {"input": first["input"].copy()}
    frozen["input"].flags.writeable = False
    np.testing.assert_array_equal(session.run(frozen)["logits"], kept)
    sliced = {"input": np.repeat(first["input"], 2, axis=1)[:, ::2]}
    np.testing.assert_array_equal(session.run(sliced)["logits"], kept)
    assert session.run({"input": np.zeros((0, 8), np.float32)})["logits"].shape == (0, 4)
    session.close()


@pytest.mark.parametrize(
    ("feeds", "tensor"),
    [
        ({}, "input"),
        ({"input": np.ones((1, 9), np.float32)}, "input"),
        ({"input": np.ones((1, 8, 1), np.float32)}, "input"),
        ({"input": np.ones((1, 8), np.float64)}, "input"),
        ({"input": np.ones((1, 8), np.float32), "ghost": np.ones(1, np.float32)}, "ghost"),
    ],
)
def test_wrong_feeds(feeds: dict[str, Any], tensor: str, backend: OpenVinoBackend, tmp_path: Path) -> None:
    built, engine, _ = build(backend, models.mlp(), tmp_path)
    session = backend.load(engine, built["runtime"])
    for use in (session.run, session.bind):
        with pytest.raises(StageFailure) as caught:
            use(feeds)
        assert (caught.value.code, caught.value.tensor) == ("inference_failed", tensor)


def test_a_run_that_fails_is_typed(backend: OpenVinoBackend, tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["output"], name="needs_6")]
    weights = [models.tensor("shape", [2, 3], np.int64)]
    model = models.make_model(nodes, [models.value("input", ["n", "m"])], [models.value("output", [2, 3])], weights)
    built, engine, notes = build(backend, model, tmp_path)
    assert built["trial_run"] is None  # our own inputs do not suit the model: ONNX Runtime refuses them, too
    assert "tells nothing" in notes.notes[0][0]
    session = backend.load(engine, built["runtime"])
    assert session.run({"input": np.ones((2, 3), np.float32)})["output"].shape == (2, 3)
    with pytest.raises(StageFailure) as caught:
        session.bind({"input": np.ones((2, 4), np.float32)})()
    assert caught.value.code == "inference_failed"
    assert "/" not in caught.value.detail


# Failures of models


@pytest.mark.parametrize(
    ("make", "code", "node"),
    [
        (models.unknown_op, "unsupported_op", "frob"),
        (models.unknown_standard_op, "unsupported_op", "frob"),
        (models.string_input, "unsupported_op", "id"),
        (models.cyclic, "load_failed", None),
        (models.dynamic_rank, "load_failed", "input"),
        (models.type_error, "unsupported_op", "mixed"),
        (models.shape_error, "unsupported_op", "mm"),
    ],
)
def test_models_that_it_does_not_take(
    make: Callable[[], ModelProto], code: str, node: str | None, backend: OpenVinoBackend, tmp_path: Path
) -> None:
    with pytest.raises(StageFailure) as caught:
        build(backend, make(), tmp_path)
    assert (caught.value.code, caught.value.node) == (code, node)
    assert caught.value.remedy
    assert str(tmp_path) not in caught.value.detail
    if code == "unsupported_op" and make not in (models.string_input,):
        op = make().graph.node[0].op_type
        assert op in caught.value.detail


def test_messages() -> None:
    text = (
        "Exception from src/inference/src/cpp/core.cpp:84:\nCheck 'false' failed at src/frontends/x.cpp:151:\n"
        "Summary:\n-- No conversion rule found for operations: com.example.Frob, Gadget-17\n"
        "-- Conversion is failed for: SplitToSequence-17\n\n"
    )
    message = clean_message(RuntimeError(text))
    assert unsupported_ops(message) == ["Frob", "Gadget", "SplitToSequence"]
    assert "src/" not in message


# Options


@pytest.mark.parametrize(
    "options", [{"threads": 4}, {"inference_precision": "f8"}, {"num_streams": 0}, {"inference_num_threads": -1}]
)
def test_wrong_options_are_refused(options: dict[str, Any], backend: OpenVinoBackend, tmp_path: Path) -> None:
    with pytest.raises(StageFailure) as caught:
        build(backend, models.mlp(), tmp_path, **options)
    assert (caught.value.code, caught.value.kind) == ("invalid_backend_options", FailureKind.REQUEST)


def test_options_reach_the_runtime(backend: OpenVinoBackend, tmp_path: Path) -> None:
    options = {"inference_num_threads": 1, "num_streams": 1, "enable_cpu_pinning": False}
    built, engine, _ = build(backend, models.mlp(), tmp_path, **options)
    assert built["runtime"] == {"inference_precision": "f32", **options}
    assert {k: built["compiled"][k] for k in options} == options
    for hint in ("latency", "throughput"):
        session = backend.load(engine, {"performance_hint": hint, "enable_hyper_threading": True})
        session.run(synthetic_feeds(session.inputs, 2, None, 0))


def test_instances_share_the_machine_without_pinning(backend: OpenVinoBackend) -> None:
    runtime = backend.with_threads({"inference_precision": "bf16", "enable_cpu_pinning": True}, 2)
    assert runtime == {
        "inference_precision": "bf16",
        "num_streams": 1,
        "inference_num_threads": 2,
        "enable_cpu_pinning": False,
    }


# What is proposed


def case(kind: str = "cnn", *, calibration: bool = True, **facts: Any) -> Case:
    body: dict[str, Any] = {"model_id": "mdl_x", **facts.pop("spec", {})}
    if calibration:
        body["calibration"] = {"dataset_id": "dst_x", **facts.pop("data", {})}
    known = {"isa": ["avx2", "avx512_vnni", "avx512_bf16"], "cores": 2, "has_calibration": calibration}
    ops = {"Conv": 20, "MatMul": 8, "LSTM": 2}
    return Case(OptimizationSpec.model_validate(body), facts.pop("ops", ops), kind, **{**known, **facts})


def proposed(of: Case) -> dict[str, Candidate]:
    return {c.id: c for c in OpenVinoBackend().propose(of).candidates}


def reason(of: Case, name: str) -> str:
    return next(s.reason for s in OpenVinoBackend().propose(of).skipped if s.name == name)


def test_candidates() -> None:
    found = proposed(case())
    assert list(found) == ["ov-fp32", "ov-bf16", "ov-int8", "ov-int8-bf16"]
    assert [c.id for c in found.values() if c.lossless] == ["ov-fp32"]
    assert [c.precision for c in found.values()] == ["fp32", "bf16", "int8", "int8"]
    assert [c.runtime["inference_precision"] for c in found.values()] == ["f32", "bf16", "f32", "bf16"]
    assert found["ov-int8"].steps == found["ov-int8-bf16"].steps
    step = found["ov-int8"].steps[1]
    assert (step.stage, step.extra) == ("quantize_nncf", ("calibration",))
    assert step.options == {
        "preset": "performance",
        "model_type": None,
        "method": "minmax",
        "max_samples": 300,
        "part": "all",
        "exclude_nodes": [],
    }
    assert proposed(case("transformer"))["ov-int8"].steps[1].options["model_type"] == "transformer"
    assert proposed(case(data={"method": "entropy"}))["ov-int8"].steps[1].options["method"] == "histogram"


def test_what_is_not_proposed_and_why() -> None:
    assert "ov-bf16" not in proposed(case(isa=["avx2", "avx512_vnni"]))
    assert "bf16" in reason(case(isa=["avx2"]), "ov-bf16")
    assert "calibration data" in reason(case(calibration=False), "ov-int8")
    assert "quantized already" in reason(case(quantized=True), "ov-int8")
    assert "recurrent" in reason(case("rnn"), "ov-int8")
    assert "no operator" in reason(case("other", ops={"Relu": 3}), "ov-int8")
    assert list(proposed(case(spec={"precisions": ["int8"]}))) == ["ov-int8"]
    assert list(proposed(case(spec={"precisions": ["fp32"]}))) == ["ov-fp32"]


def test_priors_know_small_models_and_old_processors() -> None:
    assert proposed(case())["ov-int8"].prior < proposed(case())["ov-bf16"].prior < proposed(case())["ov-fp32"].prior
    assert proposed(case(size_bytes=100_000))["ov-int8"].prior > 1
    assert proposed(case(isa=["avx2"]))["ov-int8"].prior == 0.9


def test_variants_are_runtime_options_that_load() -> None:
    backend = OpenVinoBackend()
    hardware = {"cores_physical": 4, "cores_machine": 8}
    candidate = proposed(case())["ov-bf16"]
    assert backend.variants(case(cores=1), candidate) == ()
    assert [c.id for c in backend.variants(case(hardware=hardware), candidate)] == [
        "ov-bf16.nopin",
        "ov-bf16.t1",
        "ov-bf16.ht",
    ]
    assert [c.id for c in backend.variants(case(size_bytes=1000), candidate)] == ["ov-bf16.t1", "ov-bf16.nopin"]
    for variant in backend.variants(case(hardware=hardware), candidate):
        assert variant.runtime["inference_precision"] == "bf16"
        assert backend.infer_script(variant.runtime)


def test_probe(backend: OpenVinoBackend) -> None:
    new, old = backend.probe({"isa": ["avx2", "avx512_vnni", "amx_bf16"]}), backend.probe({})
    assert new is not None
    assert old is not None
    assert (new.devices, new.precisions, old.precisions) == (("cpu",), ("fp32", "bf16", "int8"), ("fp32",))
    assert set(new.versions) == {"openvino"}


# Telemetry

_OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise SystemExit("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import workers.backends.openvino as backend
from workers.graph.ir.library import library
from workers.graph.nncf import quantize as nncf_quantize
assert backend.OpenVinoBackend().probe({}) is not None
import numpy as np
ov = library()
from openvino import opset13
x = opset13.parameter([-1, 8], np.float32)
w = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
model = ov.Model([opset13.matmul(x, opset13.constant(w), False, False)], [x])
x.output(0).set_names({"x"})
data = [{"x": np.ones((1, 8), np.float32)}]
options = {"preset": "mixed", "model_type": None, "method": "auto", "smooth_quant_alpha": None}
options |= {"fast_bias_correction": True, "excluded": (), "progress": lambda fraction: None}
nncf_quantize.quantize(model, lambda: data, 1, **options)
loaded = [n for n in sys.modules if n.split(".")[0] == "openvino_telemetry" and sys.modules[n] is not None]
assert not loaded, loaded
assert "torch" not in sys.modules
print("quiet")
"""


def test_no_telemetry_no_torch_and_no_noise(tmp_path: Path) -> None:
    assert in_a_process(_OFFLINE, HOME=str(tmp_path)) == "quiet\n"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


# Forks


def test_engines_run_in_forks_of_a_process_that_imported_the_library(backend: OpenVinoBackend, tmp_path: Path) -> None:
    built, engine, _ = build(backend, models.conv_net(), tmp_path)
    source = f"""
import os, sys
from workers.kernel import backends
from workers.measure.engine_process import EngineProcess
from workers.data import synthetic_feeds
from pathlib import Path
backend = backends()["openvino"]()
backend.probe({{}})
before = set(os.listdir("/dev/shm")) | set(os.listdir("/tmp"))
for turn in range(8):
    engines = [EngineProcess(str(i), "openvino", Path({str(engine)!r}), {built["runtime"]!r}) for i in range(2)]
    for e in engines:
        loaded = e.load()
    for e in engines:
        feeds = synthetic_feeds(loaded.inputs, turn % 3 + 1, None, turn)
        ms, broken = e.infer(feeds)
        assert not broken
        assert e.peak_memory_mb() < 1000
    for e in engines:
        e.close()  # SIGKILL
made = (set(os.listdir("/dev/shm")) | set(os.listdir("/tmp"))) - before
print("openvino" in " ".join(made))
"""
    assert in_a_process(source, TMPDIR=str(tmp_path)) == "False\n"


def test_a_killed_engine_is_a_typed_failure(backend: OpenVinoBackend, tmp_path: Path) -> None:
    built, engine, _ = build(backend, models.mlp(), tmp_path)
    process = EngineProcess("e", "openvino", engine, built["runtime"])
    loaded = process.load()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(StageFailure) as caught:
        process.infer(synthetic_feeds(loaded.inputs, 1, None, 0))
    assert caught.value.code == "out_of_memory"
    process.close()


# The bundle, and the pipeline's stages


def test_infer_script_runs_beside_the_engine(backend: OpenVinoBackend, tmp_path: Path) -> None:
    built, engine, _ = build(backend, models.mlp(), tmp_path, inference_num_threads=1)
    (engine / "infer.py").write_text(backend.infer_script(built["runtime"]))
    feeds = {"input": np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)}
    expected = backend.load(engine, built["runtime"]).run(feeds)
    np.savez(engine / "sample_input.npz", **feeds)
    np.savez(engine / "expected_output.npz", **expected)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(engine / "infer.py"), *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)

    plain = run()
    assert plain.returncode == 0, plain.stderr
    assert plain.stderr == ""
    assert "output logits: float32 [2, 4]" in plain.stdout
    assert "latency p50:" in plain.stdout
    assert "max abs difference to expected_output.npz: 0" in plain.stdout
    with np.load(tmp_path / "output.npz") as written:
        np.testing.assert_array_equal(written["logits"], expected["logits"])
    np.savez(tmp_path / "wrong.npz", other=feeds["input"])
    wrong = run("wrong.npz")
    assert (wrong.returncode, "missing inputs: input" in wrong.stderr) == (2, True)


def test_build_validate_and_benchmark(tmp_path: Path) -> None:
    source = models.folder(architectures.residual_cnn(), tmp_path / "model")
    hardware = describe()

    def context(stage: str, **inputs: Path) -> StageContext:
        (tmp_path / f"work-{stage}").mkdir()
        return StageContext(inputs, tmp_path / f"work-{stage}", tmp_path / f"out-{stage}", Notes(), hardware)

    built = Build().run(context("build", model=source), BuildStageOptions(backend="openvino")).data
    assert built["engine_format"] == "openvino-ir"
    assert json.loads(json.dumps(built, allow_nan=False)) == built
    engine = tmp_path / "out-build" / "engine"
    validate = ValidateOptions(backend="openvino", runtime=built["runtime"])
    judged = Validate().run(context("validate", model=source, engine=engine), validate).data
    assert judged["broken"] is None
    assert judged["loss_percent"] < 0.01
    inputs = {"baseline": source, "engine.ov": engine}
    options = BenchmarkOptions.model_validate(
        {
            "engines": [{"id": "ov", "backend": "openvino", "runtime": built["runtime"]}],
            "batch_sizes": [1, 2],
            "min_seconds": 0.1,
            "rounds": 5,
        }
    )
    timed = Benchmark().run(context("benchmark", **inputs), options).data
    assert "openvino" in timed["versions"]
    figures = timed["engines"]["ov"]
    assert "failed" not in figures
    assert set(figures["batches"]) == {"1", "2"}
