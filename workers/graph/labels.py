"""Names of a classifier's classes, where the model carries them in its metadata."""

from __future__ import annotations

import ast
import json
from typing import Any

from onnx import ModelProto

# What exporters write: Ultralytics `names` as Python's dict, Hugging Face `id2label` as JSON; lists under the others.
_KEYS = ("names", "id2label", "labels", "classes")
_MOST_BYTES, _MOST = 1 << 20, 100_000


def labels_of(model: ModelProto) -> list[str] | None:
    """By class number; None where there are none, or not one for each number from 0 on."""
    told = {entry.key.lower(): entry.value for entry in model.metadata_props}
    for key in _KEYS:
        if found := _labels(_parsed(told.get(key, ""))):
            return found
    return None


def _parsed(text: str) -> Any:
    """JSON, or a literal of Python; None for what is neither."""
    if len(text) > _MOST_BYTES:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _labels(found: Any) -> list[str] | None:
    if isinstance(found, dict):
        by_number = {str(key): label for key, label in found.items()}
        found = [by_number.get(str(number)) for number in range(len(found))]
    if not isinstance(found, list) or not 0 < len(found) <= _MOST or not all(isinstance(f, str) for f in found):
        return None
    return [" ".join(label.split()) for label in found]  # one line each, in the files that they go into
