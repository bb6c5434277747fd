"""What the how-to pages show runs, and the command line's page names what there is."""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anneal_client.cli.exits import Exit
from anneal_client.cli.main import make_parser
from tests.factories import bundled, onnx_models

DOCS = Path(__file__).resolve().parents[2] / "docs"


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


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in (DOCS / "cli.md", *sorted((DOCS / "how-to").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_page_of_the_command_line_names_every_command_option_and_exit_code() -> None:
    text = (DOCS / "cli.md").read_text()
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert re.search(rf"`{name}\b|`anneal {name}\b|, `{name}`", text), name
        for action in command._actions:
            for option in action.option_strings:
                if option.startswith("--") and option not in ("--help", "--url", "--quiet", "--status", "--model"):
                    assert option in text, f"{name} {option}"
    for code in Exit:
        assert re.search(rf"^\| {int(code)} \|", text, flags=re.MULTILINE), code
