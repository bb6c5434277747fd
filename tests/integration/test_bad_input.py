"""What bad data sets and specs get, end to end: a typed error, and one worker that outlives them all."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.factories import onnx_models
from tests.factories.hostile import Besieged, Json, besieged, npz, zipped

pytestmark = pytest.mark.timeout(280)

FEATURES = 16
GOOD = onnx_models.mlp(features=FEATURES).SerializeToString()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    with besieged(tmp_path_factory.mktemp("bad_input") / "home", {}) as found:
        yield found


@pytest.fixture(scope="module")
def model_id(service: Besieged) -> str:
    return service.acme.stored(GOOD)


def rows(count: int, features: int = FEATURES, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(count).normal(size=(count, features)).astype(dtype)


def _on(dataset_id: str) -> Json:
    return {"dataset_id": dataset_id, "max_accuracy_loss_percent": 100}


def _npy(header: str, data: bytes = bytes(64)) -> bytes:
    """A .npy of format 1.0 with any header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def _strange(value: float) -> bytes:
    array = rows(60)
    array[7, 3] = value
    return npz(input=array)


# Data sets: refused at the upload


@pytest.mark.parametrize(
    ("data", "filename", "code", "word", "tensor"),
    [
        pytest.param(pickle.dumps([1.0]), "d.npz", "invalid_dataset", "unpickling runs code", None, id="pickle"),
        pytest.param(
            npz(input=np.array([{"a": 1}, None], dtype=object)),
            "d.npz",
            "invalid_dataset",
            "pickled",
            "input",
            id="objects",
        ),
        pytest.param(npz(input=np.array(["a", "b"])), "d.npz", "invalid_dataset", "text", "input", id="text"),
        pytest.param(npz(), "d.npz", "invalid_dataset", "no array", None, id="no array"),
        pytest.param(npz(input=rows(0)), "d.npz", "invalid_dataset", "no sample", None, id="no sample"),
        pytest.param(npz(input=np.float32(1)), "d.npz", "invalid_dataset", "single number", "input", id="scalar"),
        pytest.param(
            npz(input=rows(60), labels=np.zeros(59, np.int64)),
            "d.npz",
            "invalid_dataset",
            "59 samples",
            "labels",
            id="counts",
        ),
        pytest.param(npz(input=rows(60))[:-400], "d.npz", "invalid_dataset", "incomplete", None, id="truncated"),
        pytest.param(
            zipped([("input.npy", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9,)}"))]),
            "d.npz",
            "invalid_dataset",
            "header",
            "input",
            id="header with code",
        ),
        pytest.param(
            zipped([("input.npy", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 16)}"))]),
            "d.npz",
            "invalid_dataset",
            "truncated",
            "input",
            id="header that lies",
        ),
        pytest.param(
            zipped([("a.npz", npz(input=rows(9))), ("b.npz", npz(input=rows(9, dtype=np.float64)))]),
            "d.zip",
            "invalid_dataset",
            "b.npz",
            "input",
            id="shards that differ",
        ),
        pytest.param(
            zipped([("../a.npz", npz(input=rows(9)))]), "d.zip", "archive_unsafe_path", "member name", None, id="path"
        ),
        pytest.param(
            zipped([("a.npz", b"x"), ("b.npz", b"/etc/passwd")], link="b.npz"),
            "d.zip",
            "archive_link",
            "link",
            None,
            id="link",
        ),
        pytest.param(
            zipped([("input.npy", _npy("{}")), ("labels.npy", bytes(40 << 20))]),
            "d.npz",
            "archive_bomb",
            "200 times",
            None,
            id="bomb",
        ),
    ],
)
def test_data_refused_at_the_upload(
    service: Besieged, data: bytes, filename: str, code: str, word: str, tensor: str | None
) -> None:
    problem = service.assert_problem(service.acme.upload(data, filename, "datasets"), 422, code)
    assert word in problem["detail"]
    assert problem.get("tensor") == tensor


# Data sets: refused with the job, for they do not fit the model


@pytest.mark.parametrize("section", ["calibration", "validation"])
@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"wrong": rows(9)}, "'input' is missing"),
        ({"input": rows(9), "extra": rows(9)}, "'extra' is no input or output"),
        ({"input": rows(9, dtype=np.float64)}, "float64"),
        ({"input": rows(9, 15)}, "['samples', 15]"),
        ({"input": rows(9)[:, :, None]}, "['samples', 16, 1]"),
        ({"input": rows(9), "logits": rows(9, 9)}, "'logits' has shape ['samples', 9]"),
    ],
    ids=["missing", "extra", "dtype", "shape", "rank", "reference"],
)
def test_data_that_does_not_fit_the_model(
    service: Besieged, model_id: str, section: str, arrays: dict[str, Any], word: str
) -> None:
    data = service.acme.stored(npz(**arrays), "d.npz", "datasets")
    response = service.acme.submit(model_id, **{section: {"dataset_id": data}})
    problem = service.assert_problem(response, 422, "invalid_request")
    assert word in problem["detail"]
    assert problem["errors"][0]["pointer"] == f"/{section}/dataset_id"


@pytest.mark.parametrize(
    ("labels", "metric", "word"),
    [
        (np.zeros(60, np.float32), "auto", "no class numbers"),
        (np.zeros(60, np.float32), "top1", "no class numbers"),
        (np.zeros((60, 2), np.int64), "top1", "cannot compare"),
        (np.zeros(60, np.int64), "mean_iou", "needs label maps"),
        (np.zeros(60, np.float32), "rmse", "cannot compare"),
    ],
)
def test_labels_that_do_not_fit_the_metric(
    service: Besieged, model_id: str, labels: Any, metric: str, word: str
) -> None:
    data = service.acme.stored(npz(input=rows(60), labels=labels), "d.npz", "datasets")
    response = service.acme.submit(model_id, validation={"dataset_id": data, "metric": metric})
    problem = service.assert_problem(response, 422, "invalid_request")
    assert word in problem["detail"]
    assert problem["errors"][0]["pointer"] == "/validation/dataset_id"


@pytest.mark.parametrize(
    ("data", "code", "tensor"),
    [
        pytest.param(_strange(np.nan), "dataset_not_finite", "input", id="nan"),
        pytest.param(_strange(np.inf), "dataset_not_finite", "input", id="infinity"),
        pytest.param(
            npz(input=rows(60), labels=np.full(60, 99)), "labels_out_of_range", "labels", id="labels out of range"
        ),
    ],
)
def test_data_that_the_job_finds_bad(service: Besieged, model_id: str, data: bytes, code: str, tensor: str) -> None:
    dataset_id = service.acme.stored(data, "d.npz", "datasets")
    job = service.acme.ended(service.acme.submit(model_id, validation=_on(dataset_id)))
    # Whoever reads the data first: a timing its inputs, the original's outputs the references, the judge the labels.
    error = service.assert_failed(job, code, stage=job["error"]["stage"])
    assert error["stage"] in ("benchmark", "reference_outputs", "validate")
    assert error["tensor"] == tensor


def test_one_sample(service: Besieged, model_id: str) -> None:
    """Enough to validate with, and said to prove little; too little to be split."""
    data = service.acme.stored(npz(input=rows(1)), "d.npz", "datasets")
    job = service.acme.ended(service.acme.submit(model_id, validation=_on(data)))
    assert job["status"] == "succeeded", job["error"]
    spec = {"calibration": {"dataset_id": data}, "validation": _on(data)}
    job = service.acme.ended(service.acme.submit(model_id, **spec))
    assert job["status"] == "failed"
    error = service.assert_failed(job, "dataset_empty", stage=job["error"]["stage"])
    assert "part" in error["detail"]


# Specs


def _range(low: list[int], opt: list[int], high: list[int]) -> Json:
    return {"shapes": {"input": {"min": low, "opt": opt, "max": high}}}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        pytest.param(_range([4, 16], [2, 16], [8, 16]), "min ≤ opt ≤ max", id="min over opt"),
        pytest.param(_range([0, 16], [1, 16], [8, 16]), "greater than or equal to 1", id="zero"),
        pytest.param(_range([1], [1], [1]), "rank 1", id="rank"),
        pytest.param(_range([1, 8], [1, 8], [1, 8]), "fixed at 16", id="fixed axis"),
        pytest.param({"shapes": {"x": _range([1], [1], [1])["shapes"]["input"]}}, "no input 'x'", id="no such input"),
        pytest.param(_range([2, 16], [4, 16], [8, 16]), "batch size 1 is outside", id="batch size outside"),
        pytest.param({"constraints": {"p99_latency_ms": 0}}, "greater than 0", id="p99 of 0"),
        pytest.param({"constraints": {"max_size_mb": "NaN"}}, "finite", id="NaN"),
        pytest.param({"benchmark": {"batch_sizes": [1, 1]}}, "distinct", id="batch sizes twice"),
        pytest.param({"unknown": 1}, "/body/unknown", id="unknown field"),
        pytest.param({"webhook": {"url": "file:///etc/passwd"}}, "/body/webhook/url", id="webhook to a file"),
        pytest.param({"webhook": {"url": "http://a/\r\nX: y"}}, "/body/webhook/url", id="webhook with a header"),
    ],
)
def test_specs_that_contradict(service: Besieged, model_id: str, fields: Json, word: str) -> None:
    problem = service.assert_problem(service.acme.submit(model_id, **fields), 422, "invalid_request", remedy=False)
    assert word in problem["detail"]
    assert problem["errors"]


def test_samples_outside_of_the_shapes(service: Besieged) -> None:
    model = service.acme.stored(onnx_models.transformer_block())
    ids = np.ones((9, 12), np.int64)
    data = service.acme.stored(npz(input_ids=ids, attention_mask=ids), "d.npz", "datasets")
    shapes = {name: {"min": [1, 4], "opt": [1, 6], "max": [8, 8]} for name in ("input_ids", "attention_mask")}
    response = service.acme.submit(model, shapes=shapes, validation=_on(data))
    problem = service.assert_problem(response, 422, "invalid_request")
    assert "12 along axis 1" in problem["detail"]


def test_default_batch_sizes_follow_the_shapes(service: Besieged, model_id: str) -> None:
    spec = {**_range([2, 16], [4, 16], [6, 16]), "benchmark": {"min_seconds": 0.1}}
    job = service.acme.submit(model_id, **spec).json()
    assert job["spec"]["benchmark"]["batch_sizes"] == [4]
    assert service.acme.http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202


def test_nodes_to_keep_that_the_model_has_not(service: Besieged) -> None:
    model = service.acme.stored(onnx_models.transformer_block())
    ids = np.random.default_rng(0).integers(0, 10, (40, 6))
    data = service.acme.stored(npz(input_ids=ids, attention_mask=np.ones_like(ids)), "d.npz", "datasets")
    keep = {"keep_nodes": ["no_such_node"]}
    response = service.acme.submit(model, quantization=keep, calibration={"dataset_id": data}, precisions=["int8"])
    job = service.acme.ended(response)
    error = service.assert_failed(job, "unknown_node", stage=job["error"]["stage"])
    assert error["stage"].startswith("quantize")
    assert error["node"] == "no_such_node"


def test_what_nobody_offers(service: Besieged, model_id: str) -> None:
    for fields in ({"target": {"device": "cuda"}}, {"precisions": ["fp8"]}, {"target": {"backends": ["../x"]}}):
        problem = service.assert_problem(service.acme.submit(model_id, **fields), 422, "unavailable_target")
        assert {"onnxruntime", "openvino"} <= {*problem["offered"]["backends"]}


@pytest.mark.parametrize(
    ("constraints", "relax"),
    [
        ({"max_size_mb": 1e-6}, "constraints.max_size_mb"),
        ({"min_throughput_qps": 1e15}, "constraints.min_throughput"),
        ({"p99_latency_ms": 1e-6}, "constraints.p99_latency_ms to more than"),
    ],
)
def test_constraints_that_nothing_meets(service: Besieged, model_id: str, constraints: Json, relax: str) -> None:
    job = service.acme.ended(service.acme.submit(model_id, constraints=constraints))
    error = service.assert_failed(job, "no_feasible_candidate", stage="benchmark")
    assert "nearest is" in error["detail"]
    assert relax in error["remedy"]
    assert "to 0" not in error["remedy"].replace("to 0.", "")
    assert job["engine_ids"] == []
    report = service.acme.http.get(f"/v1/jobs/{job['id']}/report")
    assert report.status_code == 200
    assert report.json()["final_metrics"] is None
    assert any(not check["passed"] for check in report.json()["checks"])
    assert report.json()["baseline"]["batches"]
    assert not any(c["measured"] == "full" for c in report.json()["candidates"]), "it ended at once"


def test_after_all_that_the_same_worker_serves_and_nothing_is_left(service: Besieged) -> None:
    job = service.acme.run(onnx_models.conv_net())
    assert job["status"] == "succeeded", job["error"]
    assert service.worker.poll() is None
    service.assert_nothing_left()
    log = service.deployed.logs()
    assert "internal_error" not in log
    assert "Traceback" not in log
