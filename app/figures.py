"""Figures as people read them: no exponents, no more digits than say something, a share in percent."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

# Metrics that are a share of something: 0.7245 is read as 72.45 %.
SHARES = frozenset({"top1", "top5", "macro_f1", "mean_iou", "agreement", "neighbours"})
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Four digits: 17,260 for 17264.3, 0.4328 for 0.432825, 1.2 × 10⁻⁵ for 0.000012."""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 999.95:
        return f"{float(f'{value:.4g}'):,.0f}"
    if value and abs(value) < 1e-4:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return f"{value:.4g}"


def percent(share: float) -> str:
    """72.45 % for 0.7245."""
    return f"{number(round(100 * share, 2))} %"


def metric(name: str | None, value: float) -> str:
    """A value of this metric of accuracy."""
    return percent(value) if name in SHARES else number(value)


def size(count: float) -> str:
    """Bytes: 25.3 GB, by powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{float(f'{count:.3g}'):g} {unit}"
        count /= 1000
    return f"{float(f'{count:.3g}'):g} TB"


def duration(seconds: float) -> str:
    """0.34 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{float(f'{max(seconds, 0):.2g}'):g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 >= 60 else "")


def moment(at: datetime) -> str:
    """To the minute, in UTC; pages say the reader's own time where they can run a script."""
    return f"{at:%Y-%m-%d %H:%M} UTC"


def dims(shape: Any) -> str:
    """A shape: 1×3×224×224."""
    return "×".join("?" if axis is None else str(axis) for axis in shape) if isinstance(shape, list) else "any shape"
