"""One job on several workers: what a worker's own jobs hand out (`search.crew`), and its errand of answering what
others hand out while it is idle.

Celery's groups would tie a job's fate to messages and to results kept in the broker. So it is with calls as it is with
jobs: a message only wakes, and who answers which call the database decides, by leases and fencing tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import structlog
from sqlalchemy.exc import SQLAlchemyError
from structlog.contextvars import bound_contextvars

from app.capabilities.service import CapabilityService
from app.db.base import utcnow
from app.db.uow import Database
from app.domain.failures import FailureKind, StageFailure
from app.jobs.ledger import Claim, LeaseLost
from app.queue.messages import help_queue
from app.queue.producer import make_bell
from app.settings import Settings
from app.sharing.service import CallBoard, HelpHold, SharingService, idle_of
from workers import kernel
from workers.equipment import Equipment
from workers.kinds import Kind, machine
from workers.pipeline.faults import infrastructure_faults
from workers.pipeline.isolated import Interrupted
from workers.pipeline.lease import LeaseKeeper, StopReason
from workers.pipeline.optimize import Optimizer
from workers.pipeline.workspace import Workspace
from workers.search.calls import Call
from workers.search.crew import Crew
from workers.spare import SpareTime
from workers.telemetry.telling import Telemetry
from workers.telemetry.watch import StageSeen, Watch

log = structlog.get_logger(__name__)

_LOOK_S = 0.1


class Sharing:
    """Of one worker: what its own jobs need to hand out calls. `db`: what a job's own writes go by."""

    def __init__(
        self, db: Database, capabilities: CapabilityService, settings: Settings, worker_id: str, kind: Kind
    ) -> None:
        self._db, self._capabilities, self._settings, self._id = db, capabilities, settings, worker_id
        self.kind, self._bell = kind, make_bell(settings)

    @property
    def queue(self) -> str:
        """Where this worker hears that others hand out calls."""
        return help_queue(self.kind.plain)

    def crew(self, claim: Claim, should_stop: Callable[[], bool], traceparent: str | None = None) -> Crew:
        """`traceparent`: of the attempt at the job."""
        return Crew(
            CallBoard(self._db, claim, self._settings.worker, traceparent),
            helpers=self._helpers,
            kind=self.kind.of,
            machine=machine(),
            ring=lambda workers: self._bell(self.kind.plain, workers),
            should_stop=should_stop,
        )

    def _helpers(self) -> tuple[int, int]:
        live = [w for w in self._capabilities.live() if w.id != self._id]
        ids = [w.id for w in live if w.hardware.get("helps") == self.kind.plain]
        return len(ids), idle_of(self._db, ids) if ids else 0


class Helper:
    """An errand of the worker's spare time. `renewals`: by a database that fails while there is time for another try;
    `willing`: whether the worker takes work at all."""

    def __init__(
        self,
        service: SharingService,
        renewals: SharingService,
        equipment: Equipment,
        kind: Kind,
        backends: list[kernel.BackendInfo],
        spare: SpareTime,
        telemetry: Telemetry,
        willing: Callable[[], bool],
    ) -> None:
        self._service, self._renewals, self._equipment, self._kind = service, renewals, equipment, kind
        self._backends, self._spare, self._telemetry, self._willing = backends, spare, telemetry, willing
        self._machine = machine()

    def help_one(self) -> bool:
        """Take on a call of another's job, if this worker is idle; whether there was one that it is done with."""
        with self._spare.turn() as mine:
            if not mine or not self._willing():
                return False
            asked = time.monotonic()
            hold = self._service.take(self._equipment.worker_id, self._kind.both, self._machine)
            if hold is None:
                return False
            with bound_contextvars(**hold.logged, call=hold.call_id[:12]):
                return self._help(hold, asked)

    def _help(self, hold: HelpHold, asked: float) -> bool:
        log.info("help_started")
        on_lost = self._equipment.isolated.interrupt
        with LeaseKeeper(self._renewals, hold, self._spare.shutdown, asked=asked, on_lost=on_lost) as keeper:
            try:
                outcome = self._answered(hold, keeper)
            except LeaseLost:
                outcome = "lost"  # taken back, or the job is over
            except (SQLAlchemyError, OSError):
                self._telemetry.helped("failed")
                raise  # the lease runs out
        self._telemetry.helped(outcome)
        log.info("help_ended", outcome=outcome)
        return outcome in ("answered", "lost")

    def _answered(self, hold: HelpHold, keeper: LeaseKeeper[HelpHold]) -> str:
        """What became of it: answered, given_back, failed. Raises `LeaseLost`."""

        def should_stop() -> bool:
            return keeper.should_stop() or self._spare.over()

        name = f"help-{hold.job_id}-{self._equipment.worker_id}"
        try:
            with infrastructure_faults(), self._equipment.workspace(name, hold.tenant_id) as workspace:
                self._answer(hold, workspace, should_stop)
        except Interrupted:
            if keeper.reason is StopReason.LEASE_LOST:
                raise LeaseLost(hold.job_id) from None
            self._service.give_back(hold)
            return "given_back"
        except StageFailure as failure:
            log.info("help_failed", code=failure.code, detail=failure.detail)
            if failure.kind is FailureKind.INFRASTRUCTURE:
                self._service.give_back(hold)
                return "failed"
        except (LeaseLost, SQLAlchemyError, OSError):
            raise
        except Exception:  # what another worker wrote down is no reason for this one to end
            log.exception("help_failed")
            self._service.give_back(hold)
            return "failed"
        self._service.end(hold)  # what fails on the model, the job's own worker finds, too
        return "answered"

    def _answer(self, hold: HelpHold, workspace: Workspace, should_stop: Callable[[], bool]) -> None:
        call = Call.from_json(hold.body)
        waited = (utcnow() - hold.offered_at).total_seconds() if hold.offered_at else 0.0
        # The call's deadlines are seconds of the job's budget.
        hold = replace(hold, spent_seconds=call.now + max(waited, 0.0))
        with self._telemetry.help(hold) as seen:
            stages = _Stages(self._service, hold, seen, should_stop)
            job, models, datasets = self._equipment.ledger.load(hold)
            runner = self._equipment.runner(hold, workspace, should_stop, watch=stages, elsewhere=stages.elsewhere)
            Optimizer(runner, job, models, datasets, self._backends, self._equipment.settings.limits).answer(call)


class _Stages(Watch):
    """Tells the job's own worker what stage is computed, and that none is while this machine is not free: then it need
    not wait."""

    def __init__(self, service: SharingService, hold: HelpHold, watch: Watch, should_stop: Callable[[], bool]) -> None:
        self._service, self._hold, self._watch, self._should_stop = service, hold, watch, should_stop
        self._key, self._waits = "", False

    def elsewhere(self, key: str, seconds: float) -> bool:
        """Before a stage is computed: wait while somebody else does, so long at most; whether there was one."""
        self._key = key
        self._service.doing(self._hold, key)
        until, waited = time.monotonic() + seconds, False
        while time.monotonic() < until and self._service.elsewhere(self._hold, key):
            waited = True
            if self._should_stop():
                raise Interrupted
            time.sleep(_LOOK_S)
        return waited

    @contextmanager
    def stage(self, seen: StageSeen) -> Iterator[None]:
        with self._watch.stage(seen):
            yield

    def waiting(self) -> None:
        self._watch.waiting()
        self._waits = True
        with suppress(LeaseLost):  # seen when it is this call's turn
            self._service.waits(self._hold)

    @contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        if self._waits:
            self._waits = False
            self._service.doing(self._hold, self._key)
        with self._watch.held(alone=alone):
            yield
