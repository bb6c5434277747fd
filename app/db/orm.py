"""Every table. Each resource belongs to a tenant; repositories filter by it, always."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    false,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from app.db.accounts import (  # noqa: F401 (here every table is known)
    LOCAL_TENANT,
    ApiKey,
    AuditEvent,
    BrowserSession,
    GpuUse,
    Plan,
    SubjectSession,
    Tenant,
)
from app.db.base import Base, JsonColumn, UtcDateTime, utcnow
from app.db.chains import ChainMember  # noqa: F401 (likewise)
from app.db.operations import OperationCount  # noqa: F401 (likewise)
from app.db.sharing import SharedCall  # noqa: F401 (likewise)
from app.db.webhooks import WebhookDelivery, WebhookEndpoint  # noqa: F401 (likewise)

Id = String(64)
Sha256 = String(64)
Json = dict[str, Any]


class SourceModel(Base):
    """An uploaded ML model. `inputs`/`outputs`: lists of {name, dtype, shape}."""

    __tablename__ = "source_models"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(200))
    filename: Mapped[str] = mapped_column(String(255))
    format: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str] = mapped_column(Sha256)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    opset: Mapped[int | None] = mapped_column(Integer)
    inputs: Mapped[list[Json]] = mapped_column(JsonColumn)
    outputs: Mapped[list[Json]] = mapped_column(JsonColumn)
    detail: Mapped[Json] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index("ix_source_models_tenant_id_id", "tenant_id", "id"),
        Index("ix_source_models_tenant_id_sha256", "tenant_id", "sha256"),
    )


class Dataset(Base):
    """`arrays`: list of {name, dtype, shape}, the shape of one sample."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(200))
    filename: Mapped[str] = mapped_column(String(255))
    format: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str] = mapped_column(Sha256)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    samples: Mapped[int] = mapped_column(BigInteger)
    arrays: Mapped[list[Json]] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        Index("ix_datasets_tenant_id_id", "tenant_id", "id"),
        Index("ix_datasets_tenant_id_sha256", "tenant_id", "sha256"),
    )


class Upload(Base):
    """An upload session. `status`: `app.domain.upload_state`. `lease_expires_at`: until then somebody completes it, or
    clears up after its end; still there later, that was left undone. `error`: why it was aborted."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    filename: Mapped[str] = mapped_column(String(255))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(Sha256)
    part_size: Mapped[int] = mapped_column(BigInteger)
    storage_key: Mapped[str] = mapped_column(String(512))
    storage_upload_id: Mapped[str] = mapped_column(String(1024))
    status: Mapped[str] = mapped_column(String(16))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    error: Mapped[Json | None] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)

    __table_args__ = (Index("ix_uploads_tenant_id_sha256", "tenant_id", "sha256"),)


class Job(Base):
    """A job. `version` grows with every change and is its ETag; `stages` is the snapshot that clients see.

    `lease_owner`, `lease_expires_at` and `fencing_token` guard it: a worker's write counts only while its token does.
    `lease_lock`: by what those on the owner's machine see that it is dead (`workers.liveness`), and the token.
    `attempts`: since a stage was finished last; `attempts_in_all` never begin anew. Neither counts what a worker that
    was shut down gave back.
    `turn` (of its `priority`) and `not_before` say when it is next (`app.jobs.schedule`); `start_by`: queued until then
    without having been begun, it fails.
    `spent_seconds`: of its budget, by attempts that ended; the one that runs began at `claimed_at`. `tallied_at`: since
    then an ended job stands in its status's `JobTally`. `parent_id`: of the job that compares this one's target with
    others (`app.jobs.family`). `traceparent`: of the request that submitted it, where that is traced; `actor`: in whose
    name that was, as audit rows have it. `told`: its end, to the tenant's webhook endpoints; a worker of the release
    before leaves that to others (`app.webhooks.outbox`).
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("source_models.id"))
    status: Mapped[str] = mapped_column(String(16))
    stage: Mapped[str | None] = mapped_column(String(64))
    progress: Mapped[float] = mapped_column(Float, default=0.0)
    spec: Mapped[Json] = mapped_column(JsonColumn)
    queue: Mapped[str] = mapped_column(String(128))
    stages: Mapped[list[Json]] = mapped_column(JsonColumn, default=list)
    error: Mapped[Json | None] = mapped_column(JsonColumn)
    engine_ids: Mapped[list[str]] = mapped_column(JsonColumn, default=list)
    report_sha256: Mapped[str | None] = mapped_column(Sha256)
    manifest_sha256: Mapped[str | None] = mapped_column(Sha256)
    correlation_id: Mapped[str] = mapped_column(String(128))
    traceparent: Mapped[str | None] = mapped_column(String(55))
    actor: Mapped[str | None] = mapped_column(String(200))
    version: Mapped[int] = mapped_column(BigInteger, default=1)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    attempts_in_all: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    fencing_token: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lease_lock: Mapped[str | None] = mapped_column(String(100))
    priority: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    turn: Mapped[int] = mapped_column(Integer, default=1, server_default=text("1"))
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    start_by: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    webhook_url: Mapped[str | None] = mapped_column(String(2048))
    webhook_attempts: Mapped[int] = mapped_column(Integer, default=0)
    webhook_due_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    webhook_done_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    claimed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    spent_seconds: Mapped[float] = mapped_column(Float, default=0.0, server_default=text("0"))
    expected_end: Mapped[datetime | None] = mapped_column(UtcDateTime)
    tallied_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    parent_id: Mapped[str | None] = mapped_column(Id)
    told: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())

    __table_args__ = (
        # Lists: all of a tenant's jobs, those in a status, those of a model.
        Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
        Index("ix_jobs_tenant_id_status_id", "tenant_id", "status", "id"),
        Index("ix_jobs_model_id_id", "model_id", "id"),
        # What refers to a blob (`app.blobs.references`).
        Index("ix_jobs_tenant_id_report_sha256", "tenant_id", "report_sha256"),
        Index("ix_jobs_tenant_id_manifest_sha256", "tenant_id", "manifest_sha256"),
        # What expires by a tenant's retention.
        Index(
            "ix_jobs_ended",
            "tenant_id",
            "finished_at",
            sqlite_where=text("finished_at IS NOT NULL"),
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
        # What the metrics count.
        Index(
            "ix_jobs_untallied",
            "status",
            "queue",
            sqlite_where=text("tallied_at IS NULL"),
            postgresql_where=text("tallied_at IS NULL"),
        ),
        # What the sweeper looks at: a small part of a table that only grows.
        Index(
            "ix_jobs_active",
            "status",
            "lease_expires_at",
            sqlite_where=text("status IN ('queued', 'running')"),
            postgresql_where=text("status IN ('queued', 'running')"),
        ),
        # Whose turn is next among a tenant's jobs; with the queue, those of other workers are passed over quickly.
        Index(
            "ix_jobs_waiting",
            "tenant_id",
            "turn",
            "id",
            "queue",
            sqlite_where=text("status = 'queued'"),
            postgresql_where=text("status = 'queued'"),
        ),
        # Those that wait too long.
        Index(
            "ix_jobs_start_by",
            "start_by",
            sqlite_where=text("status = 'queued' AND start_by IS NOT NULL"),
            postgresql_where=text("status = 'queued' AND start_by IS NOT NULL"),
        ),
        Index(
            "ix_jobs_webhook",
            "finished_at",
            sqlite_where=text("webhook_url IS NOT NULL AND webhook_done_at IS NULL"),
            postgresql_where=text("webhook_url IS NOT NULL AND webhook_done_at IS NULL"),
        ),
        # What a worker of the release before has ended.
        Index(
            "ix_jobs_untold",
            "finished_at",
            sqlite_where=text("finished_at IS NOT NULL AND NOT told"),
            postgresql_where=text("finished_at IS NOT NULL AND NOT told"),
        ),
        Index(
            "ix_jobs_parent_id",
            "parent_id",
            "id",
            sqlite_where=text("parent_id IS NOT NULL"),
            postgresql_where=text("parent_id IS NOT NULL"),
        ),
        CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="status"),
    )


class JobTally(Base):
    """How many jobs that ended in this status bear `tallied_at`: nobody needs to count them again."""

    __tablename__ = "job_tallies"

    status: Mapped[str] = mapped_column(String(16), primary_key=True)
    jobs: Mapped[int] = mapped_column(BigInteger)


class JobEvent(Base):
    """What happened to a job, in order; `seq` is the job's version after the change and the SSE id."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    type: Mapped[str] = mapped_column(String(32))
    data: Mapped[Json] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)


class StageResult(Base):
    """The content-addressed result of one stage call, good or bad, within a tenant's scope."""

    __tablename__ = "stage_results"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    key: Mapped[str] = mapped_column(Sha256, primary_key=True)
    stage: Mapped[str] = mapped_column(String(64))
    outputs: Mapped[Json] = mapped_column(JsonColumn)  # output name → list of {name, sha256, size_bytes}
    data: Mapped[Json] = mapped_column(JsonColumn)
    failure: Mapped[Json | None] = mapped_column(JsonColumn)
    seconds: Mapped[float] = mapped_column(Float)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    used_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow, index=True)


class StageFile(Base):
    """A blob that a stage result holds: each is found by the other. Written by `app.blobs.references.keep_result`."""

    __tablename__ = "stage_files"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    key: Mapped[str] = mapped_column(Sha256, primary_key=True)
    sha256: Mapped[str] = mapped_column(Sha256, primary_key=True)

    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant_id", "key"], ["stage_results.tenant_id", "stage_results.key"], ondelete="CASCADE"
        ),
        Index("ix_stage_files_tenant_id_sha256", "tenant_id", "sha256"),
    )


class Blob(Base):
    """A stored file of a tenant, so that storage can be collected and counted. None vouches for bytes that were found
    damaged."""

    __tablename__ = "blobs"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    sha256: Mapped[str] = mapped_column(Sha256, primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)


class BlobRemoval(Base):
    """The last removal of a blob's bytes from storage: under way until `ends_at`, over without. Whoever stores the same
    content meanwhile tells by `id` that its bytes may have been taken. Kept for a day."""

    __tablename__ = "blob_removals"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    sha256: Mapped[str] = mapped_column(Sha256, primary_key=True)
    id: Mapped[str] = mapped_column(Id)
    removed_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow, index=True)
    ends_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Engine(Base):
    """A delivered engine: the file, its bundle, and how it runs. It may outlive its job."""

    __tablename__ = "engines"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    job_id: Mapped[str] = mapped_column(Id, index=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("source_models.id"), index=True)
    backend: Mapped[str] = mapped_column(String(64))
    format: Mapped[str] = mapped_column(String(64))
    precision: Mapped[str] = mapped_column(String(16))
    filename: Mapped[str] = mapped_column(String(255))
    sha256: Mapped[str] = mapped_column(Sha256)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    bundle_filename: Mapped[str] = mapped_column(String(255))
    bundle_sha256: Mapped[str] = mapped_column(Sha256)
    bundle_size_bytes: Mapped[int] = mapped_column(BigInteger)
    hardware: Mapped[Json] = mapped_column(JsonColumn)
    runtime: Mapped[Json] = mapped_column(JsonColumn)
    metrics: Mapped[Json] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)

    __table_args__ = (
        Index("ix_engines_tenant_id_id", "tenant_id", "id"),
        Index("ix_engines_tenant_id_sha256", "tenant_id", "sha256"),
        Index("ix_engines_tenant_id_bundle_sha256", "tenant_id", "bundle_sha256"),
    )


class IdempotencyKey(Base):
    """One answered POST: the same key and request answers the same resource."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(Sha256)
    resource_id: Mapped[str] = mapped_column(Id)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow, index=True)


class Worker(Base):
    """A worker that reported itself; live while `last_seen_at` is recent. From `draining_at` on it takes no job."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    hostname: Mapped[str] = mapped_column(String(255))
    hardware: Mapped[Json] = mapped_column(JsonColumn)
    backends: Mapped[list[Json]] = mapped_column(JsonColumn)
    formats: Mapped[list[str]] = mapped_column(JsonColumn)
    queues: Mapped[list[str]] = mapped_column(JsonColumn)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    last_seen_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow, index=True)
    stopped_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    draining_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Examination(Base):
    """Whether a backend takes a model: the question, and a worker's answer. `version`: of the backend's libraries
    on the workers that were asked. `status`: asked, answered, failed. `lease_owner` holds it until
    `lease_expires_at`."""

    __tablename__ = "examinations"

    model_id: Mapped[str] = mapped_column(ForeignKey("source_models.id"), primary_key=True)
    backend: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    version: Mapped[str] = mapped_column(String(200))
    status: Mapped[str] = mapped_column(String(16))
    answer: Mapped[Json | None] = mapped_column(JsonColumn)
    error: Mapped[Json | None] = mapped_column(JsonColumn)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    asked_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    answered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        # What waits for a worker: a small part of a table that only grows.
        Index(
            "ix_examinations_asked",
            "asked_at",
            sqlite_where=text("status = 'asked'"),
            postgresql_where=text("status = 'asked'"),
        ),
        CheckConstraint("status IN ('asked', 'answered', 'failed')", name="status"),
    )


class Prebuild(Base):
    """A job whose engines a worker without the job's device may build, as long as it is queued: by this backend, for
    this target. `lease_owner` does so until `lease_expires_at`; `ended_at`: there is no more to build."""

    __tablename__ = "prebuilds"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    backend: Mapped[str] = mapped_column(String(64), primary_key=True)
    target: Mapped[str] = mapped_column(String(64))
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
