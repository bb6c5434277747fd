"""A whole job whose bundle holds two engines: by construction one is the faster at small batches and the other, by far,
at large ones, where the first is slower than the original."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.factories.deployment import deployment
from tests.factories.pace import paced
from tests.factories.plugins import EXAMPLE, install

TOYS = Path(__file__).resolve().parents[1] / "factories" / "two_toys.py"
_ADDS = 4000

pytestmark = pytest.mark.timeout(300)


def sum_of_constants(path: Path) -> Path:
    """`input` [batch, 16] and so many constants, one after the other: milliseconds of the original's, exact in any
    order."""
    rng = np.random.default_rng(7)
    names = [f"v{i}" for i in range(_ADDS - 1)]
    pairs = zip(["input", *names], [*names, "output"], strict=True)
    nodes = [helper.make_node("Add", [a, f"c{i}"], [b], name=f"add{i}") for i, (a, b) in enumerate(pairs)]
    constants = [numpy_helper.from_array(rng.integers(-4, 5, 16).astype(np.float32), f"c{i}") for i in range(_ADDS)]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 16]) for n in ("input", "output")]
    graph = helper.make_graph(nodes, "sum", tensors[:1], tensors[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def seconds_of(model: Path) -> float:
    """What one sample takes in ONNX Runtime here."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    took = []
    for _ in range(30):
        began = time.perf_counter()
        session.run(None, {"input": np.zeros((1, 16), np.float32)})
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def test_a_bundle_with_two_engines_ships_where_each_wins_somewhere(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(EXAMPLE / "anneal_toy.py", site)
    points = {
        "anneal.backends": {"toy-per-sample": "two_toys:PerSample", "toy-any-batch": "two_toys:AnyBatch"},
        "anneal.stages": {"toy_fold": "anneal_toy:Fold"},
    }
    install(site, "two-toys", "0.1.0", points, TOYS)
    original = sum_of_constants(tmp_path / "sum.onnx")
    (site / "two_toys.txt").write_text(f"{seconds_of(original)}")
    spec: dict[str, Any] = {
        "benchmark": {"batch_sizes": [1, 16], "min_seconds": 0.1, "allow_noisy": True},
        "target": {"backends": ["toy-per-sample", "toy-any-batch"]},
        "budget_seconds": max(200, paced(85)),  # beside other tests, 60 of them are used
    }
    with deployment(tmp_path / "home", {"PYTHONPATH": str(site)}) as deployed, deployed.client() as client:
        deployed.start_worker()
        deployed.wait_ready()
        model = client.upload_model(original, "sum")
        job = client.wait(client.submit({"model_id": model["id"], **spec})["id"])
        report, manifest = client.report(job["id"]), client.manifest(job["id"])
        bundle = client.download_bundle(job["engine_ids"][0], tmp_path / "bundle.zip")
        single = client.download_engine(job["engine_ids"][0], tmp_path / "engine.tar")
        page = httpx.get(f"{deployed.url}/v1/jobs/{job['id']}/report", headers={"Accept": "text/html"}).text
    _check_report(report)
    assert "Which engine answers which batch" in page
    judged = next(s for s in manifest["stages"] if s["stage"] == "package")
    assert {f["name"] for f in judged["inputs"]["engine"]} >= {"small/sum.npy", "large/sum.npy"}
    assert single.stat().st_size > 0
    _check_bundle(bundle, tmp_path / "bundle", report["by_batch"]["engines"][0]["most"])


def _check_report(report: dict[str, Any]) -> None:
    told = [(c["id"], c["status"], c["reason"]) for c in report["candidates"]]
    assert report["picked"] == "two-engines", (told, report["search"])
    both = report["by_batch"]
    assert [e["candidate"] for e in both["engines"]] == ["toy-per-sample-sum", "toy-any-batch-sum"]
    assert {e["accuracy_verdict"] for e in both["engines"]} == {"proven"}
    low, high = both["border"]
    assert 1 <= low < high <= 16
    assert high < 16, "it was timed between the sizes"
    at = {row["batch"]: row for row in both["batches"]}
    for size in (1, 16):
        assert at[size]["speedup_ci"][0] > 1.0, "never slower, at every batch size that was asked for"
    assert at[16]["small_speedup"] < 1.0 < at[16]["large_speedup"]
    assert both["costs"]["memory_mb"] > 0
    assert both["costs"]["cold_start_ms"] > 0
    candidates = {c["id"]: c for c in report["candidates"]}
    assert candidates["two-engines"]["status"] == "picked"
    # "alone: slower at batch size 16" follows where the machine is quiet enough to prove it
    assert candidates["toy-per-sample-sum"]["reason"].startswith("one of the two engines in the bundle")
    assert report["deployment_config"]["backend"] == "by-batch"
    assert report["optimizations_applied"], "of the engine that answers at the batch size that counts"


def _check_bundle(file: Path, folder: Path, most: int) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    done = subprocess.run([sys.executable, "-I", "infer.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same as where it was built") == 2
    with np.load(folder / "sample_input_large.npz") as sample:
        assert len(sample["input"]) == most + 1
    told = json.loads((folder / "manifest.json").read_text())["engine"]["by_batch"]
    assert [e["backend"] for e in told["engines"]] == ["toy-per-sample", "toy-any-batch"]
