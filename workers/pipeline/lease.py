"""Keeps a claimed job's lease alive in a thread, and learns there whether the work shall stop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.jobs.ledger import LeaseLost
from app.settings import WorkerSettings

log = structlog.get_logger(__name__)

_LOOK_FOR_CANCEL_S = 1.0
_LOOK_S = 0.2
_USABLE = 0.95
_GOES_BY_ITSELF_S = 1.5  # that a job's own thread has, at a shutdown, to stop or to end the job


class StopReason(StrEnum):
    CANCELLED = "cancelled"
    LEASE_LOST = "lease_lost"
    SHUTDOWN = "shutdown"


class Held(Protocol):
    """What the lease is on: a job, or a call of one."""

    @property
    def job_id(self) -> str: ...


H = TypeVar("H", bound=Held)
H_contra = TypeVar("H_contra", bound=Held, contravariant=True)


class Renewals(Protocol[H_contra]):
    """Where leases are renewed: `app.jobs.ledger.JobLedger`, say."""

    settings: WorkerSettings

    def renew(self, claim: H_contra) -> bool: ...


class LeaseKeeper(Generic[H]):
    """A context manager: the lease is renewed while inside. `should_stop` is cheap and safe to call from any thread.

    Whether the lease still holds is told by this machine's clock alone, from the last renewal that succeeded: a
    database that hangs holds up the renewal, and perhaps the job's own thread, but not `on_lost`, which ends the job's
    stage. At a shutdown, too, nobody waits for that thread: it may be in the middle of a large file, or wait for a
    storage that hangs.
    """

    def __init__(
        self,
        ledger: Renewals[H],
        claim: H,
        shutdown: threading.Event,
        *,
        asked: float,
        on_lost: Callable[[], None],
        hand_back: Callable[[], None] = lambda: None,
    ) -> None:
        """`asked`: `time.monotonic()` before the claim was. `on_lost` is called in a thread of its own, once; so is
        `hand_back`, where the job's thread has not gone by itself a while after the shutdown began."""
        self._ledger = ledger
        self._claim = claim
        self._shutdown = shutdown
        self._on_lost = on_lost
        self._hand_back = hand_back
        self._ended = threading.Event()
        self._reason: StopReason | None = None
        self._lease_s = ledger.settings.lease_s
        self._good_until = self._until(asked)
        self._threads = [
            threading.Thread(target=target, name=f"{name}-{claim.job_id}", daemon=True)
            for name, target in (("lease", self._keep), ("watch", self._watch))
        ]

    def _until(self, asked: float) -> float:
        """The end of a lease that was asked for then, less what it takes to end a stage."""
        return asked + _USABLE * self._lease_s

    def should_stop(self) -> bool:
        return self.reason is not None

    @property
    def reason(self) -> StopReason | None:
        if self._reason is None and self._shutdown.is_set():
            return StopReason.SHUTDOWN
        return self._reason

    def __enter__(self) -> LeaseKeeper[H]:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _keep(self) -> None:
        # Often enough that a cancel is seen within a second or so, and that one missed renewal does no harm.
        every = min(self._lease_s / 4, _LOOK_FOR_CANCEL_S)
        while not self._ended.wait(every) and self._reason is not StopReason.LEASE_LOST:
            asked = time.monotonic()
            try:
                if self._ledger.renew(self._claim):
                    self._reason = self._reason or StopReason.CANCELLED
                self._good_until = self._until(asked)
            except LeaseLost:
                self._reason = StopReason.LEASE_LOST
                return
            except SQLAlchemyError as error:
                # The database is away. Go on while the lease holds; after that somebody else may have the job.
                log.warning("lease_not_renewed", job_id=self._claim.job_id, error=str(error)[:200])
            except Exception:
                log.exception("lease_not_renewed", job_id=self._claim.job_id)

    def _watch(self) -> None:
        every, asked_to_go = min(self._lease_s / 20, _LOOK_S), math.inf
        while not self._ended.wait(every):
            if self._shutdown.is_set():
                asked_to_go = min(asked_to_go, time.monotonic())
                if time.monotonic() > asked_to_go + _GOES_BY_ITSELF_S:
                    self._on_lost()
                    self._hand_back()
                    return
            if self._reason is None and time.monotonic() > self._good_until:
                log.warning("lease_ran_out", job_id=self._claim.job_id)
                self._reason = StopReason.LEASE_LOST
            if self._reason is StopReason.LEASE_LOST:
                self._on_lost()
                return
