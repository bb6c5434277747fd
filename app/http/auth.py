"""Who asks: `Authorization: Bearer …`, a key or a token of the identity provider, names the tenant and a role; or the
session of a browser that signed in with either.

A browser sends its cookie whoever made it ask. So a request that changes something counts only with a token that a page
of another origin cannot know: bound to the session, and to a cookie of its own, which there is before a session.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import cookie_parser
from starlette.types import Scope

from app.db.uow import Database
from app.domain.roles import needed_by
from app.errors import AppError
from app.http.rates import Rate, Rates
from app.http.threads import SharedReads
from app.network import address_of
from app.oidc import METADATA
from app.settings import Settings
from app.tenants.callers import LOCAL, Caller, KeyUses, caller_of_key, caller_of_session, hash_key

SESSION_COOKIE = "anneal_session"
SEED_COOKIE = "anneal_seed"
TOKEN_HEADER = "x-csrf-token"  # noqa: S105 (the header's name)
_REMEMBERED_S = 2.0
_MOST_REMEMBERED = 10_000
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_INVALID = 'Bearer realm="anneal", error="invalid_token"'


@dataclass(frozen=True)
class Credentials:
    """What a request says of who sends it: the header `Authorization`, and a browser's cookies."""

    authorization: str | None = None
    session: str | None = None
    seed: str | None = None

    @classmethod
    def of(cls, scope: Scope) -> Credentials:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        authorization, cookie = headers.get(b"authorization"), headers.get(b"cookie")
        found = cookie_parser(cookie.decode("latin-1")) if cookie is not None else {}
        return cls(
            None if authorization is None else authorization.decode("latin-1"),
            found.get(SESSION_COOKIE) or None,
            found.get(SEED_COOKIE) or None,
        )

    def token(self) -> str:
        """What a form of this browser has to send."""
        return csrf_token(self.seed or "", self.session)

    def check_token(self, given: str | None) -> None:
        """Raises 403 `csrf` for a form that is none of this browser's own."""
        if not self.seed or not given or not hmac.compare_digest(self.token().encode(), given.encode()):
            detail = "The request does not come from a page of this service, or the page is too old."
            raise AppError("csrf", "Refused", 403, detail, remedy="Load the page again, and send it once more.")


def csrf_token(seed: str, session: str | None) -> str:
    return hmac.new(seed.encode(), (session or "").encode(), hashlib.sha256).hexdigest()


class RefusedToken(Exception):
    """A token that opens nothing. The message says why, to whoever sent it."""


# Who sends this token. Raises `RefusedToken`.
TokenCaller = Callable[[str], Awaitable[Caller]]


class Authenticator:
    """Finds who sends a request. Who was let in is remembered for two seconds, so that polling costs one query.
    `of_token`: of the identity provider; None where there is none."""

    def __init__(
        self, db: Database, settings: Settings, reads: SharedReads, rates: Rates, of_token: TokenCaller | None = None
    ) -> None:
        self._db = db
        self._reads = reads
        self._rates = rates
        self._of_token = of_token
        self._required = settings.keys_required
        self._challenge = 'Bearer realm="anneal"'
        if of_token is not None and settings.public_url:  # RFC 9728, 5.1
            self._challenge += f', resource_metadata="{settings.public_url}{METADATA}"'
        self._sign_ins = settings.limits.sign_ins_per_minute
        self._wrong_keys = settings.limits.wrong_keys_per_minute
        self._known: dict[tuple[str, str], tuple[Caller, float]] = {}
        self.uses = KeyUses(db)

    async def caller(self, credentials: Credentials) -> Caller:
        """401 for no key where one is needed, and for a wrong one always; 403 where its tenant is switched off, or the
        provider's token names none; 503 where the provider cannot be asked about a token."""
        if credentials.authorization is None:
            if not self._required:
                return LOCAL
            found = None
            if credentials.session is not None:
                found = await self._caller(("session", credentials.session), caller_of_session)
            if found is None or found.expired():
                what = "an API key" if self._of_token is None else "an API key, or a token of its identity provider"
                raise _unauthorized(f"This service needs {what}.", self._challenge)
            return found.admitted()
        scheme, _, key = credentials.authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise _unauthorized("The Authorization header is not of the form 'Bearer <key>'.", 'Bearer realm="anneal"')
        if self._of_token is not None and "." in key:  # no key has one, every JWT has two
            return (await self._token_caller(key, self._of_token)).admitted()
        found = await self._caller(("key", key), caller_of_key)
        if found is None or found.expired():
            detail = "The API key is not valid." if found is None else "The API key has expired."
            raise _unauthorized(detail, _INVALID)
        return found.admitted()

    async def tenant(self, credentials: Credentials) -> str:
        """The id of the caller's tenant."""
        return (await self.caller(credentials)).tenant_id

    async def caller_of_call(self, credentials: Credentials, method: str, token: str | None) -> Caller:
        """Who sends a call of the API, which a browser's session may make by a page of this service only. 403 where the
        role is too small for what the method may change."""
        caller = await self.caller(credentials)
        if self._required and credentials.authorization is None and method not in _SAFE:
            credentials.check_token(token)
        caller.require(needed_by(method))
        return caller

    async def counted(self, caller: Caller) -> Rate | None:
        """One more request of this caller's tenant, where its plan limits them; 429 where it has no more."""
        allowed = caller.requests_per_minute
        rate = None if allowed is None else await self._rates.take("tenant", caller.tenant_id, allowed)
        if rate is not None and rate.exceeded:
            raise rate.refusal("The tenant")
        return rate

    async def count_sign_in(self, address: str) -> None:
        """One more attempt from this address; 429 where it has no more."""
        if self._sign_ins:
            rate = await self._rates.take("sign-in", address_of(address), self._sign_ins)
            if rate is not None and rate.exceeded:
                raise rate.refusal("An address that signs in")

    async def count_wrong_key(self, credentials: Credentials, address: str) -> None:
        """One more call from this address with a key or a token that opens nothing; 429 where it has no more. Whoever
        has one that opens something is none the worse for what others send from there."""
        if self._wrong_keys and credentials.authorization is not None:
            rate = await self._rates.take("wrong-key", address_of(address), self._wrong_keys)
            if rate is not None and rate.exceeded:
                error = rate.refusal("An address whose keys are wrong")
                error.remedy = "Send a key that is valid; those that are get in all the same."
                raise error

    def forget(self, session: str) -> None:
        """A session that was ended here."""
        self._known.pop(("session", session), None)

    async def _caller(self, who: tuple[str, str], find: Callable[[Database, str], Caller | None]) -> Caller | None:
        return await self._remembered(who, lambda: self._reads.read(who, find, self._db, who[1]))

    async def _token_caller(self, token: str, of_token: TokenCaller) -> Caller:
        who = ("token", hash_key(token))  # tokens are long, and nothing keeps them

        async def find() -> Caller:
            try:
                return await of_token(token)
            except RefusedToken as error:
                raise _unauthorized(f"The access token is not valid. {error}", _INVALID) from error

        found = await self._remembered(who, find)
        if found is None or found.expired():
            raise _unauthorized("The access token is not valid. It has expired.", _INVALID)
        return found

    async def _remembered(self, who: tuple[str, str], find: Callable[[], Awaitable[Caller | None]]) -> Caller | None:
        now = time.monotonic()
        known = self._known.get(who)
        if known is not None and known[1] > now:
            return known[0]
        self._known.pop(who, None)
        caller = await find()
        if caller is not None and not caller.disabled and not caller.expired():
            self.uses.note(caller)
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[who] = (caller, now + _REMEMBERED_S)
        return caller


def _unauthorized(detail: str, challenge: str) -> AppError:
    remedy = (
        "Send the header Authorization: Bearer <key>, in a browser sign in at /login; an operator makes keys with the "
        "service's command line."
    )
    return AppError("unauthorized", "Unauthorized", 401, detail, remedy=remedy, headers={"WWW-Authenticate": challenge})
