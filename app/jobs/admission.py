"""Whether a job can be served at all: told at submission, not after minutes in a queue. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.capabilities.service import offered
from app.db.orm import Worker
from app.domain.shapes import ShapeRange
from app.domain.spec import OptimizationSpec
from app.errors import AppError, FieldError, invalid_request
from app.jobs.data_admission import MOST_ERRORS, axes_of
from app.queue.messages import device_of_kind, queue_for

# What adds a model format that only some workers read.
_ADDS = {
    "pt2": "Start the service with `anneal serve --with torch`, which installs what reads a .pt2 (or install the extra "
    "`torch` where a worker runs, and start it again); or upload the model as ONNX: `torch.onnx.export(model.eval(), "
    "example_inputs, 'model.onnx', dynamo=True)`."
}


def check_shapes(shapes: Mapping[str, ShapeRange], inputs: Sequence[Mapping[str, Any]]) -> None:
    """Raise 422 where the wanted shapes contradict the model's inputs."""
    by_name = {i["name"]: i for i in inputs}
    errors: list[FieldError] = []
    for name, wanted in shapes.items():
        pointer = f"/shapes/{name}"
        if name not in by_name:
            if inputs:
                errors.append(FieldError(pointer, f"the model has no input {name!r}; it has {sorted(by_name)}"))
            continue
        shape = by_name[name]["shape"]
        if shape is None:
            continue
        if len(shape) != len(wanted.opt):
            errors.append(FieldError(pointer, f"rank {len(wanted.opt)}, the model's input has rank {len(shape)}"))
            continue
        for axis, fixed in enumerate(shape):
            if isinstance(fixed, int) and not wanted.min[axis] == wanted.max[axis] == fixed:
                errors.append(FieldError(pointer, f"axis {axis} of the model is fixed at {fixed}"))
    if errors:
        remedy = "Give every input a range that fits the shape which GET /v1/models/{id} tells."
        raise invalid_request(f"The shapes do not fit the model: {errors[0].message}.", errors[:MOST_ERRORS], remedy)


def fit_batch_sizes(spec: OptimizationSpec, inputs: Sequence[Mapping[str, Any]]) -> OptimizationSpec:
    """The spec with batch sizes inside of the wanted shapes. Those that are only defaults are fitted; raise 422 where
    the client asks for one outside. Inputs whose batch axis the model fixes do not count: there is no choice."""
    known, axes = {i["name"]: i["shape"] for i in inputs}, axes_of(inputs, spec.inputs)
    ranges = []
    for name, wanted_range in (spec.shapes or {}).items():
        axis, shape = axes.get(name, 0), known.get(name)
        if axis is not None and axis < len(wanted_range.opt) and not (shape and isinstance(shape[axis], int)):
            ranges.append((wanted_range.min[axis], wanted_range.opt[axis], wanted_range.max[axis]))
    low, high = max((r[0] for r in ranges), default=1), min((r[2] for r in ranges), default=2**31)
    wanted = spec.benchmark.batch_sizes
    outside = [b for b in wanted if not low <= b <= high]
    if low > high or not outside:  # the export stage knows which inputs share their batch axis
        return spec
    if "batch_sizes" in spec.benchmark.model_fields_set:
        message = f"batch size {outside[0]} is outside of the wanted shapes ({low} to {high})"
        raise invalid_request(
            f"The benchmark does not fit the shapes: {message}.",
            [FieldError("/benchmark/batch_sizes", message)],
            "Widen the batch axis of `shapes`, or leave the batch size out.",
        )
    kept = [b for b in wanted if b not in outside] or [min(max(ranges[0][1], low), high)]
    benchmark = spec.benchmark.model_copy(update={"batch_sizes": kept})
    return spec.model_copy(update={"benchmark": benchmark})


@dataclass(frozen=True)
class Queue:
    """Where a job waits; `waiting_for` says what for, where no worker that would take it lives now. `builds`: by
    backend, the target that live workers can build its engines for until then."""

    name: str
    waiting_for: str | None = None
    builds: Mapping[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What the job's document shows until a worker takes it."""
        if self.waiting_for is None:
            return []
        return [{"name": "queue", "status": "waiting", "cached": False, "detail": self.waiting_for}]


def find_queue(spec: OptimizationSpec, model_format: str, live: Iterable[Worker], known: Iterable[Worker]) -> Queue:
    """As `choose_queue`: live workers decide; where none of them would do, the job waits for one that was `known`, or
    for one that nobody has seen yet, where the GPU that it is to have can be built for here."""
    live, known = list(live), list(known)
    fitting = [w for w in live if not _lacks(spec, model_format, w)]
    if fitting:
        name = choose_queue(spec, model_format, fitting)
        return Queue(name, builds=_builds(spec, model_format, name, fitting, live))
    fitting = [w for w in known if not _lacks(spec, model_format, w)]
    if fitting:
        name = choose_queue(spec, model_format, fitting)
        builds = _builds(spec, model_format, name, fitting, live)
        seen = max(w.last_seen_at for w in fitting).isoformat(timespec="seconds").replace("+00:00", "Z")
        detail = f"one was last seen at {seen}. The job starts when one comes back."
        return Queue(name, f"No worker for {_wanted(spec)} is live; {detail}{_meanwhile(builds)}", builds)
    kind = spec.target.compute_capability
    built = _precisions_built(spec, model_format, kind, live) if kind and not spec.target.hardware else {}
    if kind is None or not built:
        return Queue(choose_queue(spec, model_format, live or known))  # which says what is lacking
    lacking = [p for p in spec.precisions or () if not any(p in precisions for precisions in built.values())]
    if lacking:
        raise _unavailable([f"precision {p!r} on compute capability {kind}" for p in lacking], live)
    builds = dict.fromkeys(built, kind)
    detail = "nor was one seen lately. The job starts when one comes."
    name = queue_for(device_of_kind("cuda", kind), None, model_format)
    return Queue(name, f"No worker for {_wanted(spec)} is live, {detail}{_meanwhile(builds)}", builds)


def _wanted(spec: OptimizationSpec) -> str:
    target = spec.target
    if target.hardware is None and target.compute_capability is not None:
        return f"a GPU of compute capability {target.compute_capability}"
    return target.hardware or (target.device if target.device != "auto" else "this job")


def _meanwhile(builds: Mapping[str, str]) -> str:
    if not builds:
        return ""
    told = ", ".join(f"{backend} for {target}" for backend, target in sorted(builds.items()))
    return f" Engines are built meanwhile ({told}); there they are proven and measured."


def _builds(
    spec: OptimizationSpec, model_format: str, queue: str, fitting: Sequence[Worker], live: Sequence[Worker]
) -> dict[str, str]:
    """Backend → the target that live workers build for, ahead of the workers of this queue, where those are of one
    kind and run the backend. `fitting`: workers that would take the job."""
    takers = [w for w in fitting if queue in w.queues]
    kinds, runs = {_capability(w) for w in takers}, {b["name"] for w in takers for b in w.backends}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        return {}
    return {b: kind for b in _precisions_built(spec, model_format, kind, live) if b in runs}


def _precisions_built(
    spec: OptimizationSpec, model_format: str, kind: str, live: Sequence[Worker]
) -> dict[str, set[str]]:
    """Backend → precisions that live workers build for this kind of GPU without having one."""
    wanted, found = spec.target.backends, dict[str, set[str]]()
    for worker in (w for w in live if model_format in w.formats):
        for backend, targets in (worker.hardware.get("builds") or {}).items():
            if kind in targets and (wanted is None or backend in wanted):
                found.setdefault(backend, set()).update(targets[kind])
    return found


def _capability(worker: Worker) -> str | None:
    found = (worker.hardware.get("gpu") or {}).get("compute_capability")
    return None if found is None else str(found)


def choose_queue(spec: OptimizationSpec, model_format: str, workers: Iterable[Worker]) -> str:
    """The queue whose workers can do what the spec asks. Raises 422 `unavailable_target`, saying what is on offer.

    Where no worker was ever seen, a job that asks for nothing special waits for the first one.
    """
    workers = list(workers)
    target = spec.target
    kind = target.hardware or target.compute_capability
    special = kind or target.backends or spec.precisions or target.device == "cuda"
    if not workers and not special:
        return queue_for("cpu", None, model_format)
    fitting = [w for w in workers if not _lacks(spec, model_format, w)]
    if not fitting:
        lacks = sorted({reason for w in workers for reason in _lacks(spec, model_format, w)}) or ["no worker is known"]
        raise _unavailable(lacks, workers, _ADDS.get(model_format) if _format(model_format) in lacks else None)
    if target.hardware:
        return queue_for("", target.hardware, model_format)
    if target.compute_capability:
        return queue_for(device_of_kind("cuda", target.compute_capability), None, model_format)
    usable = [b for w in fitting for b in w.backends if target.backends is None or b["name"] in target.backends]
    devices = {d for b in usable for d in b["devices"]}
    if target.device != "auto":
        return queue_for(target.device, None, model_format)
    return queue_for("cuda" if "cuda" in devices else "cpu", None, model_format)


_TOLD = ("hardware", "devices", "backends", "precisions")


def _format(model_format: str) -> str:
    return f"model format {model_format!r}"


def _unavailable(lacks: Sequence[str], workers: Sequence[Worker], remedy: str | None = None) -> AppError:
    there = offered(workers)
    told = "; ".join(f"{name} {', '.join(there[name])}" for name in _TOLD if there[name]) or "nothing: none is live"
    return AppError(
        "unavailable_target",
        "Not on offer here",
        422,
        f"No worker can do what the job asks: {'; '.join(lacks)}.",
        remedy=remedy
        or f"Ask for what GET /v1/capabilities offers, or start a worker that has it. On offer now: {told[:1000]}.",
        extra={"offered": there},
    )


def _lacks(spec: OptimizationSpec, model_format: str, worker: Worker) -> list[str]:
    """What this worker lacks for the spec, in words."""
    reasons = []
    target = spec.target
    if target.hardware and worker.hardware.get("id") != target.hardware:
        reasons.append(f"hardware {target.hardware!r}")
    if target.compute_capability and _capability(worker) != target.compute_capability:
        reasons.append(f"a GPU of compute capability {target.compute_capability}")
    usable = [
        b
        for b in worker.backends
        if (target.device == "auto" or target.device in b["devices"])
        and (target.backends is None or b["name"] in target.backends)
    ]
    if not usable:
        if target.device != "auto" and not any(target.device in b["devices"] for b in worker.backends):
            reasons.append(f"device {target.device!r}")
        missing = set(target.backends or ()) - {b["name"] for b in worker.backends}
        reasons += [f"backend {name!r}" for name in sorted(missing)] or ["a backend for that device"]
    elif spec.precisions is not None:
        precisions = {p for b in usable for p in b["precisions"]}
        reasons += [f"precision {p!r}" for p in spec.precisions if p not in precisions]
    if model_format not in worker.formats:
        reasons.append(_format(model_format))
    return reasons
