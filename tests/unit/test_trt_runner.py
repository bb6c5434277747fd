"""Loading and running a plan: safety first, then named tensors, profiles, shapes that depend on the data, graphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from app.domain.failures import StageFailure
from tests.factories import cuda_standin, tensorrt_standin
from tests.factories import onnx_models as models
from tests.factories.tensorrt_standin import Behaviour
from tests.unit.test_trt_build import Recorder
from workers import installation
from workers.backends.tensorrt import TensorRtBackend
from workers.backends.tensorrt import probe as trt_probe
from workers.backends.tensorrt.runner import TensorRtSession
from workers.backends.tensorrt.sidecar import read_verified


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Behaviour]:
    with cuda_standin.installed(monkeypatch, tmp_path / "cache") as found:
        yield found
    assert cuda_standin.Cuda.depth == 0, "a context was left current"


def engine_of(model: onnx.ModelProto, tmp_path: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    source, out = models.folder(model, tmp_path / "model"), tmp_path / "engine"
    out.mkdir()
    return out, TensorRtBackend().build(source, out, options, Recorder())["runtime"]


def load(engine: Path, runtime: dict[str, Any]) -> TensorRtSession:
    session = TensorRtBackend().load(engine, runtime)
    assert isinstance(session, TensorRtSession)
    return session


def reference(model: onnx.ModelProto, feeds: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def images(batch: int) -> dict[str, Any]:
    return {"input": np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)}


@pytest.mark.usefixtures("behaviour")
def test_runs_by_name_at_every_batch(tmp_path: Path) -> None:
    model = models.conv_net()
    session = load(*engine_of(model, tmp_path, batch_sizes=[1, 8]))
    assert [(s.name, s.dtype, s.shape) for s in session.inputs] == [("input", "float32", ("batch", 3, 16, 16))]
    for batch in (1, 8, 16, 3, 1):
        feeds = images(batch)
        np.testing.assert_allclose(session.run(feeds)["logits"], reference(model, feeds)["logits"], rtol=1e-5)
    memory = session.memory()
    assert memory["activation_bytes"] == 4096, "profile 0 is in use"
    assert memory["io_bytes"] > 0
    session.close()
    session.close()
    assert cuda_standin.Buffer.live == 0


@pytest.mark.usefixtures("behaviour")
def test_two_inputs_of_int64(tmp_path: Path) -> None:
    model = models.transformer_block()
    session = load(*engine_of(model, tmp_path))
    feeds = {"input_ids": np.arange(10, dtype=np.int64).reshape(2, 5), "attention_mask": np.ones((2, 5), np.int64)}
    found = session.run(feeds)["last_hidden_state"]
    np.testing.assert_allclose(found, reference(model, feeds)["last_hidden_state"], rtol=1e-4, atol=1e-5)
    session.close()


@pytest.mark.usefixtures("behaviour")
def test_an_input_whose_shape_stays_when_the_profile_changes(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"], name="product")
    inputs = [models.value("a", ["m", 4]), models.value("b", [4, "n"])]
    model = models.make_model([node], inputs, [models.value("y", ["m", "n"])])
    same = {"min": [4, 2], "opt": [4, 2], "max": [4, 8]}
    small, large = ({"min": [1, 4], "opt": [m, 4], "max": [m, 4]} for m in (1, 64))
    session = load(*engine_of(model, tmp_path, profiles=[{"a": small, "b": same}, {"a": large, "b": same}]))
    for rows in (1, 64, 1):
        feeds = {"a": np.ones((rows, 4), np.float32), "b": np.ones((4, 2), np.float32)}
        np.testing.assert_array_equal(session.run(feeds)["y"], np.full((rows, 2), 4.0))
    session.close()


@pytest.mark.usefixtures("behaviour")
def test_bound_calls_keep_their_own_memory(tmp_path: Path) -> None:
    model = models.conv_net()
    session = load(*engine_of(model, tmp_path))
    first, second = images(1), images(4)
    calls = [session.bind(first), session.bind(second), session.bind(first)]
    for call in calls * 2:
        call()
    for binding, feeds in zip(session._bindings[1:], (first, second, first), strict=True):
        array = binding.buffers.host("logits", binding.outputs["logits"] or (), np.dtype(np.float32))
        np.testing.assert_allclose(array, reference(model, feeds)["logits"], rtol=1e-5)
    session.close()


@pytest.mark.parametrize("transfers", [True, False])
@pytest.mark.usefixtures("behaviour")
def test_a_call_that_is_dropped_gives_its_memory_back(transfers: bool, tmp_path: Path) -> None:
    engine, _ = engine_of(models.conv_net(), tmp_path)
    session = load(engine, {"cuda_graph": True, "transfers": transfers})
    session.run(images(1))
    before = cuda_standin.Buffer.live
    calls = [session.bind(images(batch)) for batch in (1, 8)]
    assert cuda_standin.Buffer.live == before + 4
    for call in calls:
        call()
    calls.clear()
    del call
    assert cuda_standin.Buffer.live == before
    session.close()


@pytest.mark.usefixtures("behaviour")
def test_outputs_follow_the_feeds_after_another_call_had_their_shape(tmp_path: Path) -> None:
    model = models.conv_net()
    session = load(*engine_of(model, tmp_path))
    session.run(images(1))
    call = session.bind(images(8))
    call()
    found = session.run(images(8))["logits"]  # the context has this shape already, the session's own buffers have not
    np.testing.assert_allclose(found, reference(model, images(8))["logits"], rtol=1e-5)
    session.close()


def test_a_graph_is_captured_once_and_replayed(tmp_path: Path, behaviour: Behaviour) -> None:
    model = models.conv_net()
    engine, runtime = engine_of(model, tmp_path, cuda_graph=True)
    assert runtime == {"cuda_graph": True}
    session = load(engine, runtime)
    calls = [session.bind(images(1)), session.bind(images(4))]
    assert session.graph_status == "captured"
    before = behaviour.enqueued
    for call in calls:
        call()
    assert [b.graph.launched for b in session._bindings[1:]] == [1, 1]
    assert behaviour.enqueued == before + 2
    found = session._bindings[2].buffers.host("logits", (4, 4), np.dtype(np.float32))
    np.testing.assert_allclose(found, reference(model, images(4))["logits"], rtol=1e-5)
    session.close()


def test_a_graph_that_cannot_be_captured_runs_eagerly_and_says_so(tmp_path: Path, behaviour: Behaviour) -> None:
    behaviour.fail_capture = True
    session = load(*engine_of(models.mlp(), tmp_path, cuda_graph=True))
    call = session.bind({"input": np.ones((1, 8), np.float32)})
    call()
    assert (session.graph_status or "").startswith("not captured")
    session.close()


def nonzero_model() -> onnx.ModelProto:
    node = helper.make_node("NonZero", ["x"], ["where"], name="nonzero")
    return models.make_model(
        [node], [models.value("x", ["b", 4])], [models.value("where", [2, "n"], TensorProto.INT64)]
    )


@pytest.mark.usefixtures("behaviour")
def test_an_output_whose_shape_depends_on_the_data(tmp_path: Path) -> None:
    model = nonzero_model()
    engine, _ = engine_of(model, tmp_path)
    session = load(engine, {"cuda_graph": True})
    for ones in (3, 0, 7):
        x = np.zeros((2, 4), np.float32)
        x.reshape(-1)[:ones] = 1
        found = session.run({"x": x})["where"]
        assert found.shape == (2, ones)
        np.testing.assert_array_equal(found, reference(model, {"x": x})["where"])
    call = session.bind({"x": np.ones((2, 4), np.float32)})
    call()
    assert "depends on the data" in (session.graph_status or "")
    session.close()


@pytest.mark.usefixtures("behaviour")
def test_no_memory_for_an_output_that_depends_on_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(*engine_of(nonzero_model(), tmp_path))
    monkeypatch.setattr(cuda_standin.Cuda, "buffer_limit", 100)
    with pytest.raises(StageFailure) as caught:
        session.run({"x": np.ones((2, 4), np.float32)})
    assert caught.value.code == "gpu_out_of_memory"
    session.close()


def test_shape_tensors_stay_on_the_host(tmp_path: Path, behaviour: Behaviour) -> None:
    behaviour.shape_inputs = frozenset({"shape"})
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape")
    inputs = [models.value("x", ["b", 4]), models.value("shape", [2], TensorProto.INT64)]
    model = models.make_model([node], inputs, [models.value("y", ["m", "n"])])
    values = {"shape": {"min": [1, 1], "opt": [2, 2], "max": [8, 16]}}
    session = load(*engine_of(model, tmp_path, shape_values=values))
    for shape in ([8, 2], [2, 8]):
        found = session.run({"x": np.ones((4, 4), np.float32), "shape": np.array(shape, np.int64)})
        assert found["y"].shape == tuple(shape)
    session.close()


@pytest.mark.usefixtures("behaviour")
def test_double_in_double_out(tmp_path: Path) -> None:
    node = helper.make_node("Abs", ["x"], ["y"], name="n")
    ends = [models.value(n, ["b", 4], TensorProto.DOUBLE) for n in "xy"]
    session = load(*engine_of(models.make_model([node], ends[:1], ends[1:]), tmp_path))
    assert session.inputs[0].dtype == session.outputs[0].dtype == "float64"
    found = session.run({"x": np.full((2, 4), -1.5)})["y"]
    assert found.dtype == np.float64
    assert (found == 1.5).all()
    session.close()


@pytest.mark.usefixtures("behaviour")
def test_feeds_that_do_not_fit(tmp_path: Path) -> None:
    session = load(*engine_of(models.mlp(), tmp_path, shapes={"input": {"min": [1, 8], "opt": [2, 8], "max": [4, 8]}}))
    for feeds, code in (
        ({}, "inference_failed"),
        ({"input": np.ones((5, 8), np.float32)}, "shape_outside_profiles"),
        ({"input": np.ones((1, 9), np.float32)}, "shape_outside_profiles"),
        ({"input": np.ones((8,), np.float32)}, "shape_outside_profiles"),
        ({"input": np.ones((1, 8), np.int32)}, "inference_failed"),
    ):
        with pytest.raises(StageFailure) as caught:
            session.run(feeds)
        assert caught.value.code == code
    assert session.run({"input": np.ones((4, 8), np.float32)})["logits"].shape == (4, 4), "it lives on"
    session.close()


def test_an_enqueue_that_fails(tmp_path: Path, behaviour: Behaviour) -> None:
    session = load(*engine_of(models.mlp(), tmp_path))
    behaviour.fail_enqueue = True
    with pytest.raises(StageFailure) as caught:
        session.run({"input": np.ones((1, 8), np.float32)})
    assert caught.value.code == "inference_failed"
    assert "enqueue failed" in caught.value.detail
    session.close()


@pytest.mark.usefixtures("behaviour")
def test_times_by_events(tmp_path: Path) -> None:
    session = load(*engine_of(models.mlp(), tmp_path))
    times = session.timings({"input": np.ones((1, 8), np.float32)}, 5)
    assert len(times) == 5
    assert set(times[0]) == {"h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms", "total_ms"}
    assert all(t["total_ms"] >= t["enqueue_ms"] > 0 for t in times)
    profile = session.profile({"input": np.ones((1, 8), np.float32)})
    assert profile["latency_ms"] > 0
    assert profile["memory"]["weights_bytes"] > 0
    assert profile["cuda_graph"] is None
    session.close()


@pytest.mark.usefixtures("behaviour")
def test_times_by_layer(tmp_path: Path) -> None:
    engine, runtime = engine_of(models.mlp(), tmp_path, cuda_graph=True)
    layers = TensorRtBackend().layer_times(engine, runtime, {"input": np.ones((1, 8), np.float32)}, 4)
    assert layers is not None
    assert [(t.name, t.op_type) for t in layers] == [("fc2", "Myelin"), ("act", "Myelin"), ("fc1", "Myelin")]
    assert layers[0].ms == pytest.approx(0.3)


@pytest.mark.usefixtures("behaviour")
def test_inputs_on_the_gpu_already(tmp_path: Path) -> None:
    engine, _ = engine_of(models.mlp(), tmp_path)
    session = load(engine, {"transfers": False, "profile": 1})
    session.bind({"input": np.ones((1, 8), np.float32)})()
    session.close()
    session = load(engine, {"profile": 7})
    with pytest.raises(StageFailure) as caught:
        session.run({"input": np.ones((1, 8), np.float32)})
    assert caught.value.code == "invalid_profile"
    session.close()


# Safety


def test_only_what_this_installation_built_is_loaded(tmp_path: Path, behaviour: Behaviour) -> None:
    engine, runtime = engine_of(models.mlp(), tmp_path)
    plan, sidecar = engine / "engine.plan", engine / "engine.json"
    whole, facts = plan.read_bytes(), json.loads(sidecar.read_text())
    behaviour.load_error = "must not be asked"

    def refused() -> StageFailure:
        with pytest.raises(StageFailure) as caught:
            load(engine, runtime)
        return caught.value

    plan.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert (refused().code, "after it was signed" in refused().detail) == ("engine_untrusted", True)
    plan.write_bytes(whole)
    for change in ({"tensorrt": "11.5"}, {"plan_sha256": "0" * 64}, {"hmac_sha256": ""}, {"hmac_sha256": "ü"},
                   {"hmac_sha256": "\ud800"}, {"precision": float("nan")}):  # fmt: skip
        sidecar.write_text(json.dumps({**facts, **change}))
        assert refused().code == "engine_untrusted"
    for text in ("{", "[]", "{}", '{"format": "anneal-tensorrt-plan/1"}'):
        sidecar.write_text(text)
        assert refused().code == "engine_untrusted"
    sidecar.write_text(json.dumps(facts))
    with installation.using(installation.Installation(b"another tenant's key 00000000000")):
        assert refused().code == "engine_untrusted"
    with installation.using(installation.Installation()):
        assert refused().code == "engine_key_missing"
    assert refused().code == "load_failed", "now TensorRT is asked"
    sidecar.unlink()
    assert refused().code == "load_failed"


@pytest.mark.parametrize(
    ("gpu", "version", "options", "words"),
    [
        ({}, "11.5.0.1", {}, "built with TensorRT 11.4"),
        ({}, "11.3.0.1", {"version_compatible": True}, "built with TensorRT 11.4"),
        ({"compute_capability": "8.9", "name": "L4"}, None, {}, "this machine has L4"),
        ({"name": "NVIDIA H200"}, None, {}, "this machine has NVIDIA H200"),
        ({"compute_capability": "8.9"}, None, {"hardware_compatibility": "same_compute_capability"}, "(8.9)"),
        ({"compute_capability": "7.5"}, None, {"hardware_compatibility": "ampere_plus"}, "(7.5)"),
        ({"cuda": "12.4"}, None, {}, "CUDA 13.1"),
        ({"driver": "580.95.05"}, None, {}, "the older 580.95.05"),
        ({"driver": "595.10"}, None, {}, None),
        ({"driver": ""}, None, {}, None),
        ({"name": "NVIDIA H200"}, None, {"hardware_compatibility": "same_compute_capability"}, None),
        ({"name": "L4", "compute_capability": "8.9"}, None, {"hardware_compatibility": "ampere_plus"}, None),
        ({}, "11.5.0.1", {"version_compatible": True}, None),
    ],
)
@pytest.mark.usefixtures("behaviour")
def test_another_machine(
    gpu: dict[str, Any],
    version: str | None,
    options: dict[str, Any],
    words: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, runtime = engine_of(models.mlp(), tmp_path, **options)
    monkeypatch.setattr(trt_probe, "ask_driver", lambda: {**cuda_standin.GPU, **gpu})
    trt_probe.probe_gpu.cache_clear()
    monkeypatch.setattr(tensorrt_standin, "__version__", version or tensorrt_standin.__version__)
    if words is None:
        load(engine, runtime).close()
        return
    with pytest.raises(StageFailure) as caught:
        load(engine, runtime)
    assert caught.value.code == "engine_incompatible"
    assert words in caught.value.detail
    assert "Run the job again" in (caught.value.remedy or "")
    assert not caught.value.cacheable


@pytest.mark.parametrize(
    ("logged", "code"),
    [
        ("The engine plan file is not compatible with this version of TensorRT", "engine_incompatible"),
        ("Requested amount of GPU memory could not be allocated: out of memory", "gpu_out_of_memory"),
        ("Serialization assertion failed", "load_failed"),
    ],
)
def test_a_plan_that_tensorrt_does_not_load(logged: str, code: str, tmp_path: Path, behaviour: Behaviour) -> None:
    engine, runtime = engine_of(models.mlp(), tmp_path)
    behaviour.load_error = logged
    with pytest.raises(StageFailure) as caught:
        load(engine, runtime)
    assert caught.value.code == code


@pytest.mark.usefixtures("behaviour")
def test_host_code_stays_forbidden(tmp_path: Path) -> None:
    session = load(*engine_of(models.mlp(), tmp_path))
    assert session._runtime is not None
    assert session._runtime.engine_host_code_allowed is False
    session.close()


def test_the_installations_key(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "engine.key"
    key = installation.load_or_make_key(path)
    assert len(key) == installation.KEY_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert installation.load_or_make_key(path) == key
    assert list(path.parent.iterdir()) == [path]
    tenants = [installation.key_for_tenant(key, name) for name in ("a", "b")]
    assert len({key, *tenants}) == 3
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="5 bytes"):
        installation.load_or_make_key(path)
    handed = installation.Installation(tenants[0], tmp_path)
    assert installation.Installation.from_json(json.loads(json.dumps(handed.to_json()))) == handed
    assert installation.Installation.from_json({}) == installation.Installation()


@pytest.mark.usefixtures("behaviour")
def test_the_sidecar_says_what_it_was_built_with(tmp_path: Path) -> None:
    engine, _ = engine_of(models.mlp(), tmp_path, precision="fp16")
    facts, plan = read_verified(engine)
    assert plan == (engine / "engine.plan").read_bytes()
    assert facts["precision"] == "fp16"
    assert facts["gpu"]["driver"] == "590.44.01"
    assert facts["inputs"] == [["input", "float32", ["batch", 8]]]
