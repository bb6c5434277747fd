"""Will TensorRT take my model? A real CPU worker answers through the API, with the real parser of TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import helper

from anneal_client import Client
from tests.factories import onnx_models as models
from tests.factories.deployment import Deployment, deployment, submit_case
from tests.factories.pace import paced


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("examining") / "home") as found:
        found.start_hurried_worker()
        found.wait_ready()
        yield found


@pytest.fixture(scope="module")
def client(served: Deployment) -> Iterator[Client]:
    with served.client() as client:
        yield client


def test_every_backend_of_a_cpu_worker_answers(client: Client, tmp_path: Path) -> None:
    (worker,) = client.capabilities()["workers"]
    assert set(worker["examines"]) == {"onnxruntime", "openvino", "tensorrt-rtx"}
    assert "tensorrt-rtx" not in {b["name"] for b in worker["backends"]}, (
        "it tells, and offers nothing that it cannot run"
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="fine"),
        helper.make_node("Det", ["a"], ["d"], name="determinant"),
    ]
    model = models.make_model(nodes, [models.value("x", ["b", 4, 4])], [models.value("d", ["b"])])
    uploaded = client.upload_model(models.save(model, tmp_path / "net.onnx"))
    found = client.compatibility(uploaded["id"])
    assert found["status"] == "complete", found
    told = {b["name"]: b for b in found["backends"]}
    assert set(told) == set(worker["examines"])
    assert told["onnxruntime"]["accepted"]
    assert told["tensorrt-rtx"]["accepted"] is False
    assert [(r["node"], r["op"]) for r in told["tensorrt-rtx"]["refused"]] == [("determinant", "Det")]
    assert told["tensorrt-rtx"]["changes"]


def test_the_report_of_a_job_says_it_too(client: Client, tmp_path: Path) -> None:
    fields = {
        "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
        "precisions": ["fp32"],
        "budget_seconds": paced(40),
    }
    job = client.wait(submit_case(client, tmp_path, 1, **fields)["id"])
    report = client.report(job["id"])
    (told,) = report["compatibility"]
    assert (told["backend"], told["accepted"]) == ("tensorrt-rtx", True)
    assert "on no GPU" in told["how"]
    assert {p["name"] for p in told["precisions"] if p["admitted"]} >= {"fp16", "int8"}
