"""From a module and arrays to an engine in this process, through a real service."""

from __future__ import annotations

from pathlib import Path

import anyio
import numpy as np
import pytest
import torch
from torch import nn

from anneal_client import AsyncClient, Event
from anneal_client.data import from_arrays
from anneal_client.exporting import from_torch
from tests.factories.deployment import deployment
from tests.factories.pace import paced


def test_a_module_becomes_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNEAL_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 4)).eval()
    x = torch.randn(200, 32)
    with torch.no_grad():
        wanted = module(x).numpy()
    model = from_torch(module, x[:2], name="net")
    data = from_arrays({"input": x}, wanted.argmax(1))
    seen: list[Event] = []
    with deployment(tmp_path / "home") as deployed:
        deployed.start_hurried_worker()
        deployed.wait_ready()
        with deployed.client() as client:
            result = client.optimize(
                model,
                data,
                on_event=seen.append,
                timeout_s=120,
                benchmark={"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
                validation={"max_accuracy_loss_percent": 5},
                budget_seconds=paced(15),
            )
            assert seen[-1].terminal
            assert result.job.spec["validation"]["max_accuracy_loss_percent"] == 5
            assert result.job.spec["validation"]["dataset_id"] == result.job.spec["calibration"]["dataset_id"]
            assert result.report.final_metrics["latency_ms"] > 0
            (out,) = result.engine(x.numpy()).values()
            assert out.shape == wanted.shape
            assert (out.argmax(1) == wanted.argmax(1)).mean() > 0.9
            assert result.engine.check()

        async def looped() -> None:
            async with AsyncClient(deployed.url) as there:
                again = await there.result(result.job.id)
                assert (await again.report()) == result.report
                (same,) = (await again.engine())(x.numpy()).values()
                assert np.array_equal(same, out)

        anyio.run(looped)
