"""One job on several workers: the worker that has it writes down which calls others may answer, and idle workers of
its kind take them on. What they make are stage results under the very keys that the job's own worker asks for: that one
finds them made. Nothing waits for a helper that has not begun, and what a lost one held is taken back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, select

from app.db.base import utcnow
from app.db.orm import Job
from app.db.sharing import SharedCall
from app.db.uow import Database, patiently
from app.domain.job_state import JobStatus
from app.jobs.ledger import Claim, LeaseLost
from app.jobs.logs import log_context
from app.settings import WorkerSettings
from app.sharing.repository import SharedCallRepository, busy_with, holding

MOST_TAKES = 5  # of one call: after that its job's own worker is left to make it
_TRACEPARENT = "traceparent"  # beside the call, in its body
_TRIES = 3  # of taking one, where others look at the same moment


class CallState(StrEnum):
    FREE = "free"
    HELD = "held"
    ENDED = "ended"


@dataclass(frozen=True)
class Offer:
    """`body`: `workers.search.calls.Call` as JSON; the rest as in `SharedCall`."""

    id: str
    body: Mapping[str, Any]
    turn: int
    kind: str
    apart: str | None = None


@dataclass(frozen=True)
class HelpHold:
    """A worker's right to answer one call of a job that another one has; it ends with that job, when the call is taken
    back, or given to another helper."""

    job_id: str
    tenant_id: str
    owner: str
    call_id: str
    token: int
    take: int
    body: Mapping[str, Any] = field(compare=False, default_factory=dict)
    offered_at: datetime | None = None
    spent_seconds: float = 0.0
    logged: Mapping[str, str] = field(compare=False, default_factory=dict)  # what its log lines bear

    @property
    def traceparent(self) -> str | None:
        """Of the job's attempt, whose worker handed this out."""
        return self.body.get(_TRACEPARENT)

    @property
    def row(self) -> list[ColumnElement[bool]]:
        return holding(self.job_id, self.token, self.call_id, self.owner, self.take)

    def holds(self) -> list[ColumnElement[bool]]:
        return [
            Job.fencing_token == self.token,
            Job.status == JobStatus.RUNNING.value,
            Job.cancel_requested_at.is_(None),
            select(SharedCall.id).where(*self.row).exists(),
        ]

    def with_a_result(self) -> dict[str, Any]:
        return {"attempts": Job.attempts}  # as it is: that is for its own worker to say

    def seen(self, _changes: dict[str, Any], _event: dict[str, Any]) -> None:
        """Clients see what the job's own worker does: it will find this made."""


class CallBoard:
    """Of one job, for the worker that has it. `traceparent`: of its attempt, which spans of helpers are to follow."""

    def __init__(self, db: Database, claim: Claim, settings: WorkerSettings, traceparent: str | None = None) -> None:
        self._db, self._settings = db, settings
        self._job_id, self._token = claim.job_id, claim.token
        self._told = {} if traceparent is None else {_TRACEPARENT: traceparent}

    def offer(self, offers: Sequence[Offer]) -> None:
        mine = {"job_id": self._job_id, "token": self._token}

        def write() -> None:
            rows = [
                SharedCall(**mine, id=o.id, kind=o.kind, apart=o.apart, turn=o.turn, body={**o.body, **self._told})
                for o in offers
            ]
            with self._db.write() as uow:
                SharedCallRepository(uow.session).offer(self._job_id, self._token, rows)

        patiently(write, self._settings.lease_s)

    def states(self) -> dict[str, CallState]:
        """Of the calls that are out, by id."""
        rows, now = self._rows(), utcnow()
        return {row.id: _state(row, now) for row in rows}

    def doing(self, key: str) -> bool:
        """Whether a helper computes the stage with this key."""
        rows, now = self._rows(), utcnow()
        return any(busy_with(row, key, now) for row in rows)

    def take_back(self, call_id: str) -> bool:
        """False where somebody is at it, or has answered it."""

        def write() -> bool:
            with self._db.write() as uow:
                return SharedCallRepository(uow.session).take_back(self._job_id, self._token, call_id)

        return patiently(write, self._settings.lease_s)

    def withdraw(self, ids: Collection[str] | None = None) -> None:
        """Whoever is at them; None: all."""

        def write() -> None:
            with self._db.write() as uow:
                SharedCallRepository(uow.session).withdraw(self._job_id, self._token, ids)

        patiently(write, self._settings.lease_s)

    def _rows(self) -> list[Any]:
        def read() -> list[Any]:
            with self._db.read() as session:
                return SharedCallRepository(session).of_job(self._job_id, self._token)

        return patiently(read, self._settings.lease_s)


class SharingService:
    """Of workers that help."""

    def __init__(self, db: Database, settings: WorkerSettings) -> None:
        self._db, self.settings = db, settings

    def take(self, owner: str, kinds: Collection[str], machine: str) -> HelpHold | None:
        """A call that a worker of these kinds may answer on this machine, held for a lease; None: there is none."""
        for _ in range(_TRIES):
            with self._db.read() as session:
                found = SharedCallRepository(session).next_for(kinds, machine, owner, MOST_TAKES)
            if found is None:
                return None
            call, job = found
            with self._db.write() as uow:
                if SharedCallRepository(uow.session).take(call, owner, self._until()):
                    take = call.takes + 1
                    return HelpHold(
                        job.id,
                        job.tenant_id,
                        owner,
                        call.id,
                        call.token,
                        take,
                        call.body,
                        call.offered_at,
                        logged=log_context(job),
                    )
        return None

    def remove_stale(self) -> None:
        """What nobody takes any more: its job does not run, or under another token."""
        with self._db.write() as uow:
            SharedCallRepository(uow.session).remove_stale()

    def renew(self, claim: HelpHold) -> bool:
        """Raises `LeaseLost`; never True: where the user asked to cancel the job, it is over, too."""
        self._update(claim, lease_expires_at=self._until())
        return False

    def doing(self, hold: HelpHold, key: str) -> None:
        """It computes the stage with this key from now on. Raises `LeaseLost`."""
        self._update(hold, doing=key, begun_at=utcnow(), lease_expires_at=self._until())

    def waits(self, hold: HelpHold) -> None:
        """It has to wait before it can go on: nobody else need. Raises `LeaseLost`."""
        self._update(hold, begun_at=None, doing=None)

    def elsewhere(self, hold: HelpHold, key: str) -> bool:
        """Whether somebody else is at this stage, whom to wait for."""
        with self._db.read() as session:
            return SharedCallRepository(session).doing(hold.job_id, hold.token, key, hold.call_id)

    def end(self, hold: HelpHold) -> None:
        """All that it asks for is in storage, or cannot be had. Raises `LeaseLost`."""
        self._update(hold, ended_at=utcnow(), lease_expires_at=None)

    def give_back(self, hold: HelpHold) -> None:
        """Somebody else, or the job's own worker. Raises `LeaseLost`."""
        self._update(hold, lease_owner=None, lease_expires_at=None, begun_at=None, doing=None)

    def _until(self) -> datetime:
        return utcnow() + timedelta(seconds=self.settings.lease_s)

    def _update(self, hold: HelpHold, **values: Any) -> None:
        with self._db.write() as uow:
            if not SharedCallRepository(uow.session).update(hold.row, values):
                raise LeaseLost(hold.job_id)


def idle_of(db: Database, worker_ids: Collection[str]) -> int:
    """How many of these workers have no job."""
    running = select(Job.lease_owner).where(Job.status == JobStatus.RUNNING.value, Job.lease_owner.in_(worker_ids))
    with db.read() as session:
        return len(set(worker_ids) - set(session.scalars(running)))


def _state(row: Any, now: datetime) -> CallState:
    if row.ended_at is not None:
        return CallState.ENDED
    held = row.lease_expires_at is not None and row.lease_expires_at >= now
    return CallState.HELD if held and row.begun_at is not None else CallState.FREE
