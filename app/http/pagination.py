"""Cursors: the id that the page ended with, opaque to clients. Ids are ordered by time, so pages are newest first."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

from app.errors import AppError

_ID = re.compile(rb"[a-z]{3}_[0-9a-zA-Z]{1,60}")


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_HasId)


def encode_cursor(row_id: str) -> str:
    return base64.urlsafe_b64encode(row_id.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """The id in a cursor; raises 422 `invalid_cursor`."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not _ID.fullmatch(raw):
        remedy = "Use the next_cursor of the page before, unchanged."
        raise AppError("invalid_cursor", "Not a cursor", 422, "The cursor is not one of this service.", remedy=remedy)
    return raw.decode()


def cut(rows: Sequence[R], limit: int) -> tuple[Sequence[R], str | None]:
    """The page of `limit` rows out of up to one more, and the cursor of the next page where there is one."""
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], encode_cursor(rows[limit - 1].id)
