"""What the stage `benchmark` is asked for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints, field_validator, model_validator

from workers.kernel import StageOptions

BASELINE = "baseline"


def again(engine: str) -> str:
    """The name of the second process of an engine that others are compared with."""
    return f"{engine} (again)"


class EngineOption(StageOptions):
    """One engine: the input artifact `engine.<id>`, and how its backend loads it. `expected`: its latency over the
    baseline's, as far as it is known; it only decides who is left out where the time runs out. `beside`: whether it is
    compared with each of the other engines, too."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)
    expected: float = Field(default=1.0, gt=0, le=10_000)
    beside: bool = False


class BenchmarkOptions(StageOptions):
    """`min_seconds` is measured per engine and batch size, over all rounds. `shapes`: as in the job's spec.

    `engines`: the most promising first; where the time runs out, the last are left out. `cold`: whether cold start and
    memory are measured, too. `screening`: a short timing of many, see `method`; where the time left hardly holds all
    batch sizes, it is content with `essential`. `every_shape`: whether shapes beside the typical are timed, too, at the
    batch size `essential`, or else the smallest. `compare_to`: the id of an engine that all others are compared with,
    beside the baseline.
    """

    engines: list[EngineOption] = Field(default_factory=list, max_length=64)
    batch_sizes: list[Annotated[int, Field(ge=1, le=4096)]] = Field(default=[1, 8], min_length=1, max_length=16)
    min_seconds: float = Field(default=3.0, gt=0, le=600)
    rounds: int = Field(default=10, ge=5, le=100)
    shapes: dict[str, Any] | None = None
    want_p99: bool = False
    cold: bool = True
    screening: bool = False
    essential: int | None = None
    every_shape: bool = False
    compare_to: str | None = None
    seed: int = Field(default=0, ge=0)
    baseline_backend: str = "onnxruntime"
    baseline_runtime: dict[str, Any] = Field(default_factory=dict)

    @field_validator("engines")
    @classmethod
    def _distinct(cls, engines: list[EngineOption]) -> list[EngineOption]:
        ids = [e.id for e in engines]
        if len(set(ids)) != len(ids) or BASELINE in ids:
            raise ValueError("engine ids must be distinct, and none may be 'baseline'")
        return engines

    @model_validator(mode="after")
    def _known(self) -> BenchmarkOptions:
        if self.compare_to is not None and self.compare_to not in [e.id for e in self.engines]:
            raise ValueError("compare_to must be the id of one of the engines")
        return self
