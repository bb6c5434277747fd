"""Figures as people read them. What was not measured is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

DASH = "–"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3, unit: str = "") -> str:
    """So many significant digits, never in scientific notation; thousands are set apart. Whole numbers are counts: they
    keep all of theirs."""
    if not is_number(value):
        return DASH
    if value == 0:
        return f"0{unit}"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") + unit
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 9)}f}".replace(",", " ") + unit


def milliseconds(value: Any) -> str:
    if is_number(value) and value >= 10_000:
        return number(value / 1000, 3, " s")
    return number(value, 3, " ms")


def size(value: Any) -> str:
    """Of bytes, in decimal units."""
    if not is_number(value):
        return DASH
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= of:
            return number(value / of, 3, f" {unit}")
    return f"{value:g} B"


def megabytes(value: Any) -> str:
    return size(value * 1e6) if is_number(value) else DASH


def percent(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f} %" if is_number(value) else DASH


def speedup(value: Any) -> str:
    """A ratio with its interval, of {ratio, low, high}; or a bare number."""
    if not isinstance(value, Mapping):
        return number(value, 3, "x")
    text = number(value.get("ratio"), 3, "x")
    if not is_number(value.get("low")) or not is_number(value.get("high")):
        return text
    return f"{text} [{number(value['low'])}, {number(value['high'])}]"


def duration(seconds: Any) -> str:
    if not is_number(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def instant(text: Any) -> datetime | None:
    """Of RFC 3339; None where it is none."""
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def between(start: Any, end: Any) -> float | None:
    first, last = instant(start), instant(end)
    return None if first is None or last is None else (last - first).total_seconds()


def when(text: Any) -> str:
    """In the local time of who reads it."""
    found = instant(text)
    return DASH if found is None else found.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def bar(fraction: Any, columns: int = 20) -> str:
    share = min(max(float(fraction), 0.0), 1.0) if is_number(fraction) else 0.0
    full = round(share * columns)
    return "█" * full + "░" * (columns - full)
