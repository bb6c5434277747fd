"""ONNX Runtime's CPU provider as the interpreter of graphs: what passes run a graph with while they look into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def optimized(path: Path, out: Path) -> Path:
    """Write the model after basic optimizations, which do not depend on the hardware, to `out`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return out


def open_session(model: Path | bytes, *, optimize: bool = False) -> Any:
    """A CPU session. `optimize`: basic optimizations only: they keep the named tensors and do not depend on the
    hardware; without, the nodes run one by one as they stand."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )
