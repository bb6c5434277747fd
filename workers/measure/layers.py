"""Layer times from a library's own profiler, run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from workers.kernel import LayerTime


def median_times(runs: Sequence[Mapping[tuple[str, str], float]]) -> list[LayerTime]:
    """The median over `runs` of each layer, the slowest first. A run: (name, op type) → ms; a layer that does not stand
    in it took none. Medians, because one preempted run in twenty makes a mean ten times as large."""
    names = list(dict.fromkeys(name for run in runs for name in run))
    times = (LayerTime(*name, float(np.median([run.get(name, 0.0) for run in runs]))) for name in names)
    return sorted((t for t in times if t.ms > 0), key=lambda t: -t.ms)
