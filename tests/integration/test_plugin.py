"""A backend and a stage from a package of their own (`examples/plugin`): its wheel, installed beside a worker, takes a
whole job, with nothing of them in this repository's code. What cannot be used is told, and the worker lives."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.factories import onnx_models as models
from tests.factories import sums
from tests.factories.deployment import Deployment, deployment
from tests.factories.pace import paced
from tests.factories.plugins import EXAMPLE, install_wheel, project, wheel_of
from tests.servers import free_port

BROKEN = {"anneal.backends": {"broken": "anneal_broken:Nothing", "none": "anneal_toy:TOY_SUM"}}
_ADDS = 300

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployment]:
    site, sources = tmp_path / "site", {"anneal_broken": "import no_such_library\n"}
    install_wheel(wheel_of(EXAMPLE, tmp_path / "toy"), site)
    broken = project(tmp_path / "sources", "anneal-broken", "1.0", BROKEN, sources)
    install_wheel(wheel_of(broken, tmp_path / "broken"), site)
    assert sorted(p.name for p in site.glob("*.py")) == ["anneal_broken.py", "anneal_toy.py"]
    told = {"PYTHONPATH": str(site), "WORKER_METRICS_PORT": str(free_port())}
    with deployment(tmp_path / "home", told) as found:
        found.start_worker()
        found.wait_ready()
        yield found


def sum_of_constants(path: Path) -> Path:
    """`input` [batch, 16] and 300 constants."""
    return models.save(sums.sum_of_constants(_ADDS), path)


def test_a_backend_of_another_package_takes_a_whole_job(deployed: Deployment, tmp_path: Path) -> None:
    (worker,) = httpx.get(f"{deployed.url}/v1/capabilities").json()["workers"]
    assert "toy" in [b["name"] for b in worker["backends"]]
    assert "plugins" not in worker["hardware"]
    told = {p["name"]: p for p in worker["plugins"]}
    assert {n for n, p in told.items() if p["problem"] is None} == {"toy", "toy_fold"}
    assert (told["toy"]["distribution"], told["toy"]["version"]) == ("anneal-toy", "0.1.0")
    assert "No module named 'no_such_library'" in told["broken"]["problem"]
    assert "no Backend" in told["none"]["problem"]
    assert "plugin_left_out" in deployed.worker_log()

    spec: dict[str, Any] = {
        "benchmark": {"batch_sizes": [1], "min_seconds": 0.2, "allow_noisy": True},
        "target": {"backends": ["toy"]},
        "budget_seconds": paced(60),  # it is over long before, but beside other tests
    }
    with deployed.client() as client:
        model = client.upload_model(sum_of_constants(tmp_path / "sum.onnx"), "sum")
        job = client.wait(client.submit({"model_id": model["id"], **spec})["id"])
        report, manifest = client.report(job["id"]), client.manifest(job["id"])
        assert report["picked"] == "toy-sum", report
        assert [c["made_by"] for c in report["candidates"]] == [worker["id"]]
        assert not report["not_explained"], report["not_explained"]
        fold, backend = report["optimizations_applied"]
        assert fold["details"] == {"added": _ADDS}
        assert "It takes toy-sum, and there is onnx" in fold["reason"], "an engine without that step cannot be"
        assert backend["name"] == "toy in place of onnxruntime"
        made = next(s for s in manifest["stages"] if s["stage"] == "toy_fold")
        assert made["libraries"]["anneal-toy"] == "0.1.0", "its version is part of the key"
        metrics = httpx.get(f"http://127.0.0.1:{deployed.environment['WORKER_METRICS_PORT']}/metrics").text.splitlines()
        assert 'anneal_stage_seconds_count{backend="none",stage="toy_fold"} 1.0' in metrics
        assert 'anneal_stage_seconds_count{backend="toy",stage="build"} 1.0' in metrics
        assert 'anneal_job_attempts_total{queue="anneal.cpu"} 1.0' in metrics
        assert "anneal_job_budget_used_ratio_count 1.0" in metrics
        bundle = client.download_bundle(job["engine_ids"][0], tmp_path / "bundle.zip")
        assert report["bundles"]["triton"]["backend"] == "python", "Triton has no backend for it"
        models = client.download_bundle(job["engine_ids"][0], tmp_path / "models.tar", kind="triton")
    with tarfile.open(models) as tar:
        assert {"config.pbtxt", "1/model.py", "1/infer.py"} <= {n.split("/", 1)[1] for n in tar.getnames()}
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path / "bundle")
    command = [sys.executable, "-I", "infer.py"]
    done = subprocess.run(command, cwd=tmp_path / "bundle", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "anneal" not in (tmp_path / "bundle" / "requirements.txt").read_text()
