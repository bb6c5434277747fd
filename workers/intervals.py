"""Intervals of integers: what arithmetic on them can give."""

from __future__ import annotations

import math
from collections.abc import Sequence

Interval = tuple[float, float]  # lowest and highest value; infinite where nothing bounds it
ANY: Interval = (-math.inf, math.inf)
LONGEST = (1 << 24) - 1  # no axis has more elements


def computed(op: str, inputs: Sequence[Interval], summed: int, fmod: int) -> Interval | None:
    """Of arithmetic on integers; None where the type alone bounds it."""
    a = inputs[0] if inputs else ANY
    b = inputs[1] if len(inputs) > 1 else ANY
    if op in ("Add", "Sum"):
        return (sum(low for low, _ in inputs), sum(high for _, high in inputs))
    if op == "Sub":
        return (a[0] - b[1], a[1] - b[0])
    if op == "Neg":
        return (-a[1], -a[0])
    if op == "Sign":
        return (-1, 1)
    most = max(abs(a[0]), abs(a[1]))
    if op == "Abs":
        return (0, most)
    if op == "Div":
        return (-most, most) if a[0] < 0 or b[0] < 0 else a
    if op == "Mod":
        divisor = max(abs(b[0]), abs(b[1])) - 1
        return (-divisor if fmod or b[0] < 0 else 0, divisor)
    if op == "Mul":
        ends = [_product(x, y) for x in a for y in b]
        return (min(ends), max(ends))
    if op == "Clip":
        low, high = (b[0], inputs[2][1]) if len(inputs) > 2 else (-math.inf, math.inf)
        return both(a, (low, high))
    if op in ("ReduceSum", "CumSum"):
        return (min(0, _product(a[0], summed)), max(0, _product(a[1], summed)))
    if op == "Range":
        return (-LONGEST, LONGEST)
    return None


def _product(a: float, b: float) -> float:
    return 0 if a == 0 or b == 0 else a * b


def both(a: Interval, b: Interval) -> Interval:
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low <= high else b  # what cannot be: the tighter claim stands


def outside(interval: Interval, limits: Interval) -> bool:
    return interval[0] < limits[0] or interval[1] > limits[1]


def beyond(interval: Interval, most: float) -> bool:
    return outside(interval, (-most, most))
