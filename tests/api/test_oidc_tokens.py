"""Access tokens of an identity provider at the API, beside keys: good ones name tenant and role, bad ones open nothing,
and a provider that is away holds up nobody who has a key."""

from __future__ import annotations

import base64
import functools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from app.db.base import utcnow
from app.domain.plan import Limits
from app.http.services import Services
from app.main import create_app
from app.oidc import provider as provider_module
from app.oidc import tokens as tokens_module
from app.settings import OidcSettings, Settings
from app.tenants import create_key
from tests.api.conftest import assert_problem, report_worker, serving
from tests.api.test_signing_in import sign_in
from tests.factories.bad_tokens import BAD_TOKENS, now
from tests.factories.oidc import AUDIENCE, LocalProvider, local_provider, signer


@dataclass
class Trusting:
    """A service that trusts a provider; two tenants, each with a key."""

    url: str
    services: Services
    provider: LocalProvider
    keys: dict[str, str]

    def ask(self, token: str, path: str = "/v1/tenant", method: str = "GET", **options: Any) -> httpx.Response:
        return self.client.request(method, path, headers={"Authorization": f"Bearer {token}".encode()}, **options)

    @functools.cached_property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)

    def forget(self) -> None:
        """What is remembered for two seconds."""
        self.services.auth._known.clear()

    def may_ask_again(self) -> None:
        """As if the pause between two looks at the provider were over."""
        assert self.services.provider is not None
        self.services.provider._asked_at = float("-inf")


@pytest.fixture(autouse=True)
def _seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: the pause between two looks at the provider ends when a test says so."""
    monkeypatch.setattr(provider_module, "_AGAIN_S", 600.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    found = tmp_path_factory.mktemp("oidc") / "home"
    found.mkdir()
    shutil.copy(migrated, found / "anneal.db")
    return found


@contextmanager
def _trusting(home: Path, provider: LocalProvider, **oidc: Any) -> Iterator[Trusting]:
    settings = Settings(home=home, oidc=OidcSettings(issuer=provider.issuer, audience=AUDIENCE, **oidc))
    app = create_app(settings, dispatch=lambda job: True)
    with serving(app) as url:
        services: Services = app.state.services
        report_worker(services)
        keys = {name: create_key(services.db, name, f"key of {name}") for name in ("alice", "bob")}
        found = Trusting(url, services, provider, keys)
        with found.client:
            yield found


@pytest.fixture(scope="module")
def trusting(home: Path) -> Iterator[Trusting]:
    with local_provider() as provider, _trusting(home, provider) as found:
        yield found


def test_a_token_names_tenant_role_and_who_it_is(trusting: Trusting, model_bytes: bytes) -> None:
    provider = trusting.provider
    provider.publish(signer("one"), signer("rsa", "RS256"), signer("okp", "EdDSA"), signer("p384", "ES384"))
    trusting.may_ask_again()
    for by in (signer("one"), signer("rsa", "RS256"), signer("okp", "EdDSA"), signer("p384", "ES384")):
        account = trusting.ask(provider.token(by)).json()
        assert (account["name"], account["role"], account["subject"]) == ("alice", "submit", "someone"), by.algorithm
        assert (account["key_id"], account["key_expires_at"]) == (None, None)
    padded = jwt.encode(provider.claims(), signer("rsa", "RS256").private, "PS512", {"kid": "rsa"})
    assert trusting.ask(padded).status_code == 200
    by_key = trusting.ask(trusting.keys["bob"]).json()
    assert (by_key["name"], by_key["subject"]) == ("bob", None)

    # What it does stands in the tenant's rows under its name
    token = provider.token(sub="ci|runner-7")
    made = trusting.ask(token, "/v1/models?filename=a.onnx", "POST", content=model_bytes)
    assert made.status_code == 201
    assert trusting.ask(token, f"/v1/models/{made.json()['id']}", "DELETE").status_code == 204
    (event,) = trusting.ask(trusting.keys["alice"], "/v1/audit?action=model.delete").json()["items"]
    assert (event["actor"], event["resource"]) == ("oidc:ci|runner-7", made.json()["id"])
    # Roles are those of keys
    reader = provider.token(roles=["other", "anneal-read"])
    assert trusting.ask(reader, "/v1/jobs").status_code == 200
    refused = assert_problem(trusting.ask(reader, "/v1/jobs", "POST", json={}), 403, "role_required")
    assert "identity provider" in refused["detail"]
    assert_problem(trusting.ask(token, "/v1/keys"), 403, "role_required")
    admin = provider.token(roles=["anneal-read", "anneal-admin"])
    created = trusting.ask(admin, "/v1/keys", "POST", json={"name": "by a token"})
    assert created.status_code == 201
    # Two long subjects that begin alike stay apart
    actors = set()
    for end in "ab":
        long = provider.token(sub="s" * 250 + end, roles=["anneal-admin"])
        assert trusting.ask(long, "/v1/keys", "POST", json={"name": end}).status_code == 201
    actors = {e["actor"] for e in trusting.ask(trusting.keys["alice"], "/v1/audit?action=key.create").json()["items"]}
    assert len([a for a in actors if a.startswith("oidc:sss")]) == 2


def test_bad_tokens_open_nothing(trusting: Trusting) -> None:
    provider = trusting.provider
    provider.publish(signer("one"), signer("rsa", "RS256"), signer("two"))
    trusting.may_ask_again()
    assert trusting.ask(provider.token(signer("two"))).status_code == 200
    asked = sum(provider.asked.values())
    for words, make in BAD_TOKENS.items():
        token = make(provider)
        response = trusting.ask(token)
        assert response.status_code == 401, (words, response.text)
        problem = assert_problem(response, 401, "unauthorized")
        assert 'error="invalid_token"' in response.headers["www-authenticate"], words
        assert token not in response.text, words
        assert problem["detail"].startswith("The access token is not valid."), words
        # A page that it asks for as well; and what it would write
        assert trusting.ask(token, "/v1/models", "POST", content=b"x").status_code == 401, words
    assert sum(provider.asked.values()) == asked, "none of them makes the service ask anybody"
    huge = trusting.ask("a." + "x" * 100_000 + ".b")
    assert huge.status_code == 431
    good = provider.token()
    for scheme in ("Basic", "DPoP", "Token"):
        response = trusting.client.get("/v1/tenant", headers={"Authorization": f"{scheme} {good}"})
        assert_problem(response, 401, "unauthorized")
    assert trusting.ask(good).status_code == 200
    assert trusting.ask(provider.token(exp=now(-10))).status_code == 200, "clocks differ by some seconds"


def test_times_go_by_the_clock_that_all_share(trusting: Trusting, monkeypatch: pytest.MonkeyPatch) -> None:
    token = trusting.provider.token()
    for minutes, words in ((-10, "not valid yet"), (10, "expired")):
        with monkeypatch.context() as patch:
            patch.setattr(tokens_module, "utcnow", lambda minutes=minutes: utcnow() + timedelta(minutes=minutes))
            assert words in assert_problem(trusting.ask(token), 401, "unauthorized")["detail"]
    assert trusting.ask(token).status_code == 200
    assert trusting.ask(trusting.provider.token(exp=10**400)).status_code == 200


def test_weak_and_foreign_keys_count_for_nothing(trusting: Trusting) -> None:
    provider = trusting.provider
    weak = signer("weak", "RS256", 1024)
    secret = {"kty": "oct", "kid": "secret", "k": base64.urlsafe_b64encode(b"s" * 32).decode()}
    for_others = {**signer("enc").jwk, "use": "enc"}
    leaked = {**signer("leaked").jwk, "d": "x"}
    pinned = {**signer("pinned", "RS256").jwk, "alg": "RS512"}
    odd: list[Any] = [None, [], "x", {"kty": "EC", "kid": "odd", "crv": "P-256", "x": "?", "y": "?"}, {"kty": 1}]
    provider.published = [*odd, weak.jwk, secret, for_others, leaked, pinned, signer("one").jwk]
    trusting.may_ask_again()
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        by_weak = provider.token(weak)
    by_secret = jwt.encode(provider.claims(), "s" * 32, "HS256", {"kid": "secret"})
    tokens = [by_weak, by_secret, *(provider.token(signer(name)) for name in ("enc", "leaked"))]
    for token in (*tokens, provider.token(signer("pinned", "RS256"))):
        assert_problem(trusting.ask(token), 401, "unauthorized")
    assert trusting.ask(provider.token()).status_code == 200


def test_the_provider_changes_its_keys(trusting: Trusting) -> None:
    provider = trusting.provider
    provider.publish(signer("one"))
    trusting.may_ask_again()
    assert trusting.ask(provider.token()).status_code == 200
    provider.publish(signer("one"), signer("new"))
    trusting.may_ask_again()
    before = provider.asked["/jwks"]
    for _ in range(3):
        assert trusting.ask(provider.token(signer("new"))).status_code == 200
    assert provider.asked["/jwks"] == before + 1
    for n in range(20):  # anybody may send these
        assert trusting.ask(provider.token(signer("evil"), head={"kid": f"k{n}"})).status_code == 401
    assert provider.asked["/jwks"] == before + 1
    provider.publish(signer("new"))  # the old one is withdrawn, and the service looks again in its own time
    trusting.may_ask_again()
    assert trusting.ask(provider.token(signer("evil"))).status_code == 401
    trusting.forget()
    assert trusting.ask(provider.token()).status_code == 401
    assert trusting.ask(provider.token(signer("new"))).status_code == 200


def test_a_provider_that_is_away_or_talks_nonsense_changes_nothing_for_who_is_known(
    trusting: Trusting, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = trusting.provider
    provider.publish(signer("one"))
    trusting.may_ask_again()
    assert trusting.ask(provider.token(signer("evil"))).status_code == 401
    answers: dict[str, Callable[[], tuple[int, bytes]]] = {
        "away": lambda: (503, b"{}"),
        "no JSON": lambda: (200, b"<html>"),
        "a list": lambda: (200, b"[]"),
        "nested": lambda: (200, b"[" * 100_000),
        "no keys": lambda: (200, b'{"keys": []}'),
        "keys that are none": lambda: (200, b'{"keys": {"a": 1}}'),
        "endless": lambda: (200, b" " * (3 << 20)),
        "elsewhere": lambda: (302, f"{provider.issuer}/evil".encode()),
        "refusing": lambda: (400, b'{"error": "invalid_request"}'),
    }
    for words, answer in answers.items():
        provider.broken["/jwks"] = answer
        trusting.may_ask_again()
        response = trusting.ask(provider.token(signer("evil"), head={"kid": words}))
        problem = assert_problem(response, 503, "provider_unavailable")
        assert problem["retryable"], words
        assert int(response.headers["retry-after"]) > 0
        trusting.forget()
        assert trusting.ask(provider.token()).status_code == 200, "its key is known"
    assert provider.asked["/evil"] == 0
    del provider.broken["/jwks"]
    right = dict(provider.document)
    changes: list[dict[str, Any]] = [
        {"issuer": "https://evil.example"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": None},
        {"jwks_uri": "http://192.0.2.1/k"},
    ]
    for change in changes:
        provider.document = {**right, **change}
        trusting.may_ask_again()
        assert_problem(trusting.ask(provider.token(signer("evil"))), 503, "provider_unavailable")
    provider.document = right

    # One that hangs: who has a key is answered meanwhile
    released = threading.Event()
    monkeypatch.setattr(provider_module, "_PATIENCE_S", 1.5)
    provider.broken["/jwks"] = lambda: (503 if released.wait(20) else 500, b"{}")
    trusting.may_ask_again()
    told: list[httpx.Response] = []
    unknown = provider.token(signer("new"))
    waiting = [threading.Thread(target=lambda: told.append(trusting.ask(unknown))) for _ in range(60)]
    try:
        for thread in waiting:
            thread.start()
        for _ in range(5):
            trusting.forget()
            assert trusting.ask(trusting.keys["alice"]).status_code == 200
            assert trusting.ask(provider.token()).status_code == 200
        for thread in waiting:
            thread.join(20)
        assert {response.status_code for response in told} == {503}
    finally:
        released.set()
        del provider.broken["/jwks"]
    deadline = time.monotonic() + 10
    while trusting.ask(provider.token(signer("evil"))).status_code != 401:
        trusting.may_ask_again()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_provider_that_was_never_there(settings: Settings) -> None:
    with local_provider() as provider:
        provider.broken["/.well-known/openid-configuration"] = lambda: (500, b"")
        with _trusting(settings.home, provider) as trusting:
            assert_problem(trusting.ask(provider.token()), 503, "provider_unavailable")
            assert trusting.ask(trusting.keys["alice"]).status_code == 200
            provider.broken.clear()
            trusting.may_ask_again()
            assert trusting.ask(provider.token()).status_code == 200


@pytest.mark.usefixtures("one_minute")
def test_claims_become_a_tenant_and_a_role_or_nothing(trusting: Trusting) -> None:
    provider = trusting.provider
    provider.publish(signer("one"))
    trusting.may_ask_again()
    trusting.ask(provider.token(signer("evil")))
    tenants = (None, "", "nobody", 7, ["alice", "bob"], [], {}, "a\x00b", "\ud800", "x" * 5000, "tnt_local")
    for tenant in tenants:
        response = trusting.ask(provider.token(tenant=tenant))
        assert "'tenant'" in assert_problem(response, 403, "tenant_missing")["detail"]
    assert trusting.ask(provider.token(tenant=["alice", "\x00"])).json()["name"] == "alice"
    for roles in (None, [], "", "admin", ["submit"], 1, {}, [["anneal-admin"]]):
        assert_problem(trusting.ask(provider.token(roles=roles)), 403, "role_missing")
    assert trusting.ask(provider.token(roles="openid anneal-read")).json()["role"] == "read"
    trusting.services.tenants.switch("alice", on=False, actor="test")
    trusting.forget()
    assert_problem(trusting.ask(provider.token()), 403, "tenant_disabled")
    trusting.services.tenants.switch("alice", on=True, actor="test")
    # The plan is the tenant's, whoever asks
    trusting.services.tenants.put_on("bob", None, Limits(requests_per_minute=3), actor="test")
    trusting.forget()
    codes = [trusting.ask(who).status_code for who in (trusting.keys["bob"], provider.token(tenant="bob")) * 3]
    assert codes == [200, 200, 200, 429, 429, 429]
    trusting.services.tenants.put_on("bob", None, None, clear=True, actor="test")
    trusting.forget()


def test_a_token_goes_before_a_cookie(trusting: Trusting) -> None:
    provider = trusting.provider
    with sign_in(trusting.url, trusting.keys["alice"]) as (browser, _):
        assert browser.get("/v1/tenant").json()["name"] == "alice"
        bearer = {"Authorization": f"Bearer {provider.token(tenant='bob')}"}
        assert browser.get("/v1/tenant", headers=bearer).json()["name"] == "bob"
        bad = {"Authorization": f"Bearer {provider.token(exp=now(-60))}"}
        assert_problem(browser.get("/v1/tenant", headers=bad), 401, "unauthorized")
        assert browser.post("/v1/models?filename=a.onnx", content=b"x", headers=bearer).status_code == 422
        # A token in the place of a session's is none
        with httpx.Client(base_url=trusting.url, cookies={"anneal_session": provider.token()}) as other:
            assert_problem(other.get("/v1/tenant"), 401, "unauthorized")


def test_claims_by_other_names_and_values(settings: Settings) -> None:
    with local_provider() as provider:
        names = {
            "tenant_claim": "org.groups", "tenants": {"/ml": "alice", "/speech": "alice", "/ops": "bob"},
            "roles_claim": "https://acme.example/roles", "roles": {"dev": "submit"},
        }  # fmt: skip
        with _trusting(settings.home, provider, **names) as trusting:
            given: dict[str, Any] = {"https://acme.example/roles": ["dev"], "roles": None, "tenant": "bob"}
            for groups in (["/ml"], ["/ml", "/speech", "/unknown"], "/ml"):
                assert trusting.ask(provider.token(**given, org={"groups": groups})).json()["name"] == "alice"
            for groups in (["/ml", "/ops"], ["alice"], ["/ops", "/ml"], None):
                response = trusting.ask(provider.token(**given, org={"groups": groups}))
                assert_problem(response, 403, "tenant_missing")


def test_settings_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in (
        {"OIDC_AUDIENCE": "a"},
        {"OIDC_ISSUER": "https://idp.example"},
        {"OIDC_ISSUER": "http://idp.example", "OIDC_AUDIENCE": "a"},
        {"OIDC_ISSUER": "https://idp.example?x=1", "OIDC_AUDIENCE": "a"},
        {"OIDC_ISSUER": "https://idp.example", "OIDC_CLIENT_ID": "a"},
        {"OIDC_ISSUER": "https://idp.example", "OIDC_CLIENT_ID": "a", "ANNEAL_PUBLIC_URL": "http://anneal.example"},
        {"OIDC_ISSUER": "https://idp.example", "OIDC_CLIENT_ID": "a", "ANNEAL_PUBLIC_URL": "https://a.example/path"},
        {"OIDC_ISSUER": "https://idp.example", "OIDC_AUDIENCE": "a", "OIDC_ROLES": "x=root"},
        {"OIDC_ISSUER": "https://idp.example", "OIDC_AUDIENCE": "a", "OIDC_TENANTS": "x"},
        {"OIDC_ISSUER": "https://idp.example", "OIDC_AUDIENCE": "a", "OIDC_SCOPES": "profile"},
        {"OIDC_ISSUER": "https://idp.example", "OIDC_AUDIENCE": "a", "ANNEAL_REQUIRE_KEYS": "false"},
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(ValueError, match=r"OIDC|ANNEAL|VALUE=NAME|read"):
                Settings()
    monkeypatch.setenv("OIDC_ISSUER", "https://idp.example/realms/acme")
    monkeypatch.setenv("OIDC_AUDIENCE", "anneal")
    monkeypatch.setenv("OIDC_TENANTS", "acme.com=acme, a=b=other")
    monkeypatch.setenv("OIDC_ROLES", json.dumps({"cn=ml,dc=acme": "submit"}))
    settings = Settings()
    assert settings.oidc.tenants == {"acme.com": "acme", "a=b": "other"}
    assert settings.oidc.roles == {"cn=ml,dc=acme": "submit"}
    assert settings.keys_required, "who is asked for is known"
    monkeypatch.delenv("OIDC_ISSUER")
    monkeypatch.delenv("OIDC_AUDIENCE")
    assert not Settings().keys_required, "the embedded default wants nobody's name"
