"""A job that compares targets, and the jobs it consists of: one for each target, its children.

No worker takes such a job. It runs from its submission until all its children have ended; what becomes of it is decided
in the very transaction in which the last of them ends, under its row's lock, so that none is missed and none counts
twice. Pure; the SQL is the repository's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.domain.job_state import TERMINAL, JobStatus, Trigger

PARENTS = "anneal.compared"  # the queue of jobs that wait in none


@dataclass(frozen=True)
class Child:
    """What its parent has to know. `hardware`: of its target."""

    id: str
    status: str
    hardware: str | None
    engine_ids: Sequence[str]
    error: Mapping[str, Any] | None
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL


def stages_of(children: Sequence[Child]) -> list[dict[str, Any]]:
    """What clients see of them in the parent's document."""
    return [
        {
            "name": "target",
            "status": child.status,
            "cached": False,
            "hardware": child.hardware,
            "job_id": child.id,
            "started_at": _told(child.started_at),
            "finished_at": _told(child.finished_at),
            "detail": (child.error or {}).get("detail"),
        }
        for child in children
    ]


def progress_of(children: Sequence[Child]) -> float:
    return sum(child.ended for child in children) / max(len(children), 1)


def fate(children: Sequence[Child], *, cancel_requested: bool) -> tuple[Trigger, dict[str, Any]] | None:
    """What becomes of the parent, and columns to be changed with it; None as long as one of them has not ended.

    One that came to an engine is enough; where the user has asked to cancel and that reached one, or all were cancelled
    one by one, it is cancelled."""
    if not all(child.ended for child in children):
        return None
    found = {child.status for child in children}
    engines = [engine for child in children for engine in child.engine_ids]
    values: dict[str, Any] = {"engine_ids": engines, "stage": None}
    if JobStatus.CANCELLED in found and (cancel_requested or found == {JobStatus.CANCELLED}):
        return Trigger.CANCEL, values
    if JobStatus.SUCCEEDED in found:
        return Trigger.COMPLETE, {**values, "progress": 1.0}
    return Trigger.FAIL, {**values, "error": _error(children)}


def _error(children: Sequence[Child]) -> dict[str, Any]:
    why = "; ".join(
        f"{child.hardware}: {child.status}" + (f", {child.error['detail']}" if child.error else "")
        for child in children
    )
    return {
        "code": "no_target_succeeded",
        "detail": f"No target came to an engine ({why[:2000]}).",
        "remedy": "Look at the jobs under `children`: each has its own error and stages.",
    }


def _told(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat().replace("+00:00", "Z")
