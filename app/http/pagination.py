"""Cursors: the id that the page ended with, opaque to clients. Ids are ordered by time, so pages are newest first."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from starlette.responses import Response

from app.errors import AppError

CURSOR = r"^[A-Za-z0-9_-]{1,100}$"
_ID = re.compile(rb"[a-z]{3}_[0-9a-zA-Z]{1,60}")
_ROWS = 20  # asked for at once: a row may be large
_PAGE_BYTES = 4 << 20  # after which a page ends, whatever its `limit` is


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=_HasId)


@dataclass(frozen=True)
class Page:
    """What the client asks for: at most so many items, those before an id."""

    limit: int
    before: str | None


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


def page_response(
    page: Page, fetch: Callable[[int, str | None], Sequence[R]], render: Callable[[R], bytes]
) -> Response:
    """A page as JSON: `fetch` gives so many rows before an id, `render` one of them as JSON. However many are wanted,
    the page ends before it grows too large, and no more than a few rows are in memory beside it."""
    items: list[bytes] = []
    size, before = 0, page.before
    while True:
        wanted = min(_ROWS, page.limit - len(items))
        rows = fetch(wanted + 1, before)
        for row in rows[:wanted]:
            body = render(row)
            if items and size + len(body) > _PAGE_BYTES:
                return _response(items, before)
            items.append(body)
            size, before = size + len(body), row.id
        if len(rows) <= wanted:
            return _response(items, None)
        if len(items) == page.limit:
            return _response(items, before)


def _response(items: Sequence[bytes], last_id: str | None) -> Response:
    cursor = json.dumps(None if last_id is None else encode_cursor(last_id)).encode()
    body = b'{"items":[' + b",".join(items) + b'],"next_cursor":' + cursor + b"}"
    return Response(body, media_type="application/json")
