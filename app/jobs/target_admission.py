"""A job that names several targets, as one job for each of them: all with a live worker, or it is refused. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from app.capabilities.service import offered
from app.db.orm import Worker
from app.domain.spec import Cost, OptimizationSpec, PricedTarget
from app.errors import AppError, FieldError
from app.jobs.admission import Queue, find_queue


def per_target(
    spec: OptimizationSpec, model_format: str, live: Sequence[Worker]
) -> list[tuple[OptimizationSpec, Queue]]:
    """In the order of `spec.targets`. Raises 422 `unavailable_target` for targets without a live worker, for kinds that
    are not one machine, and for those whose workers cannot do what the job asks."""
    targets, names = spec.targets or [], list[str]()
    errors: list[FieldError] = []
    for i, target in enumerate(targets):
        machines = _machines(target.hardware, live)
        if not machines:
            errors.append(_error(i, f"no worker with hardware {target.hardware!r} is live"))
        elif len(machines) > 1:
            named = ", ".join(repr(machine) for machine in machines)
            errors.append(_error(i, f"{target.hardware!r} is several machines, {named}: name one of them"))
        elif machines[0] in names:
            errors.append(_error(i, f"{target.hardware!r} is {machines[0]!r}, which stands there already"))
        else:
            names.append(machines[0])
    if errors:
        raise _unavailable(errors, live)
    pairs = enumerate(zip(targets, names, strict=True))
    return [_child(i, spec, target, name, model_format, live) for i, (target, name) in pairs]


def _child(
    index: int, spec: OptimizationSpec, target: PricedTarget, hardware: str, model_format: str, live: Sequence[Worker]
) -> tuple[OptimizationSpec, Queue]:
    child = spec.model_copy(
        update={
            "targets": None,
            "target": spec.target.model_copy(update={"hardware": hardware}),
            "cost": Cost(price_per_hour=target.price_per_hour, currency=target.currency),
            "webhook": None,
        }
    )
    try:
        queue = find_queue(child, model_format, live, ())
    except AppError as refused:
        own = [worker for worker in live if worker.hardware.get("id") == hardware]
        raise _unavailable([_error(index, f"{hardware}: {refused.detail}")], own) from refused
    return child, queue


def _machines(name: str, live: Sequence[Worker]) -> list[str]:
    """Ids of live hardware that is called so: by its id, else by its kind."""
    ids = {str(worker.hardware["id"]) for worker in live if "id" in worker.hardware}
    if name in ids:
        return [name]
    return sorted({str(worker.hardware["id"]) for worker in live if "id" in worker.hardware and name in _kinds(worker)})


def _kinds(worker: Worker) -> set[str]:
    gpu = worker.hardware.get("gpu") or {}
    return {"cuda", str(gpu.get("compute_capability"))} if gpu else {"cpu"}


def _error(index: int, message: str) -> FieldError:
    return FieldError(f"/targets/{index}/hardware", message)


def _unavailable(errors: Sequence[FieldError], live: Sequence[Worker]) -> AppError:
    there = offered(live)
    named = ", ".join(there["hardware"]) or "none"
    return AppError(
        "unavailable_target",
        "Not on offer here",
        422,
        f"Not every target can have its job: {'; '.join(error.message for error in errors)}. Live hardware: {named}.",
        remedy="Name hardware that GET /v1/capabilities offers, or start a worker on the machine that is missing.",
        errors=errors,
        extra={"offered": there},
    )
