"""Deliveries are written where something happens, in the same transaction: they are lost with it, or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Row, bindparam, select, update
from sqlalchemy.orm import Session

from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import Job
from app.db.webhooks import WebhookDelivery, WebhookEndpoint
from app.jobs.schemas import JobEnded

_RECEIVER = re.compile(r"[^/?#]*//[^/?#]*")
# Of a job, what is told of it: neither its spec nor its stages, which a client may have made large.
_TOLD = (
    Job.id, Job.tenant_id, Job.model_id, Job.parent_id, Job.status, Job.queue, Job.error, Job.engine_ids,
    Job.report_sha256, Job.manifest_sha256, Job.webhook_url, Job.webhook_attempts, Job.created_at, Job.finished_at,
)  # fmt: skip
# Composed once, and of the table: it is asked at every job's end, and composing it costs more than the database takes
# to answer it.
_ENDPOINT = WebhookEndpoint.metadata.tables[WebhookEndpoint.__tablename__].c
_ENDPOINTS = (
    select(_ENDPOINT.id, _ENDPOINT.url, _ENDPOINT.events, _ENDPOINT.created_at)
    .where(
        _ENDPOINT.tenant_id == bindparam("tenant_id"),
        _ENDPOINT.disabled_at.is_(None),
        _ENDPOINT.deleted_at.is_(None),
    )
    .order_by(_ENDPOINT.id)
)

_Endpoint = Row[str, str, list[str] | None, datetime]


def receiver_of(url: str) -> str:
    """The URL up to its path. Spellings of one host count as several: they share the tenant's places all the same."""
    found = _RECEIVER.match(url)
    return found[0] if found else ""


def job_ended(session: Session, job_id: str, tenant_id: str, status: str, url: str | None) -> None:
    """Write a delivery to each of the tenant's endpoints that want to hear of this end, and to the URL that the job
    names."""
    endpoints = _listening(session, tenant_id, f"job.{status}")
    if not endpoints and url is None:
        return
    job = _told(session, job_id)
    if url is not None:
        hand_over(session, job)
    _tell(session, job, endpoints)


def tell_late(session: Session, job_id: str) -> None:
    """As `job_ended`, of a job that a worker of the release before has ended, which knows of no endpoints: to those
    that were there by then. Its own URL is told by `take_over`, or by that worker."""
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.finished_at.is_not(None), Job.told.is_(False))
        .values(told=True)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    if session.scalar(statement) is None:
        return  # somebody else came first
    job = _told(session, job_id)
    if job.parent_id is None and job.finished_at is not None:
        endpoints = _listening(session, job.tenant_id, f"job.{job.status}")
        _tell(session, job, [endpoint for endpoint in endpoints if endpoint.created_at <= job.finished_at])


def _tell(session: Session, job: Job, endpoints: Sequence[_Endpoint]) -> None:
    if not endpoints:
        return
    message = JobEnded.of(job)
    payload, now = message.to_json().decode(), utcnow()
    session.add_all(
        delivery(job.tenant_id, endpoint.url, message.type, payload, now, endpoint_id=endpoint.id, job_id=job.id)
        for endpoint in endpoints
    )


def take_over(session: Session, job_id: str, attempts: int) -> bool:
    """Hand over the webhook of a job that ended without a delivery, in an earlier release; a process of which would
    deliver it by itself, unless it finds it done. False where one attempts it at this moment, or somebody else came
    first."""
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.webhook_attempts == attempts, Job.webhook_done_at.is_(None))
        .values(webhook_done_at=utcnow())
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    )
    if session.scalar(statement) is None:
        return False
    hand_over(session, _told(session, job_id))
    return True


def hand_over(session: Session, job: Job) -> None:
    """The delivery to the URL that a job names. Nothing more is to be done about it by the job's own columns, by which
    the release before delivers."""
    assert job.webhook_url is not None
    message, now = JobEnded.of(job), utcnow()
    row = delivery(
        job.tenant_id, job.webhook_url, message.type, message.to_json().decode(), now, endpoint_id=None, job_id=job.id
    )
    row.attempts = row.failures = job.webhook_attempts
    session.add(row)
    done = update(Job).where(Job.id == job.id, Job.webhook_done_at.is_(None)).values(webhook_done_at=now)
    session.execute(done, execution_options={"synchronize_session": False})


def delivery(
    tenant_id: str,
    url: str,
    event: str,
    payload: str,
    due_at: datetime,
    *,
    endpoint_id: str | None,
    job_id: str | None,
) -> WebhookDelivery:
    """One that is due; yet to be added to a session."""
    return WebhookDelivery(
        id=new_id("msg"),
        tenant_id=tenant_id,
        endpoint_id=endpoint_id,
        job_id=job_id,
        url=url,
        receiver=receiver_of(url),
        event=event,
        payload=payload,
        status="pending",
        attempts=0,
        failures=0,
        due_at=due_at,
        created_at=utcnow(),
    )


def _told(session: Session, job_id: str) -> Job:
    """The job as it is now, as far as it is told; apart from the session's own."""
    return Job(**session.execute(select(*_TOLD).where(Job.id == job_id)).one()._mapping)


def _listening(session: Session, tenant_id: str, event: str) -> Sequence[_Endpoint]:
    found = session.execute(_ENDPOINTS, {"tenant_id": tenant_id})
    return [endpoint for endpoint in found if endpoint.events is None or event in endpoint.events]
