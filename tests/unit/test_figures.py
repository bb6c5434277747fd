"""Figures as people read them."""

from __future__ import annotations

import pytest

from app import figures


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (17264.3, "17,260"), (999.96, "1,000"), (999.4, "999.4"), (0.432825, "0.4328"), (0.1, "0.1"), (0.0, "0"),
        (1.2e-5, "1.2 × 10⁻⁵"), (-0.19, "-0.19"), (8, "8"), (2048, "2048"), (135899, "135,899"), (1e9, "1,000,000,000"),
        (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_numbers(value: float, shown: str) -> None:
    assert figures.number(value) == shown


def test_shares_sizes_times_and_shapes() -> None:
    assert (figures.percent(0.7245), figures.percent(1.0)) == ("72.45 %", "100 %")
    assert (figures.metric("top1", 0.7245), figures.metric("rmse", 0.7245)) == ("72.45 %", "0.7245")
    assert [figures.size(n) for n in (0, 999, 1000, 25276510208, 2e12)] == ["0 B", "999 B", "1 kB", "25.3 GB", "2 TB"]
    shown = ["0.34 s", "12 s", "1 min", "3 min 20 s", "2 h 5 min", "1 h"]
    assert [figures.duration(s) for s in (0.34, 12.2, 60, 200, 7500, 3600)] == shown
    assert (figures.dims([1, 3, "n", None]), figures.dims(None)) == ("1×3×n×?", "any shape")
