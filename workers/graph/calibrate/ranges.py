"""Ranges of activations by calibration: what each recipe calibrates, and the file that further stages start from.

One schema for all recipes. A file says for which of them it was made, and holds a range for every tensor that the
recipe may round, whichever nodes are kept in higher precision: keeping further ones, or measuring how sensitive they
are, takes no new calibration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from onnx import ModelProto

from app.domain.failures import FailureKind, StageFailure, data_failure
from workers.data import Samples
from workers.graph.calibrate import statistics as calibration
from workers.graph.onnxruntime_messages import runtime_failure
from workers.graph.qdq import placement as qdq

Recipe = Literal["static_int8", "int8", "fp8"]
RANGES_FILE = "ranges.json"
RANGES_FORMAT = 2
LARGEST_RANGES_FILE = 64 << 20  # bytes
_KEYS = frozenset({"format", "recipe", "method", "percentile", "samples", "dataset", "tensors", "unusable"})


def calibrated_tensors(recipe: Recipe, model: ModelProto, op_types: Collection[str] | None) -> list[str]:
    """The activations that `recipe` may round, sorted; needs inferred types.

    `static_int8` (`quantize`): what the nodes of `op_types` read and write. `int8`, `fp8` (`convert`): what products
    and convolutions with weights read, and both sides of the sums that a convolution is fused into.
    """
    if recipe == "static_int8":
        return calibration.calibratable(model, op_types or (), ())
    return list(qdq.roundable(model, recipe, op_types))


def batches_of(samples: Samples) -> Callable[[int], Iterator[dict[str, Any]]]:
    """What the calibrators ask for: a new pass over the samples' inputs in batches of a size."""

    def batches(size: int) -> Iterator[dict[str, Any]]:
        for batch in samples.batches(size):
            yield batch.feeds

    return batches


def calibrate(
    prepared: Path,
    tensors: Sequence[str],
    samples: Samples | None,
    *,
    method: calibration.Method,
    percentile: float,
    symmetric: bool,
    progress: Callable[[float, str], None],
) -> calibration.Ranges:
    """Ranges of `tensors` of the prepared model over the samples. Raises StageFailure: `calibration_data_missing`,
    `calibration_failed`."""
    if samples is None:
        raise StageFailure(
            "calibration_data_missing",
            "Ranges of activations need calibration data.",
            FailureKind.REQUEST,
            remedy="Name a data set under calibration.dataset_id.",
        )
    try:
        return calibration.calibrate(
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


def document(
    recipe: Recipe,
    found: calibration.Ranges,
    samples: Samples,
    method: calibration.Method,
    percentile: float,
    learned: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """The content of a ranges file. `learned`: by training; they take the place of what was found."""
    tensors = {name: learned.get(name, limits) for name, limits in found.tensors.items()}
    return {
        "format": RANGES_FORMAT,
        "recipe": recipe,
        "dataset": samples.digest(),
        "method": method,
        "percentile": percentile if method == "percentile" else None,
        "samples": found.samples,
        "tensors": {name: [low, high] for name, (low, high) in sorted(tensors.items())},
        "unusable": sorted(found.unusable),
    }


def write_ranges(known: Mapping[str, Any], folder: Path) -> None:
    text = json.dumps(known, indent=1, sort_keys=True, allow_nan=False)
    (folder / RANGES_FILE).write_text(text + "\n")


def read_ranges(path: Path, recipe: Recipe, tensors: Collection[str]) -> dict[str, Any]:
    """The ranges of an earlier calibration for this recipe, which hold all of `tensors`; raises `ranges_invalid` or
    `ranges_mismatch`."""
    known: Any = None
    if path.stat().st_size <= LARGEST_RANGES_FILE:
        try:
            known = json.loads(path.read_bytes())
        except ValueError:
            known = None
    if not _is_document(known):
        detail = "The calibration ranges are not a file that this service wrote."
        raise data_failure("ranges_invalid", detail, remedy="Calibrate again with a data set.")
    if known["recipe"] != recipe:
        detail = f"The calibration ranges were made for {known['recipe']}, not for {recipe}."
        raise data_failure("ranges_mismatch", detail, remedy="Calibrate again with a data set.")
    missing = sorted(set(tensors) - set(known["tensors"]) - set(known["unusable"]))
    if missing:
        raise data_failure(
            "ranges_mismatch",
            f"The calibration ranges have none for {len(missing)} of the model's {len(tensors)} tensors.",
            tensor=missing[0],
            remedy="Calibrate again with a data set; the ranges belong to another graph.",
        )
    found: dict[str, Any] = known
    return found


def limits(known: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Lowest and highest value by tensor."""
    return {name: (low, high) for name, (low, high) in known["tensors"].items()}


def _is_document(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.get("format") != RANGES_FORMAT or not set(value) >= _KEYS:
        return False
    tensors, unusable = value["tensors"], value["unusable"]
    if not isinstance(tensors, Mapping) or not isinstance(unusable, list):
        return False
    return all(isinstance(name, str) for name in unusable) and all(map(_is_range, tensors.values()))


def _is_range(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) in (int, float) for v in value):
        return False
    return all(math.isfinite(v) and abs(v) <= calibration.USABLE_MAGNITUDE for v in value) and value[0] <= value[1]
