"""Parts of a job's spec that speak of shapes: ranges of inputs, and how TensorRT builds for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from app.domain.limits import INT64_MAX
from app.domain.strict import Dimension, Name, Strict

Int64 = Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)]


def _check_order(low: list[int], opt: list[int], high: list[int], length: str, place: str) -> None:
    if not len(low) == len(opt) == len(high):
        raise ValueError(f"min, opt and max must have the same {length}")
    for i, (a, b, c) in enumerate(zip(low, opt, high, strict=True)):
        if not a <= b <= c:
            raise ValueError(f"{place} {i} needs min ≤ opt ≤ max, got {a}, {b}, {c}")


class ShapeRange(Strict):
    """Smallest, most usual and largest shape of one input; the first axis is the batch."""

    min: list[Dimension] = Field(min_length=1, max_length=16)
    """The smallest size of each axis."""
    opt: list[Dimension] = Field(min_length=1, max_length=16)
    """The most usual one, which engines are tuned for."""
    max: list[Dimension] = Field(min_length=1, max_length=16)
    """The largest one."""

    @model_validator(mode="after")
    def _ordered(self) -> ShapeRange:
        _check_order(self.min, self.opt, self.max, "rank", "axis")
        return self


class ValueRange(Strict):
    """Smallest, most usual and largest values of an input that sets the shapes of other tensors."""

    min: list[Int64] = Field(min_length=1, max_length=64)
    """The smallest values."""
    opt: list[Int64] = Field(min_length=1, max_length=64)
    """The most usual ones."""
    max: list[Int64] = Field(min_length=1, max_length=64)
    """The largest ones."""

    @model_validator(mode="after")
    def _ordered(self) -> ValueRange:
        _check_order(self.min, self.opt, self.max, "length", "value")
        return self


class TensorRtBuild(Strict):
    """TensorRT's own settings. `workspace_mb`: most scratch memory of a tactic (None: all of the GPU's).
    `avg_timing_iterations`: TensorRT's default is 1; more make a choice of tactics less random. `exact_timing`: fail
    where the timing cache does not hold every layer."""

    workspace_mb: int | None = Field(default=None, ge=1, le=1 << 20)
    """Most scratch memory of a tactic; null: all of the GPU's."""
    optimization_level: int = Field(default=3, ge=0, le=5)
    """0 builds fastest, 5 looks the longest."""
    max_tactics: int | None = Field(default=None, ge=1, le=10_000)
    """At most so many tactics are timed for a layer."""
    avg_timing_iterations: int = Field(default=8, ge=1, le=64)
    """Runs that a tactic's time is the mean of."""
    max_aux_streams: int | None = Field(default=None, ge=0, le=16)
    """At most so many streams beside the main one."""
    sparsity: bool = False
    """Whether weights that are 2:4 sparse may be used so."""
    version_compatible: bool = False
    """Whether later versions of TensorRT may load the engine."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """The GPUs that the engine loads on beside the one it was built on."""
    timing_cache: bool = True
    """Whether the times of tactics are kept and used again."""
    exact_timing: bool = False
    """Whether to fail where the timing cache does not hold every layer."""


class TensorRt(TensorRtBuild):
    """How TensorRT builds a job's engines; docs/gpu.md. `profiles`: several ranges of shapes instead of the job's
    `shapes`, one optimization profile each. `shape_values`: of inputs that set the shapes of other tensors."""

    profiles: list[dict[Name, ShapeRange]] | None = Field(default=None, min_length=1, max_length=8)
    """Several ranges of shapes, an optimization profile each, instead of the job's `shapes`."""
    shape_values: dict[Name, ValueRange] | None = None
    """Values of inputs that set the shapes of other tensors, by input."""
