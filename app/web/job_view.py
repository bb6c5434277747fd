"""What a page shows of a job while it runs. Pure: rows in, values for a template out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from app.db.orm import Job
from app.domain.chain import models_of
from app.domain.job_state import TERMINAL
from app.jobs.family import PARENTS
from app.jobs.outlook import Outlook

Json = Mapping[str, Any]
STAGES = {
    "export": "read the model",
    "chain": "join the models",
    "unchain": "take the models apart",
    "simplify": "simplify the graph",
    "equalize": "even out weights",
    "convert": "convert precision",
    "quantize": "quantize",
    "quantize_nncf": "quantize",
    "observe": "see how large values get",
    "train": "train weights to be rounded",
    "sensitivity": "look for what quantization hurts",
    "build": "build the engine",
    "reference_outputs": "the original's answers",
    "shape_probes": "try other shapes",
    "check_shapes": "check other shapes",
    "validate": "check the accuracy",
    "benchmark": "measure",
    "sweep": "find out how to deploy",
    "load_test": "drive with traffic",
    "profile": "see where the time goes",
    "cold_start": "time the cold start",
    "compatibility": "ask other backends",
    "package": "pack the bundle",
    "queue": "wait for a worker",
    "target": "another machine",
}
_STANDINGS = {
    "proposed": "to be built",
    "built": "built",
    "screened": "timed shortly",
    "checked": "accuracy checked",
    "finalist": "finalist",
    "refused": "out",
}


@dataclass
class Board:
    """The candidates as the search told of them, the fastest first, those that are out last."""

    candidates: list[dict[str, Any]] = field(default_factory=list)
    leader: dict[str, Any] | None = None

    @classmethod
    def of(cls, told: Iterable[Json]) -> Board:
        found: dict[str, dict[str, Any]] = {}
        ahead = None
        for news in told:
            ahead = news.get("leader")
            for candidate in news.get("candidates") or ():
                found[candidate["candidate"]] = {
                    **candidate,
                    "words": _STANDINGS.get(candidate["standing"], candidate["standing"]),
                }
        return cls(sorted(found.values(), key=_place), found.get(ahead) if ahead else None)


def _place(candidate: Json) -> tuple[bool, float]:
    return candidate["standing"] == "refused", -(candidate.get("speedup") or {}).get("ratio", 0.0)


@dataclass
class JobView:
    """A job for the template: stages newest last, with words; `seconds_left` of its budget, None where none runs."""

    job: Job
    model_name: str
    board: Board
    now: datetime
    outlook: Outlook | None = None

    @property
    def terminal(self) -> bool:
        return self.job.status in TERMINAL

    @property
    def compares(self) -> bool:
        return self.job.queue == PARENTS

    @property
    def budget(self) -> int:
        return int(self.job.spec.get("budget_seconds", 0))

    @property
    def ends_by(self) -> datetime | None:
        """When the budget of a job that runs is used up, by a worker's own clock about."""
        if self.job.status != "running" or self.job.claimed_at is None or self.compares:
            return None
        return self.job.claimed_at + timedelta(seconds=max(self.budget - self.job.spent_seconds, 0))

    @property
    def seconds_left(self) -> float | None:
        until = self.ends_by
        return None if until is None else max((until - self.now).total_seconds(), 0.0)

    @property
    def seconds(self) -> float | None:
        """How long it took, or takes by now."""
        if self.job.started_at is None:
            return None
        return max(((self.job.finished_at or self.now) - self.job.started_at).total_seconds(), 0.0)

    @property
    def stages(self) -> Sequence[dict[str, Any]]:
        names = {c["candidate"]: c["name"] for c in self.board.candidates}
        return [
            {
                "name": stage["name"],
                "words": STAGES.get(stage["name"], stage["name"].replace("_", " ")),
                "status": stage["status"],
                "cached": bool(stage.get("cached")),
                "seconds": stage.get("seconds"),
                "detail": stage.get("detail"),
                "of": names.get(stage.get("candidate"), stage.get("candidate")) or stage.get("hardware"),
                "job_id": stage.get("job_id"),
            }
            for stage in self.job.stages
            if isinstance(stage, Mapping)
        ]

    @property
    def running_stage(self) -> dict[str, Any] | None:
        return next((s for s in reversed(self.stages) if s["status"] == "running"), None)


def asked_for(spec: Json) -> list[tuple[str, Any]]:
    """What the user wanted, in words; defaults that say nothing are left out."""
    limits, check = spec.get("constraints") or {}, spec.get("validation") or {}
    target, bench = spec.get("target") or {}, spec.get("benchmark") or {}
    found: list[tuple[str, Any]] = [("Best by", spec.get("objective"))]
    if check.get("max_accuracy_loss_percent") is not None:
        found.append(("Accuracy loss", f"at most {check['max_accuracy_loss_percent']:g} percentage points"))
    if spec.get("targets"):
        found.append(("Machines", ", ".join(str(t.get("hardware")) for t in spec["targets"])))
    else:
        where = target.get("hardware") or target.get("compute_capability") or target.get("device")
        found.append(("Runs on", "any machine" if where == "auto" else where))
    for name, words, unit in (
        ("p99_latency_ms", "p99 latency", "ms"),
        ("min_throughput_qps", "Throughput", "samples/s"),
        ("max_memory_mb", "Memory", "MB"),
        ("max_size_mb", "Size on disk", "MB"),
    ):
        if limits.get(name) is not None:
            found.append((words, f"{'at least' if name.startswith('min') else 'at most'} {limits[name]:g} {unit}"))
    traffic = spec.get("traffic") or {}
    if traffic:
        rate, slo = traffic.get("rate_per_second"), (traffic.get("slo") or {}).get("p99_latency_ms")
        within = "" if slo is None else f" with p99 within {slo:g} ms"
        found.append(("Traffic", f"{'the highest rate' if rate is None else f'{rate:g} requests/s'}{within}"))
    if further := models_of(spec):
        whole = "one engine of the whole" if spec["chain"].get("deploy") != "ensemble" else "an engine of each"
        found.append(("Chain", f"this model, then {', then '.join(further)}; {whole}"))
    training = ((spec.get("quantization") or {}).get("training") or {}).get("mode", "off")
    if training != "off":
        found.append(("Training", training))
    if spec.get("precisions"):
        found.append(("Precisions", ", ".join(spec["precisions"])))
    if bench.get("batch_sizes"):
        found.append(("Batch sizes", ", ".join(str(size) for size in bench["batch_sizes"])))
    found.append(("Budget", spec.get("budget_seconds")))
    return found
