"""TensorRT's parser and builder for real: TensorRT for RTX needs a GPU only to load and to run what it built."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper

from app.domain.failures import FailureKind, StageFailure
from tests.factories import cuda_standin
from tests.factories import onnx_models as models
from tests.factories.tensorrt_rtx import TARGET, Recorder, built, refused, signing
from tests.gpu.models import Case, make_case
from workers import installation
from workers.backends.tensorrt import TensorRtBackend, TensorRtRtxBackend
from workers.backends.tensorrt import build as building
from workers.backends.tensorrt import probe as trt_probe
from workers.backends.tensorrt import recipes as trt_recipes
from workers.backends.tensorrt.library import RTX
from workers.backends.tensorrt.probe import Gpu
from workers.backends.tensorrt.progress import Progress
from workers.backends.tensorrt.sidecar import check_compatible, read_verified
from workers.kernel import Reporter, backends

L4 = Gpu("NVIDIA L4", "8.9", 24 << 30, "13.1", "590.44.01")
PRECISIONS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("fp16", {}, ("fp16",)),
    ("bf16", {}, ("bf16",)),
    ("int8", {}, ("int8",)),
    ("int8", {"high_precision": "fp16"}, ("fp16", "int8")),
    ("fp8", {"high_precision": "fp16"}, ("fp16", "fp8")),
    ("int4", {"block_size": 32}, ("int4",)),
    ("int4", {"block_size": 32, "high_precision": "fp16"}, ("fp16", "int4")),
]


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=f"{op.lower()}_{outputs[0]}", **attributes)


@pytest.mark.parametrize("name", ["residual_cnn", "bert", "vit", "gpt2"])
def test_every_explicit_precision_parses_and_builds(name: str, tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    case: Case = make_case(name, tmp_path / "case")
    graphs = [("fp32", case.simplified, ())]
    for recipe, options, holds in PRECISIONS:
        graphs.append((recipe, case.converted(recipe, {}, **options)[0], holds))
    plans = set()
    for i, (recipe, folder, holds) in enumerate(graphs):
        told, engine = built(folder, tmp_path / str(i), precision=recipe, batch_sizes=[4])
        assert told["precisions_in_graph"] == list(holds), recipe
        assert (engine / "engine.plan").stat().st_size > 100_000, recipe
        plans.add((engine / "engine.plan").read_bytes())
    assert len(plans) == len(graphs), "each is a plan of its own"


def test_a_plan_is_signed_and_its_sidecar_says_what_it_is_for(tmp_path: Path) -> None:
    reporter = Recorder()
    told, engine = built(models.conv_net(), tmp_path, reporter, batch_sizes=[1, 8])
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert sorted(p.name for p in engine.iterdir()) == ["engine.json", "engine.plan"]
    assert told["layers"] == []
    assert "built without its GPU" in told["reason"], "what only a GPU tells is not made up"
    assert told["timing_cache"] == {"used": False, "stored": False}
    with signing():
        sidecar, plan = read_verified(engine)
    assert sidecar["library"] == "tensorrt-rtx"
    assert sidecar["tensorrt"] == trt.__version__
    assert sidecar["gpu"]["compute_capability"] == TARGET
    assert [p["input"]["opt"][0] for p in sidecar["profiles"]] == [1, 8]
    assert plan.count(b"sm_89") or len(plan) > 100_000
    fractions = [f for f, _ in reporter.told]
    assert fractions == sorted(fractions)
    assert 0.9 < max(fractions) <= 0.95
    assert len({message for _, message in reporter.told}) > 3, "phases by name, as the builder tells them"
    altered = bytearray(plan)
    altered[len(plan) // 2] ^= 1
    (engine / "engine.plan").write_bytes(bytes(altered))
    with signing(), pytest.raises(StageFailure) as caught:
        read_verified(engine)
    assert caught.value.code == "engine_untrusted"


def test_a_plan_is_for_its_library_version_and_compute_capability(tmp_path: Path) -> None:
    _, engine = built(models.mlp(), tmp_path)
    with signing():
        sidecar, _ = read_verified(engine)
    check_compatible(sidecar, trt.__version__, L4, RTX)  # another driver or model of the same capability compiles it
    for version, gpu, words in (
        ("1.6.0", L4, "built with TensorRT"),
        (trt.__version__, Gpu("NVIDIA A10", "8.6", 24 << 30, "13.1", "590"), "8.6"),
    ):
        with pytest.raises(StageFailure, match=words) as caught:
            check_compatible(sidecar, version, gpu, RTX)
        assert caught.value.code == "engine_incompatible"
    with pytest.raises(StageFailure, match="another library"):
        check_compatible(sidecar, trt.__version__, L4)


def test_without_a_gpu_it_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_probe, "ask_driver", lambda: {"error": "no NVIDIA driver: libcuda.so.1"})
    trt_probe.probe_gpu.cache_clear()
    told, engine = built(models.mlp(), tmp_path)
    with signing(), pytest.raises(StageFailure) as caught:
        TensorRtRtxBackend().load(engine, told["runtime"])
    assert caught.value.code == "gpu_unavailable"
    assert TensorRtRtxBackend().probe({}) is None, "what cannot run here is not offered"
    with pytest.raises(StageFailure) as caught:
        built(models.mlp(), tmp_path / "untargeted", target=None)
    assert caught.value.code == "gpu_unavailable"
    trt_probe.probe_gpu.cache_clear()


def test_operators_that_the_parser_does_not_know_are_named(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Det", ["a"], ["b"]), node("Unique", ["a"], ["c"])]
    model = models.make_model(
        nodes, [models.value("x", ["n", 4, 4])], [models.value("b", None), models.value("c", None)]
    )
    failure = refused(model, tmp_path)
    assert (failure.code, failure.kind, failure.node) == ("unsupported_op", FailureKind.MODEL, "det_b")
    for words in ("Det, Unique", "det_b (Det): ", "unique_c (Unique): ", "does not support this operator"):
        assert words in failure.detail
    assert "false" not in failure.detail, "the parser's own reason is a C++ condition"
    assert "onnxruntime-cuda" in (failure.remedy or "")


def _of_a_domain() -> onnx.ModelProto:
    return models.unknown_op()


def _shapes_that_differ() -> onnx.ModelProto:
    weights = [models.tensor("w", np.zeros((5, 3)))]
    return models.make_model(
        [node("MatMul", ["x", "w"], ["y"])], [models.value("x", ["b", 4])], [models.value("y", ["b", 3])], weights
    )


def _types_that_are_none() -> onnx.ModelProto:
    cast = [node("Cast", ["x"], ["c"], to=TensorProto.UINT16), node("Cast", ["c"], ["y"], to=TensorProto.FLOAT)]
    return models.make_model(cast, [models.value("x", ["b", 4])], [models.value("y", ["b", 4])])


@pytest.mark.parametrize(
    ("make", "code", "at", "words"),
    [
        (_of_a_domain, "unsupported_op", "frob", "knows no such operator"),
        (_shapes_that_differ, "parse_failed", "matmul_y", "must match"),
        (_types_that_are_none, "unsupported_op", "cast_c", "Unsupported data type for the Cast operator"),
    ],
)
def test_errors_of_the_parser(
    make: Callable[[], onnx.ModelProto], code: str, at: str, words: str, tmp_path: Path
) -> None:
    failure = refused(make(), tmp_path)
    assert (failure.code, failure.node) == (code, at)
    assert words in failure.detail
    assert ".cpp" not in failure.detail


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    model = models.mlp()
    model.graph.node[0].input[0] = "nowhere"
    failure = refused(model, tmp_path)
    assert failure.code == "parse_failed"
    assert "not registered" in failure.detail


def test_profiles_that_contradict_the_graph(tmp_path: Path) -> None:
    """Two inputs that are added, whose sizes have other names: only the builder sees that they must be one."""
    ends = [models.value("x", ["b", 4]), models.value("z", ["c", 4])], [models.value("y", ["b", 4])]
    model = models.make_model([node("Add", ["x", "z"], ["y"])], *ends)
    shapes = {"x": {"min": [2, 4], "opt": [2, 4], "max": [3, 4]}, "z": {"min": [5, 4], "opt": [5, 4], "max": [8, 4]}}
    failure = refused(model, tmp_path, shapes=shapes)
    assert failure.code in ("invalid_profile", "engine_build_failed")
    assert failure.kind is FailureKind.MODEL


def test_inputs_that_set_shapes_need_a_range(tmp_path: Path) -> None:
    inputs = [models.value("x", ["b", 4]), models.value("shape", [2], TensorProto.INT64)]
    model = models.make_model([node("Reshape", ["x", "shape"], ["y"])], inputs, [models.value("y", ["m", "n"])])
    failure = refused(model, tmp_path)
    assert (failure.code, failure.tensor) == ("invalid_profile", "shape")
    values = {"shape": {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}}
    shapes = {"x": {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}}
    built(model, tmp_path / "given", shape_values=values, shapes=shapes)
    values["shape"]["opt"] = [3, 4]
    assert refused(model, tmp_path / "contrary", shape_values=values, shapes=shapes).code == "invalid_profile"


def test_profiles_that_were_derived_fit_the_graph(tmp_path: Path) -> None:
    """A table of 24 positions takes no sequence of 128, which nothing but the builder's refusal tells."""
    nodes = [
        node("Shape", ["x"], ["n"], start=1, end=2),
        node("Slice", ["table", "zero", "n", "zero"], ["rows"]),
        node("Add", ["x", "rows"], ["y"]),
    ]
    stored = [models.tensor("table", np.ones((24, 4))), models.tensor("zero", [0], np.int64)]
    ends = [models.value("x", ["b", "time", 4])], [models.value("y", ["b", "time", 4])]
    told, _ = built(models.make_model(nodes, *ends, stored), tmp_path)
    assert told["profiles_derived"]
    assert {tuple(p["x"]["max"])[1] for p in told["profiles"]} == {24}
    long = {"x": {"min": [1, 1, 4], "opt": [1, 30, 4], "max": [1, 30, 4]}}
    assert refused(models.make_model(nodes, *ends, stored), tmp_path / "given", shapes=long).code == "invalid_profile"


def test_several_profiles(tmp_path: Path) -> None:
    profiles = [{"input": {"min": [1, 8], "opt": [b, 8], "max": [b, 8]}} for b in (1, 4, 16)]
    told, _ = built(models.mlp(), tmp_path, profiles=profiles)
    assert told["profiles"] == profiles


def test_the_jobs_shapes_become_the_profile(tmp_path: Path) -> None:
    shapes = {"input": {"min": [1, 8], "opt": [4, 8], "max": [9, 8]}}
    told, _ = built(models.mlp(), tmp_path, shapes=shapes)
    assert told["profiles"] == [shapes]
    assert not told["profiles_derived"]
    wrong = {"input": {"min": [1, 7], "opt": [4, 7], "max": [9, 7]}}
    assert refused(models.mlp(), tmp_path / "wrong", shapes=wrong).code == "invalid_profile"


def test_double_tensors_are_computed_in_float32_and_said(tmp_path: Path) -> None:
    ends = [models.value(n, ["b", 4], TensorProto.DOUBLE) for n in "xy"]
    reporter = Recorder()
    told, _ = built(models.make_model([node("Abs", ["x"], ["y"])], ends[:1], ends[1:]), tmp_path, reporter)
    assert told["runtime"] == {"declared": {"x": "float64", "y": "float64"}}
    assert any("float64" in message for message in reporter.notes)


def test_no_key_no_build(tmp_path: Path) -> None:
    source = models.folder(models.mlp(), tmp_path / "model")
    with installation.using(installation.Installation()), pytest.raises(StageFailure) as caught:
        TensorRtRtxBackend().build(source, tmp_path, {"target": TARGET}, Recorder())
    assert (caught.value.code, caught.value.kind) == ("engine_key_missing", FailureKind.INFRASTRUCTURE)


def test_external_weights(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    models.save_external(models.mlp(), source / "model.onnx")
    _, beside = built(source, tmp_path / "beside")
    (source / "weights.bin").unlink()
    failure = refused(source, tmp_path / "lost")
    assert (failure.code, failure.kind) == ("parse_failed", FailureKind.MODEL)
    assert (beside / "engine.plan").stat().st_size > 0


class Watched(Progress):
    """Keeps what the real builder tells through its `IProgressMonitor`, and cancels at the step `at`, where given."""

    def __init__(self, reporter: Reporter, at: int | None) -> None:
        super().__init__(reporter)
        self.at = at
        self.phases: dict[str, int] = {}  # that were begun → their steps
        self.steps: list[tuple[str, int]] = []
        self.finished: list[str] = []
        self.began = self.ended = time.monotonic()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self.phases[phase] = steps
        super().start(phase, parent, steps)

    def step(self, phase: str, step: int) -> bool:
        self.steps.append((phase, step))
        if self.at is not None and len(self.steps) >= self.at:
            self.cancel()
        return super().step(phase, step)

    def finish(self, phase: str) -> None:
        self.finished.append(phase)
        super().finish(phase)


def watched(monkeypatch: pytest.MonkeyPatch, model: Path, root: Path, at: int | None = None) -> tuple[Watched, float]:
    """What a build tells, and the seconds that the builder took until it was through, or was cancelled."""
    made: list[Watched] = []

    def progress(reporter: Reporter, _: float | None) -> Watched:
        made.append(Watched(reporter, at))
        return made[0]

    with monkeypatch.context() as patched:
        patched.setattr(building, "Progress", progress)
        if at is None:
            built(model, root)
        else:
            failure = refused(model, root)
            assert (failure.code, failure.kind, failure.cacheable) == ("build_cancelled", FailureKind.MODEL, False)
    return made[0], time.monotonic() - made[0].began


def test_a_build_is_cancelled_in_its_middle_by_the_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "case").mkdir()
    case = make_case("bert", tmp_path / "case")
    watched(monkeypatch, case.simplified, tmp_path / "first")  # what is loaded once counts for neither
    whole, seconds = watched(monkeypatch, case.simplified, tmp_path / "whole")
    assert len(whole.steps) > 8
    cut, took = watched(monkeypatch, case.simplified, tmp_path / "cut", len(whole.steps) // 2)
    assert cut.phases, "it had begun"
    assert max(step for _, step in cut.steps) > 0, "and had done steps of a phase"
    assert len(whole.steps) // 2 <= len(cut.steps) < len(whole.steps), "but not all"
    left = [
        phase
        for phase, steps in cut.phases.items()
        if 0 < 1 + max((s for p, s in cut.steps if p == phase), default=-1) < steps
    ]
    assert left, "a phase was cut in its middle"
    assert took < seconds
    assert not list((tmp_path / "cut" / "engine").iterdir()), "no plan is left"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"target": "9.0"}, "gpu_unsupported"),
        ({"target": "8.0", "precision": "fp8"}, "precision_unsupported"),
        ({"target": "nonsense"}, "gpu_unsupported"),
    ],
)
def test_what_cannot_be_built_for(options: dict[str, Any], code: str, tmp_path: Path) -> None:
    assert refused(models.mlp(), tmp_path, **options).code == code


def test_tensorrt_builds_for_no_other_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.folder(models.mlp(), tmp_path / "model")
    (tmp_path / "out").mkdir()
    with cuda_standin.installed(monkeypatch, tmp_path / "cache"), pytest.raises(StageFailure) as caught:
        TensorRtBackend().build(source, tmp_path / "out", {"target": "8.9"}, Recorder())
    assert caught.value.code == "gpu_unsupported"


def test_its_candidates_are_those_of_tensorrt_where_it_runs() -> None:
    from tests.unit.test_trt_graph import case

    found = trt_recipes.propose(case(cc="8.9"), RTX)
    assert {c.backend for c in found.candidates} == {"tensorrt-rtx"}
    assert {c.id.removeprefix("rtx-") for c in found.candidates} == {
        c.id.removeprefix("trt-") for c in trt_recipes.propose(case(cc="8.9")).candidates
    }
    hopper = trt_recipes.propose(case(cc="9.0"), RTX)
    assert not hopper.candidates
    assert "8.9" in hopper.skipped[0].reason
    assert {"tensorrt", "tensorrt-rtx"} <= set(backends())
