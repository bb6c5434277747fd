"""How an engine is served: as its traffic tuned it; where no traffic was told, in batches no larger than were measured,
and no request waits for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from workers.kernel import TensorSpec
from workers.measure.axes import batch_axes, fixed_batch
from workers.serving.serving_settings import Settings


def why_one_by_one(inputs: Sequence[TensorSpec]) -> str | None:
    """What in the model's inputs keeps requests from sharing a batch, in words; None where nothing does."""
    axes = batch_axes(inputs)
    for name, axis in axes.items():
        if axis not in (0, None):
            return f"the batch of input {name} lies along axis {axis}"
    if all(axis is None for axis in axes.values()):
        return "no input has a batch axis"
    fixed = fixed_batch(inputs)
    return None if fixed is None else f"the engine takes batches of {fixed} only"


def settings_of(inputs: Sequence[TensorSpec], manifest: Mapping[str, Any], one_by_one: str | None) -> Settings:
    """`manifest`: of the bundle: its deployment says what was tuned, or the instances and threads that were found best;
    its figures tell the batch sizes that were measured. `one_by_one`: why requests share no batch, where that is so."""
    deployment = manifest.get("deployment") or {}
    if tuned := (deployment.get("serving") or {}).get("settings"):
        found = Settings.from_json(tuned)
    else:
        found = Settings(
            instances=deployment.get("instances") or 1,
            threads=deployment.get("threads_per_instance") if deployment.get("instances") else None,
            max_batch=_most(inputs, manifest),
        )
    axes = batch_axes(inputs)
    if one_by_one is None:
        return replace(found, batch_axis=axes)
    return replace(
        found,
        max_batch=1,
        preferred_batches=(),
        pad={},
        cut={},
        batch_axis=dict.fromkeys(axes),
        reason=f"requests are served one by one: {one_by_one}",
    )


def _most(inputs: Sequence[TensorSpec], manifest: Mapping[str, Any]) -> int:
    """The largest batch that was measured, and that the engine takes."""
    most = max((int(size) for size in (manifest.get("figures") or {}).get("batches") or ()), default=1)
    accepts = (manifest.get("engine") or {}).get("accepts") or {}
    for name, axis in batch_axes(inputs).items():
        bounds = accepts.get(name) or ()
        if axis is not None and axis < len(bounds) and bounds[axis] and bounds[axis][1] is not None:
            most = min(most, int(bounds[axis][1]))
    return max(most, 1)
