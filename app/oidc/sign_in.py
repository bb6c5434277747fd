"""People sign in at the identity provider: the authorization code flow with PKCE, `state` and `nonce` (RFC 6749, 7636,
9207, 9700; OpenID Connect Core 1.0, 3.1).

What one sign-in needs to know of its beginning lies in a cookie of the browser that began it: one random seed, of which
`state`, `nonce` and the verifier are made. An answer that another browser began finds no such cookie here.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

import anyio.to_thread
import structlog

from app.db.uow import Database
from app.errors import AppError
from app.oidc import CALLBACK
from app.oidc.fetching import ProviderRefused, fetched, plain_code, posted
from app.oidc.people import caller_of, claim, name_of
from app.oidc.provider import Known, Provider
from app.oidc.tokens import LEEWAY_S, Head, InvalidToken, id_claims
from app.settings import Settings
from app.tenants.callers import Caller
from app.tenants.sessions import note_refused_subject, sign_in_subject

log = structlog.get_logger(__name__)

_LONGEST_CODE = 4096


@dataclass(frozen=True)
class SignedIn:
    """`session`: the token of the browser's session; `id_token`: shown to the provider when it ends."""

    session: str
    id_token: str
    caller: Caller


class SignIn:
    """Calls do not block."""

    def __init__(self, db: Database, settings: Settings, provider: Provider) -> None:
        self._db = db
        self._settings = settings.oidc
        self._public_url = settings.public_url
        self._provider = provider
        self.lasts = timedelta(seconds=self._settings.session_s)
        self.secure = self._public_url.startswith("https://")

    @property
    def host(self) -> str:
        """Of the provider, for the button."""
        return self._settings.issuer.partition("://")[2].partition("/")[0]

    async def begin(self) -> tuple[str, str]:
        """Where the browser goes, and the seed that it is to keep. 503 `provider_unavailable`."""
        address = (await self._provider.known()).endpoints.get("authorization_endpoint")
        if address is None:
            raise self._provider.unavailable()
        seed = secrets.token_urlsafe(32)
        challenge = hashlib.sha256(_part(seed, "verifier").encode()).digest()
        query = {
            "response_type": "code",
            "client_id": self._settings.client_id,
            "redirect_uri": self._public_url + CALLBACK,
            "scope": self._settings.scopes,
            "state": _part(seed, "state"),
            "nonce": _part(seed, "nonce"),
            "code_challenge": _text(challenge),
            "code_challenge_method": "S256",
        }
        return with_query(address, query), seed

    async def finish(self, seed: str | None, answer: Mapping[str, str], address: str) -> SignedIn:
        """A session for whom the provider's answer names. 403 `sign_in_failed` for an answer that this browser has not
        begun, or that is none; 403 for who has no place here; 503 `provider_unavailable`."""
        known = await self._provider.known()
        code = self._code(known, seed, answer)
        assert seed is not None  # `_code` has refused that
        tokens = await self._provider.call(self._exchanged, known, code, _part(seed, "verifier"))
        id_token = tokens.get("id_token")
        if not isinstance(id_token, str):
            raise _failed("The identity provider gave no ID token.")
        try:
            head = Head.of(id_token)
            key = await self._provider.key(head)
            if key is None:
                raise InvalidToken("The identity provider publishes no such key.")
            of_client = {"issuer": self._settings.issuer, "client_id": self._settings.client_id}
            claims = id_claims(id_token, head, key, **of_client, nonce=_part(seed, "nonce"))
        except InvalidToken as error:
            raise _failed(f"The identity provider's ID token is not valid. {error}") from error
        claims = await self._completed(known, claims, tokens.get("access_token"))
        return await anyio.to_thread.run_sync(self._begun, claims, id_token, address)

    async def goodbye(self, id_token: str | None) -> str | None:
        """Where a browser goes that has signed out here, to sign out there, too; None where that is not offered, or the
        provider is away."""
        try:
            address = (await self._provider.known()).endpoints.get("end_session_endpoint")
        except AppError:
            return None
        if address is None:
            return None
        query = {"client_id": self._settings.client_id, "post_logout_redirect_uri": f"{self._public_url}/login"}
        return with_query(address, query | ({"id_token_hint": id_token} if id_token else {}))

    def _code(self, known: Known, seed: str | None, answer: Mapping[str, str]) -> str:
        state = answer.get("state", "")
        if not seed or not hmac.compare_digest(_part(seed, "state").encode(), state.encode()):
            raise _failed("The answer belongs to no sign-in that this browser has begun, or that took too long.")
        # Another provider's answer: RFC 9207
        if answer.get("iss", None if known.names_itself else known.issuer) != known.issuer:
            raise _failed("The answer is not of the identity provider that was asked.")
        if "error" in answer:
            raise _failed(f"The identity provider refuses: {plain_code(answer['error'])}.")
        code = answer.get("code", "")
        if not 0 < len(code) <= _LONGEST_CODE:
            raise _failed("The answer holds no code.")
        return code

    def _exchanged(self, known: Known, code: str, verifier: str) -> dict[str, Any]:
        """The tokens for a code. Blocks."""
        address = known.endpoints.get("token_endpoint")
        if address is None:
            raise _failed("The identity provider offers no tokens for a code.")
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._public_url + CALLBACK,
            "code_verifier": verifier,
        }
        client = None
        secret = self._settings.client_secret
        if secret is None:
            form["client_id"] = self._settings.client_id
        elif "client_secret_basic" in known.methods or "client_secret_post" not in known.methods:
            client = (self._settings.client_id, secret.get_secret_value())
        else:
            form |= {"client_id": self._settings.client_id, "client_secret": secret.get_secret_value()}
        try:
            return posted(address, form, client=client)
        except ProviderRefused as error:
            log.warning("code_refused", error=error.error)
            raise _failed(f"The identity provider refuses the code: {error.error}.") from error

    async def _completed(self, known: Known, claims: dict[str, Any], access_token: Any) -> dict[str, Any]:
        """With what the provider tells of the person elsewhere, where the ID token has not all that counts."""
        address = known.endpoints.get("userinfo_endpoint")
        wanted = (self._settings.tenant_claim, self._settings.roles_claim)
        if address is None or not _is_bearer(access_token) or all(claim(claims, w) is not None for w in wanted):
            return claims
        try:
            told = await self._provider.call(lambda: fetched(address, bearer=access_token))
        except ProviderRefused:
            return claims
        if told.get("sub") != claims["sub"]:  # OpenID Connect Core 1.0, 5.3.2
            raise _failed("The identity provider tells of another person.")
        return {**told, **claims}

    def _begun(self, claims: Mapping[str, Any], id_token: str, address: str) -> SignedIn:
        """Blocks."""
        try:
            caller = caller_of(self._db, claims, self._settings, LEEWAY_S)
        except AppError as error:
            note_refused_subject(self._db, str(claims["sub"]), error.code, address)
            raise
        return SignedIn(sign_in_subject(self._db, caller, name_of(claims), self.lasts, address), id_token, caller)


def with_query(address: str, values: Mapping[str, str]) -> str:
    return f"{address}{'&' if '?' in address else '?'}{urlencode(values)}"


def _part(seed: str, name: str) -> str:
    """One of the values of a sign-in: 43 characters, of which none tells another."""
    return _text(hmac.new(seed.encode(), name.encode(), hashlib.sha256).digest())


def _text(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _is_bearer(token: Any) -> bool:
    """What may stand in a header."""
    return isinstance(token, str) and 0 < len(token) < 16_384 and token.isascii() and token.isprintable()


def _failed(detail: str) -> AppError:
    return AppError("sign_in_failed", "Not signed in", 403, detail, remedy="Begin again at /login.")
