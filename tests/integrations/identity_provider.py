"""A real, certified OpenID Provider (panva's `oidc-provider`) in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from tests.integrations.environments import NoSystemPackage, node_environment
from tests.servers import free_port, launched

AUDIENCE = "https://anneal.example/api"
PAGES, MACHINE, CLI = "pages", "pipeline", "cli"
SECRET = "of the tests: long enough for HS256"
DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
PEOPLE: dict[str, dict[str, Any]] = {
    "mia": {"preferred_username": "Mia", "tenant": "acme", "roles": ["anneal-admin", "other"]},
    "nobody": {"preferred_username": "Nobody"},
}


def new_keys(name: str) -> list[dict[str, Any]]:
    """Private ones, as JWKs: one for ID tokens, one for access tokens."""
    made = {
        "rsa": RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048), as_dict=True),
        "ec": ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()), as_dict=True),
    }
    # Without what a private key is for: the public half is published with it.
    own = {kind: {k: v for k, v in key.items() if k != "key_ops"} for kind, key in made.items()}
    return [{**key, "kid": f"{name}-{kind}", "use": "sig"} for kind, key in own.items()]


@dataclass
class IdentityProvider:
    """`public_url`: of the service whose pages it sends browsers back to."""

    folder: Path
    public_url: str
    log: Path
    keys: Sequence[dict[str, Any]] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def issuer(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        node = shutil.which("node")
        if node is None:
            raise NoSystemPackage("The identity provider of the tests needs your system's package `nodejs`.")
        told = {
            "issuer": self.issuer, "port": self.port, "audience": AUDIENCE, "jwks": {"keys": [*self.keys]},
            "people": PEOPLE, "clients": self._clients(),
        }  # fmt: skip
        with self.log.open("ab") as log:
            command = [*launched(), node, str(self.folder / "provider.mjs"), json.dumps(told)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"{self.issuer}/.well-known/openid-configuration").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def token(self, client: str = MACHINE) -> str:
        """An access token that a machine gets for itself."""
        answer = httpx.post(f"{self.issuer}/token", data={"grant_type": "client_credentials"}, auth=(client, SECRET))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    def _clients(self) -> list[dict[str, Any]]:
        nothing = {"redirect_uris": [], "response_types": []}
        machine = {**nothing, "grant_types": ["client_credentials"], "client_secret": SECRET}
        return [
            {
                "pages": True,
                "metadata": {
                    "client_id": PAGES,
                    "client_secret": SECRET,
                    "redirect_uris": [f"{self.public_url}/login/oidc/callback"],
                    "post_logout_redirect_uris": [f"{self.public_url}/login"],
                },
            },
            {
                "metadata": {"client_id": MACHINE, **machine},
                "claims": {"tenant": "acme", "roles": ["anneal-submit"]},
            },
            {
                "metadata": {"client_id": "other", **machine},
                "claims": {"tenant": "other", "roles": ["anneal-admin"]},
            },
            {"metadata": {"client_id": "placeless", **machine}},
            {
                "metadata": {
                    "client_id": CLI,
                    **nothing,
                    "grant_types": [DEVICE_CODE, "refresh_token"],
                    "token_endpoint_auth_method": "none",
                },
            },
        ]


@contextmanager
def identity_provider(public_url: str, log: Path) -> Iterator[IdentityProvider]:
    found = IdentityProvider(node_environment("oidc_provider"), public_url, log, new_keys("first"))
    try:
        found.start()
        yield found
    finally:
        found.stop()
