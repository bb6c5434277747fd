"""Jobs that wait for a device are built for by workers that need it not: the API writes the question down, an idle
worker takes it on. Its builds are stage results like all others, so that whoever gets the job finds them made. Where it
is lost in the middle, or nobody ever takes it on, that worker makes what is missing itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement

from app.db.base import utcnow
from app.db.orm import Job, Prebuild
from app.db.uow import Database
from app.prebuilds.repository import PrebuildRepository, held

LEASE = timedelta(seconds=30)
MOST_ATTEMPTS = 3  # of a job that takes its builders down, say: then it waits for its own worker


@dataclass(frozen=True)
class PrebuildHold:
    """A worker's right to build for a job that waits; it ends when the job is taken, cancelled or given to another
    builder. `before`: what the job's document showed of its stages until then; `progress`: how far the job is."""

    job_id: str
    tenant_id: str
    owner: str
    backend: str
    target: str
    before: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)
    progress: float = 0.0
    spent_seconds: float = 0.0  # none of it is the job's

    def holds(self) -> list[ColumnElement[bool]]:
        return held(self.job_id, self.backend, self.owner)

    def with_a_result(self) -> dict[str, Any]:
        return {"attempts": Job.attempts}  # as it is: the job was not begun

    def seen(self, changes: dict[str, Any], event: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The job stays queued, at no stage and as far as it was: what is built alone."""
        stages = [*map(dict, self.before), *changes["stages"]]
        return {"stages": stages}, {**event, "progress": self.progress, "expected_end": None}


class PrebuildService:
    """Of workers."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def take(self, owner: str, targets: Mapping[str, Collection[str]], formats: Collection[str]) -> PrebuildHold | None:
        """The job that waits longest of those that this worker can build for, held for `LEASE`; None where there is
        none. `targets`: by backend."""
        if not targets:
            return None
        with self._db.read() as session:
            found = PrebuildRepository(session).longest_waiting(targets, formats, MOST_ATTEMPTS)
        if found is None:
            return None
        asked, job = found
        with self._db.write() as uow:
            if not PrebuildRepository(uow.session).take(asked, owner, utcnow() + LEASE):
                return None
        before = tuple(stage for stage in job.stages if stage["status"] == "waiting")
        return PrebuildHold(job.id, job.tenant_id, owner, asked.backend, asked.target, before, job.progress)

    def renew(self, hold: PrebuildHold) -> bool:
        """False where it is over."""
        return self._update(hold, lease_expires_at=utcnow() + LEASE)

    def end(self, hold: PrebuildHold) -> None:
        """All that could be built is."""
        self._update(hold, ended_at=utcnow(), lease_expires_at=None)

    def retry_later(self, hold: PrebuildHold) -> None:
        """Something of the service was in the way; after `MOST_ATTEMPTS` nobody tries again."""
        self._update(hold, lease_owner=None, lease_expires_at=None)

    def give_back(self, hold: PrebuildHold) -> None:
        """Somebody else, or this worker later: it counts as no attempt."""
        self._update(hold, lease_owner=None, lease_expires_at=None, attempts=Prebuild.attempts - 1)

    def _update(self, hold: PrebuildHold, **values: Any) -> bool:
        with self._db.write() as uow:
            return PrebuildRepository(uow.session).update(hold.job_id, hold.backend, hold.owner, values)
