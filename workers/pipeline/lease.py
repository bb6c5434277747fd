"""Keeps a claimed job's lease alive in a thread, and learns there whether the work shall stop."""

from __future__ import annotations

import threading
import time
from enum import StrEnum
from types import TracebackType

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.jobs.ledger import Claim, JobLedger, LeaseLost

log = structlog.get_logger(__name__)

_LOOK_FOR_CANCEL_S = 1.0


class StopReason(StrEnum):
    CANCELLED = "cancelled"
    LEASE_LOST = "lease_lost"
    SHUTDOWN = "shutdown"


class LeaseKeeper:
    """A context manager: the lease is renewed while inside. `should_stop` is cheap and safe to call from any thread."""

    def __init__(self, ledger: JobLedger, claim: Claim, shutdown: threading.Event) -> None:
        self._ledger = ledger
        self._claim = claim
        self._shutdown = shutdown
        self._ended = threading.Event()
        self._reason: StopReason | None = None
        self._lease_s = ledger.settings.lease_s
        self._thread = threading.Thread(target=self._keep, name=f"lease-{claim.job_id}", daemon=True)

    def should_stop(self) -> bool:
        return self.reason is not None

    @property
    def reason(self) -> StopReason | None:
        if self._reason is None and self._shutdown.is_set():
            return StopReason.SHUTDOWN
        return self._reason

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _keep(self) -> None:
        # Often enough that a cancel is seen within a second or so, and that one missed renewal does no harm.
        every = min(self._lease_s / 4, _LOOK_FOR_CANCEL_S)
        good_until = time.monotonic() + self._lease_s
        while not self._ended.wait(every):
            asked = time.monotonic()
            try:
                if self._ledger.renew(self._claim):
                    self._reason = self._reason or StopReason.CANCELLED
                good_until = asked + self._lease_s
            except LeaseLost:
                self._reason = StopReason.LEASE_LOST
                return
            except SQLAlchemyError as error:
                # The database is away. Go on while the lease holds; after that somebody else may have the job.
                log.warning("lease_not_renewed", job_id=self._claim.job_id, error=str(error)[:200])
                if time.monotonic() > good_until:
                    self._reason = StopReason.LEASE_LOST
                    return
