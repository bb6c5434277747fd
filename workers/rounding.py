"""How far an engine's numbers may be from those that it gave where it was built."""

from __future__ import annotations

from typing import Final

# Over the largest number of its output: another machine, version or batch sums in another order, and the lower the
# precision, the more that shows. Whole numbers are equal.
TOLERANCES: Final = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 5e-2, "fp8": 1e-1, "int4": 5e-2}


def tolerance(precision: str) -> float:
    """Of an engine in this precision; of several engines ("int8+fp32") the lowest one's."""
    return max(TOLERANCES.get(part, TOLERANCES["fp32"]) for part in precision.split("+"))
