"""Signed tokens of the provider: which keys and algorithms count, and what a token must and must not say (RFC 7519, RFC
8725, RFC 9068). Nothing of a token is believed before its signature is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from app.db.base import utcnow

log = structlog.get_logger(__name__)

LEEWAY_S = 30  # between clocks
LONGEST = 16 << 10
_LONGEST_KEY_ID = 200
_LONGEST_SUBJECT = 255  # OpenID Connect Core 1.0, 2
_MOST_KEYS = 100
_LEAST_RSA_BITS = 2048
_RSA: tuple[str, str | None] = ("RSA", None)
_EDWARDS = ("OKP", "Ed25519")
# What may sign, and the type of key it takes. No symmetric one: whoever reads the published keys could sign, too.
ALGORITHMS: Mapping[str, tuple[str, str | None]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), _RSA),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": _EDWARDS,
}
_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
# What tells other tokens of the same provider from access tokens where the header does not: ID tokens, logout tokens
# and other security events; and Keycloak's own word for the kind.
_OF_OTHERS = ("nonce", "at_hash", "c_hash", "s_hash", "events")
_KINDS_OF_OTHERS = frozenset({"id", "refresh", "offline", "logout"})
_WORDS: Sequence[tuple[type[Exception], str]] = (
    (jwt.InvalidAudienceError, "It is for another audience."),
    (jwt.InvalidIssuerError, "It is of another issuer."),
    (jwt.MissingRequiredClaimError, "It lacks a claim: exp, iss, aud and sub are needed."),
)
# Beside PyJWT's own, what its reading of odd numbers and deep nesting raises.
_FAULTS = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError, KeyError, AttributeError)


class InvalidToken(Exception):
    """It opens nothing. The message says why, in words for whoever sent it."""


@dataclass(frozen=True)
class PublicKey:
    """A key that the provider publishes; `algorithm`: the only one that it is for, None for any that fits its type."""

    key_id: str | None
    kind: tuple[str, str | None]
    algorithm: str | None
    key: Any

    def fits(self, head: Head) -> bool:
        same = self.key_id == head.key_id or head.key_id is None
        return same and self.kind == ALGORITHMS[head.algorithm] and self.algorithm in (None, head.algorithm)


@dataclass(frozen=True)
class Head:
    """What of a token's header counts: which key is said to have signed it, and how. `key_id`: None where it names
    none."""

    algorithm: str
    key_id: str | None

    @classmethod
    def of(cls, token: str) -> Head:
        """Raises `InvalidToken` for what cannot be one of the provider's."""
        if len(token) > LONGEST or _SHAPE.fullmatch(token) is None:
            raise InvalidToken("It is no signed JWT, or longer than one of a provider is.")
        try:
            header = jwt.get_unverified_header(token)
        except _FAULTS as error:
            raise InvalidToken("Its header cannot be read.") from error
        algorithm, key_id, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise InvalidToken("It is signed by an algorithm that is not taken.")
        if not isinstance(kind, str) or kind.lower() not in _TYPES or {"crit", "b64"} & header.keys():
            raise InvalidToken("It is of a type that is not taken.")
        if key_id is not None and (not isinstance(key_id, str) or len(key_id) > _LONGEST_KEY_ID):
            raise InvalidToken("It names no key.")
        return cls(algorithm, key_id)


def keys_of(document: Mapping[str, Any]) -> tuple[PublicKey, ...]:
    """The keys of a JWK set (RFC 7517) that may sign; others are passed over."""
    listed = document.get("keys")
    if not isinstance(listed, list):
        return ()
    return tuple(key for item in listed[:_MOST_KEYS] if (key := _key_of(item)) is not None)


def _key_of(item: Any) -> PublicKey | None:
    if not isinstance(item, dict) or item.get("use", "sig") != "sig" or "d" in item:
        return None
    operations = item.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return None
    algorithm, key_id = item.get("alg"), item.get("kid")
    kind = _RSA if item.get("kty") == "RSA" else (str(item.get("kty")), str(item.get("crv")))
    fitting = [name for name, taken in ALGORITHMS.items() if taken == kind and algorithm in (None, name)]
    if not fitting or not (key_id is None or isinstance(key_id, str)):
        return None
    try:
        key = jwt.PyJWK(item, fitting[0]).key
    except _FAULTS as error:
        log.warning("provider_key_not_read", key_id=str(key_id)[:80], error=type(error).__name__)
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < _LEAST_RSA_BITS:
        return None
    return PublicKey(key_id, kind, algorithm, key)


def the_one(keys: Sequence[PublicKey], head: Head) -> PublicKey | None:
    """The key that a token says it is signed by; None where none fits, or, without a name, more than one does."""
    fitting = [key for key in keys if key.fits(head)]
    return fitting[0] if fitting and (head.key_id is not None or len(fitting) == 1) else None


def signed_claims(token: str, head: Head, key: PublicKey, *, issuer: str, audience: str) -> dict[str, Any]:
    """What a token claims that this key has signed: of this issuer, for this audience, now. Raises `InvalidToken`."""
    try:
        claims: dict[str, Any] = jwt.decode(
            token,
            key.key,
            algorithms=[head.algorithm],
            audience=audience,
            issuer=issuer,
            options={
                "require": ["exp", "iss", "aud", "sub"],
                "verify_exp": False,  # see `_check_times`
                "verify_nbf": False,
                "verify_iat": False,
            },
        )
        subject = claims["sub"]
    except _FAULTS as error:
        told = next((words for kind, words in _WORDS if isinstance(error, kind)), "Its signature or its form is wrong.")
        raise InvalidToken(told) from error
    if not isinstance(subject, str) or not 0 < len(subject) <= _LONGEST_SUBJECT or not subject.isprintable():
        raise InvalidToken("Its subject is empty, too long or not printable.")
    _check_times(claims)
    return claims


def _check_times(claims: Mapping[str, Any]) -> None:
    """By the clock that all processes share: this machine's own may be minutes off."""
    now = utcnow().timestamp()
    times = {name: claims[name] for name in ("exp", "nbf", "iat") if name in claims}
    for found in times.values():
        whole = isinstance(found, int) and not isinstance(found, bool)
        if not whole and not (isinstance(found, float) and math.isfinite(found)):
            raise InvalidToken("Its exp, nbf or iat is no number of seconds.")
    if times["exp"] <= now - LEEWAY_S:
        raise InvalidToken("It has expired.")
    if max(times.get("nbf", 0), times.get("iat", 0)) > now + LEEWAY_S:
        raise InvalidToken("It is not valid yet.")


def access_claims(token: str, head: Head, key: PublicKey, *, issuer: str, audience: str) -> dict[str, Any]:
    """The same of an access token. Others of the provider, and those bound to a client's own key, are none."""
    claims = signed_claims(token, head, key, issuer=issuer, audience=audience)
    kind = claims.get("typ")
    if any(name in claims for name in _OF_OTHERS) or (isinstance(kind, str) and kind.lower() in _KINDS_OF_OTHERS):
        raise InvalidToken("It is no access token.")
    if "cnf" in claims:
        raise InvalidToken("It is bound to a key of its client's (cnf), which this service does not ask for.")
    return claims


def id_claims(token: str, head: Head, key: PublicKey, *, issuer: str, client_id: str, nonce: str) -> dict[str, Any]:
    """The same of an ID token for this client and this one sign-in (OpenID Connect Core 1.0, 3.1.3.7)."""
    claims = signed_claims(token, head, key, issuer=issuer, audience=client_id)
    several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
    if claims.get("azp", None if several else client_id) != client_id:
        raise InvalidToken("It was made for another client.")
    if claims.get("nonce") != nonce:
        raise InvalidToken("It belongs to another sign-in.")
    return claims
