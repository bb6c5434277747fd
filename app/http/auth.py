"""API keys: `Authorization: Bearer ank_…` names the tenant."""

from __future__ import annotations

import time

from app.db.orm import LOCAL_TENANT
from app.db.uow import Database
from app.errors import AppError
from app.http.threads import SharedReads
from app.tenants import tenant_of

_REMEMBERED_S = 2.0
_MOST_REMEMBERED = 10_000


class Authenticator:
    """Finds the tenant of a request. A good key is remembered for two seconds, so that polling costs one query."""

    def __init__(self, db: Database, keys_required: bool, reads: SharedReads) -> None:
        self._db = db
        self._reads = reads
        self._required = keys_required
        self._known: dict[str, tuple[str, float]] = {}

    async def tenant(self, authorization: str | None) -> str:
        """The tenant's id. 401 for no key where one is needed, and for a wrong one always."""
        if authorization is None:
            if self._required:
                raise _unauthorized("This service needs an API key.", 'Bearer realm="anneal"')
            return LOCAL_TENANT
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise _unauthorized("The Authorization header is not of the form 'Bearer <key>'.", 'Bearer realm="anneal"')
        now = time.monotonic()
        found = self._known.get(key)
        if found is not None and found[1] > now:
            return found[0]
        self._known.pop(key, None)
        tenant_id = await self._reads.read(("key", key), tenant_of, self._db, key)
        if tenant_id is None:
            raise _unauthorized("The API key is not valid.", 'Bearer realm="anneal", error="invalid_token"')
        if len(self._known) >= _MOST_REMEMBERED:
            self._known.clear()
        self._known[key] = (tenant_id, now + _REMEMBERED_S)
        return tenant_id


def _unauthorized(detail: str, challenge: str) -> AppError:
    remedy = "Send the header Authorization: Bearer <key>; an operator makes keys with the service's command line."
    return AppError("unauthorized", "Unauthorized", 401, detail, remedy=remedy, headers={"WWW-Authenticate": challenge})
