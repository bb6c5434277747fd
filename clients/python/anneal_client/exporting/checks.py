"""Whether an export computes what the original does, on the inputs it was exported with."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anneal_client.errors import ConversionFailed
from anneal_client.prepared import ExportedModel

# Of an output's largest number: what another library's order of summing may move.
TOLERANCE = 1e-3
TOLERANCE_HALF = 3e-2


def need(module: str, extra: str) -> Any:
    """The library. Raises `ConversionFailed` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise ConversionFailed(
            "library_missing",
            f"This needs {missing.name or module}, which is not installed here.",
            remedy=f"pip install 'anneal-client[{extra}]'",
        ) from missing


def run_onnx(path: Path, feeds: Mapping[str, Any]) -> dict[str, Any] | None:
    """The outputs of an `.onnx` by name; None where ONNX Runtime is not installed. Raises `ConversionFailed` where it
    does not take the model."""
    try:
        import onnxruntime as ort
    except ImportError:
        return None
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as refused:  # ONNX Runtime's errors have no class of their own
        raise ConversionFailed(
            "export_does_not_run",
            f"ONNX Runtime does not run what was exported: {str(refused)[:1000]}",
            remedy="Export another opset, or make the module's forward simpler where the message points to.",
        ) from refused


def hold_against(
    exported: ExportedModel, wanted: Sequence[Any], found: Sequence[Any] | None, tolerance: float | None
) -> None:
    """Note the largest difference, relative to an output's largest number. Raises `ConversionFailed` (`export_differs`)
    where it is above `tolerance` (None: what the types carry)."""
    import numpy as np

    if found is None:
        exported.note = "not compared: onnxruntime is not installed here"
        return
    if len(wanted) != len(found):
        raise _differs(f"The original has {len(wanted)} outputs, the export {len(found)}.")
    worst = exported.difference or 0.0
    for number, (a, b) in enumerate(zip(map(np.asarray, wanted), map(np.asarray, found), strict=True)):
        if a.shape != b.shape:
            raise _differs(f"Output {number} has the shape {list(a.shape)}, that of the export {list(b.shape)}.")
        if a.dtype.kind not in "fcV" and b.dtype.kind not in "fcV":
            if not np.array_equal(a, b):
                raise _differs(f"Output {number} ({a.dtype}) is not equal.")
            continue
        half = min(a.dtype.itemsize, b.dtype.itemsize) <= 2
        allowed = tolerance if tolerance is not None else TOLERANCE_HALF if half else TOLERANCE
        x, y = a.astype(np.float64), b.astype(np.float64)
        size = float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) or 1.0
        with np.errstate(invalid="ignore"):
            apart = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        difference = float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0)) / size
        if difference > allowed:
            raise _differs(
                f"Output {number} differs by {difference:.2g} of its largest number, allowed is {allowed:g}."
            )
        worst = max(worst, difference)
    exported.difference = worst


def _differs(detail: str) -> ConversionFailed:
    return ConversionFailed(
        "export_differs",
        f"What was exported does not compute the same. {detail}",
        remedy="A forward that branches in Python on values, or that is random, cannot be exported as it is; "
        "`tolerance=` allows more.",
    )
