"""Engines timed at shapes beside the typical one: short windows, at the batch size that counts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.domain.failures import StageFailure
from workers.measure import figures
from workers.measure.engine_process import EngineProcess
from workers.measure.inputs import InputSource
from workers.measure.quiet import Quiet
from workers.measure.rounds import Measured, measure
from workers.measure.shapes import Shape, at_batch

Array = np.ndarray[Any, Any]

SHARE = 0.25  # of the time that the timing of all may take
_LEAST_SECONDS = 0.3
_LESS = 0.25  # of what is measured at the typical shape
_LONG_CALL = 0.02  # of the time left, at most, for one call of the original at a shape that nobody asked for
_LEAST_CALL_S = 0.5


@dataclass
class OtherShapes:
    """What is timed beside the typical shape. `feeds`: label → distinct inputs; `left_out`: what is not, and why."""

    source: InputSource
    batch: int
    shapes: list[Shape] = field(default_factory=list)
    feeds: dict[str, list[dict[str, Array]]] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)

    def try_on(self, original: EngineProcess, call_s: float, seconds_left: float) -> None:
        """Find out which shapes the original takes. `call_s`: of a call at the typical one."""
        for alternatives in self.source.shapes.others:
            reason = ""
            for shape in alternatives:
                expected = call_s * self.source.growth(shape) ** 2
                if expected > max(_LEAST_CALL_S, _LONG_CALL * seconds_left):
                    reason = "one call of the original would take too long"
                    continue
                try:
                    feeds = self.source.at(shape, self.batch)
                    original.infer(feeds[0])
                except (StageFailure, MemoryError) as failure:
                    detail = failure.detail if isinstance(failure, StageFailure) else "too large"
                    reason = reason or f"the original does not take it: {detail[:200]}"
                    continue
                self.shapes.append(shape)
                self.feeds[shape.label] = feeds
                break
            else:
                self._leave_out(alternatives[0], reason)

    def measure(
        self,
        processes: Mapping[str, EngineProcess],
        *,
        min_seconds: float,
        rounds: int,
        seed: int,
        seconds: float,
        always: Collection[str],
        progress: Callable[[float], None],
        quiet: Quiet | None = None,
    ) -> dict[str, Measured]:
        """By label, within about `seconds`; what that does not hold is left out."""
        found: dict[str, Measured] = {}
        ends = time.monotonic() + seconds
        short = max(_LEAST_SECONDS, _LESS * min_seconds)
        for done, shape in enumerate(self.shapes):

            def told(fraction: float, done: int = done) -> None:
                progress((done + fraction) / len(self.shapes))

            left = ends - time.monotonic()
            if left <= 0:
                self._leave_out(shape, "the time left did not hold it")
                continue
            share = math.inf if math.isinf(left) else left / (len(self.shapes) - done)
            found[shape.label] = measure(
                processes,
                shape.label,
                min_seconds=min(short, min_seconds),
                rounds=rounds,
                want_p99=False,
                seed=seed,
                progress=told,
                ends=time.monotonic() + share,
                always=always,
                quiet=quiet,
            )
        return found

    def figures(self, measured: Mapping[str, Measured], baseline: str, again: str, seed: int) -> dict[str, list[Any]]:
        """By engine: at each shape {label, dims, batch, in_use} with latencies, `speedup` and `throughput_ratio`, or
        with why there are none: `failed` (a StageFailure as JSON) or `reason`."""
        found: dict[str, list[Any]] = {}
        for shape in self.shapes:
            at = measured.get(shape.label)
            if at is None:
                continue
            if baseline not in at.timings:
                failure = at.failures.get(baseline)
                self._leave_out(shape, failure.detail if failure else "the original was not measured there")
                continue
            first = at.timings[baseline]
            second = at.timings.get(again, first)
            for name, timing in at.timings.items():
                ratios = figures.itself() if name == baseline else figures.comparison(first, second, timing, seed)
                entry = {**self._told(shape), **figures.latency_figures(timing, self.batch), **ratios}
                found.setdefault(name, []).append(entry)
            for name, failure in at.failures.items():
                told: dict[str, Any] = {"failed": failure.to_json()}
                if failure.code == "budget_exhausted":
                    told = {"reason": "the time left did not hold it"}
                found.setdefault(name, []).append({**self._told(shape), **told})
        return found

    def _leave_out(self, shape: Shape, reason: str) -> None:
        self.left_out.append({**self._told(shape), "reason": reason})

    def _told(self, shape: Shape) -> dict[str, Any]:
        dims = at_batch(self.source.inputs, shape.dims, self.batch, self.source.axes)
        return {
            "label": shape.label,
            "dims": {name: list(d) for name, d in dims.items()},
            "batch": self.batch,
            "in_use": shape.in_use,
        }

    def typical(self) -> dict[str, Any]:
        """The shape that everything else was timed at."""
        return {**self._told(self.source.shapes.typical), "why": self.source.shapes.why}
