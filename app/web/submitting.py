"""The form that submits a job."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from starlette.datastructures import FormData

from app.domain.artifact_key import digest_of
from app.domain.spec import OptimizationSpec, Training, stored
from app.errors import AppError, FieldError
from app.http.deps import IdFilter, ServicesDep
from app.http.problem import field_errors
from app.http.services import Services
from app.idempotency import Idempotency
from app.web.access import PageRoute, SentForm, Visitor, text_field
from app.web.rendering import page, see_other

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_CHOICES = 100
_OBJECTIVES = {
    "latency": "the shortest time of a call",
    "throughput": "the most samples per second on the whole machine",
    "cost": "the least cost of a million samples",
}
_TRAINING = {
    "off": "no",
    "auto": "where no other way keeps the accuracy limit, and the time holds it",
    "always": "beside each int8 engine that is made without it",
}


@dataclass(frozen=True)
class Limit:
    """A number of the form: where it stands in the spec, and what it means."""

    name: str
    path: tuple[str, ...]
    words: str
    hint: str
    unit: str = ""
    default: str = ""
    integer: bool = False


LIMITS = (
    Limit(
        "loss",
        ("validation", "max_accuracy_loss_percent"),
        "Accuracy loss, at most",
        "An engine that loses more than this against your original, on your validation data, does not ship. With 1, "
        "98.5 % may become 97.5 %.",
        "points",
        "1",
    ),
    Limit(
        "p99",
        ("constraints", "p99_latency_ms"),
        "p99 latency, at most",
        "99 of 100 calls have to be answered in this time. Empty: no limit. It takes some hundred calls to prove, so "
        "give it budget.",
        "ms",
    ),
    Limit(
        "throughput",
        ("constraints", "min_throughput_qps"),
        "Throughput, at least",
        "Samples that one caller gets answered per second. Empty: no limit.",
        "samples/s",
    ),
    Limit(
        "memory",
        ("constraints", "max_memory_mb"),
        "Memory, at most",
        "Of the process that runs the engine, its interpreter and libraries included. Empty: no limit.",
        "MB",
    ),
    Limit("size", ("constraints", "max_size_mb"), "Size on disk, at most", "Of the engine. Empty: no limit.", "MB"),
    Limit(
        "price",
        ("cost", "price_per_hour"),
        "Price of the machine, per hour",
        "For what a million samples cost. Empty: costs are told in relation to each other only.",
    ),
    Limit(
        "budget",
        ("budget_seconds",),
        "Time for the job, at most",
        "When it is used up, the best so far ships. 60 is enough to try; 900 for a thorough search.",
        "seconds",
        "300",
        integer=True,
    ),
)
_NAMED = {
    "model_id": "Model",
    "calibration": "Calibration data",
    "validation": "Validation data",
    "target": "Machine",
    "precisions": "Precisions",
    "benchmark": "Batch sizes",
    "objective": "Best by",
    "quantization": "Training",
    "chain": "Chain",
}


@dataclass
class Filled:
    """What stands in the form. `lost`: fields of the job that it was filled from, for which the form has no place."""

    values: dict[str, Any] = field(default_factory=dict)
    errors: list[FieldError] = field(default_factory=list)
    problem: AppError | None = None
    lost: list[str] = field(default_factory=list)


@router.get("/jobs/new")
async def form_page(
    request: Request,
    services: ServicesDep,
    tenant_id: Visitor,
    model: IdFilter = None,
    dataset: IdFilter = None,
    like: Annotated[str | None, Query(max_length=80)] = None,
) -> Response:
    """The form, filled as asked: with a model, a data set, or as another job was."""
    values: dict[str, Any] = {limit.name: limit.default for limit in LIMITS}
    values.update(dict.fromkeys(("model", "calibration", "validation", "strict", "allow_noisy")))
    values.update(objective="latency", batch_sizes="1, 8", precisions=[], hardware="", training=Training().mode)
    lost: list[str] = []
    if like is not None:
        job = await anyio.to_thread.run_sync(services.jobs.get, tenant_id, like)
        values.update(_as_typed(job.spec), model=job.model_id)
        lost = _lost(job.spec, values)
        lost += [name for name, given in (("priority", job.priority), ("max_queue_seconds", job.start_by)) if given]
    if model is not None:
        values["model"] = model
    if dataset is not None:
        values.update(calibration=dataset, validation=dataset)
    return await _form(request, services, tenant_id, Filled(values, lost=lost))


@router.post("/jobs")
async def submit(request: Request, services: ServicesDep, tenant_id: Visitor, form: SentForm) -> Response:
    """Submit, and on to the job; the form again, with what is wrong in it, where that is not possible."""
    filled = Filled({**{name: text_field(form, name) for name in _fields()}, "precisions": _many(form, "precisions")})
    try:
        document = spec_of(filled.values)
        spec = OptimizationSpec.model_validate(document)
        once = text_field(form, "once")[:100]
        key = Idempotency(f"page-{once}", digest_of(["job", document])) if once.isascii() and once else None
        request_id = request.scope["anneal.request_id"]
        job, _ = await anyio.to_thread.run_sync(
            lambda: services.jobs.submit(
                tenant_id,
                spec,
                correlation_id=request_id,
                idempotency=key,
                traceparent=request.scope.get("anneal.traceparent"),
            )
        )
    except ValidationError as error:
        filled.errors = [FieldError(_label(e.pointer), e.message) for e in field_errors(error.errors())]
    except AppError as error:
        filled.problem, filled.errors = error, [FieldError(_label(e.pointer), e.message) for e in error.errors]
    else:
        return see_other(f"/jobs/{job.id}")
    return await _form(request, services, tenant_id, filled, code=422)


async def _form(request: Request, services: Services, tenant_id: str, filled: Filled, code: int = 200) -> Response:
    def read() -> dict[str, Any]:
        offer = services.capabilities.live()
        return {
            "models": services.models.page(tenant_id, limit=_CHOICES, before=None),
            "datasets": services.datasets.page(tenant_id, limit=_CHOICES, before=None),
            "machines": sorted({str(w.hardware["id"]) for w in offer if "id" in w.hardware}),
            "offered": sorted({p for w in offer for b in w.backends for p in b.get("precisions", ())}),
        }

    values = await anyio.to_thread.run_sync(read)
    return page(
        request,
        "new.html",
        code=code,
        filled=filled,
        limits=LIMITS,
        objectives=_OBJECTIVES,
        trainings=_TRAINING,
        once=secrets.token_hex(16),
        **values,
    )


def _fields() -> list[str]:
    own = ["model", "calibration", "validation", "objective", "hardware", "batch_sizes", "strict", "allow_noisy"]
    return [*own, "training", *(limit.name for limit in LIMITS)]


def _many(form: FormData, name: str) -> list[str]:
    return [value for value in form.getlist(name) if isinstance(value, str)]


def spec_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed as a spec. What is no number stays as it is: the spec's own rules say what is wrong with it."""
    spec: dict[str, Any] = {"model_id": values.get("model") or "", "objective": values.get("objective") or "latency"}
    for limit in LIMITS:
        typed = str(values.get(limit.name) or "").replace(",", ".")
        if typed:
            inner = spec
            for step in limit.path[:-1]:
                inner = inner.setdefault(step, {})
            inner[limit.path[-1]] = _number(typed)
    if values.get("calibration"):
        spec["calibration"] = {"dataset_id": values["calibration"]}
    if values.get("validation"):
        spec.setdefault("validation", {})["dataset_id"] = values["validation"]
    if values.get("strict"):
        spec.setdefault("validation", {})["strict"] = True
    if values.get("hardware"):
        spec["target"] = {"hardware": values["hardware"]}
    if values.get("training"):
        spec["quantization"] = {"training": {"mode": values["training"]}}
    if values.get("precisions"):
        spec["precisions"] = list(values["precisions"])
    sizes = str(values.get("batch_sizes") or "").replace(",", " ").split()
    if sizes:
        spec["benchmark"] = {"batch_sizes": [_number(size) for size in sizes[:32]]}
    if values.get("allow_noisy"):
        spec.setdefault("benchmark", {})["allow_noisy"] = True
    return spec


def _number(typed: str) -> Any:
    try:
        return int(typed)
    except ValueError:
        pass
    try:
        return float(typed)
    except ValueError:
        return typed[:100]


def _as_typed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The other way round, for the form that starts from a job."""
    check, target, measured = (spec.get(name) or {} for name in ("validation", "target", "benchmark"))
    values: dict[str, Any] = {
        "objective": spec.get("objective"),
        "calibration": (spec.get("calibration") or {}).get("dataset_id"),
        "validation": check.get("dataset_id"),
        "strict": check.get("strict"),
        "allow_noisy": measured.get("allow_noisy"),
        "hardware": target.get("hardware") or "",
        "precisions": spec.get("precisions") or [],
        "training": ((spec.get("quantization") or {}).get("training") or {}).get("mode") or Training().mode,
        "batch_sizes": ", ".join(str(size) for size in measured.get("batch_sizes") or ()),
    }
    for limit in LIMITS:
        found: Any = spec
        for step in limit.path:
            found = found.get(step) if isinstance(found, Mapping) else None
        values[limit.name] = "" if found is None else f"{found:g}" if isinstance(found, float) else str(found)
    return values


def _lost(spec: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Fields of the job that a job of the filled form would not have as they are, by their names in the spec."""
    try:
        again = stored(OptimizationSpec.model_validate(spec_of(values)))
    except ValidationError:
        return []  # what is wrong is told when it is sent
    found: list[str] = []
    for name, value in spec.items():
        new = again.get(name)
        if isinstance(value, Mapping) and isinstance(new, Mapping):
            found += [f"{name}.{inner}" for inner in value if value[inner] != new.get(inner)]
        elif value != new:
            found.append(name)
    return found


def _label(pointer: str) -> str:
    """What the form calls the place of an error."""
    steps = tuple(step for step in pointer.split("/") if step and step != "body")
    found = next((limit.words for limit in LIMITS if limit.path == steps[: len(limit.path)]), None)
    return found or _NAMED.get(steps[0] if steps else "", pointer)
