"""The traffic that an engine is to serve, as a job says it: when requests come, how large they are, and the limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from app.domain.strict import Dimension, Name, Strict

Share = Annotated[float, Field(gt=0, le=1)]

MOST_ARRIVALS = 20_000
LEAST_ARRIVALS = 20
GAP = 20.0  # times the mean pause of the others: by chance (a Poisson process) once in e²⁰ pauses
_OFF_ONE = 1e-3  # that shares may miss one by: 0.33 + 0.33 + 0.34 is meant well


class Slo(Strict):
    """The limit: 99 of 100 requests are answered within `p99_latency_ms`, counted from when they were due. Whatever was
    refused, failed or came too late is not answered within it. `timeout_ms`: after which a caller has left; ten times
    the limit where it is not said."""

    p99_latency_ms: float = Field(gt=0, le=600_000)
    """99 of 100 requests are answered within so many milliseconds of when they were due."""
    timeout_ms: float | None = Field(default=None, gt=0, le=600_000)
    """After which a caller has left; null: ten times the limit."""

    @model_validator(mode="after")
    def _in_order(self) -> Slo:
        if self.timeout_ms is not None and self.timeout_ms < self.p99_latency_ms:
            raise ValueError("timeout_ms must not be below p99_latency_ms: callers would leave before the limit")
        return self


class ShapeShare(Strict):
    """`dims`: the shape of every input, its batch axis included (any size stands there: `batch_mix` says it)."""

    dims: dict[Name, list[Dimension]] = Field(min_length=1)
    """The shape of every input, its batch axis included."""
    share: Share
    """Of all requests."""


class Traffic(Strict):
    """`rate_per_second`: of requests, that are to be served; where it is not said, only the highest rate within the
    limit is looked for. `trace`: arrival times in seconds, in order; other rates are the same trace, faster or slower.
    `trace_gaps`: what to make of a pause that no such traffic has by chance: `refuse` the trace, `keep` it (there were
    no requests), or `close` it (the recording was interrupted). `batch_mix`: batch size → share of the requests.
    `shape_mix`: shares of shapes; without it, those of the data set."""

    arrival: Literal["poisson", "constant", "trace"] = "poisson"
    """When requests come: at random (`poisson`), evenly, or as the trace says."""
    rate_per_second: float | None = Field(default=None, gt=0, le=1e6)
    """Requests per second that are to be served; null: the highest rate within the limit is looked for."""
    trace: list[Annotated[float, Field(ge=0, le=1e10)]] | None = Field(
        default=None, min_length=LEAST_ARRIVALS, max_length=MOST_ARRIVALS
    )
    """Arrival times in seconds, in order."""
    trace_gaps: Literal["refuse", "keep", "close"] = "refuse"
    """What to make of pauses that no such traffic has by chance."""
    batch_mix: dict[Annotated[int, Field(ge=1, le=4096)], Share] = Field(default={1: 1.0}, min_length=1, max_length=16)
    """Batch size → share of the requests."""
    shape_mix: list[ShapeShare] | None = Field(default=None, min_length=1, max_length=32)
    """Shares of shapes; null: those of the data set."""
    slo: Slo
    """The limit that is to be kept."""

    @field_validator("trace")
    @classmethod
    def _in_time(cls, trace: list[float] | None) -> list[float] | None:
        if trace is None:
            return None
        late = next((i for i in range(1, len(trace)) if trace[i] < trace[i - 1]), None)
        if late is not None:
            raise ValueError(
                f"is out of order: arrival {late} ({trace[late]:g} s) comes before arrival {late - 1} "
                f"({trace[late - 1]:g} s); sort it"
            )
        if trace[0] == trace[-1]:
            raise ValueError("has no duration: all arrivals are at one moment, so it says no rate")
        return trace

    @field_validator("batch_mix")
    @classmethod
    def _batches_whole(cls, mix: dict[int, float]) -> dict[int, float]:
        _check_sum(list(mix.values()))
        return mix

    @field_validator("shape_mix")
    @classmethod
    def _shapes_whole(cls, mix: list[ShapeShare] | None) -> list[ShapeShare] | None:
        if mix is not None:
            _check_sum([part.share for part in mix])
            if any(set(part.dims) != set(mix[0].dims) for part in mix):
                raise ValueError("every shape must name the same inputs")
        return mix

    @model_validator(mode="after")
    def _one_source(self) -> Traffic:
        if (self.arrival == "trace") != (self.trace is not None):
            raise ValueError("give a trace with arrival trace, and with no other")
        if self.trace is not None and self.trace_gaps == "refuse":
            gap = next(gaps(self.trace), None)
            if gap is not None:
                at, seconds, usual = gap
                raise ValueError(
                    f"the trace has a gap of {seconds:g} s before arrival {at}, where the others come every "
                    f"{usual:.3g} s; say trace_gaps keep (there were no requests) or close (the recording was "
                    "interrupted)"
                )
        return self


def gaps(trace: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """(arrival after it, seconds, mean pause of the others) of every pause of at least twenty such means."""
    whole, pauses = trace[-1] - trace[0], len(trace) - 1
    for i in range(1, len(trace)):
        pause = trace[i] - trace[i - 1]
        usual = (whole - pause) / max(pauses - 1, 1)
        if usual > 0 and pause > GAP * usual:
            yield i, pause, usual


def without_gaps(trace: Sequence[float]) -> list[float]:
    """The trace with every gap as long as the mean of the other pauses."""
    cut = {i: seconds - usual for i, seconds, usual in gaps(trace)}
    shift, found = 0.0, []
    for i, at in enumerate(trace):
        shift += cut.get(i, 0.0)
        found.append(at - shift)
    return found


def _check_sum(shares: Sequence[float]) -> None:
    whole = sum(shares)
    if abs(whole - 1) > _OFF_ONE:
        raise ValueError(f"shares sum to {whole:g}, not to 1")
