"""What the how-to pages show runs, and the command line's page names what there is."""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest

from anneal_client import Client
from anneal_client.cli.exits import Exit
from anneal_client.cli.main import make_parser
from tests.factories import bundled, onnx_models

DOCS = Path(__file__).resolve().parents[2] / "docs"
MAKING = DOCS.parent / "app" / "web" / "templates" / "_macros.html"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def test_a_data_set_from_a_data_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    data = torch.utils.data.TensorDataset(torch.zeros(70, 3, 4), torch.arange(70))
    names: dict[str, Any] = {
        "loader": torch.utils.data.DataLoader(data, batch_size=32),
        "by_length": {n: {"ids": np.zeros((5, n), np.int64)} for n in (8, 16)},
    }
    for block in blocks("how-to/make-a-data-set.md"):
        exec(block, names)
    with np.load("data.npz", allow_pickle=False) as arrays:
        assert {n: arrays[n].shape for n in arrays.files} == {"input": (70, 3, 4), "labels": (70,)}
    names["save_data_set"](names["loader"], "few.npz", samples=40)
    with np.load("few.npz", allow_pickle=False) as arrays:
        assert arrays["input"].shape == (40, 3, 4)
    assert Path("data.tar").is_file()


@pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecations
def test_a_model_of_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(3600, 5))
    names: dict[str, Any] = {"model": model}
    for block in blocks("how-to/bring-a-model.md"):
        exec(block, names)
    assert Path("model.onnx").is_file()
    assert names["exported"].difference < 1e-3


def test_an_engine_in_one_s_own_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundled.bundled("onnxruntime", onnx_models.mlp(), tmp_path / "made")
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(made.bundle) as archive:
        archive.extractall("engine")
    names: dict[str, Any] = {}
    for block in blocks("how-to/use-an-engine.md"):
        exec(block, names)
    expected = made.arrays("expected_output.npz")
    assert set(names["outputs"]) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(names["outputs"][name], value, rtol=1e-3, atol=1e-4)


def test_what_a_receiver_of_webhooks_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNEAL_WEBHOOK_SECRET", "s3cret")
    enqueued: list[str] = []
    (block,) = blocks("webhooks.md")
    names: dict[str, Any] = {"first_time": lambda message: not enqueued, "enqueue": enqueued.append}
    exec(block, names)
    job = {"id": "job_1", "status": "succeeded", "engine_ids": ["eng_1"]}
    body = json.dumps({"type": "job.succeeded", "job": job})
    stamp = str(int(time.time()))
    signed = hmac.new(b"s3cret", f"msg_1.{stamp}.{body}".encode(), hashlib.sha256).digest()
    headers = {"webhook-id": "msg_1", "webhook-timestamp": stamp}

    async def told(signature: bytes) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(names["app"]), base_url="http://here") as caller:
            sent = {**headers, "webhook-signature": f"v1,{base64.b64encode(signature).decode()}"}
            return (await caller.post("/anneal", content=body, headers=sent)).status_code

    assert asyncio.run(told(bytes(32))) == 401
    assert enqueued == []
    assert [asyncio.run(told(signed)), asyncio.run(told(signed))] == [204, 204]
    assert enqueued == ["job_1"], "however often it comes"


@pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecations
def test_what_the_readme_and_the_pages_tell_of_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines make the model and its data; their names fit."""
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    told = re.findall(r"^```python\n(.*?)^```", (DOCS.parent / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shown = re.findall(r"<pre[^>]*>(torch.*?)</pre>", MAKING.read_text(), re.DOTALL)
    assert (len(told), len(shown)) == (1, 1)

    class Net(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch may be missing
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(12, 5)

        def forward(self, x: Any) -> Any:
            return self.inner(x.flatten(1))

    for block in (*told, *shown):
        names = {"torch": torch, "numpy": np, "model": Net(), "images": torch.randn(6, 3, 4), "labels": torch.arange(6)}
        exec(block, names)
        (given,) = onnx.load("model.onnx", load_external_data=False).graph.input
        batch, *rest = given.type.tensor_type.shape.dim
        assert (given.name, [d.dim_value for d in rest]) == ("x", [3, 4])
        assert batch.dim_param, "the batch varies"
        with np.load("data.npz") as arrays:
            assert {n: arrays[n].shape for n in arrays.files} == {"x": (6, 3, 4), "labels": (6,)}


def test_every_example_in_python_is_one_that_a_test_runs() -> None:
    """Where a page gets its first one, add it to a test, then here."""
    run_here = {"how-to/make-a-data-set.md", "how-to/bring-a-model.md", "how-to/use-an-engine.md", "webhooks.md"}
    elsewhere = {"index.md", "client.md", "platforms.md"}  # tests/integrations
    elsewhere |= {"how-to/chain-models.md"}  # tests/api/test_chains.py
    assert {
        str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if "```python" in p.read_text()
    } == run_here | elsewhere


def test_the_page_of_the_client_names_every_call() -> None:
    text = (DOCS / "client.md").read_text().partition("## Calls")[2].partition("\n## ")[0]
    calls = {name for name, found in vars(Client).items() if callable(found) and not name.startswith("_")}
    assert len(calls) > 30
    assert {name for name in calls if f"`{name}(" not in text} == set()


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in (DOCS / "cli.md", *sorted((DOCS / "how-to").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).is_file(), f"{page.name}: {target}"


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of the commands below it, too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)
        yield action


def test_the_page_of_the_command_line_names_every_command_option_and_exit_code() -> None:
    text = (DOCS / "cli.md").read_text()
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert re.search(rf"`{name}\b|`anneal {name}\b|, `{name}`", text), name
        for action in _actions(command):
            known = {"--help", "--url", "--quiet", "--status", "--model"} & {*action.option_strings}
            if action.option_strings and not known:
                assert any(option in text for option in action.option_strings), (name, action.option_strings)
    for code in Exit:
        assert re.search(rf"^\| {int(code)} \|", text, flags=re.MULTILINE), code
