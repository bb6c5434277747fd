"""Locks by name that end with their transaction. Unlike the lock of a row, none is in the way of who changes a row.

A writing transaction on SQLite is alone by itself; PostgreSQL takes an advisory lock.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session


def lock(session: Session, name: str) -> None:
    """Until the end of this transaction nobody else passes here with this name."""
    # `connection()` begins the transaction: a session that has asked nothing yet has none.
    if session.connection().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_number(name))))


def try_lock(session: Session, name: str) -> bool:
    """The same without waiting: False where somebody else has it."""
    if session.connection().dialect.name != "postgresql":
        return True
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(_number(name)))))


def _number(name: str) -> ColumnElement[Any]:
    return func.hashtextextended(name, 0)
