"""Keys change with everything that can change the output, and with nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.artifact_key import ArtifactRef, FileRef, canonical_json, digest_of, stage_key

MODEL = ArtifactRef((FileRef("model.onnx", "a" * 64, 10),))
BASE: dict[str, Any] = {
    "stage": "quantize",
    "version": 1,
    "inputs": {"model": MODEL},
    "options": {"recipe": "static_int8", "method": "minmax"},
    "libraries": {"onnx": "1.23.2"},
    "hardware": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "build"},
        {"version": 2},
        {"inputs": {"model": ArtifactRef((FileRef("model.onnx", "b" * 64, 10),))}},
        {"inputs": {"other": MODEL}},
        {"inputs": {"model": ArtifactRef((FileRef("renamed.onnx", "a" * 64, 10),))}},
        {"options": {"recipe": "static_int8", "method": "entropy"}},
        {"options": {"recipe": "static_int8", "method": "minmax", "per_channel": True}},
        {"libraries": {"onnx": "1.24.0"}},
        {"hardware": "cpu-x"},
    ],
)
def test_every_part_counts(change: dict[str, Any]) -> None:
    assert stage_key(**{**BASE, **change}) != stage_key(**BASE)


def test_order_does_not_count() -> None:
    two = (FileRef("a", "1" * 64, 1), FileRef("b", "2" * 64, 2))
    assert ArtifactRef(two).digest == ArtifactRef(two[::-1]).digest
    reordered = {**BASE, "options": {"method": "minmax", "recipe": "static_int8"}}
    assert stage_key(**reordered) == stage_key(**BASE)


def test_artifacts_survive_json() -> None:
    assert ArtifactRef.from_json(MODEL.to_json()) == MODEL


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"x": float("nan")})


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=5))
def test_digest_is_a_function_of_the_content(value: dict[str, Any]) -> None:
    assert digest_of(value) == digest_of(dict(reversed(value.items())))
