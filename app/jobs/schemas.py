"""Jobs as clients see them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Self, cast
from zlib import crc32

from pydantic import BaseModel, ConfigDict, Field

from app.db.orm import Job
from app.domain.job_state import TERMINAL
from app.domain.spec import OptimizationSpec
from app.jobs.family import PARENTS
from app.jobs.outlook import Outlook, to_json
from app.schemas import ItemPage, Resource

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class StageOut(BaseModel):
    """One stage of a job. `cached`: its result was there already, and it did not run."""

    model_config = ConfigDict(extra="allow")

    name: str
    status: str
    cached: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None


class JobError(BaseModel):
    """Why a job failed: what happened, where in the user's model, and what to do about it."""

    model_config = ConfigDict(extra="allow")

    code: str
    detail: str
    stage: str | None = None
    node: str | None = None
    tensor: str | None = None
    remedy: str | None = None


class ChildOut(BaseModel):
    """The job of one target of a job that compares several."""

    id: str
    hardware: str | None
    status: Status
    links: dict[str, str]


class QueueOut(BaseModel):
    """What a queued job can expect."""

    position: int | None = Field(description="1 is next, among the jobs that the same workers may take")
    ahead: int | None
    expected_start: datetime | None = Field(
        description="By the pace of the jobs that run and that ran; in the past: a worker is free; null: not known"
    )
    waiting_for: str | None = Field(description="Why no worker takes it now")


class JobNotice(Resource):
    """What is told of a job where its spec and stages would be too much."""

    status: Status
    error: JobError | None
    engine_ids: list[str]

    @classmethod
    def of(cls, row: Job) -> Self:
        # Not validated: it was, when it was stored, and a later version may have narrowed what a spec can say.
        return cast(Self, cls.model_construct(**cls._values(row)))

    @classmethod
    def _values(cls, row: Job) -> dict[str, Any]:
        path = f"/v1/jobs/{row.id}"
        links = {
            "self": path,
            "events": f"{path}/events",
            "cancel": f"{path}/cancel",
            "model": f"/v1/models/{row.model_id}",
            "engines": f"/v1/engines?job_id={row.id}",
        }
        if row.parent_id is not None:
            links["parent"] = f"/v1/jobs/{row.parent_id}"
        if row.report_sha256 is not None or (row.queue == PARENTS and is_terminal(row)):
            links["report"] = f"{path}/report"
        if row.manifest_sha256 is not None:
            links["manifest"] = f"{path}/manifest"
        return {
            "id": row.id,
            "created_at": row.created_at,
            "links": links,
            "status": row.status,
            "error": row.error,
            "engine_ids": row.engine_ids,
        }

    def to_json(self) -> bytes:
        # What is stored as JSON already (spec, stages, error) goes out as it is, which is what pydantic would warn of.
        return self.model_dump_json(warnings=False).encode()


class JobOut(JobNotice):
    """A job."""

    stage: str | None = Field(description="The stage that runs now")
    progress: float = Field(ge=0, le=1)
    model_id: str
    spec: OptimizationSpec
    stages: list[StageOut]
    started_at: datetime | None
    finished_at: datetime | None
    expected_end: datetime | None = Field(default=None, description="Of a running job, by its pace and its budget")
    queue: QueueOut | None = Field(default=None, description="Of a queued job: what it can expect")
    cancel_requested: bool
    expires_at: datetime | None = Field(default=None, description="Of one that has ended: when retention deletes it")
    parent_id: str | None = Field(default=None, description="The job that compares this one's target with others")
    children: list[ChildOut] = Field(default=[], description="Of a job with `targets`: one for each, in their order")

    @classmethod
    def seen(cls, row: Job, outlook: Outlook | None) -> Self:
        """With what it can expect of the queue."""
        job = cls.of(row)
        job.queue = None if outlook is None else cast(QueueOut, to_json(outlook))
        return job

    @classmethod
    def _values(cls, row: Job) -> dict[str, Any]:
        return {
            **super()._values(row),
            "stage": row.stage,
            "progress": row.progress,
            "model_id": row.model_id,
            "spec": spec_of(row),
            "stages": row.stages,
            "started_at": row.started_at,
            "finished_at": row.finished_at,
            "expected_end": row.expected_end if row.status == "running" else None,
            "cancel_requested": row.cancel_requested_at is not None,
            "parent_id": row.parent_id,
            "children": _children(row),
        }


def spec_of(row: Job) -> dict[str, Any]:
    """What was submitted, with every default."""
    seconds = None if row.start_by is None else round((row.start_by - row.created_at).total_seconds())
    return {**row.spec, "priority": row.priority, "max_queue_seconds": seconds}


def _children(row: Job) -> list[dict[str, Any]]:
    if row.queue != PARENTS:
        return []
    return [
        {
            "id": stage["job_id"],
            "hardware": stage["hardware"],
            "status": stage["status"],
            "links": {"self": f"/v1/jobs/{stage['job_id']}"},
        }
        for stage in row.stages
    ]


class JobPage(ItemPage[JobOut]):
    """Jobs."""


class JobEnded(BaseModel):
    """What webhooks are sent. Of a test, which an endpoint is sent on demand, the job is none."""

    type: Literal["job.succeeded", "job.failed", "job.cancelled", "webhook.test"]
    timestamp: datetime | None = Field(default=None, description="When it happened; that of the attempt is a header")
    job: JobNotice

    @classmethod
    def of(cls, row: Job) -> JobEnded:
        values: dict[str, Any] = {
            "type": f"job.{row.status}",
            "timestamp": row.finished_at,
            "job": JobNotice.of(row),
        }
        return cls.model_construct(**values)

    @classmethod
    def sample(cls, at: datetime) -> JobEnded:
        notice = JobNotice(
            id="job_test", created_at=at, links={}, status="succeeded", error=None, engine_ids=["eng_test"]
        )
        return cls(type="webhook.test", timestamp=at, job=notice)

    def to_json(self) -> bytes:
        return self.model_dump_json(warnings=False).encode()


def job_json(row: Job, outlook: Outlook | None = None, expires_at: datetime | None = None) -> bytes:
    job = JobOut.seen(row, outlook)
    job.expires_at = expires_at
    return job.to_json()


def job_etag(row: Job, outlook: Outlook | None = None, days: int | None = None) -> str:
    """Strong: every change that a client can see raises the version, but for what a queued job can expect, and `days`
    after which an ended one expires: these stand behind it."""
    kept = f".{days}" if days is not None and is_terminal(row) else ""
    return f'"{row.id}-{row.version}{kept if outlook is None else f".{_digest(outlook)}"}"'


def _digest(outlook: Outlook) -> str:
    return f"{crc32(repr(outlook).encode()):08x}"


def version_in(etags: str | None, job_id: str) -> int | None:
    """The version of this job that an If-None-Match header names."""
    for tag in (etags or "").split(","):
        name, _, version = tag.strip().removeprefix("W/").strip('"').rpartition("-")
        version = version.partition(".")[0]
        if name == job_id and version.isdecimal() and len(version) < 19:
            return int(version)
    return None


def is_terminal(row: Job) -> bool:
    return row.status in TERMINAL


def timestamp(value: datetime | None) -> str | None:
    """RFC 3339 in UTC."""
    return None if value is None else value.isoformat().replace("+00:00", "Z")
