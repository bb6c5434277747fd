"""Workers and retention, as an operator has them: what the command line and `/v1/operator` share. Calls block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import select

from app.audit import record
from app.blobs.retention import change_policy
from app.capabilities.service import CapabilityService
from app.db.accounts import Tenant
from app.db.orm import Job, Worker
from app.db.uow import Database
from app.errors import not_found
from app.jobs.schedule import RUNNING

NEVER, DEFAULT = "never", "default"


@dataclass(frozen=True)
class WorkerStanding:
    """A worker of the last 24 hours, and the jobs that it holds."""

    worker: Worker
    state: Literal["live", "draining", "gone"]
    jobs: Sequence[str]

    @property
    def last_seen_at(self) -> datetime:
        return self.worker.last_seen_at


def workers(db: Database, capabilities: CapabilityService) -> list[WorkerStanding]:
    live = {worker.id for worker in capabilities.live()}
    held: dict[str | None, list[str]] = {}
    with db.read() as session:
        for owner, job_id in session.execute(select(Job.lease_owner, Job.id).where(Job.status == RUNNING)):
            held.setdefault(owner, []).append(job_id)
    return [WorkerStanding(worker, _state(worker, live), held.get(worker.id, ())) for worker in capabilities.known()]


def _state(worker: Worker, live: set[str]) -> Literal["live", "draining", "gone"]:
    if worker.draining_at is not None and worker.stopped_at is None:
        return "draining"
    return "live" if worker.id in live else "gone"


def set_retention(db: Database, which: str, days: Mapping[str, int | str], *, actor: str) -> Tenant:
    """Change after how many days what a tenant (by name or id) has expires: by kind, days, `NEVER`, or `DEFAULT` for
    what the settings say. What is shorter now applies to what is there already, from the collector's next round on.
    404 for no tenant."""
    own = {kind: None if value == NEVER else int(value) for kind, value in days.items() if value != DEFAULT}
    forgotten = [kind for kind, value in days.items() if value == DEFAULT]
    with db.write() as uow:
        named = (Tenant.id == which) | (Tenant.name == which)
        tenant = uow.session.scalar(select(Tenant).where(named).order_by(Tenant.id != which))
        if tenant is None:
            raise not_found("tenant", which)
        change_policy(uow.session, tenant.id, own, forgotten)
        record(uow.session, tenant.id, actor, "tenant.retention", tenant.id, {"changes": dict(days)})
        return tenant
