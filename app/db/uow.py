"""The unit of work: one session, one transaction, committed only here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.orm import Session


class Database:
    """Hands out transactions. `write()` commits at its end or rolls back on any exception; `read()` never commits.

    `after_commit` callbacks given to `UnitOfWork.after_commit` run once the commit stands (dispatch to the queue).
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._reader = engine.execution_options(anneal_write=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self._reader, expire_on_commit=False, autoflush=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[UnitOfWork]:
        with Session(self.engine, expire_on_commit=False) as session:
            uow = UnitOfWork(session)
            yield uow
            session.commit()
        for callback in uow.callbacks:
            callback()

    def close(self) -> None:
        self.engine.dispose()


class UnitOfWork:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.callbacks: list[Callable[[], object]] = []

    def after_commit(self, callback: Callable[[], object]) -> None:
        self.callbacks.append(callback)
