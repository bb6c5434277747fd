"""All SQL on webhooks that have yet to be told: whose turn it is, and that nobody else takes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, func, not_, or_, select
from sqlalchemy.orm import Session

from app.db.base import utcnow
from app.db.orm import Job
from app.jobs.repository import LEAN, JobRepository


@dataclass(frozen=True)
class Passed:
    """Whom not to look for at this moment: jobs, tenants, and receivers (a URL's scheme and authority)."""

    jobs: Collection[str] = ()
    tenants: Collection[str] = ()
    receivers: Collection[str] = ()


class WebhookRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def waiting_tenants(self, now: datetime, passed: Passed) -> list[str]:
        """Tenants with a webhook that is due; whoever has waited longest first."""
        query = select(Job.tenant_id).where(*_due(now, passed)).group_by(Job.tenant_id)
        return [*self.session.scalars(query.order_by(func.min(Job.finished_at), Job.tenant_id))]

    def next_of(self, tenant_id: str, now: datetime, passed: Passed) -> Job | None:
        """The tenant's job that has waited longest."""
        query = select(Job).options(*LEAN).where(Job.tenant_id == tenant_id, *_due(now, passed))
        return self.session.scalar(query.order_by(Job.finished_at, Job.id).limit(1))

    def take(self, job: Job, until: datetime) -> bool:
        """Count one more attempt, and let nobody else begin one until then. False where somebody has."""
        changes = {"webhook_due_at": until, "webhook_attempts": job.webhook_attempts + 1}
        return self._jobs.touch(job.id, _at(job.webhook_attempts), changes)

    def again(self, job: Job, due_at: datetime) -> bool:
        """The attempt that `take` counted has failed."""
        return self._jobs.touch(job.id, _at(job.webhook_attempts + 1), {"webhook_due_at": due_at})

    def done(self, job: Job, message: str) -> bool:
        """It was told, or is given up."""
        open_still = [Job.webhook_done_at.is_(None)]
        changes = {"webhook_done_at": utcnow()}
        return self._jobs.update(job.id, open_still, changes, "note", {"message": message[:300]}) is not None

    @property
    def _jobs(self) -> JobRepository:
        return JobRepository(self.session)


def _at(attempts: int) -> list[ColumnElement[bool]]:
    return [Job.webhook_attempts == attempts, Job.webhook_done_at.is_(None)]


def _due(now: datetime, passed: Passed) -> list[ColumnElement[bool]]:
    """Ended jobs whose webhook has yet to hear of it. The first two conditions are those of the partial index."""
    return [
        Job.webhook_url.is_not(None),
        Job.webhook_done_at.is_(None),
        Job.finished_at.is_not(None),
        or_(Job.webhook_due_at.is_(None), Job.webhook_due_at <= now),
        Job.id.not_in(passed.jobs),
        Job.tenant_id.not_in(passed.tenants),
        *(not_(_goes_to(receiver)) for receiver in passed.receivers),
    ]


def _goes_to(receiver: str) -> ColumnElement[bool]:
    after = (Job.webhook_url.startswith(receiver + mark, autoescape=True) for mark in "/?#")
    return or_(Job.webhook_url == receiver, *after)
