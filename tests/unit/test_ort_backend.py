"""The ONNX Runtime backend on real models: engines, sessions, typed failures and the bundle's `infer.py`."""

from __future__ import annotations

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
from tests.factories import onnx_models as models
from workers.backends import onnxruntime as backend_module
from workers.backends.onnxruntime import OnnxRuntimeBackend
from workers.backends.onnxruntime.session import RuntimeOptions, session_options
from workers.candidates import Candidate, Case
from workers.data import synthetic_feeds
from workers.graph.onnx_files import read_skeleton
from workers.graph.onnxruntime_messages import runtime_failure, where_of
from workers.kernel import Reporter, TensorSpec


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[tuple[str, dict[str, Any]]] = []

    def progress(self, fraction: float, message: str = "") -> None:
        pass

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append((message, facts))


@pytest.fixture
def backend() -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend()


def build(
    backend: OnnxRuntimeBackend, model: ModelProto, tmp_path: Path, **options: Any
) -> tuple[dict[str, Any], Path, Notes]:
    source, out, notes = models.folder(model, tmp_path / "model"), tmp_path / "engine", Notes()
    out.mkdir()
    return backend.build(source, out, options, notes), out, notes


def test_probe_offers_int8_only_where_it_gains(backend: OnnxRuntimeBackend) -> None:
    new, old = backend.probe({"isa": ["avx2", "avx512_vnni"]}), backend.probe({"isa": []})
    assert new is not None
    assert old is not None
    assert (new.devices, new.precisions, old.precisions) == (("cpu",), ("fp32", "int8"), ("fp32",))
    assert set(new.versions) == {"onnxruntime"}


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
    ],
)
def test_the_engine_computes_what_the_model_does(
    make: Callable[[], ModelProto], backend: OnnxRuntimeBackend, tmp_path: Path
) -> None:
    built, engine, notes = build(backend, make(), tmp_path)
    assert built == {"runtime": {"graph_optimization_level": "disable"}, "offline_optimized": True}
    assert notes.notes == []
    baseline, optimized = backend.load(tmp_path / "model", {}), backend.load(engine, built["runtime"])
    for batch in (1, 3):
        feeds = synthetic_feeds(baseline.inputs, batch, None, seed=batch)
        wanted, got = baseline.run(feeds), optimized.run(feeds)
        assert list(wanted) == list(got)
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], atol=1e-4)


def test_the_optimized_graph_is_fused(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    _, engine, _ = build(backend, models.conv_net(), tmp_path)
    ops = [n.op_type for n in read_skeleton(engine / "model.onnx").graph.node]
    assert "BatchNormalization" not in ops
    assert "Relu" not in ops


def test_options_reach_the_runtime(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    options = {"intra_op_num_threads": 1, "inter_op_num_threads": 1, "allow_spinning": False, "offline": False}
    built, engine, _ = build(backend, models.mlp(), tmp_path, **options, execution_mode="parallel")
    assert built["runtime"] == {
        "graph_optimization_level": "all",
        "intra_op_num_threads": 1,
        "inter_op_num_threads": 1,
        "execution_mode": "parallel",
        "allow_spinning": False,
    }
    assert (engine / "model.onnx").read_bytes() == (tmp_path / "model" / "model.onnx").read_bytes()
    session = backend.load(engine, built["runtime"])
    session.run(synthetic_feeds(session.inputs, 2, None, 0))


def test_memory_and_denormal_options(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    options = {"enable_cpu_mem_arena": False, "enable_mem_pattern": False, "denormal_as_zero": True}
    built, engine, _ = build(backend, models.mlp(), tmp_path, **options)
    assert built["runtime"] == {"graph_optimization_level": "disable", **options}
    made = session_options(RuntimeOptions(**options))
    assert (made.enable_cpu_mem_arena, made.enable_mem_pattern) == (False, False)
    assert made.get_session_config_entry("session.set_denormal_as_zero") == "1"
    session = backend.load(engine, built["runtime"])
    session.run(synthetic_feeds(session.inputs, 2, None, 0))
    script = backend.infer_script(built["runtime"])
    assert all(name in script for name in options)
    compile(script, "infer.py", "exec")


def test_variants_fit_the_case(backend: OnnxRuntimeBackend) -> None:
    def ids(kind: str, cores: int, **spec: Any) -> list[str]:
        case = Case(OptimizationSpec.model_validate({"model_id": "mdl_x", **spec}), {}, kind, cores=cores)
        candidate = Candidate("ort-fp32", "fp32", "onnxruntime", "fp32", ())
        found = backend.variants(case, candidate)
        for variant in found:
            RuntimeOptions.model_validate(variant.runtime)
        return [v.id.split(".")[1] for v in found]

    assert ids("cnn", 1) == []
    assert ids("cnn", 2) == ["t1", "nospin"]
    assert ids("rnn", 2, constraints={"max_memory_mb": 100}) == ["t1", "nospin", "daz", "noarena"]


def test_large_models_keep_their_weights_outside(
    backend: OnnxRuntimeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "INLINE_LIMIT_BYTES", 4000)
    built, engine, notes = build(backend, models.mlp(features=64, hidden=64), tmp_path)
    assert notes.notes == []
    assert sorted(p.name for p in engine.iterdir()) == ["model.onnx", "model.onnx.data"]
    feeds = {"input": np.ones((2, 64), np.float32)}
    wanted = backend.load(tmp_path / "model", {}).run(feeds)["logits"]
    np.testing.assert_allclose(backend.load(engine, built["runtime"]).run(feeds)["logits"], wanted, atol=1e-5)


def test_a_broken_optimized_file_falls_back(
    backend: OnnxRuntimeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that ONNX Runtime wrote is cut in half before it is tried."""
    original = OnnxRuntimeBackend._try

    def cut(self: OnnxRuntimeBackend, folder: Path, *rest: Any) -> StageFailure | None:
        (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:200])
        return original(self, folder, *rest)

    monkeypatch.setattr(OnnxRuntimeBackend, "_try", cut)
    built, engine, notes = build(backend, models.mlp(), tmp_path, intra_op_num_threads=1)
    assert built["offline_optimized"] is False
    assert built["runtime"] == {"graph_optimization_level": "all", "intra_op_num_threads": 1}
    assert "cannot be used" in notes.notes[0][0]
    session = backend.load(engine, built["runtime"])
    session.run(synthetic_feeds(session.inputs, 2, None, 0))


def test_our_own_odd_inputs_are_not_the_engines_fault(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["output"], name="needs_6")]
    weights = [models.tensor("shape", [2, 3], np.int64)]
    model = models.make_model(nodes, [models.value("input", ["n", "m"])], [models.value("output", [2, 3])], weights)
    built, engine, notes = build(backend, model, tmp_path)
    assert built["offline_optimized"] is True
    assert notes.notes == []
    assert backend.load(engine, built["runtime"]).run({"input": np.ones((2, 3), np.float32)})["output"].shape == (2, 3)


def test_specs(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    session = backend.load(models.folder(models.transformer_block(), tmp_path / "m"), {})
    assert list(session.inputs) == [
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "sequence")),
    ]
    assert list(session.outputs) == [TensorSpec("last_hidden_state", "float32", ("batch", "sequence", 32))]


def test_bind_runs_on_bound_inputs(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    session = backend.load(models.folder(models.conv_net(), tmp_path / "m"), {})
    first, second = (synthetic_feeds(session.inputs, batch, None, batch) for batch in (1, 4))
    calls = [session.bind(first), session.bind(second)]
    del first, second
    for call in calls * 3:
        call()


def test_bind_serves_what_cannot_be_bound(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    session = backend.load(models.folder(models.string_input(), tmp_path / "m"), {})
    outputs = session.bind({"text": np.array(["a", "b"], dtype=object)})()
    assert list(outputs["output"]) == ["a", "b"]


def test_bind_reports_a_failing_run(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    session = backend.load(models.folder(models.mlp(), tmp_path / "m"), {})
    with pytest.raises(StageFailure) as caught:
        session.bind({"input": np.ones((1, 9), np.float32)})()
    assert caught.value.code == "inference_failed"


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
def test_wrong_feeds(feeds: dict[str, Any], tensor: str, backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    session = backend.load(models.folder(models.mlp(), tmp_path / "m"), {})
    with pytest.raises(StageFailure) as caught:
        session.run(feeds)
    assert (caught.value.code, caught.value.tensor) == ("inference_failed", tensor)


def test_a_run_that_fails_names_the_node(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["output"], name="lookup")]
    ids = models.value("ids", ["n"], TensorProto.INT64)
    weights = [models.tensor("table", np.ones((3, 2)))]
    model = models.make_model(nodes, [ids], [models.value("output", ["n", 2])], weights)
    session = backend.load(models.folder(model, tmp_path / "m"), {})
    with pytest.raises(StageFailure) as caught:
        session.run({"ids": np.array([7])})
    assert (caught.value.code, caught.value.node) == ("inference_failed", "lookup")
    assert "/" not in caught.value.detail.split("Name:")[0]


@pytest.mark.parametrize(
    ("model", "code", "node"),
    [
        (models.cyclic(), "load_failed", None),
        (models.unknown_standard_op(), "unsupported_op", "frob"),
        (models.type_error(), "load_failed", "mixed"),
        (models.shape_error(), "load_failed", "mm"),
    ],
)
def test_load_failures(
    model: ModelProto, code: str, node: str | None, backend: OnnxRuntimeBackend, tmp_path: Path
) -> None:
    with pytest.raises(StageFailure) as caught:
        build(backend, model, tmp_path)
    assert (caught.value.code, caught.value.node) == (code, node)
    assert str(tmp_path) not in caught.value.detail


def test_missing_and_damaged_files(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    for content in (None, b"", b"no model"):
        if content is not None:
            (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(StageFailure) as caught:
            backend.load(tmp_path, {})
        assert caught.value.code == "load_failed"


def test_unknown_options_are_refused(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    with pytest.raises(StageFailure) as caught:
        build(backend, models.mlp(), tmp_path, threads=4)
    assert (caught.value.code, caught.value.kind) == ("invalid_backend_options", FailureKind.REQUEST)


def test_memory_failures_are_not_cached() -> None:
    failure = runtime_failure("inference_failed", MemoryError("std::bad_alloc"))
    assert (failure.code, failure.cacheable) == ("out_of_memory", False)


@pytest.mark.parametrize(
    ("message", "where"),
    [
        (
            "Non-zero status code returned while running Gather node. Name:'lookup' Status Message: indices",
            {"op": "Gather", "node": "lookup"},
        ),
        (
            "Could not find an implementation for Einsum(12) node with name 'e1'",
            {"op": "Einsum", "node": "e1"},
        ),
        ("Fatal error: com.example:Frob(-1) is not a registered function/op", {"op": "Frob"}),
        ("anything else", {}),
    ],
)
def test_where_of(message: str, where: dict[str, str]) -> None:
    assert where_of(message) == where


def test_infer_script_runs_beside_the_engine(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    built, engine, _ = build(backend, models.mlp(), tmp_path, intra_op_num_threads=1, allow_spinning=False)
    (engine / "infer.py").write_text(backend.infer_script(built["runtime"]))
    feeds = {"input": np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)}
    expected = backend.load(engine, built["runtime"]).run(feeds)
    np.savez(engine / "sample_input.npz", **feeds)
    np.savez(engine / "expected_output.npz", **expected)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(engine / "infer.py"), *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)

    plain = run()
    assert plain.returncode == 0, plain.stderr
    assert "output logits: float32 [2, 4]" in plain.stdout
    assert "latency p50:" in plain.stdout
    assert "max abs difference to expected_output.npz: 0" in plain.stdout
    with np.load(tmp_path / "output.npz") as written:
        np.testing.assert_array_equal(written["logits"], expected["logits"])

    np.savez(tmp_path / "mine.npz", input=feeds["input"][:1])
    given = run("mine.npz", "mine_out.npz")
    assert given.returncode == 0, given.stderr
    assert "expected_output" not in given.stdout
    with np.load(tmp_path / "mine_out.npz") as written:
        assert written["logits"].shape == (1, 4)

    np.savez(tmp_path / "wrong.npz", other=feeds["input"])
    wrong = run("wrong.npz")
    assert (wrong.returncode, "missing inputs: input" in wrong.stderr) == (2, True)
