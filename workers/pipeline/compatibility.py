"""What a job's report says of backends that this worker can ask but not run: whether they would take the model, before
somebody rents a device for them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from app.domain.failures import StageFailure
from workers import kernel
from workers.pipeline.budget import Budget
from workers.pipeline.runner import StageRunner
from workers.pipeline.stage_calls import Outcome

_ENOUGH_S, _LONGEST_S = 10.0, 30.0  # it is beside the point of the job


def compatibility_of(
    runner: StageRunner, export: Outcome, offered: Collection[str], budget: Budget
) -> list[dict[str, Any]]:
    """`workers.examined.Examined` as JSON, with `backend`, of each. `offered`: what this worker runs. `accepted` is
    None where it could not be told, with a `reason`."""
    found: list[dict[str, Any]] = []
    for name in asked(runner, offered):
        try:
            done = examine(runner, export, name, budget.left(budget.end))
        except StageFailure as failure:
            found.append({"backend": name, "accepted": None, "reason": failure.detail})
            continue
        if done is None:
            found.append({"backend": name, "accepted": None, "reason": "the budget was over"})
        else:
            found.append({k: v for k, v in done.data.items() if k not in ("made", "notes_of_stage")})
    return found


def examine(runner: StageRunner, export: Outcome, backend: str, left: float) -> Outcome | None:
    """The stage call; None where the seconds `left` do not hold it."""
    if left < _ENOUGH_S:
        return None
    inputs, options = {"model": export.outputs["model"]}, {"backend": backend}
    return runner.run("compatibility", inputs, options, seconds=min(_LONGEST_S, left), soft_seconds=_ENOUGH_S)


def asked(runner: StageRunner, offered: Collection[str]) -> list[str]:
    """Backends that this worker can ask, and not run."""
    known = kernel.backends()
    return sorted(n for n, backend in known.items() if n not in offered and _examines(backend, runner))


def _examines(backend: type[kernel.Backend], runner: StageRunner) -> bool:
    try:
        return backend().examines(runner.hardware)
    except Exception:  # a plug-in that breaks its contract is left out where the worker starts, and told there
        return False
