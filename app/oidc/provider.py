"""What is known of the identity provider: its discovery document and its keys, fetched beside the requests and kept
where it is away. A request waits for it only where nothing is known yet, or for a key that is not; and then without
holding a thread."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple, Unpack
from urllib.parse import urlsplit

import structlog

from app.errors import AppError
from app.oidc.fetching import ProviderAway, ProviderRefused, fetched, is_endpoint
from app.oidc.tokens import Head, PublicKey, keys_of, the_one

log = structlog.get_logger(__name__)

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

_KEPT_S = 300.0  # after which they are fetched again: what the provider has withdrawn counts no longer than that
_OLDEST_S = 24 * 3600.0  # of a provider that is away: none of its tokens lives longer
_AGAIN_S = 10.0  # anybody may send a token with an unknown key: it is asked for no more often than that
_PATIENCE_S = 6.0
_CALLS = 8  # under way at once, of people who sign in
_OPTIONAL = (
    "authorization_endpoint",
    "token_endpoint",
    "userinfo_endpoint",
    "end_session_endpoint",
    "device_authorization_endpoint",
)


@dataclass(frozen=True)
class Known:
    """`endpoints`: those of `_OPTIONAL` that it offers. `methods`: how clients may show who they are at its token
    endpoint. `challenges`: of PKCE, None where it does not say. `names_itself`: in each answer of its authorization
    endpoint (RFC 9207)."""

    issuer: str
    endpoints: Mapping[str, str]
    methods: frozenset[str]
    challenges: frozenset[str] | None
    names_itself: bool
    keys: tuple[PublicKey, ...]
    at: float


def look_up(issuer: str) -> Known:
    """Ask the provider. Blocks. Raises `ProviderAway`."""
    plain = urlsplit(issuer).scheme == "http"
    try:
        document = fetched(issuer.rstrip("/") + "/.well-known/openid-configuration")
        if document.get("issuer") != issuer:  # OpenID Connect Discovery 1.0, 4.3
            raise ProviderAway(f"it calls itself {str(document.get('issuer'))[:200]!r}, not {issuer!r}")
        for name in ("jwks_uri", *_OPTIONAL):
            if (name in document or name == "jwks_uri") and not is_endpoint(document.get(name), plain=plain):
                raise ProviderAway(f"its {name} is no address to be asked: {str(document.get(name))[:200]!r}")
        keys = keys_of(fetched(document["jwks_uri"]))
    except ProviderRefused as error:
        raise ProviderAway(f"it refuses: {error}") from error
    if not keys:
        raise ProviderAway("it publishes no key that may sign")
    challenges = document.get("code_challenge_methods_supported")
    return Known(
        issuer,
        {name: document[name] for name in _OPTIONAL if name in document},
        _texts(document.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])),
        None if challenges is None else _texts(challenges),
        document.get("authorization_response_iss_parameter_supported") is True,
        keys,
        time.monotonic(),
    )


def _texts(found: object) -> frozenset[str]:
    return frozenset(text for text in found if isinstance(text, str)) if isinstance(found, list) else frozenset()


class Provider:
    """Made and used in one event loop. What blocks runs in threads of its own, never in those of the requests: a
    provider that hangs holds up nobody who has a key."""

    def __init__(self, issuer: str) -> None:
        self.issuer = issuer
        self._known: Known | None = None
        self._asking: asyncio.Task[None] | None = None
        self._began_at = self._asked_at = float("-inf")
        self._away: str | None = None
        self._calls = asyncio.Semaphore(_CALLS)

    async def run(self) -> None:
        """In the background, for good: what is known stays fresh."""
        while True:
            await self._ask()
            pause_s = _AGAIN_S if self._away else _KEPT_S
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311 (not all processes at once)

    async def known(self) -> Known:
        """Raises 503 `provider_unavailable` where nothing is known, or what is has become too old."""
        if not self._usable():
            await self._ask_unless_just_asked()
        if self._known is None or not self._usable():
            raise self.unavailable()
        return self._known

    async def key(self, head: Head) -> PublicKey | None:
        """The published key of a token; None where there is none. An unknown one may be new: the provider changes its
        keys without a word. 503 `provider_unavailable` where it cannot be asked for that."""
        found = self._published(head)
        if found is None:
            await self._ask_unless_just_asked()
            found = self._published(head)
        if found is None and (self._away is not None or self._known is None):
            raise self.unavailable()
        return found

    def unavailable(self) -> AppError:
        detail = "The identity provider cannot be reached, or does not answer as one does."
        remedy = "Try again; API keys go on to work. The operator's `anneal-admin doctor` says what is wrong."
        return AppError(
            "provider_unavailable",
            "Identity provider unavailable",
            503,
            detail,
            retryable=True,
            remedy=remedy,
            headers={"Retry-After": str(round(_AGAIN_S))},
        )

    async def call(self, run: Callable[[Unpack[Arguments]], T], *arguments: *Arguments) -> T:
        """`run(*arguments)` in a thread of its own. 503 `provider_unavailable` for `ProviderAway`, for what takes too
        long, and where too many wait already."""
        if self._calls.locked():
            raise self.unavailable()
        async with self._calls:
            try:
                return await asyncio.wait_for(_in_thread(run, *arguments), 2 * _PATIENCE_S)
            except (ProviderAway, TimeoutError) as error:
                log.warning("provider_away", issuer=self.issuer, error=str(error)[:300])
                raise self.unavailable() from error

    def _published(self, head: Head) -> PublicKey | None:
        return the_one(self._known.keys, head) if self._known is not None and self._usable() else None

    def _usable(self) -> bool:
        return self._known is not None and time.monotonic() - self._known.at < _OLDEST_S

    async def _ask_unless_just_asked(self) -> None:
        now = time.monotonic()
        hangs = self._asking is not None and now - self._began_at >= _PATIENCE_S
        if not hangs and (self._asking is not None or now - self._asked_at >= _AGAIN_S):
            await self._ask()

    async def _ask(self) -> None:
        """Once for all who want it now. Who has waited long enough goes on; the asking does, too."""
        if self._asking is None:
            self._began_at = time.monotonic()
            self._asking = asyncio.get_running_loop().create_task(self._renew())
        try:
            await asyncio.wait_for(asyncio.shield(self._asking), _PATIENCE_S)
        except TimeoutError:
            self._note_away("it does not answer")

    async def _renew(self) -> None:
        try:
            self._known = await _in_thread(look_up, self.issuer)
            self._away = None
        except ProviderAway as error:
            self._note_away(str(error))
        except Exception as error:  # whatever else its answer can lead to: what is known goes on to count
            log.exception("provider_not_read", issuer=self.issuer)
            self._note_away(type(error).__name__)
        finally:
            self._asked_at, self._asking = time.monotonic(), None

    def _note_away(self, why: str) -> None:
        if self._away != why:
            log.warning("provider_away", issuer=self.issuer, error=why[:300])
        self._away = why


async def _in_thread(run: Callable[[Unpack[Arguments]], T], *arguments: *Arguments) -> T:
    """A thread that nothing waits for at the end of the process: looking up a name knows no time-out."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[T] = loop.create_future()

    def end(result: T | None, error: BaseException | None) -> None:
        if not ended.done():
            if error is not None:
                ended.set_exception(error)
            else:
                ended.set_result(result)  # type: ignore[arg-type]  # None only where T is

    def work() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = run(*arguments)
        except Exception as error:
            failure = error
        try:
            loop.call_soon_threadsafe(end, result, failure)
        except RuntimeError:  # the loop is closed: the process ends
            return

    threading.Thread(target=work, name="identity-provider", daemon=True).start()
    return await ended
