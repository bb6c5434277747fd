"""`.pt2` sources with real torch: conversion, comparison, and archives that would run code when loaded."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from app.domain.failures import StageFailure
from tests.unit.test_export import export
from workers.graph.exported_program import ProgramFolder, quiet
from workers.stages.export import Export, _pt2
from workers.stages.export._pt2_guard import clean_copy

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`")

ROOT = "net"


def save_program(path: Path, *, dynamic: bool = True) -> Path:
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 3)
            self.fc = torch.nn.Linear(4, 3)

        def forward(self, image: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            features = torch.relu(self.conv(image)).mean((2, 3)) * scale
            return {"logits": self.fc(features), "features": features.reshape(features.shape[0] * 2, 2)}

    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, {0: batch}) if dynamic else None
    with quiet():
        program = torch.export.export(Net().eval(), (torch.randn(2, 1, 8, 8), torch.randn(2, 4)), dynamic_shapes=shapes)
        torch.export.save(program, str(path))
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_program(tmp_path_factory.mktemp("pt2") / f"{ROOT}.pt2")


def rewritten(source: Path, target: Path, changes: Mapping[str, Callable[[bytes], bytes] | bytes]) -> Path:
    """A copy of the archive with members changed, or added where there is none."""
    wanted = dict(changes)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            change = next((wanted.pop(n) for n in list(wanted) if info.filename == f"{ROOT}/{n}"), None)
            new.writestr(info.filename, data if change is None else change(data) if callable(change) else change)
        for name, change in wanted.items():
            assert isinstance(change, bytes)
            new.writestr(f"{ROOT}/{name}", change)
    return target


def graph_edit(edit: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        edit(content)
        return json.dumps(content).encode()

    return apply


def test_dynamic_program(program: Path, tmp_path: Path) -> None:
    result, folder = export(program, tmp_path, format="pt2")
    data = result.data
    assert [(i["name"], i["shape"]) for i in data["inputs"]] == [("image", ["batch", 1, 8, 8]), ("scale", ["batch", 4])]
    assert [o["shape"] for o in data["outputs"]] == [["batch", 3], ["2*batch", 2]]
    assert data["opset"] >= 17
    assert data["dynamic_batch"] is True
    comparison = data["checks"]["source_comparison"]
    assert (comparison["inputs"], comparison["batch_sizes"]) == (6, [1, 2])
    assert comparison["max_abs_diff"] < 1e-5
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)


def test_the_program_is_kept_beside_the_onnx(program: Path, tmp_path: Path) -> None:
    """As an artifact of its own: what computes as the source does, the same bytes every time, with sample inputs of our
    own in place of those that it came with (pickles)."""
    import torch

    kept = []
    for run in ("1", "2"):
        (tmp_path / run).mkdir()
        result, folder = export(program, tmp_path / run, format="pt2")
        assert set(result.outputs) == {"model", "program"}
        kept.append((folder.parent / "program" / "program.pt2").read_bytes())
    assert kept[0] == kept[1]
    path = tmp_path / "kept.pt2"
    path.write_bytes(kept[0])
    image, scale = torch.randn(3, 1, 8, 8), torch.randn(3, 4)
    with quiet(), torch.no_grad():
        wanted, found = (torch.export.load(str(p)).module()(image, scale) for p in (program, path))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert Export.kinds({}) == {"model": "onnx", "program": "exported-program"}


def test_what_a_program_hands_on_as_it_is(tmp_path: Path) -> None:
    """Inputs keep their names, and their copies are outputs; so does a tensor that is given twice, and a constant."""
    import torch

    class Through(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 3)
            self.register_buffer("seen", torch.ones(2))

        def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.fc(x)
            return y, state, x, y, self.seen

    batch = torch.export.Dim("batch", min=1, max=64)
    with quiet():
        program = torch.export.export(
            Through().eval(), (torch.randn(2, 4), torch.randn(2, 5)), dynamic_shapes=({0: batch}, {0: batch})
        )
        torch.export.save(program, str(tmp_path / "through.pt2"))
    result, folder = export(tmp_path / "through.pt2", tmp_path, format="pt2")
    assert [i["name"] for i in result.data["inputs"]] == ["x", "state"]
    assert len({o["name"] for o in result.data["outputs"]} | {"x", "state"}) == 7
    assert result.data["checks"]["source_comparison"]["batch_sizes"] == [1, 2]
    assert any("is input 'state' as it is" in note for note in result.data["notes"])
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    assert ProgramFolder.read(folder.parent / "program").order == ("x", "state")


def test_static_program_stays_static(tmp_path: Path) -> None:
    result, _ = export(save_program(tmp_path / "net.pt2", dynamic=False), tmp_path, format="pt2")
    assert result.data["dynamic_batch"] is False
    assert result.data["checks"]["source_comparison"]["batch_sizes"] == [2]
    assert any("fixed batch" in note for note in result.data["notes"])


def test_a_difference_fails_the_stage(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that is wrong by a little: the fc bias of the ONNX is moved by 0.01."""
    original = _pt2.Program.to_onnx

    def wrong(self: _pt2.Program, folder: Path, opset: int) -> Path:
        path = original(self, folder, opset)
        model = onnx.load(str(path))
        bias = next(t for t in model.graph.initializer if t.name == "fc.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
        onnx.save(model, str(path))
        return path

    monkeypatch.setattr(_pt2.Program, "to_onnx", wrong)
    with pytest.raises(StageFailure) as caught:
        export(program, tmp_path, format="pt2")
    assert caught.value.code == "export_mismatch"
    assert caught.value.tensor
    assert "0.01" in caught.value.detail


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self._trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self._trace, "w"))


def test_sample_inputs_are_never_unpickled(program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    import torch

    payload = io.BytesIO()
    torch.save(((Bomb(trace),), {}), payload)
    armed = rewritten(program, tmp_path / "net.pt2", {"data/sample_inputs/model.pt": payload.getvalue()})
    result, _ = export(armed, tmp_path, format="pt2")
    assert result.data["checks"]["source_comparison"]["passed"]
    assert not trace.exists()


def _expression(content: dict[str, Any]) -> None:
    sizes = content["graph_module"]["graph"]["tensor_values"]["image"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = "__import__('os').system('true')"


def _target(content: dict[str, Any]) -> None:
    content["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"


def _name(content: dict[str, Any]) -> None:
    content["graph_module"]["graph"]["nodes"][0]["name"] = "x=print()"


def _argument(content: dict[str, Any]) -> None:
    content["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = ["a=print()", "b"]


def _pickled(content: dict[str, Any]) -> None:
    next(iter(content["config"].values()))["use_pickle"] = True


MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"


@pytest.mark.parametrize(
    ("member", "change"),
    [
        (MODEL, graph_edit(_expression)),
        (MODEL, graph_edit(_target)),
        (MODEL, graph_edit(_name)),
        (MODEL, graph_edit(_argument)),
        (WEIGHTS, graph_edit(_pickled)),
        ("data/constants/custom_obj_0", b"x"),
        ("data/constants/opaque_obj_0", pickle.dumps(1)),
        ("data/weights/model.pt", pickle.dumps(1)),
        ("data/aotinductor/model/model.so", b"\x7fELF"),
        ("models/other.json", b"{}"),
    ],
)
def test_what_would_run_code_is_refused(
    program: Path, tmp_path: Path, member: str, change: Callable[[bytes], bytes] | bytes
) -> None:
    armed = rewritten(program, tmp_path / "net.pt2", {member: change})
    with pytest.raises(StageFailure) as caught:
        clean_copy(armed, tmp_path / "clean.pt2", b"")
    assert caught.value.code == "unsafe_program"
    assert caught.value.remedy


def test_torchscript_and_checkpoints_are_refused(tmp_path: Path) -> None:
    import torch

    checkpoint = tmp_path / "net.pt2"
    torch.save({"w": torch.ones(2)}, str(checkpoint))
    with pytest.raises(StageFailure) as caught:
        export(checkpoint, tmp_path, format="pt2")
    assert caught.value.code == "invalid_model"
    assert "torch.export.save" in (caught.value.remedy or "")


def test_cut_off_archive(program: Path, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(program.read_bytes()[:3000])
    with pytest.raises(StageFailure) as caught:
        export(tmp_path / "net.pt2", tmp_path, format="pt2")
    assert caught.value.code == "invalid_model"
