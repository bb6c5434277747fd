"""What the tests hold the service to wherever they go: no thread asks the storage while it has a transaction open."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from app.db.uow import Database
from app.storage.local import LocalStore
from app.storage.s3 import S3Store

_ASKS = (
    "put_file",
    "fetch",
    "open",
    "size",
    "copy",
    "delete",
    "list",
    "check",
    "begin_upload",
    "put_part",
    "list_parts",
    "complete_upload",
    "abort_upload",
    "abort_uploads",
)
_open = threading.local()


def _counted(begin: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def transaction(db: Database) -> Iterator[Any]:
        _open.count = getattr(_open, "count", 0) + 1
        try:
            with begin(db) as found:
                yield found
        finally:
            _open.count -= 1

    return transaction


def _guarded(name: str, ask: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ask)
    def asked(*arguments: Any, **named: Any) -> Any:
        assert not getattr(_open, "count", 0), f"storage is asked to {name} while a transaction is open"
        return ask(*arguments, **named)

    return asked


@contextmanager
def storage_outside_of_transactions() -> Iterator[None]:
    """A storage that stalls would hold locks, leases and the writes of others for as long."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("read", "write"):
            patch.setattr(Database, name, _counted(getattr(Database, name)))
        for store in (LocalStore, S3Store):
            for name in _ASKS:
                patch.setattr(store, name, _guarded(name, getattr(store, name)))
        yield
