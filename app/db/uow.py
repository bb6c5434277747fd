"""The unit of work: one session, one transaction, committed only here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog
from sqlalchemy import Engine, event
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from app.db.counts import write_noted

log = structlog.get_logger(__name__)

T = TypeVar("T")


_LONGEST_PAUSE_S = 1.0


def patiently(call: Callable[[], T], seconds: float) -> T:
    """Try again for so long where the database is away (it restarts, say). What was committed and whose answer was lost
    is done twice: only for what bears that."""
    until, pause = time.monotonic() + seconds, 0.1
    while True:
        try:
            return call()
        except (OperationalError, InterfaceError) as error:
            if time.monotonic() + pause > until:
                raise
            log.warning("database_away", again_in_s=pause, error=str(error)[:200])
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class Database:
    """Hands out transactions. `write()` commits at its end or rolls back on any exception; `read()` changes nothing.
    Each statement of a `read()` sees what is committed by then: on PostgreSQL, which would see the same inside of a
    transaction, it does without one, and without the two trips that one costs.

    `after_commit` callbacks given to `UnitOfWork.after_commit` run once the commit stands (dispatch to the queue).
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        alone = {"isolation_level": "AUTOCOMMIT"} if engine.dialect.name == "postgresql" else {}
        self._reader = engine.execution_options(anneal_write=False, **alone)

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self._reader, expire_on_commit=False, autoflush=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[UnitOfWork]:
        with Session(self.engine, expire_on_commit=False) as session:
            uow = UnitOfWork(session)
            yield uow
            write_noted(session)
            session.commit()
        for callback in uow.callbacks:
            callback()

    def close(self) -> None:
        """What a thread still has (one whose task was cancelled, say) is closed when it comes back: to a pool that is
        nobody's any more."""
        event.listen(self.engine, "checkin", _closed)
        self.engine.dispose()


def _closed(_connection: Any, record: Any) -> None:
    record.invalidate()


class UnitOfWork:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.callbacks: list[Callable[[], object]] = []

    def after_commit(self, callback: Callable[[], object]) -> None:
        self.callbacks.append(callback)
