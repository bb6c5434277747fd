"""Access tokens that open nothing, each with one thing that is wrong, by what that is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.factories.oidc import AUDIENCE, LocalProvider, by_hand, signer


def _hmac_by_public_key(provider: LocalProvider) -> str:
    """What a service takes that believes the header's algorithm: a secret that everybody knows."""
    pem = signer("rsa", "RS256").private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    unsigned = by_hand({"alg": "HS256", "kid": "rsa", "typ": "JWT"}, provider.claims()).rpartition(".")[0]
    signature = hmac.new(pem, unsigned.encode(), hashlib.sha256).digest()
    return f"{unsigned}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _changed(provider: LocalProvider) -> str:
    """Another payload under a good signature."""
    head, _, signature = provider.token().split(".")
    return f"{head}.{by_hand({}, provider.claims(tenant='bob')).split('.')[1]}.{signature}"


def now(seconds: float) -> int:
    return int(time.time() + seconds)


BAD_TOKENS: dict[str, Callable[[LocalProvider], str]] = {
    "expired": lambda p: p.token(exp=now(-60)),
    "not yet": lambda p: p.token(nbf=now(60)),
    "issued tomorrow": lambda p: p.token(iat=now(86_400)),
    "of another audience": lambda p: p.token(aud="https://other.example"),
    "of other audiences": lambda p: p.token(aud=["a", "b"]),
    "of a part of the audience": lambda p: p.token(aud=AUDIENCE[:-1]),
    "of an odd audience": lambda p: p.token(aud=[{}]),
    "without an audience": lambda p: p.token(aud=None),
    "of another issuer": lambda p: p.token(iss="https://evil.example"),
    "of the issuer with a slash": lambda p: p.token(iss=p.issuer + "/"),
    "of two issuers": lambda p: p.token(iss=[p.issuer]),
    "without an end": lambda p: p.token(exp=None),
    "with an odd end": lambda p: p.token(exp="soon"),
    "with an end that is a list": lambda p: p.token(exp=[now(60)]),
    "without end": lambda p: p.token(exp=float("inf")),
    "with an end that is a text": lambda p: p.token(exp=str(now(60))),
    "with an end that is true": lambda p: p.token(exp=True),
    "with a huge end, and an odd beginning": lambda p: p.token(exp=10**400, nbf=float("nan")),
    "without a subject": lambda p: p.token(sub=None),
    "with an empty subject": lambda p: p.token(sub=""),
    "with a subject of control characters": lambda p: p.token(sub="a\nb"),
    "with a subject of half a character": lambda p: p.token(sub="\ud800"),
    "with a very long subject": lambda p: p.token(sub="s" * 256),
    "an ID token": lambda p: p.token(nonce="n"),
    "an ID token by its hash": lambda p: p.token(at_hash="h", head={"typ": "JWT"}),
    "an ID token of Keycloak": lambda p: p.token(typ="ID", head={"typ": "JWT"}),
    "a logout token": lambda p: p.token(head={"typ": "logout+jwt"}),
    "a logout token by its events": lambda p: p.token(events={}, head={"typ": "JWT"}),
    "bound to a key": lambda p: p.token(cnf={"jkt": "x"}),
    "unsigned": lambda p: by_hand({"alg": "none"}, p.claims(), b""),
    "unsigned, spelled otherwise": lambda p: by_hand({"alg": "nOnE", "kid": "one"}, p.claims()),
    "unsigned, with a signature": lambda p: by_hand({"alg": "none", "kid": "one"}, p.claims()),
    "signed with the public key": _hmac_by_public_key,
    "of an algorithm that fits no key of it": lambda p: by_hand({"alg": "RS256", "kid": "one"}, p.claims()),
    "of an algorithm that is a list": lambda p: by_hand({"alg": ["ES256"], "kid": "one"}, p.claims()),
    "without an algorithm": lambda p: by_hand({"kid": "one"}, p.claims()),
    "signed by somebody else": lambda p: p.token(signer("evil"), head={"kid": "one"}),
    "signed by the key that it brings": lambda p: p.token(
        signer("evil"), head={"kid": "one", "jwk": dict(signer("evil").jwk)}
    ),
    "signed by keys from elsewhere": lambda p: p.token(
        signer("evil"), head={"kid": "one", "jku": f"{p.issuer}/evil", "x5u": f"{p.issuer}/evil"}
    ),
    "changed": _changed,
    "cut off": lambda p: p.token()[:-10],
    "without a signature": lambda p: p.token().rpartition(".")[0] + ".",
    "of two parts": lambda p: p.token().rpartition(".")[0],
    "of five parts": lambda p: p.token() + ".a.b",
    "critical": lambda p: p.token(head={"crit": ["b64"], "b64": True}),
    "with an extension": lambda p: p.token(head={"crit": ["exp"], "exp": 1}),
    "of a name that is a path": lambda p: p.token(signer("evil"), head={"kid": "../../../../etc/passwd"}),
    "of a name that is SQL": lambda p: p.token(signer("evil"), head={"kid": "' OR 1=1 --"}),
    "of a name that is an address": lambda p: p.token(signer("evil"), head={"kid": f"{p.issuer}/evil"}),
    "of a very long name": lambda p: p.token(signer("evil"), head={"kid": "k" * 5000}),
    "of a name that is a number": lambda p: by_hand({"alg": "ES256", "kid": 1}, p.claims()),
    "of no name among several keys": lambda p: p.token(head={"kid": ""}),
    "garbage": lambda _: "a.b.c",
    "dots": lambda _: "...",
    "one dot": lambda _: "ank_x.y",
    "not ASCII": lambda p: p.token()[:-3] + "é.é",
    "nested": lambda p: by_hand('{"alg":' + "[" * 9000, p.claims()),
    "a header that is a list": lambda p: by_hand("[]", p.claims()),
    "a header that is a long number": lambda p: by_hand('{"alg":"ES256","x":' + "9" * 9000 + "}", p.claims()),
    "20 kB long": lambda p: p.token(more="x" * 20_000),
}  # fmt: skip
