"""Kinds of artifacts: what the files in a folder are, as steps and backends declare it. A backend or a stage from
another package may have kinds of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

ONNX: Final = "onnx"  # `model.onnx`, and `model.onnx.data` where the weights are too many
OPENVINO_IR: Final = "openvino-ir"  # `model.xml`, `model.bin`, `interface.json`
EXPORTED_PROGRAM: Final = (
    "exported-program"  # `program.pt2` as `torch.export.save` writes it, without pickles, `interface.json`
)
TRAINING: Final = "training"  # a program that is being trained: `program.pt2`, `interface.json`, `training.pt`
INDUCTOR_PACKAGE: Final = "inductor-package"  # `model.pt2` (or `program.pt2` and `cache.bin`), `engine.json`
TENSORRT_PLAN: Final = "tensorrt-plan"  # `engine.plan`, `engine.json`
TENSORRT_RTX_PLAN: Final = "tensorrt-rtx-plan"  # the same, of TensorRT for RTX

BY_BATCH: Final = "engines-by-batch"  # engines of other kinds, in a folder each
CHAINED: Final = "engines-in-a-chain"  # likewise: one of each model of a chain

PROGRAM_FILE: Final = "program.pt2"
DATA_FILE: Final = "model.onnx.data"
# Files of a kind that have no other link where a stage sees them: the package onnx takes a second one of external data
# for an attack.
UNSHARED: Final[Mapping[str, frozenset[str]]] = {ONNX: frozenset({DATA_FILE})}


def names_in(folder: Path) -> list[str]:
    """Of the files of an artifact, sorted, as its references have them: relative to `folder`, which holds folders only
    where several engines lie side by side."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
