"""Access tokens at the API: from the header to who asks."""

from __future__ import annotations

from app.db.uow import Database
from app.http.auth import RefusedToken
from app.http.threads import SharedReads
from app.oidc.people import caller_of
from app.oidc.provider import Provider
from app.oidc.tokens import LEEWAY_S, Head, InvalidToken, PublicKey, access_claims
from app.settings import OidcSettings
from app.tenants.callers import Caller, hash_key


class BearerTokens:
    """Calls do not block."""

    def __init__(self, db: Database, settings: OidcSettings, provider: Provider, reads: SharedReads) -> None:
        self._db = db
        self._settings = settings
        self._provider = provider
        self._reads = reads

    async def caller(self, token: str) -> Caller:
        """Raises `RefusedToken`; 403 for one without a tenant or a role here; 503 where the provider is away and the
        key is not known."""
        try:
            head = Head.of(token)
            key = await self._provider.key(head)
            if key is None:
                raise InvalidToken("The identity provider publishes no such key.")
            return await self._reads.read(("token", hash_key(token)), self._checked, token, head, key)
        except InvalidToken as error:
            raise RefusedToken(str(error)) from error

    def _checked(self, token: str, head: Head, key: PublicKey) -> Caller:
        settings = self._settings
        claims = access_claims(token, head, key, issuer=settings.issuer, audience=settings.audience)
        return caller_of(self._db, claims, settings, LEEWAY_S)
