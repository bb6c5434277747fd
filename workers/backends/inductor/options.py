"""Options of Inductor's engines, as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Form = Literal["package", "cache"]


class RuntimeOptions(BaseModel):
    """How an engine is loaded. `form`: AOTInductor's package, or the program with Inductor's cache, which is compiled
    again at load and finds all its kernels there. `threads`: of one call, None = torch's default, one per core.
    `cuda_graph`: captured at the first call of each shape, and replayed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Form = "package"
    threads: int | None = Field(default=None, ge=1, le=1024)
    cuda_graph: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"form": self.form, **self.model_dump(exclude_defaults=True)}


class BuildOptions(BaseModel):
    """`precision`: of products and convolutions; matrix products of a calibrated program compute in float8 beside it.
    `channels_last`: for convolutions, whatever Inductor would decide. `batch`: that the kernels are laid out for, where
    the batch is dynamic; None leaves that of the export. `form`: None takes the package, and the cache where a package
    cannot be loaded. `shapes`: as in the job's spec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    channels_last: bool = False
    batch: int | None = Field(default=None, ge=2, le=1 << 20)
    form: Form | None = None
    shapes: dict[str, Any] | None = None
