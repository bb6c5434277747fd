"""Build and runtime options of the TensorRT backend, as JSON."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BuildOptions(_Options):
    """How to build. The precision is the graph's own: TensorRT 11 has no weak typing.

    `shapes`: min/opt/max by input, as in the job's spec. `profiles`: several of those, one optimization profile each.
    `batch_sizes`: what is measured; profiles are derived from it where no shapes are given. `shape_values`: min/opt/max
    of the *values* of inputs that set shapes. `workspace_mb`: most scratch memory of a tactic (None: all of the GPU's).
    `avg_timing_iterations`: TensorRT's default is 1; more make a choice of tactics less random. `exact_timing`: fail
    where the timing cache does not hold every layer. `max_seconds`: give the build up after this time.
    """

    precision: str | None = None
    shapes: dict[str, Any] | None = None
    profiles: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=8)
    batch_sizes: list[int] | None = Field(default=None, min_length=1, max_length=16)
    shape_values: dict[str, dict[str, list[int]]] | None = None
    workspace_mb: int | None = Field(default=None, ge=1, le=1 << 20)
    optimization_level: int = Field(default=3, ge=0, le=5)
    max_tactics: int | None = Field(default=None, ge=1, le=10_000)
    avg_timing_iterations: int = Field(default=8, ge=1, le=64)
    max_aux_streams: int | None = Field(default=None, ge=0, le=16)
    tf32: bool = True
    sparsity: bool = False
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    timing_cache: bool = True
    exact_timing: bool = False
    max_seconds: float | None = Field(default=None, gt=0)
    cuda_graph: bool = False


class RuntimeOptions(_Options):
    """How to run. `cuda_graph`: replay one captured enqueue instead of launching every kernel. `transfers`: whether a
    bound call copies inputs to the GPU and outputs back, too. Not by default: all GPU backends are timed on inputs that
    lie on the GPU, and their profile tells the transfers apart.
    `declared`: dtype by tensor where the model's differs from the engine's. `profile`: use this one only."""

    cuda_graph: bool = False
    transfers: bool = False
    profile: int | None = Field(default=None, ge=0, le=63)
    declared: dict[str, str] = Field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, exclude_defaults=True)


OptionsT = TypeVar("OptionsT", bound=_Options)
