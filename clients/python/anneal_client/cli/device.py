"""Log in at the identity provider that a service trusts: a code that is typed, or a link that is opened, in any browser
(RFC 8628), and access tokens that are renewed as long as the provider agrees."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from anneal_client.cli.exits import Exit, Stop

_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_METADATA = "/.well-known/oauth-protected-resource"  # RFC 9728
_EARLY_S = 30.0  # before its end a token is renewed
_LONGEST_S = 1800.0
_TIMEOUT_S = 20.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Tokens:
    """`refresh_token`: empty where the provider gives none; then it is logged in until `expires_at`, in Unix time."""

    access_token: str
    refresh_token: str
    expires_at: float
    token_endpoint: str
    client_id: str

    @classmethod
    def of(cls, kept: Any) -> Tokens | None:
        try:
            return cls(**kept)
        except TypeError:
            return None

    def stale(self) -> bool:
        return time.time() >= self.expires_at - _EARLY_S

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """What a person does: opens `link`, or `address` and types `code`."""

    issuer: str
    address: str
    code: str
    link: str | None


def sign_in(url: str, tell: Callable[[Asked], None]) -> Tokens:
    """Ask the service at `url` whom it trusts, `tell` the person what to do, wait until it is done. Raises `Stop`."""
    with httpx.Client(timeout=_TIMEOUT_S, headers={"Accept": "application/json"}) as http:
        try:
            return _sign_in(http, url, tell)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Stop(f"No answer: {error}", where=url, exit=Exit.UNREACHABLE) from error


def renewed(tokens: Tokens) -> Tokens | None:
    """None where the provider does not agree, or is away."""
    if not tokens.refresh_token:
        return None
    form = {"grant_type": "refresh_token", "refresh_token": tokens.refresh_token, "client_id": tokens.client_id}
    try:
        answer = httpx.post(tokens.token_endpoint, data=form, timeout=_TIMEOUT_S)
    except httpx.HTTPError:
        return None
    told = _object(answer)
    given = told.get("access_token")
    return _tokens(told, tokens.token_endpoint, tokens.client_id, tokens.refresh_token) if given else None


def _sign_in(http: httpx.Client, url: str, tell: Callable[[Asked], None]) -> Tokens:
    offer = _object(http.get(url + _METADATA))
    issuers, client_id, audience = offer.get("authorization_servers"), offer.get("anneal_client_id"), _audience(offer)
    if not isinstance(issuers, list) or not issuers or not isinstance(client_id, str):
        remedy = f"Log in with a key: `anneal login {url}`. The operator makes keys."
        raise Stop("The service has no identity provider to log in at.", where=url, remedy=remedy)
    issuer = str(issuers[0])
    about = _object(http.get(_secure(issuer.rstrip("/") + "/.well-known/openid-configuration")))
    if about.get("issuer") != issuer:
        raise Stop(f"It calls itself {str(about.get('issuer'))[:200]!r}.", where=issuer)
    begin, end = _secure(about.get("device_authorization_endpoint")), _secure(about.get("token_endpoint"))
    scopes = about.get("scopes_supported")
    scope = "openid offline_access" if isinstance(scopes, list) and "offline_access" in scopes else "openid"
    begun = _object(http.post(begin, data={"client_id": client_id, "scope": scope, **audience}))
    if "device_code" not in begun:
        raise Stop(f"It refuses: {_why(begun)}", where=issuer, exit=Exit.UNAUTHORIZED)
    link = begun.get("verification_uri_complete")
    address = _secure(begun.get("verification_uri"))
    tell(Asked(issuer, address, str(begun.get("user_code")), None if link is None else _secure(link)))
    form = {"grant_type": _GRANT, "device_code": str(begun["device_code"]), "client_id": client_id, **audience}
    return _tokens(_awaited(http, end, form, begun, issuer), end, client_id)


def _audience(offer: Mapping[str, Any]) -> dict[str, str]:
    """As providers want to be told whom the token is for: by RFC 8707 where that is an address, else by a word of
    their own; who knows neither ignores them."""
    audience = offer.get("anneal_audience")
    if not isinstance(audience, str):
        return {}
    return {"audience": audience, **({"resource": audience} if "://" in audience else {})}


def _awaited(
    http: httpx.Client, endpoint: str, form: Mapping[str, str], begun: Mapping[str, Any], issuer: str
) -> dict[str, Any]:
    """What the token endpoint answers once the person is done (RFC 8628, 3.4 and 3.5)."""
    pause_s = _seconds(begun.get("interval"), 5.0)
    until = time.monotonic() + min(_seconds(begun.get("expires_in"), _LONGEST_S), _LONGEST_S)
    while time.monotonic() < until:
        time.sleep(pause_s)
        told = _object(http.post(endpoint, data=form))
        error = told.get("error")
        if told.get("access_token"):
            return told
        if error == "slow_down":
            pause_s += 5
        elif error != "authorization_pending":
            raise Stop(f"Not logged in: {_why(told)}", where=issuer, exit=Exit.UNAUTHORIZED)
    raise Stop("Not logged in: nobody has come in time.", where=issuer, exit=Exit.UNAUTHORIZED)


def _tokens(told: Mapping[str, Any], endpoint: str, client_id: str, refresh_token: str = "") -> Tokens:
    ends = time.time() + _seconds(told.get("expires_in"), 300.0)
    return Tokens(str(told["access_token"]), str(told.get("refresh_token") or refresh_token), ends, endpoint, client_id)


def _seconds(found: Any, usual: float) -> float:
    return float(found) if isinstance(found, int | float) and 0 < found < 1e9 else usual


def _object(answer: httpx.Response) -> dict[str, Any]:
    """Empty for what is none."""
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _why(told: Mapping[str, Any]) -> str:
    return str(told.get("error_description") or told.get("error") or "it does not say why")[:300]


def _secure(url: Any) -> str:
    """HTTPS, or on this machine: what goes there are secrets, or a person's password."""
    try:
        found = httpx.URL(url) if isinstance(url, str) else None
    except httpx.InvalidURL:
        found = None
    if found is None or not (found.scheme == "https" or (found.scheme == "http" and found.host in _LOOPBACK)):
        raise Stop(f"The identity provider's address is none to be asked: {str(url)[:200]!r}.")
    return str(url)
