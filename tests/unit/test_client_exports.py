"""Modules of torch, exported in the client and held against themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from anneal_client import ConversionFailed
from anneal_client.exporting import from_sklearn, from_torch
from anneal_client.onnx_files import external_data
from tests.factories.programs import cnn, quiet, transformer


def inputs_of(path: Path) -> dict[str, list[Any]]:
    model = onnx.load(path, load_external_data=False)
    return {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}


def test_a_picture_model_with_a_batch_of_one() -> None:
    module = cnn().train()
    module.norm.eval()
    exported = from_torch(module, torch.zeros(1, 3, 16, 16), name="pictures")
    assert exported.path.name == "pictures.onnx"
    assert inputs_of(exported.path) == {"image": ["batch", 3, 16, 16]}
    assert exported.difference is not None
    assert exported.difference < 1e-5
    assert module.training
    assert not module.norm.training, "each part is as it was"
    folder = exported.path.parent
    exported.close()
    assert not folder.exists()


def test_weights_lie_beside_what_is_exported_and_are_found() -> None:
    exported = from_torch(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 4)), torch.ones(2, 64))
    assert external_data(exported.path) == [p.name for p in exported.path.parent.iterdir() if p.suffix == ".data"]


def test_a_program_is_saved_as_pt2_with_its_names() -> None:
    ids = torch.arange(12).reshape(2, 6) % 8
    example = {"ids": ids, "mask": torch.ones_like(ids)}
    exported = from_torch(transformer(), example, format="pt2")
    assert exported.path.suffix == ".pt2"
    assert exported.difference is not None
    with quiet():
        program = torch.export.load(exported.path)
    assert list(program.graph_signature.user_inputs) == ["ids", "mask"]


class Recurrent(nn.Module):
    """Its state has the batch on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, state: torch.Tensor, steps: int = 2) -> dict[str, torch.Tensor]:
        for _ in range(steps):
            state = state + self.scale(x)[None]
        return {"y": state.sum(0), "state": state}


def test_other_axes_may_vary_where_they_are_named() -> None:
    batch = "batch"
    example = (torch.randn(3, 4), torch.randn(2, 3, 4))
    exported = from_torch(Recurrent(), example, {"x": {0: batch}, "state": {1: batch}})
    assert inputs_of(exported.path) == {"x": ["batch", 4], "state": [2, "batch", 4]}
    outputs = onnx.load(exported.path, load_external_data=False).graph.output
    assert [o.name for o in outputs] == ["y", "state_out"], "two tensors of one graph cannot have one name"
    fixed = from_torch(Recurrent(), example, None)
    assert inputs_of(fixed.path) == {"x": [3, 4], "state": [2, 3, 4]}


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Counting(nn.Module):
    """Gives something else from the third call on."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return x * (2 if self.calls < 4 else 3)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_what_cannot_be_exported_says_why() -> None:
    with pytest.raises(ConversionFailed, match="export_failed") as caught:
        from_torch(Branching(), torch.ones(2, 4))
    assert "dynamic_shapes" in str(caught.value.remedy)
    with pytest.raises(ConversionFailed, match="does not take the example"):
        from_torch(cnn(), (torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ConversionFailed, match="export_differs"):
        from_torch(Counting(), torch.ones(2, 4))
    assert from_torch(Noisy(), torch.ones(2, 4)).note == "not compared: the module gives something else each time"
    with pytest.raises(ConversionFailed, match=r"does not take x \[3, 4\]"):
        from_torch(FixedBatch(), torch.ones(2, 4))


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 2, 2)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "skl2onnx", None)
    with pytest.raises(ConversionFailed, match="skl2onnx") as caught:
        from_sklearn(object(), np.zeros((2, 2)))
    assert caught.value.remedy == "pip install 'anneal-client[sklearn]'"
