"""What the pages and README tell to do with a PyTorch model makes a model and data that are taken as they are."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from anneal_client import Client
from app.http.services import Services

README = Path(__file__).resolve().parents[2] / "README.md"


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(144, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def without_comments(code: str) -> str:
    return re.sub(r" +#.*", "", code).strip()


@pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecations
def test_a_pytorch_model_and_its_data_are_taken(
    client: httpx.Client, worker: Services, base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = set()
    for path in ("/", "/jobs/new"):
        page = client.get(path, headers={"Accept": "text/html"}).text
        told |= {html.unescape(code) for code in re.findall(r"<pre[^>]*>(torch\.onnx.*?)</pre>", page, flags=re.DOTALL)}
    told |= {without_comments(b) for b in re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.M | re.S)}
    (code,) = told  # all say the same
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "torch": torch,
        "numpy": np,
        "model": Net(),
        "images": torch.randn(64, 3, 8, 8),
        "labels": torch.arange(64) % 5,
    }
    exec(code, names)
    with Client(base_url) as anneal:
        model, data = anneal.upload_model("model.onnx"), anneal.upload_dataset("data.npz")
        part = {"dataset_id": data.id}
        spec = {"calibration": part, "validation": {**part, "metric": "top1", "max_accuracy_loss_percent": 1.0}}
        job = anneal.submit({**spec, "model_id": model.id})
    assert (model.inputs[0].name, list(model.inputs[0].shape)) == ("x", ["batch", 3, 8, 8])
    assert data.samples == 64
    assert job.status == "queued"
