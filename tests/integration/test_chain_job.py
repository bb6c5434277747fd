"""A whole job on a chain of two models, over HTTP: as one engine, and with an engine of each."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest

from tests.factories import onnx_models as models
from tests.factories.chains import encoder, head
from tests.factories.deployment import Deployment, deployment
from tests.factories.pace import paced

pytestmark = pytest.mark.timeout(300)
WIDTH = 512  # enough to be measured
SAMPLES = 64


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("chain") / "home") as found:
        found.start_worker()
        found.wait_ready()
        yield found


@pytest.fixture(scope="module")
def spec(deployed: Deployment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(3)
    data = folder / "data.npz"
    arrays = {"input": rng.normal(size=(SAMPLES, 8)), "weight": rng.uniform(0.5, 1.5, size=(SAMPLES, 1))}
    np.savez(data, **{name: array.astype(np.float32) for name, array in arrays.items()})
    # Of two opsets, of which the lower one is raised.
    paths = [
        models.save(model, folder / name)
        for name, model in (
            ("encoder.onnx", encoder(width=WIDTH, opset=17)),
            ("head.onnx", head(width=WIDTH, opset=18)),
        )
    ]
    with deployed.client() as client:
        first, second = (client.upload_model(path, path.stem)["id"] for path in paths)
        dataset = client.upload_dataset(data)["id"]
    return {
        "model_id": first,
        "chain": {"then": [{"model_id": second}]},
        "validation": {"dataset_id": dataset},
        "benchmark": {"batch_sizes": [1, 8], "min_seconds": 0.1, "allow_noisy": True},
        "target": {"backends": ["onnxruntime"]},
        "engines_per_bundle": 1,
        "budget_seconds": paced(60),
    }


def ended(deployed: Deployment, spec: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Job, report, and the folder of the unpacked bundle."""
    with deployed.client() as client:
        job = client.wait(client.submit(spec)["id"])
        report = client.report(job["id"])
        bundle = client.download_bundle(job["engine_ids"][0], folder / "bundle.zip")
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder / "bundle")
    done = subprocess.run(
        [sys.executable, "-I", "infer.py"], cwd=folder / "bundle", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return job, report, folder / "bundle"


def expected(bundle: Path, folder: Path) -> np.ndarray[Any, Any]:
    """What the originals answer to the bundle's sample, one after the other."""
    with np.load(bundle / "sample_input.npz") as sample:
        known = dict(sample)
    for model in (encoder(width=WIDTH, opset=17), head(width=WIDTH, opset=18)):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        given = session.run(None, {name: known[name] for name in names})
        known |= dict(zip([item.name for item in session.get_outputs()], given, strict=True))
    return known["logits"]


def test_a_chain_is_optimized_as_one(deployed: Deployment, spec: dict[str, Any], tmp_path: Path) -> None:
    job, report, bundle = ended(deployed, spec, tmp_path)
    stages = [stage["name"] for stage in job["stages"]]
    assert stages.count("export") == 4, "each model, the one of the lower opset again, and the whole"
    assert "chain" in stages
    chain = report["chain"]
    assert [model["name"] for model in chain["models"]] == ["encoder", "head"]
    assert chain["models"][1]["connect"] == {"embedding": "embedding"}
    assert chain["models"][1]["taken"] == ["weight"]
    assert (chain["deploy"], chain["asked"], chain["reason"]) == ("merged", "merged", None)
    assert report["analysis"]["model"] == "encoder then head"
    with np.load(bundle / "expected_output.npz") as told:
        assert set(told.files) == {"logits"}
        np.testing.assert_allclose(told["logits"], expected(bundle, tmp_path), rtol=1e-4, atol=1e-4)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert [model["id"] for model in manifest["chain"]["models"]] == [
        spec["model_id"],
        spec["chain"]["then"][0]["model_id"],
    ]
    page = httpx.get(f"{deployed.url}/v1/jobs/{job['id']}/report", headers={"Accept": "text/html"}).text
    assert "The chain" in page
    assert "embedding → embedding" in page
    with deployed.client() as client:
        told = client.manifest(job["id"])
        again = client.submit(spec)
        while len(done := [s for s in client.job(again["id"])["stages"] if s["status"] == "succeeded"]) < 5:
            time.sleep(0.2)
        client.cancel(again["id"])
        client.wait(again["id"], check=False)
    assert {stage["name"] for stage in done[:5]} == {"export", "chain"}
    assert all(stage["cached"] for stage in done[:5]), "what is made of the same bytes is not made again"
    (call,) = [stage for stage in told["stages"] if stage["stage"] == "chain"]
    assert set(call["inputs"]) == {"model", "model_1"}


def test_a_chain_may_ship_as_an_engine_of_each_model(
    deployed: Deployment, spec: dict[str, Any], tmp_path: Path
) -> None:
    spec = {**spec, "chain": {**spec["chain"], "deploy": "ensemble"}}
    job, report, bundle = ended(deployed, spec, tmp_path)
    chain = report["chain"]
    assert chain["asked"] == "ensemble"
    linked = [c for c in report["candidates"] if c["backend"] == "chained"]
    assert linked
    assert linked == report["candidates"], "nobody is judged as another one than would ship"
    with np.load(bundle / "expected_output.npz") as told:
        np.testing.assert_allclose(told["logits"], expected(bundle, tmp_path), rtol=1e-4, atol=1e-4)
    if chain["deploy"] == "merged":  # where the original in one graph is as fast, that ships, and the report says so
        assert "no engines of the models apart" in chain["reason"]
        return
    assert (bundle / "part_1/infer.py").exists()
    assert (bundle / "part_2/model.onnx").exists()
    assert report["bundles"]["triton"]["backend"] == "ensemble"
    with deployed.client() as client:
        archive = client.download_bundle(job["engine_ids"][0], tmp_path / "triton.tar", kind="triton")
    with tarfile.open(archive) as repository:
        names = {name.split("/")[0] for name in repository.getnames()}
    name = next(name for name in names if not name.endswith(("-1", "-2")))
    assert names == {name, f"{name}-1", f"{name}-2"}


def test_what_only_the_worker_sees_is_told_of_the_model(
    deployed: Deployment, spec: dict[str, Any], tmp_path: Path
) -> None:
    """A model that fails by itself: the job says which one."""
    broken = models.shape_error()
    with deployed.client() as client:
        second = client.upload_model(models.save(broken, tmp_path / "broken.onnx"), "broken")
        first = client.upload_model(models.save(models.mlp(classes=4), tmp_path / "first.onnx"), "first")
        body = {**spec, "model_id": first["id"], "chain": {"then": [{"model_id": second["id"]}]}, "validation": {}}
        job = client.wait(client.submit(body)["id"], check=False)
    assert job["status"] == "failed"
    assert "Model 2 of the chain (broken): " in job["error"]["detail"]
