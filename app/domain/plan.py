"""How much of the service a tenant may use: the limits of its plan, and its own in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from app.domain.limits import INT64_MAX
from app.domain.strict import Strict

DEFAULT_PLAN = "default"
WINDOW_DAYS = 30  # over which GPU seconds are counted

_Count = Annotated[int, Field(ge=0, le=INT64_MAX)]


class Limits(Strict):
    """Null: as much as the service itself takes (its `LIMIT_…` settings). 0 refuses all. What is smaller than what a
    tenant uses already takes nothing away: it blocks growth."""

    stored_bytes: _Count | None = None
    """Bytes of all files of the tenant, those that jobs made among them, and what its open uploads were declared
    with."""
    model_bytes: _Count | None = None
    """Bytes of one model."""
    active_jobs: _Count | None = None
    """Jobs that wait and run, together."""
    running_jobs: _Count | None = None
    """Jobs that run at once; further ones wait."""
    gpu_seconds: _Count | None = None
    """Seconds on GPUs by jobs of the last 30 days. A job that was begun goes on."""
    requests_per_minute: _Count | None = None
    """Requests of the API and of pages."""

    def named(self) -> dict[str, int | None]:
        """Those that were named, null among them: what stands in the place of others."""
        return self.model_dump(exclude_unset=True)


def effective(plan: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> Limits:
    """A tenant's own limits before those of its plan. Names that this version does not know (a newer one has written
    them) are passed over."""
    known = {name: value for name, value in {**(plan or {}), **(own or {})}.items() if name in Limits.model_fields}
    return Limits.model_validate(known)
