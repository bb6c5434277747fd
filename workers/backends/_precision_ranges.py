"""The file of calibrated ranges that a conversion leaves, and that another one may start from."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from app.domain.failures import data_failure

RANGES_FILE = "ranges.json"
RANGES_FORMAT = 1
LARGEST_RANGES_FILE = 64 << 20  # bytes


def read_ranges(path: Path, tensors: Collection[str]) -> dict[str, Any]:
    """The ranges of an earlier conversion; raises `ranges_invalid` or `ranges_mismatch`."""
    known: Any = None
    if path.stat().st_size <= LARGEST_RANGES_FILE:
        try:
            known = json.loads(path.read_bytes())
        except ValueError:
            known = None
    keys = {"format", "method", "percentile", "samples", "dataset", "tensors", "unusable"}
    if (
        not isinstance(known, dict)
        or known.get("format") != RANGES_FORMAT
        or not keys <= set(known)
        or not isinstance(known["tensors"], dict)
        or not isinstance(known["unusable"], list)
        or not all(map(_is_range, known["tensors"].values()))
    ):
        detail = "The calibration ranges are not a file that this service wrote."
        raise data_failure("ranges_invalid", detail, remedy="Calibrate again with a data set.")
    missing = sorted(set(tensors) - set(known["tensors"]) - {str(name) for name in known["unusable"]})
    if missing:
        raise data_failure(
            "ranges_mismatch",
            f"The calibration ranges have none for {len(missing)} of the model's {len(tensors)} tensors.",
            tensor=missing[0],
            remedy="Calibrate again with a data set; the ranges belong to another graph.",
        )
    return known


def _is_range(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) in (int, float) for v in value):
        return False
    return all(math.isfinite(v) for v in value) and value[0] <= value[1]
