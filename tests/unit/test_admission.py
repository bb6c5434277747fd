"""What cannot be served is refused at submission, with what is on offer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from app.db.orm import Worker
from app.domain.spec import OptimizationSpec
from app.errors import AppError
from app.jobs.admission import check_shapes, choose_queue, find_queue
from app.jobs.data_admission import check_dataset
from app.jobs.metric_admission import check_metric
from workers.kernel import BackendInfo
from workers.pipeline.optimize import device_of

INPUTS = [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 8]}]
OUTPUTS = [{"name": "y", "dtype": "float32", "shape": ["batch", 10]}]


def _spec(**changes: Any) -> OptimizationSpec:
    return OptimizationSpec.model_validate({"model_id": "mdl_x", **changes})


def _worker() -> Worker:
    backend = {"name": "onnxruntime", "versions": {}, "devices": ["cpu"], "precisions": ["fp32", "int8"]}
    return Worker(id="w", hardware={"id": "cpu-x"}, backends=[backend], formats=["onnx", "archive"], queues=[])


@pytest.mark.parametrize(
    "wanted",
    [
        {"target": {"device": "cuda"}},
        {"precisions": ["fp8"]},
        {"target": {"backends": ["tensorrt"]}},
        {"target": {"hardware": "gpu-z"}},
    ],
)
def test_what_no_worker_has_is_refused_with_the_offer(wanted: dict[str, Any]) -> None:
    with pytest.raises(AppError) as caught:
        choose_queue(_spec(**wanted), "onnx", [_worker()])
    assert caught.value.code == "unavailable_target"
    assert caught.value.extra["offered"]["backends"] == ["onnxruntime"]


def test_a_format_that_no_worker_reads_is_refused() -> None:
    with pytest.raises(AppError, match="pt2") as caught:
        choose_queue(_spec(), "pt2", [_worker()])
    assert "anneal serve --with torch" in str(caught.value.remedy), "the one command that adds what is missing"


def test_jobs_go_to_the_queue_of_their_hardware() -> None:
    assert choose_queue(_spec(), "onnx", [_worker()]) == "anneal.cpu"
    assert choose_queue(_spec(target={"hardware": "cpu-x"}), "onnx", [_worker()]) == "anneal.hw.cpu-x"


def test_a_job_that_may_use_cpu_backends_only_does_not_wait_for_a_gpu() -> None:
    cpu = _worker()
    card = {"name": "onnxruntime-cuda", "versions": {}, "devices": ["cuda"], "precisions": ["fp32"]}
    both = Worker(id="b", hardware={"id": "x"}, backends=[*cpu.backends, card], formats=["onnx"], queues=[])
    assert choose_queue(_spec(), "onnx", [both]) == "anneal.cuda"
    assert choose_queue(_spec(target={"backends": ["onnxruntime"]}), "onnx", [both]) == "anneal.cpu"


def test_a_worker_runs_a_job_where_the_backends_that_it_may_use_run() -> None:
    offered = [BackendInfo("onnxruntime", {}, ("cpu",), ("fp32",)), BackendInfo("tensorrt", {}, ("cuda",), ("fp32",))]
    assert device_of(_spec(), offered) == "cuda"
    assert device_of(_spec(target={"backends": ["onnxruntime"]}), offered) == "cpu"
    assert device_of(_spec(target={"device": "cpu"}), offered) == "cpu"


def _gpu_worker() -> Worker:
    backend = {"name": "onnxruntime-cuda", "versions": {}, "devices": ["cuda"], "precisions": ["fp32", "fp16"]}
    hardware = {"id": "gpu-nvidia-h100"}
    seen = datetime(2026, 11, 24, tzinfo=UTC)
    return Worker(id="g", hardware=hardware, backends=[backend], formats=["onnx"], queues=[], last_seen_at=seen)


@pytest.mark.parametrize(
    ("target", "queue"),
    [({"device": "cuda"}, "anneal.cuda"), ({"hardware": "gpu-nvidia-h100"}, "anneal.hw.gpu-nvidia-h100")],
)
def test_a_job_waits_for_hardware_that_is_known_but_not_live(target: dict[str, Any], queue: str) -> None:
    found = find_queue(_spec(target=target), "onnx", [_worker()], [_worker(), _gpu_worker()])
    assert found.name == queue
    (stage,) = found.stages
    assert stage["status"] == "waiting"
    assert next(iter(target.values())) in stage["detail"]
    assert "2026-11-24T00:00:00Z" in stage["detail"]


def test_a_job_with_a_live_worker_waits_for_nothing() -> None:
    found = find_queue(_spec(target={"device": "cuda"}), "onnx", [_worker(), _gpu_worker()], [])
    assert (found.name, found.stages) == ("anneal.cuda", [])


def test_hardware_that_nobody_knows_is_refused_also_where_others_live() -> None:
    with pytest.raises(AppError, match="gpu-z") as caught:
        find_queue(_spec(target={"hardware": "gpu-z"}), "onnx", [_worker()], [_worker(), _gpu_worker()])
    assert caught.value.code == "unavailable_target"


def test_before_any_worker_was_seen_plain_jobs_wait_and_special_ones_are_refused() -> None:
    assert choose_queue(_spec(), "onnx", []) == "anneal.cpu"
    with pytest.raises(AppError, match="no worker"):
        choose_queue(_spec(target={"device": "cuda"}), "onnx", [])


def _l4(**changes: Any) -> Worker:
    rtx = {"name": "tensorrt-rtx", "versions": {}, "devices": ["cuda"], "precisions": ["fp32", "fp16", "fp8"]}
    hardware = {"id": "gpu-nvidia-l4", "gpu": {"compute_capability": "8.9"}}
    queues = ["anneal.cuda", "anneal.cuda-8.9", "anneal.hw.gpu-nvidia-l4"]
    seen = datetime(2026, 11, 24, tzinfo=UTC)
    fields = {"id": "l4", "hardware": hardware, "backends": [rtx], "formats": ["onnx"], "queues": queues}
    return Worker(**{**fields, "last_seen_at": seen, **changes})


def _builder() -> Worker:
    found = _worker()
    found.hardware = {"id": "cpu-x", "builds": {"tensorrt-rtx": {"8.6": ["fp32", "fp16"], "8.9": ["fp32", "fp8"]}}}
    return found


RTX = {"tensorrt-rtx": "8.9"}


def test_a_job_for_a_kind_of_gpu_goes_to_whoever_has_one() -> None:
    spec = _spec(target={"compute_capability": "8.9"})
    assert spec.target.device == "cuda"
    assert find_queue(spec, "onnx", [_worker(), _l4()], []).name == "anneal.cuda-8.9"
    with pytest.raises(AppError, match=r"a GPU of compute capability 8\.6"):
        find_queue(_spec(target={"compute_capability": "8.6"}), "onnx", [_worker(), _l4()], [])
    with pytest.raises(ValueError, match="cpu"):
        _spec(target={"device": "cpu", "compute_capability": "8.9"})
    for text in ("8", "8.x", "80.99", "8.9; drop"):
        with pytest.raises(ValueError):
            _spec(target={"compute_capability": text})


@pytest.mark.parametrize(
    ("target", "queue"),
    [
        ({"compute_capability": "8.9"}, "anneal.cuda-8.9"),
        ({"hardware": "gpu-nvidia-l4"}, "anneal.hw.gpu-nvidia-l4"),
        ({"device": "cuda"}, "anneal.cuda"),
    ],
)
def test_a_live_builder_builds_for_a_worker_that_is_known(target: dict[str, Any], queue: str) -> None:
    found = find_queue(_spec(target=target), "onnx", [_builder()], [_builder(), _l4()])
    assert (found.name, found.builds) == (queue, RTX)
    assert "Engines are built meanwhile (tensorrt-rtx for 8.9)" in found.stages[0]["detail"]
    assert "2026-11-24T00:00:00Z" in found.stages[0]["detail"]
    busy = find_queue(_spec(target=target), "onnx", [_builder(), _l4()], [])
    assert (busy.name, busy.builds, busy.stages) == (queue, RTX, []), "it may have to wait for its turn"


def test_a_job_waits_for_a_gpu_that_nobody_has_seen_where_it_can_be_built_for() -> None:
    spec = _spec(target={"compute_capability": "8.9"}, precisions=["fp32", "fp8"])
    found = find_queue(spec, "onnx", [_builder()], [_builder()])
    assert (found.name, found.builds) == ("anneal.cuda-8.9", RTX)
    assert "nor was one seen lately" in found.stages[0]["detail"]
    with pytest.raises(AppError) as caught:
        find_queue(spec, "onnx", [_worker()], [_builder()])
    assert caught.value.code == "unavailable_target", "nobody builds for it now"


@pytest.mark.parametrize(
    ("wanted", "lacks"),
    [
        ({"target": {"compute_capability": "8.6"}, "precisions": ["fp16", "fp8"]}, "'fp8' on compute capability 8.6"),
        ({"target": {"compute_capability": "9.0"}}, "a GPU of compute capability 9.0"),
        ({"target": {"compute_capability": "8.9", "backends": ["tensorrt"]}}, "backend 'tensorrt'"),
        ({"target": {"compute_capability": "8.9", "hardware": "gpu-nvidia-l40"}}, "gpu-nvidia-l40"),
    ],
)
def test_what_the_target_lacks_is_refused(wanted: dict[str, Any], lacks: str) -> None:
    with pytest.raises(AppError, match=lacks) as caught:
        find_queue(_spec(**wanted), "onnx", [_builder()], [_builder()])
    assert caught.value.code == "unavailable_target"
    assert caught.value.status == 422


def test_nobody_builds_for_several_kinds_nor_for_what_is_not_run_there() -> None:
    spec, live = _spec(target={"device": "cuda"}), [_builder(), _l4()]
    other = _l4(id="a10", hardware={"id": "gpu-a10", "gpu": {"compute_capability": "8.6"}})
    assert find_queue(spec, "onnx", [*live, other], []).builds == {}, "who knows which of them takes it"
    without = [{"name": "onnxruntime-cuda", "versions": {}, "devices": ["cuda"], "precisions": ["fp32"]}]
    assert find_queue(spec, "onnx", [_builder(), _l4(backends=without)], []).builds == {}
    assert find_queue(_spec(target={"device": "cpu"}), "onnx", live, []).builds == {}
    assert find_queue(_spec(target={"backends": ["onnxruntime"]}), "onnx", live, []).builds == {}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], "is missing"),
        ([{"name": "x", "dtype": "float64", "shape": [3, 8]}], "is float64"),
        ([{"name": "x", "dtype": "float32", "shape": [3, 9]}], "has shape"),
        ([{"name": "x", "dtype": "float32", "shape": [3]}], "has shape"),
        (
            [{"name": "x", "dtype": "float32", "shape": [3, 8]}, {"name": "z", "dtype": "float32", "shape": [1]}],
            "no input or output",
        ),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(arrays: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(AppError, match=message) as caught:
        check_dataset("/calibration/dataset_id", arrays, INPUTS, OUTPUTS)
    assert caught.value.errors


def test_a_data_set_with_labels_fits() -> None:
    arrays = [{"name": "x", "dtype": "float32", "shape": [3, 8]}, {"name": "labels", "dtype": "int64", "shape": []}]
    check_dataset("/validation/dataset_id", arrays, INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("nope", [1, 3, 8], "no input"), ("x", [1, 3], "rank"), ("x", [1, 3, 9], "fixed at 8")],
)
def test_shapes_that_contradict_the_model_are_refused(name: str, shape: list[int], message: str) -> None:
    spec = _spec(shapes={name: {"min": shape, "opt": shape, "max": shape}})
    assert spec.shapes is not None
    with pytest.raises(AppError, match=message):
        check_shapes(spec.shapes, INPUTS)


def _tensor(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


CLASSES = [_tensor("logits", "float32", "batch", 10)]
FEW = [_tensor("y", "float32", "batch", 4)]
MAPS = [_tensor("y", "float32", "batch", 5, "h", "w"), _tensor("y2", "float32", "batch", 5, 8, 8)]
NUMBER = [_tensor("y", "float32", "batch", 1)]
NAMED = [_tensor("label", "int64", "batch")]
FREE = [_tensor("y", "float32", "batch", "n")]
UNKNOWN = [{"name": "y", "dtype": "float32", "shape": None}]
X = _tensor("x", "float32", 3, 8)


@pytest.mark.parametrize(
    ("metric", "arrays", "outputs"),
    [
        ("auto", None, CLASSES),
        ("auto", [X], CLASSES),
        ("auto", [X, _tensor("labels", "int64")], CLASSES),
        ("auto", [X, _tensor("labels", "int64", 3)], CLASSES),  # the job sees whether they fit
        ("auto", [X, _tensor("labels", "float32", 1)], NUMBER),
        ("auto", [X, _tensor("labels", "float32", 4)], FEW),
        ("top1", [X, _tensor("labels", "int64")], CLASSES),
        ("top1", [X, _tensor("labels", "uint8", 1)], FREE),
        ("top1", [X, _tensor("logits", "float32", 10)], CLASSES),
        ("top1", [X, _tensor("labels", "int64")], NAMED),
        ("top1", [X, _tensor("labels", "int64", 8, 8)], MAPS),
        ("top5", [X, _tensor("labels", "int64")], FREE),
        ("macro_f1", [X, _tensor("labels", "bool", 10)], CLASSES),
        ("macro_f1", [X, _tensor("labels", "int64")], NUMBER),
        ("mean_iou", [X, _tensor("labels", "uint8", 8, 8)], MAPS),
        ("mean_iou", [X, _tensor("labels", "uint8", 1, 8, 8)], MAPS),
        ("mean_iou", [X, _tensor("labels", "uint8", 8, 6)], [_tensor("y", "float32", "batch", 8, 6, 3)]),
        ("mae", [X, _tensor("labels", "float64")], NUMBER),
        ("rmse", [X, _tensor("y", "float32", 1)], NUMBER),
        ("r2", [X, _tensor("labels", "float64", 7)], UNKNOWN),
        ("cosine", None, CLASSES),
        ("spearman", None, FREE),
        ("psnr", [X], MAPS),
        ("top1", [X, _tensor("labels", "float32")], []),
    ],
)
def test_a_metric_that_may_fit_is_let_in(metric: Any, arrays: Any, outputs: list[dict[str, Any]]) -> None:
    check_metric(metric, "/validation/dataset_id", arrays, outputs)


@pytest.mark.parametrize(
    ("metric", "arrays", "outputs", "message", "pointer"),
    [
        ("top1", None, CLASSES, "needs validation data", "metric"),
        ("top1", None, [], "needs validation data", "metric"),
        ("macro_f1", [X], CLASSES, "needs validation data with `labels`", "metric"),
        ("top5", [X, _tensor("logits", "float32", 10)], CLASSES, "with `labels`", "metric"),
        ("r2", [X], NUMBER, "needs validation data with targets", "metric"),
        ("top1", [X, _tensor("labels", "float32")], CLASSES, "no class numbers", "dataset_id"),
        ("auto", [X, _tensor("labels", "float32")], CLASSES, "no class numbers", "dataset_id"),
        ("mean_iou", [X, _tensor("labels", "float32", 8, 8)], MAPS, "no class numbers", "dataset_id"),
        ("top1", [X, _tensor("labels", "int64", 3)], CLASSES, "cannot compare", "dataset_id"),
        ("top1", [X, _tensor("labels", "int64")], NUMBER, "cannot compare", "dataset_id"),
        ("top5", [X, _tensor("labels", "int64")], FEW, "more than 5 classes", "metric"),
        ("mean_iou", [X, _tensor("labels", "int64")], CLASSES, "needs label maps", "dataset_id"),
        ("mean_iou", [X, _tensor("labels", "int64", 16, 16)], MAPS[1:], "cannot compare", "dataset_id"),
        ("auto", [X, _tensor("labels", "int64", 16, 16)], MAPS[1:], "label maps", "dataset_id"),
        ("rmse", [X, _tensor("labels", "float32")], CLASSES, "cannot compare", "dataset_id"),
        ("macro_f1", [X, _tensor("labels", "int64", 9)], CLASSES, "cannot compare", "dataset_id"),
        ("spearman", [X], [_tensor("y", "float32", "batch")], "axis behind the samples", "metric"),
        ("kl", [X], NAMED, "axis behind the samples", "metric"),
        ("psnr", [X], NAMED, "needs an output of floats", "metric"),
    ],
)
def test_a_metric_that_cannot_fit_is_refused(
    metric: Any, arrays: Any, outputs: list[dict[str, Any]], message: str, pointer: str
) -> None:
    with pytest.raises(AppError, match=message) as caught:
        check_metric(metric, "/validation/dataset_id", arrays, outputs)
    assert (caught.value.code, caught.value.status) == ("invalid_request", 422)
    assert [e.pointer for e in caught.value.errors] == [f"/validation/{pointer}"]
    assert caught.value.remedy
