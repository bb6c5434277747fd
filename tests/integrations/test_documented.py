"""What the pages tell a reader to type runs on a service: the Python of the start page and of the client's pages, and
README's commands. Only names, addresses, ids and the time that a job may take are ours."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from anneal_client import Client, UploadInterrupted
from anneal_client.data import from_arrays
from tests.integrations.conftest import KEPT, Service
from tests.integrations.environments import REPOSITORY

ROWS = np.arange(32, dtype=np.float32).reshape(2, 16)

pytestmark = pytest.mark.timeout(200)


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (REPOSITORY / page).read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's: `model.onnx` and `data.npz`. Jobs are small ones on the engine that is sure to win."""
    shutil.copyfile(service.model, tmp_path / "model.onnx")
    samples = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", input=samples)
    (tmp_path / "kept.json").write_text(json.dumps(KEPT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANNEAL_CACHE", str(tmp_path / "cache"))
    submit = Client.submit
    monkeypatch.setattr(
        Client, "submit", lambda self, spec=None, **more: submit(self, {**KEPT, **(spec or {})}, **more)
    )
    return tmp_path


def run(block: str, service: Service, names: dict[str, Any]) -> None:
    exec(block.replace("http://127.0.0.1:8000", service.url), names)


def total_of(model: Path) -> np.ndarray:
    import onnx

    return np.sum([onnx.numpy_helper.to_array(c) for c in onnx.load(model).graph.initializer], axis=0)


def test_the_start_page(service: Service, folder: Path) -> None:
    (block,) = blocks("docs/index.md")
    names: dict[str, Any] = {"images": ROWS}
    run(block, service, names)
    np.testing.assert_array_equal(names["outputs"]["output"], ROWS + total_of(service.model))


class TwoInputs(torch.nn.Module):
    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=1) + state.sum(dim=0)


def test_the_page_of_the_client(service: Service, folder: Path) -> None:
    imports, export, optimize, engine, webhook = blocks("docs/client.md")
    names: dict[str, Any] = {"array": ROWS, "secret": "s3cret"}
    run(imports, service, names)
    names |= {"module": TwoInputs().eval(), "x": torch.randn(3, 5, 4), "state": torch.randn(2, 3, 4)}
    run(export, service, names)
    assert names["model"].difference < 1e-3
    with Client(service.url) as client:
        arrays = np.load("data.npz")
        names |= {"client": client, "model": "model.onnx", "data": from_arrays({"input": arrays["input"]})}
        run(optimize, service, names)
        run(engine, service, names)
    np.testing.assert_array_equal(names["outputs"]["output"], ROWS + total_of(service.model))
    run(webhook, service, names)
    body = json.dumps({"type": "job.succeeded", "job": {"id": "job_1", "status": "succeeded", "engine_ids": []}})

    async def told(signature: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://here") as caller:
            answer = await caller.post("/hook", content=body, headers={"X-Anneal-Signature": f"sha256={signature}"})
            return answer.status_code

    assert asyncio.run(told(hmac.new(b"s3cret", body.encode(), hashlib.sha256).hexdigest())) == 200
    with pytest.raises(names["verify_webhook"].__globals__["SignatureMismatch"]):
        asyncio.run(told("0" * 64))


def test_the_readme_of_the_client(service: Service, folder: Path) -> None:
    optimize, resumed = blocks("clients/python/README.md")
    names: dict[str, Any] = {"array": ROWS, "UploadInterrupted": UploadInterrupted}
    run(optimize, service, names)
    np.testing.assert_array_equal(names["outputs"]["output"], ROWS + total_of(service.model))
    shutil.copyfile("model.onnx", "large.onnx")
    with Client(service.url) as names["client"]:
        run(resumed, service, names)
    assert names["model"].id.startswith("mdl_")


def commands(heading: str) -> list[str]:
    """The commands of a section of README, each in one line, without what is said of it."""
    section = (REPOSITORY / "README.md").read_text().partition(f"## {heading}")[2].partition("\n## ")[0]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    text = "".join(code for language, code in fenced if not language)
    joined = re.sub(r",\n +", ", ", text)
    return [re.sub(r"  #.*", "", line) for line in joined.splitlines()]


def test_the_commands_of_the_readme(service: Service, folder: Path) -> None:
    serve, optimize, *plain = commands("Use it")
    assert serve.startswith("make serve"), "tests/integration/test_serve.py does this"
    anneal = f"{sys.executable} -m anneal_client.cli --url {service.url}"
    assert optimize.startswith(".venv/bin/anneal optimize ")
    typed = optimize.replace(".venv/bin/anneal", anneal) + " --spec kept.json"
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: a busy machine may not be able to prove the gain
    assert (folder / "bundle.zip").stat().st_size > 0

    ids: dict[str, str] = {}
    small = json.dumps({**KEPT})[1:-1]
    said = ""
    for command in plain:
        typed = command.replace("localhost:8000", service.url.removeprefix("http://")).replace(
            '"constraints":', f'{small}, "constraints":'
        )
        for prefix, known in ids.items():
            typed = typed.replace(f"{prefix}_…", known)
        assert "…" not in typed, typed
        for _ in range(10):
            done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True)
            said = done.stdout
            if "for=end" not in typed or json.loads(said)["status"] not in ("queued", "running"):
                break
        found = json.loads(said) if said.startswith("{") else {}
        assert "code" not in found, found
        if str(found.get("id", "")).startswith(("mdl_", "dst_", "job_")):
            ids[found["id"].partition("_")[0]] = found["id"]
        if found.get("engine_ids"):
            ids["eng"] = found["engine_ids"][0]
    assert set(ids) == {"mdl", "dst", "job", "eng"}, ids
    assert len(list(folder.glob("*.zip"))) == 2, "the bundle under its own name"
