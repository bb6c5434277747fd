"""Whole jobs whose traffic cannot be served as it would be by most engines: what ships, and what is said of it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper

from anneal_client import InvalidRequest
from tests.factories import onnx_models as models
from tests.factories.deployment import Deployment, deployment
from workers.serving.serving_settings import Settings

pytestmark = pytest.mark.timeout(300)

BUDGET_S = 60  # of which ten are kept for the traffic
UNSERVED = 500_000.0  # requests per second


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("traffic") / "home") as found:
        found.start_worker()
        found.wait_ready()
        yield found


def with_state() -> ModelProto:
    """One step of a recurrent net: `x` [batch, 8] and `state` [layers, batch, 16] to `y` [batch, 4] and `next`."""
    rng = np.random.default_rng(3)
    weights = {"w": (8, 16), "u": (16, 16), "v": (16, 4)}
    constants = [models.tensor(name, rng.normal(0, 0.3, shape)) for name, shape in weights.items()]
    constants.append(models.tensor("first", [0], np.int64))
    nodes = [
        helper.make_node("Squeeze", ["state", "first"], ["before"]),
        helper.make_node("MatMul", ["x", "w"], ["seen"]),
        helper.make_node("MatMul", ["before", "u"], ["kept"]),
        helper.make_node("Add", ["seen", "kept"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["after"]),
        helper.make_node("Unsqueeze", ["after", "first"], ["next"]),
        helper.make_node("MatMul", ["after", "v"], ["y"]),
    ]
    inputs = [models.value("x", ["batch", 8]), models.value("state", [1, "batch", 16])]
    outputs = [models.value("y", ["batch", 4]), models.value("next", [1, "batch", 16])]
    return models.make_model(nodes, inputs, outputs, constants)


def among_others() -> ModelProto:
    """`x` [batch, 8] to `y` [batch, 8], whose shares sum to one over the batch."""
    weights = [models.tensor("w", np.random.default_rng(4).normal(0, 1.0, (8, 8)))]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["y"], axis=0),
    ]
    return models.make_model(nodes, [models.value("x", ["batch", 8])], [models.value("y", ["batch", 8])], weights)


def job(served: Deployment, model: ModelProto, folder: Path, **traffic: Any) -> tuple[dict[str, Any], Path]:
    """The report, and the bundle, unpacked."""
    spec = {
        "target": {"backends": ["onnxruntime"]},
        "precisions": ["fp32"],
        "benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
        "budget_seconds": BUDGET_S,
        "traffic": {"slo": {"p99_latency_ms": 200}, **traffic},
    }
    with served.client() as client:
        told = client.upload_model(models.save(model, folder / "model.onnx"), "traffic")
        found = client.wait(client.submit({"model_id": told["id"], **spec})["id"], check=False)
        assert found["status"] == "succeeded", (found["error"], served.worker_log()[-4000:])
        report = client.report(found["id"])
        archive = client.download_bundle(found["engine_ids"][0], folder / "bundle.zip")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder / "bundle")
    return report, folder / "bundle"


def check_one_by_one(report: dict[str, Any], bundle: Path, why: str) -> None:
    """Nobody's request was in another's batch, and whoever asks is told why."""
    told = Settings.of_folder(bundle)
    assert (told.max_batch, told.preferred_batches, told.pad) == (1, (), {})
    assert why in (told.reason or "")
    assert why in (bundle / "README.md").read_text()
    assert report["deployment_config"]["serving"]["settings"]["max_batch"] == 1
    assert {t["max_batch"] for t in report["traffic"]["tried"]} <= {1}
    seen = [p for p in report["traffic"]["engine"]["curve"] if p["batches"]]
    assert all(set(p["batches"]) == {"1"} for p in seen)
    assert report["bundles"]["triton"]["notes"], "max_batch_size 0, with the reason"


def test_a_model_with_state_is_served_one_by_one_and_a_rate_that_nobody_serves_has_its_nearest(
    served: Deployment, tmp_path: Path
) -> None:
    report, bundle = job(served, with_state(), tmp_path, rate_per_second=UNSERVED)
    check_one_by_one(report, bundle, "the batch of input state lies along axis 1")
    told = report["traffic"]
    if told["engine"]["goodput"]["proven"]:  # on a machine that has other work, nothing is said
        assert told["served"] is False
        assert 0 < told["nearest_rate"] < UNSERVED
        assert told["machines"] == -(-UNSERVED // told["nearest_rate"])
        assert f"{UNSERVED:g}/s is more than this machine serves within 200 ms" in told["reasons"]["served"]
    else:
        assert told["served"] is not True
        assert told["machines"] is None


def test_outputs_that_depend_on_the_batch_are_served_one_by_one_and_a_trace_s_gap_is_closed(
    served: Deployment, tmp_path: Path
) -> None:
    trace = [0.05 * i for i in range(40)]
    trace += [120.0 + at for at in trace]
    mix = {"batch_mix": {"1": 1.0}, "arrival": "trace", "trace": trace, "trace_gaps": "close"}
    report, bundle = job(served, among_others(), tmp_path, **mix)
    check_one_by_one(report, bundle, "changes with what else is in its batch")
    told = report["traffic"]["traffic"]
    assert 15 < told["rate_per_second"] < 25, "of the trace without what was not recorded"
    assert "trace" in told["arrivals"]


def test_what_says_no_traffic_costs_no_job(served: Deployment, tmp_path: Path) -> None:
    trace = [0.1 * i for i in range(30)]
    refused = {
        "out of order": {"arrival": "trace", "trace": [*trace, 1.0]},
        "a gap of": {"arrival": "trace", "trace": [*trace, 99.0]},
        "sum to 0.9": {"batch_mix": {"1": 0.5, "2": 0.4}},
    }
    with served.client() as client:
        model = client.upload_model(models.save(among_others(), tmp_path / "model.onnx"), "traffic")
        before = len([*client.jobs()])
        for words, told in refused.items():
            with pytest.raises(InvalidRequest, match=words):
                client.submit({"model_id": model["id"], "traffic": {"slo": {"p99_latency_ms": 20}, **told}})
        assert len([*client.jobs()]) == before
