"""Kinds of artifacts: what the files in a folder are, as steps and backends declare it. A backend or a stage from
another package may have kinds of its own."""

from __future__ import annotations

from typing import Final

ONNX: Final = "onnx"  # `model.onnx`, and `model.onnx.data` where the weights are too many
OPENVINO_IR: Final = "openvino-ir"  # `model.xml`, `model.bin`, `interface.json`
EXPORTED_PROGRAM: Final = (
    "exported-program"  # `program.pt2` as `torch.export.save` writes it, without pickles, `interface.json`
)
INDUCTOR_PACKAGE: Final = "inductor-package"  # `model.pt2` (or `program.pt2` and `cache.bin`), `engine.json`
TENSORRT_PLAN: Final = "tensorrt-plan"  # `engine.plan`, `engine.json`
TENSORRT_RTX_PLAN: Final = "tensorrt-rtx-plan"  # the same, of TensorRT for RTX

PROGRAM_FILE: Final = "program.pt2"
