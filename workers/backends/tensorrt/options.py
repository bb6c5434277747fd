"""Build and runtime options of the TensorRT backend, as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.domain.shapes import TensorRtBuild


class BuildOptions(TensorRtBuild):
    """How to build: what a job may set, and what the search does. The precision is the graph's own: TensorRT 11 has no
    weak typing.

    `shapes`: min/opt/max by input, as in the job's spec. `profiles`: several of those, one optimization profile each.
    `batch_sizes`: what is measured; profiles are derived from it where no shapes are given. `shape_values`: min/opt/max
    of the *values* of inputs that set shapes. `max_seconds`: give the build up after this time.
    `target`: the compute capability to build for ("8.9"), whether such a GPU is here or not; TensorRT for RTX alone
    can. None: this machine's GPU.
    """

    precision: str | None = None
    shapes: dict[str, Any] | None = None
    profiles: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=8)
    batch_sizes: list[int] | None = Field(default=None, min_length=1, max_length=16)
    shape_values: dict[str, dict[str, list[int]]] | None = None
    tf32: bool = True
    max_seconds: float | None = Field(default=None, gt=0)
    cuda_graph: bool = False
    target: str | None = None


class RuntimeOptions(BaseModel):
    """How to run. `cuda_graph`: replay one captured enqueue instead of launching every kernel. `transfers`: whether a
    bound call copies inputs to the GPU and outputs back, too. Not by default: all GPU backends are timed on inputs that
    lie on the GPU, and their profile tells the transfers apart.
    `declared`: dtype by tensor where the model's differs from the engine's. `profile`: use this one only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cuda_graph: bool = False
    transfers: bool = False
    profile: int | None = Field(default=None, ge=0, le=63)
    declared: dict[str, str] = Field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, exclude_defaults=True)
