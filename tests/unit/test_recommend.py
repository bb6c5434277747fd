"""Recommendations follow from figures: what the profile of the shipped engine says of its limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workers.pipeline import recommend


def _said(**data: Any) -> str:
    figures = {"batch": 1, "engine_bytes": 4e8, "copy_bytes_per_s": 1e10, **data}
    explanation = SimpleNamespace(profile=SimpleNamespace(data=figures))
    return " ".join(recommend._limits(SimpleNamespace(explanation=explanation)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"weight_bandwidth_share": 0.7, "inference_ms": 60.0}, "bound by memory"),
        ({"weight_bandwidth_share": 0.05, "inference_ms": 800.0}, "a GPU computing in fp16"),
        ({"weight_bandwidth_share": 0.05, "inference_ms": 0.5}, ""),
        ({"weight_bandwidth_share": 0.3, "inference_ms": 60.0}, ""),
        ({"weight_bandwidth_share": None, "copy_bytes_per_s": None, "inference_ms": 60.0}, ""),
    ],
)
def test_what_limits_the_engine(data: dict[str, Any], says: str) -> None:
    said = _said(**data)
    assert says in said
    assert bool(says) == bool(said)
