"""Seeded models with data in folders, as the stages take them, and their outputs on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from tests.factories import architectures
from workers.graph.onnx_graph import model_specs
from workers.kernel import Reporter, StageContext, StageResult, backends
from workers.stages.convert import Convert, ConvertOptions
from workers.stages.simplify import Simplify, SimplifyOptions

Arrays = dict[str, np.ndarray[Any, Any]]
SIZES: dict[str, dict[str, int]] = {
    "residual_cnn": {"channels": 32, "blocks": 3},
    "vit": {"hidden": 128, "layers": 2},
    "bert": {"hidden": 128, "layers": 2},
    "gpt2": {"hidden": 64, "layers": 1},
}
DIMS = {"sequence": 16, "time": 6}


class Notes(Reporter):
    """Keeps what a stage says."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def progress(self, fraction: float, message: str = "") -> None:
        assert 0 <= fraction <= 1

    def note(self, message: str, **facts: Any) -> None:
        self.messages.append(message)


@dataclass
class Case:
    """Folders `model` and `simplified` with a `model.onnx`, `data` with a `data.npz`; `feeds`: the first eight samples;
    `expected`: their outputs on ONNX Runtime's CPU provider."""

    name: str
    root: Path
    model: Path
    simplified: Path
    data: Path
    feeds: Arrays
    expected: Arrays

    def converted(
        self,
        recipe: str,
        hardware: Mapping[str, Any],
        *,
        inputs: Mapping[str, Path | None] | None = None,
        **options: Any,
    ) -> tuple[Path, StageResult]:
        """(Folder of the model that stage `convert` makes, its result). `inputs` replace the usual; None = none."""
        root = Path(tempfile.mkdtemp(prefix=f"{recipe}-", dir=self.root))
        workspace = root / "work"
        workspace.mkdir()
        given = {"model": self.simplified, "calibration": self.data, **(inputs or {})}
        folders = {name: folder for name, folder in given.items() if folder is not None}
        ctx = StageContext(folders, workspace, root / "out", Notes(), hardware)
        result = Convert().run(ctx, ConvertOptions.model_validate({"recipe": recipe, **options}))
        return root / "out" / "model", result

    def fused(self) -> Path:
        """Folder of the model with ONNX Runtime's transformer fusions, as stage `simplify` makes it."""
        root = Path(tempfile.mkdtemp(prefix="fused-", dir=self.root))
        workspace = root / "work"
        workspace.mkdir()
        ctx = StageContext({"model": self.model}, workspace, root / "out", Notes(), {})
        Simplify().run(ctx, SimplifyOptions(fusions=True))
        return root / "out" / "model"


def make_case(name: str, root: Path, model: ModelProto | None = None) -> Case:
    """`model`: that one; else the architecture of this name."""
    model = model or getattr(architectures, name)(**SIZES.get(name, {}))
    folder, data = root / "model", root / "data"
    folder.mkdir()
    data.mkdir()
    onnx.save(model, folder / "model.onnx")
    rng = np.random.default_rng(7)
    arrays: Arrays = {}
    for spec in model_specs(model)[0]:
        shape = [32, *(d if isinstance(d, int) else DIMS[d] for d in spec.shape[1:])]
        if spec.name == "input_ids":
            arrays[spec.name] = rng.integers(0, 64, shape)
        elif spec.dtype == "int64":
            arrays[spec.name] = np.full(shape, int("mask" in spec.name), np.int64)
        else:
            arrays[spec.name] = rng.normal(size=shape).astype(np.float32)
    np.savez(data / "data.npz", **arrays)  # type: ignore[arg-type]
    feeds = {n: np.ascontiguousarray(a[:8]) for n, a in arrays.items()}
    session = backends()["onnxruntime"]().load(folder, {})
    workspace = root / "simplify"
    workspace.mkdir()
    Simplify().run(StageContext({"model": folder}, workspace, root / "simplified", Notes(), {}), SimplifyOptions())
    return Case(name, root, folder, root / "simplified" / "model", data, feeds, session.run(feeds))


def cosine(wanted: Arrays, found: Arrays) -> float:
    """Smallest over the outputs."""
    values = []
    for name, array in wanted.items():
        a, b = array.astype(np.float64).reshape(-1), found[name].astype(np.float64).reshape(-1)
        values.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    return min(values)
