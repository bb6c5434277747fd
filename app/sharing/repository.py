"""All SQL on shared calls. A row counts as long as its job runs under the token that it was offered with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.db.base import utcnow
from app.db.orm import Job
from app.db.sharing import SharedCall
from app.domain.job_state import JobStatus

_RUNS = and_(
    Job.id == SharedCall.job_id,
    Job.status == JobStatus.RUNNING.value,
    Job.fencing_token == SharedCall.token,
    Job.cancel_requested_at.is_(None),
)
_SILENT = {"synchronize_session": False}


class SharedCallRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    # Of the worker that has the job

    def offer(self, job_id: str, token: int, calls: Sequence[SharedCall]) -> None:
        """Twice is harmless. What earlier attempts at the job left goes."""
        self.withdraw(job_id, token - 1)
        self.withdraw(job_id, token, [call.id for call in calls])
        self.session.add_all(calls)

    def withdraw(self, job_id: str, token: int | None = None, ids: Collection[str] | None = None) -> None:
        """Whoever holds them. `token`: none of a later attempt's; `ids`: none but these."""
        wanted: list[ColumnElement[bool]] = []
        if ids is not None:
            wanted.append(SharedCall.id.in_(ids))
        if token is not None:
            wanted.append(SharedCall.token <= token)
        statement = delete(SharedCall).where(SharedCall.job_id == job_id, *wanted)
        self.session.execute(statement, execution_options=_SILENT)

    def take_back(self, job_id: str, token: int, call_id: str) -> bool:
        """Delete it where nobody is at it."""
        mine = (SharedCall.job_id == job_id, SharedCall.id == call_id, SharedCall.token == token)
        statement = delete(SharedCall).where(*mine, idle(utcnow())).returning(SharedCall.id)
        return self.session.scalar(statement, execution_options=_SILENT) is not None

    def of_job(self, job_id: str, token: int) -> list[Row[Any]]:
        """(id, ended_at, lease_expires_at, begun_at, doing) of each."""
        call = SharedCall
        query = select(call.id, call.ended_at, call.lease_expires_at, call.begun_at, call.doing)
        return [*self.session.execute(query.where(call.job_id == job_id, call.token == token))]

    def remove_stale(self) -> None:
        """What a worker left that was lost, or had to end in haste: nobody takes it any more."""
        runs = and_(
            Job.id == SharedCall.job_id,
            Job.status == JobStatus.RUNNING.value,
            Job.fencing_token == SharedCall.token,
        )
        stale = ~select(Job.id).where(runs).correlate(SharedCall).exists()
        if self.session.scalar(select(SharedCall.id).where(stale).limit(1)) is not None:
            self.session.execute(delete(SharedCall).where(stale), execution_options=_SILENT)

    # Of those that help

    def next_for(
        self, kinds: Collection[str], machine: str, owner: str, most_takes: int
    ) -> tuple[SharedCall, Job] | None:
        """Of the job with the fewest helpers; of several, of the one that was begun first."""
        now = utcnow()
        other = aliased(SharedCall)
        held = (other.job_id == SharedCall.job_id, other.ended_at.is_(None), other.lease_expires_at >= now)
        helpers = select(func.count()).select_from(other).where(*held).scalar_subquery()
        query = (
            select(SharedCall, Job)
            .join(Job, _RUNS)
            .where(
                SharedCall.kind.in_(kinds),
                _free(now),
                SharedCall.takes < most_takes,
                or_(SharedCall.apart.is_(None), SharedCall.apart != machine),
                Job.lease_owner != owner,
                Job.lease_expires_at >= now,
            )
            .order_by(helpers, Job.claimed_at, Job.id, SharedCall.turn)
            .limit(1)
        )
        found = self.session.execute(query).first()
        return None if found is None else (found[0], found[1])

    def take(self, call: SharedCall, owner: str, until: datetime) -> bool:
        """False where somebody else was faster, or it was taken back."""
        values = {
            "lease_owner": owner,
            "lease_expires_at": until,
            "takes": SharedCall.takes + 1,
            "begun_at": None,
            "doing": None,
        }
        statement = (
            update(SharedCall)
            .where(
                SharedCall.job_id == call.job_id,
                SharedCall.id == call.id,
                SharedCall.token == call.token,
                SharedCall.takes == call.takes,
                _free(utcnow()),
            )
            .values(**values)
            .returning(SharedCall.id)
        )
        return self.session.scalar(statement, execution_options=_SILENT) is not None

    def update(self, held: Sequence[ColumnElement[bool]], values: Mapping[str, Any]) -> bool:
        """Change what is still held (`holding`); False where it is not, or the job does not run any more."""
        statement = (
            update(SharedCall)
            .where(*held, select(Job.id).where(_RUNS).correlate(SharedCall).exists())
            .values(**values)
            .returning(SharedCall.id)
        )
        return self.session.scalar(statement, execution_options=_SILENT) is not None

    def doing(self, job_id: str, token: int, key: str, before: str) -> bool:
        """Whether somebody computes the stage with this key for the job: its own worker, or a helper whose call comes
        before this one."""
        rows = [row for row in self.of_job(job_id, token) if row.id < before and busy_with(row, key, utcnow())]
        stages = self.session.scalar(select(Job.stages).where(Job.id == job_id)) or []
        return bool(rows) or bool(stages and stages[-1].get("key") == key and stages[-1]["status"] == "running")


def holding(job_id: str, token: int, call_id: str, owner: str, take: int) -> list[ColumnElement[bool]]:
    """Conditions on the row: it is this worker's, by this take."""
    return [
        SharedCall.job_id == job_id,
        SharedCall.token == token,
        SharedCall.id == call_id,
        SharedCall.lease_owner == owner,
        SharedCall.takes == take,
        SharedCall.ended_at.is_(None),
    ]


def _free(now: datetime) -> ColumnElement[bool]:
    unheld = or_(SharedCall.lease_expires_at.is_(None), SharedCall.lease_expires_at < now)
    return and_(SharedCall.ended_at.is_(None), unheld)


def idle(now: datetime) -> ColumnElement[bool]:
    """Nobody computes it: free, or held by somebody who has not begun."""
    return or_(_free(now), and_(SharedCall.ended_at.is_(None), SharedCall.begun_at.is_(None)))


def busy_with(row: Row[Any], key: str, now: datetime) -> bool:
    """Of `of_job`."""
    held = row.ended_at is None and row.lease_expires_at is not None and row.lease_expires_at >= now
    return held and row.doing == key
