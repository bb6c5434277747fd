"""An identity provider on this machine whose every answer a test can set: keys made here, tokens signed with any of
them, or with none. A certified one is in tests/integrations/test_oidc.py."""

from __future__ import annotations

import base64
import functools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "https://anneal.example/api"
CLIENT = "anneal-pages"


@dataclass(frozen=True)
class Signer:
    """A private key, and the public half as the provider publishes it."""

    algorithm: str
    private: Any
    jwk: Mapping[str, Any]

    @property
    def key_id(self) -> str:
        return str(self.jwk["kid"])


@functools.cache
def signer(key_id: str, algorithm: str = "ES256", bits: int = 2048) -> Signer:
    """Made once: RSA takes its time."""
    if algorithm.startswith(("RS", "PS")):
        key: Any = rsa.generate_private_key(65537, bits)
        jwk = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    elif algorithm == "EdDSA":
        key = ed25519.Ed25519PrivateKey.generate()
        jwk = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        key = ec.generate_private_key({"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1()}[algorithm])
        jwk = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return Signer(algorithm, key, {**jwk, "kid": key_id, "use": "sig"})


@dataclass
class LocalProvider:
    """`published`: what its key set holds. `tokens`: what its token endpoint answers a form with. `broken`: for each
    path, what is done instead of answering. `asked` counts requests by path."""

    issuer: str
    published: list[Mapping[str, Any]] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    broken: dict[str, Callable[[], tuple[int, bytes]]] = field(default_factory=dict)
    tokens: Callable[[dict[str, str]], tuple[int, dict[str, Any]]] = lambda _form: (400, {"error": "invalid_grant"})
    person: dict[str, Any] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    forms: list[dict[str, str]] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)

    def publish(self, *signers: Signer) -> None:
        self.published = [signer.jwk for signer in signers]

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Of a good access token, but for what is changed; None leaves a claim out."""
        now = int(time.time())
        good = {
            "iss": self.issuer, "aud": AUDIENCE, "sub": "someone", "iat": now, "exp": now + 300,
            "tenant": "alice", "roles": ["anneal-submit"], **changed,
        }  # fmt: skip
        return {name: value for name, value in good.items() if value is not None}

    def token(self, by: Signer | None = None, head: Mapping[str, Any] | None = None, **changed: Any) -> str:
        by = by or signer("one")
        headers = {"kid": by.key_id, "typ": "at+jwt", **(head or {})}
        payload = json.dumps(self.claims(**changed)).encode()
        return jwt.PyJWS().encode(payload, by.private, by.algorithm, {k: v for k, v in headers.items() if v})

    def answer(self, path: str, form: dict[str, str]) -> tuple[int, bytes]:
        self.asked[path] += 1
        if path in self.broken:
            return self.broken[path]()
        if path == "/.well-known/openid-configuration":
            return 200, json.dumps(self.document).encode()
        if path == "/jwks":
            return 200, json.dumps({"keys": self.published}).encode()
        if path in ("/token", "/device"):
            self.forms.append(form)
            status, told = self.tokens(form) if path == "/token" else (200, self.device)
            return status, json.dumps(told).encode()
        if path == "/me":
            return 200, json.dumps(self.person).encode()
        return 404, b"{}"


@contextmanager
def local_provider() -> Iterator[LocalProvider]:
    """It publishes the signer "one"."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            form = dict(parse_qsl(self.rfile.read(size).decode()))
            found.authorizations.append(self.headers.get("Authorization", ""))
            status, body = found.answer(urlsplit(self.path).path, form)
            self.send_response(status)
            if status in (301, 302, 307):
                self.send_header("Location", body.decode())
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    issuer = f"http://127.0.0.1:{server.server_port}"
    found = LocalProvider(issuer, [signer("one").jwk])
    found.document = {
        "issuer": issuer,
        "jwks_uri": f"{issuer}/jwks",
        "authorization_endpoint": f"{issuer}/auth",
        "token_endpoint": f"{issuer}/token",
        "userinfo_endpoint": f"{issuer}/me",
        "end_session_endpoint": f"{issuer}/end",
        "code_challenge_methods_supported": ["S256"],
        "authorization_response_iss_parameter_supported": True,
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def by_hand(header: Mapping[str, Any] | str, payload: Mapping[str, Any], signature: bytes = b"x") -> str:
    """A token as no library makes it."""
    head = header if isinstance(header, str) else json.dumps(header)
    parts = (head.encode(), json.dumps(payload).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
