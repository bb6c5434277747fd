"""A job on a machine that has other work: through HTTP, beside real spinning processes."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.factories import onnx_models
from tests.factories.deployment import deployment
from tests.unit.test_disturbance import crowd, spinning
from workers.measure.disturbance import thread_waits

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.skipif(thread_waits() is None, reason="this kernel does not tell how long threads wait"),
]


def test_a_job_beside_spinning_processes_claims_nothing(tmp_path: Path) -> None:
    model = onnx_models.folder(onnx_models.mlp(features=64, hidden=256), tmp_path / "model") / "model.onnx"
    with deployment(tmp_path / "home") as deployed:
        deployed.start_worker()
        deployed.wait_ready()
        with deployed.client() as client, spinning(crowd()):
            spec = {
                "model_id": client.upload_model(model, "mlp")["id"],
                "target": {"backends": ["onnxruntime"]},
                "benchmark": {"batch_sizes": [1], "min_seconds": 0.2},
                "budget_seconds": 15,
            }
            job = client.wait(client.submit(spec)["id"])
            report = client.report(job["id"])
            headers = {**deployed.headers, "Accept": "text/html"}
            page = httpx.get(f"{deployed.url}/v1/jobs/{job['id']}/report", headers=headers).text
            allowed = {**spec, "benchmark": {**spec["benchmark"], "allow_noisy": True}}
            shipped = client.report(client.wait(client.submit(allowed)["id"])["id"])
    assert (report["claim"], report["noisy"], report["picked"]) == (False, True, "baseline")
    assert report["final_metrics"]["speedup"] == "1.0x"
    assert "no speed-up is claimed" in report["final_metrics"]["reasons"]["speedup"]
    told = report["disturbance"]
    assert told["dropped_windows"] > 0
    assert told["waited_share"] > 0.05
    assert told["reason"] in report["warnings"][0]
    assert report["recommendations"][0] == report["warnings"][0]
    assert "No speed-up is claimed" in page
    assert shipped["claim"] is False
    assert shipped["final_metrics"]["speedup_proven"] in (None, False)
