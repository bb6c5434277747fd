"""Estimators of scikit-learn and models of XGBoost, as ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from anneal_client.errors import ConversionFailed
from anneal_client.exporting.checks import hold_against, need, run_onnx
from anneal_client.prepared import ExportedModel


def from_sklearn(
    model: Any, example: Any, *, name: str | None = None, opset: int | None = None, tolerance: float | None = None
) -> ExportedModel:
    """A fitted estimator or pipeline (skl2onnx), held against its `predict` and `predict_proba`.

    `example`: some rows as it takes them: a matrix, of which the input `X` is made, or a data frame, of whose columns
    an input each. Probabilities are one array [samples, classes]. Needs the extra `sklearn`. Raises
    `ConversionFailed`.
    """
    skl2onnx = need("skl2onnx", "sklearn")
    options = {id(model): {"zipmap": False}} if hasattr(model, "predict_proba") else None
    feeds = _feeds(example)
    if list(feeds) == ["X"]:
        types, shaped = None, feeds["X"][:1]
    else:
        guessed = need("skl2onnx.common.data_types", "sklearn").guess_data_type
        types, shaped = [(column, guessed(array)[0][1]) for column, array in feeds.items()], None

    def convert() -> Any:
        return skl2onnx.to_onnx(model, shaped, initial_types=types, options=options, target_opset=opset)

    exported = _written(convert, name or type(model).__name__.lower(), "skl2onnx")
    return _checked(exported, model, example, feeds, tolerance)


def from_xgboost(
    model: Any, example: Any, *, name: str | None = None, opset: int | None = None, tolerance: float | None = None
) -> ExportedModel:
    """A fitted `XGBClassifier` or `XGBRegressor` (onnxmltools), held against its `predict` and `predict_proba`.
    `example`: some rows, a matrix. The input is `X`, float32. Needs the extra `xgboost`. Raises `ConversionFailed`."""
    import numpy as np

    onnxmltools = need("onnxmltools", "xgboost")
    types = need("onnxmltools.convert.common.data_types", "xgboost")
    matrix = np.asarray(example, dtype=np.float32)
    initial = [("X", types.FloatTensorType([None, matrix.shape[1]]))]

    def convert() -> Any:
        return onnxmltools.convert_xgboost(model, initial_types=initial, target_opset=opset)

    exported = _written(convert, name or type(model).__name__.lower(), "onnxmltools")
    return _checked(exported, model, matrix, {"X": matrix}, tolerance)


def _written(convert: Callable[[], Any], name: str, library: str) -> ExportedModel:
    exported = ExportedModel(f"{name}.onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the converters say of their own dependencies
            onnx_model = convert()
    except Exception as refused:  # the converters have no common error
        raise ConversionFailed(
            "export_failed",
            f"{library} does not convert the model: {type(refused).__name__}: {str(refused).strip()[:1000]}",
            remedy=f"{library}'s documentation lists what it converts; a part that it does not know can be left out of "
            "the pipeline and computed by the caller.",
        ) from refused
    exported.path.write_bytes(onnx_model.SerializeToString())
    return exported


def _checked(
    exported: ExportedModel, model: Any, example: Any, feeds: dict[str, Any], tolerance: float | None
) -> ExportedModel:
    import numpy as np

    rows = len(np.asarray(next(iter(feeds.values()))))
    calls = [c for c in (getattr(model, n, None) for n in ("predict", "predict_proba")) if c is not None]
    if not calls:
        calls = [model.transform]
    wanted = [np.asarray(call(example)) for call in calls]
    outputs = run_onnx(exported.path, feeds)
    found = None if outputs is None else list(outputs.values())[: len(wanted)]
    if found is not None:
        # [samples, 1] and [samples] are the same numbers.
        found = [
            np.asarray(f).reshape(w.shape) if np.size(f) == w.size else f for f, w in zip(found, wanted, strict=True)
        ]
        wanted = [w.astype(f.dtype) if w.dtype.kind in "iuf" else w for w, f in zip(wanted, found, strict=True)]
        found = [f.astype(w.dtype) if w.dtype.kind in "UO" else f for f, w in zip(found, wanted, strict=True)]
    if rows:
        hold_against(exported, wanted, found, tolerance)
    return exported


def _feeds(example: Any) -> dict[str, Any]:
    """The rows by input: `X`, float32; or of a data frame, a column each, [samples, 1]."""
    import numpy as np

    if not hasattr(example, "columns"):
        matrix = np.asarray(example)
        return {"X": matrix.astype(np.float32) if matrix.dtype.kind in "iufb" else matrix}
    feeds = {}
    for column in example.columns:
        array = np.asarray(example[column]).reshape(-1, 1)
        if array.dtype.kind == "O":
            array = array.astype(str)
        feeds[str(column)] = array.astype(np.float32) if array.dtype.kind == "f" else array
    return feeds
