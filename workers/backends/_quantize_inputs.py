"""What the quantizing stages share: which models and nodes they take, calibration data, and the ranges artifact."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from onnx import ModelProto

from app.domain.failures import FailureKind, StageFailure, data_failure, model_failure
from workers.backends import _ort_calibrate as calibration
from workers.backends import _ort_precision as precision
from workers.backends import _ort_quantize as quantization
from workers.backends._onnxruntime_messages import runtime_failure
from workers.data import Samples
from workers.onnx_files import MODEL_FILE, read_skeleton

RANGES_FILE = "ranges.json"
RANGES_FORMAT = 1
OLDEST_OPSET = 13  # QuantizeLinear with an axis, and Cast to bfloat16
LARGEST_RANGES_FILE = 64 << 20  # bytes

Part = Literal["all", "calibration"]


def check_source(model: ModelProto, exclude_nodes: Sequence[str]) -> None:
    """Raises StageFailure: `already_quantized`, `not_float32`, `opset_too_old`, `unknown_node`."""
    if quantization.is_quantized(model):
        raise model_failure(
            "already_quantized",
            "The model already holds quantized operators.",
            remedy="Upload the float32 model, or ask for no further precision.",
        )
    if precision.has_low_precision_weights(model):
        raise model_failure(
            "not_float32",
            "The model's weights are already in float16 or bfloat16.",
            remedy="Upload the float32 model.",
        )
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise model_failure(
            "opset_too_old",
            f"Quantization needs opset {OLDEST_OPSET}; the model has {opset}.",
            remedy="Export the model with opset 17 or later.",
        )
    check_names(model, exclude_nodes)


def check_names(model: ModelProto, names: Sequence[str]) -> None:
    """Raises `unknown_node` for the first name that no node has, at any depth; it tells the closest ones."""
    known = quantization.node_names(model)
    unknown = sorted(set(names) - known)
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0], sorted(known), n=3)
    hint = f" The closest names are {', '.join(map(repr, close))}." if close else ""
    raise StageFailure(
        "unknown_node",
        f"{unknown[0]!r} is no node of the simplified model.{hint}",
        FailureKind.REQUEST,
        node=unknown[0],
        remedy="Use node names of the simplified model, as the report lists them.",
    )


def op_types_for(
    model: ModelProto,
    asked: Sequence[str] | None,
    excluded: Sequence[str],
    recipe: Literal["dynamic_int8", "static_int8"],
) -> list[str]:
    """The op types to quantize, sorted; raises `nothing_to_quantize`."""
    op_types = list(asked or quantization.default_op_types(model, recipe))
    if recipe == "dynamic_int8":
        op_types = [op for op in op_types if op not in quantization.DYNAMIC_FORBIDDEN]
    if not quantization.quantizable_nodes(model, op_types, excluded):
        raise nothing_to_quantize(f"no node of the types {', '.join(sorted(op_types)) or '(none)'}")
    return sorted(set(op_types))


def nothing_to_quantize(reason: str) -> StageFailure:
    return model_failure(
        "nothing_to_quantize",
        f"There is nothing to quantize: the model has {reason}.",
        remedy="Use another precision for this model.",
    )


def calibration_samples(data: Path, model: Path, part: Part, max_samples: int) -> Samples:
    """The calibration data set at `data` for the model file `model`."""
    graph = read_skeleton(model)
    inputs, outputs = quantization.graph_inputs(graph), quantization.interface(graph.graph.output)
    return Samples(data, inputs, outputs, part=part, max_samples=max_samples)


def batches_of(samples: Samples) -> Callable[[int], Iterator[dict[str, Any]]]:
    """What the calibrators ask for: a new pass over the samples' inputs in batches of a size."""

    def batches(size: int) -> Iterator[dict[str, Any]]:
        for batch in samples.batches(size):
            yield batch.feeds

    return batches


def calibrated(
    folder: Path,
    prepared: Path,
    tensors: Sequence[str],
    samples: Samples | None,
    *,
    method: calibration.Method,
    percentile: float,
    symmetric: bool,
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """The content of a ranges file for `tensors` of the `prepared` copy of the model in `folder`.

    Raises StageFailure: `calibration_data_missing`, `calibration_failed`.
    """
    if samples is None:
        raise StageFailure(
            "calibration_data_missing",
            "Static int8 needs calibration data.",
            FailureKind.REQUEST,
            remedy="Name a data set under calibration.dataset_id.",
        )
    try:
        found = calibration.calibrate(
            prepared,
            tensors,
            batches_of(samples),
            method=method,
            percentile=percentile,
            symmetric=symmetric,
            progress=progress,
            total=len(samples),
        )
    except (StageFailure, MemoryError):
        raise
    except Exception as error:  # the runtime raises its own classes, RuntimeError and ValueError
        raise runtime_failure("calibration_failed", error, remedy="Check that the model runs on this data.") from error
    with (folder / MODEL_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "format": RANGES_FORMAT,
        "model": digest,
        "dataset": samples.digest(),
        "method": method,
        "percentile": percentile if method == "percentile" else None,
        "samples": found.samples,
        "tensors": {name: [low, high] for name, (low, high) in sorted(found.tensors.items())},
        "unusable": sorted(found.unusable),
    }


def read_ranges(path: Path, tensors: Collection[str]) -> dict[str, Any]:
    """The ranges of an earlier calibration; raises `ranges_invalid` or `ranges_mismatch`."""
    ranges: Any = None
    if path.stat().st_size <= LARGEST_RANGES_FILE:
        try:
            ranges = json.loads(path.read_bytes())
        except ValueError:
            ranges = None
    if not _is_ranges(ranges):
        raise data_failure(
            "ranges_invalid",
            "The calibration ranges are not a file that this service wrote.",
            remedy="Calibrate again with a data set.",
        )
    missing = sorted(set(tensors) - set(ranges["tensors"]) - set(ranges["unusable"]))
    if missing:
        raise data_failure(
            "ranges_mismatch",
            f"The calibration ranges have none for {len(missing)} of the model's {len(tensors)} tensors.",
            tensor=missing[0],
            remedy="Calibrate again with a data set; the ranges belong to another graph.",
        )
    found: dict[str, Any] = ranges
    return found


def _is_ranges(value: Any) -> bool:
    keys = {"format", "method", "percentile", "samples", "dataset", "tensors", "unusable"}
    if not isinstance(value, Mapping) or value.get("format") != RANGES_FORMAT or not keys <= set(value):
        return False
    tensors, unusable = value["tensors"], value["unusable"]
    if not isinstance(tensors, Mapping) or not isinstance(unusable, list):
        return False
    return all(isinstance(name, str) for name in unusable) and all(map(_is_range, tensors.values()))


def _is_range(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) in (int, float) for v in value):
        return False
    return all(math.isfinite(v) and abs(v) <= calibration.USABLE_MAGNITUDE for v in value) and value[0] <= value[1]
