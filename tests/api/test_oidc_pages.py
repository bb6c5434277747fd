"""People sign in at an identity provider: what a browser is sent with, what is checked of its answer, and what nobody
gets in by."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

import httpx
import pytest
from sqlalchemy import select, update

from app.db.accounts import AuditEvent, SubjectSession
from app.db.base import utcnow
from app.http.services import Services
from app.main import create_app
from app.settings import LimitSettings, OidcSettings, Settings
from app.tenants import create_key
from tests.api.conftest import report_worker, serving
from tests.api.test_pages import HTML, token_in
from tests.factories.oidc import CLIENT, LocalProvider, local_provider, signer


@dataclass
class Flow:
    """A service, a provider, and what a browser does between them."""

    url: str
    services: Services
    provider: LocalProvider
    of_token: dict[str, Any] = field(default_factory=dict)  # changes of the next ID token
    by: str = "one"
    exchange: tuple[int, dict[str, Any]] | None = None  # what is answered to a code instead

    def browser(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=HTML, timeout=20, **options)

    def begin(self, browser: httpx.Client, wanted: str = "/jobs") -> dict[str, str]:
        """What the provider is asked with."""
        response = browser.get(f"/login/oidc?next={quote(wanted, safe='')}")
        assert response.status_code == 303, response.text
        address = response.headers["location"]
        assert address.startswith(f"{self.provider.issuer}/auth?")
        return dict(parse_qsl(urlsplit(address).query))

    def finish(self, browser: httpx.Client, asked: dict[str, str], **changed: str | None) -> httpx.Response:
        """Back from the provider, which gave a code for an ID token."""

        def tokens(_form: dict[str, str]) -> tuple[int, dict[str, Any]]:
            if self.exchange is not None:
                return self.exchange
            claims = {
                "aud": CLIENT,
                "nonce": asked["nonce"],
                "sub": "mia",
                "preferred_username": "Mia",
                **self.of_token,
            }
            token = self.provider.token(signer(self.by), {"typ": "JWT", "kid": "one"}, **claims)
            return 200, {"access_token": "opaque", "token_type": "Bearer", "id_token": token}

        self.provider.tokens = tokens
        answer = {"code": "c0de", "state": asked["state"], "iss": self.provider.issuer, **changed}
        return browser.get("/login/oidc/callback", params={k: v for k, v in answer.items() if v is not None})

    def signed_in(self, browser: httpx.Client, wanted: str = "/jobs") -> httpx.Response:
        return self.finish(browser, self.begin(browser, wanted))


@pytest.fixture
def flow(settings: Settings) -> Iterator[Flow]:
    with local_provider() as provider:
        oidc = OidcSettings(issuer=provider.issuer, client_id=CLIENT)
        changed = {"oidc": oidc, "public_url": "http://127.0.0.1:8000"}
        limits = LimitSettings(sign_ins_per_minute=60)
        app = create_app(settings.model_copy(update={**changed, "limits": limits}), dispatch=lambda job: True)
        with serving(app) as url:
            report_worker(app.state.services)
            create_key(app.state.services.db, "alice", "first")
            yield Flow(url, app.state.services, provider)


def _events(services: Services, action: str) -> list[AuditEvent]:
    with services.db.read() as session:
        return [*session.scalars(select(AuditEvent).where(AuditEvent.action == action))]


def _onward(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    found = re.search(r'content="0;url=([^"]*)"', response.text)
    assert found is not None, response.text
    return found[1].replace("&amp;", "&")


def test_a_person_signs_in_works_and_signs_out(flow: Flow) -> None:
    with flow.browser() as browser:
        assert flow.provider.issuer.removeprefix("http://") in browser.get("/login").text
        asked = flow.begin(browser, "/models?q=1&n=2")
        assert (asked["response_type"], asked["client_id"], asked["scope"]) == ("code", CLIENT, "openid profile email")
        assert asked["redirect_uri"] == "http://127.0.0.1:8000/login/oidc/callback"
        assert asked["code_challenge_method"] == "S256"
        assert len({asked[name] for name in ("state", "nonce", "code_challenge")}) == 3
        response = flow.finish(browser, asked)
        assert _onward(response) == "/models?q=1&n=2"
        assert (response.headers["referrer-policy"], response.headers["cache-control"]) == ("no-referrer", "no-store")
        (form,) = flow.provider.forms
        assert (form["grant_type"], form["code"], form["client_id"]) == ("authorization_code", "c0de", CLIENT)
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == asked["code_challenge"]
        cookies = {c.partition("=")[0]: c for c in response.headers.get_list("set-cookie")}
        for attribute in ("HttpOnly", "SameSite=strict", "Path=/;", "Max-Age=28800"):
            assert attribute in cookies["anneal_session"] + ";", attribute
        assert "Path=/logout" in cookies["anneal_id"]
        assert 'anneal_begun=""' in cookies["anneal_begun"]
        # The session is one like any other
        assert browser.get("/jobs").status_code == 200
        account = browser.get("/v1/tenant").json()
        assert (account["name"], account["role"], account["subject"]) == ("alice", "submit", "mia")
        assert "mia" in browser.get("/account").text
        assert browser.get("/keys").status_code == 403
        assert browser.post("/v1/models?filename=a.onnx", content=b"x").json()["code"] == "csrf"
        (begun,) = _events(flow.services, "session.begin")
        assert (begun.actor, begun.detail["name"], begun.detail["role"]) == ("oidc:mia", "Mia", "submit")
        # Neither the code nor the cookie does it twice
        assert flow.finish(browser, asked).status_code == 403
        assert len(flow.provider.forms) == 1
        session = browser.cookies["anneal_session"]
        out = browser.post("/logout", data={"csrf": token_in(browser.get("/jobs"))})
        goodbye = urlsplit(_onward(out))
        assert goodbye.path == "/end"
        told = dict(parse_qsl(goodbye.query))
        assert told["post_logout_redirect_uri"] == "http://127.0.0.1:8000/login"
        assert told["client_id"] == CLIENT
        assert len(told["id_token_hint"].split(".")) == 3
        assert not {"anneal_session", "anneal_id"} & {*browser.cookies}
        browser.cookies.set("anneal_session", session)
        assert browser.get("/jobs").status_code == 303, "a copy of the cookie is worth nothing either"
    stored = b"".join(f.read_bytes() for f in flow.services.settings.home_dir.glob("anneal.db*"))
    assert session.encode() not in stored


def test_a_person_is_led_to_this_service_only(flow: Flow) -> None:
    for wanted in ("//evil.example", "https://evil.example", "/\\evil.example", "javascript:x", "", "/\tx"):
        with flow.browser() as browser:
            assert _onward(flow.signed_in(browser, wanted)) == "/", wanted
    with flow.browser() as browser:
        found = flow.signed_in(browser, '/jobs?x="><script>').text
        assert "<script>" not in found
    with flow.browser() as browser:  # what the cookie says is believed as little
        asked = flow.begin(browser)
        seed = browser.cookies["anneal_begun"].partition(".")[0]
        for forged in (base64.urlsafe_b64encode(b"//evil.example").decode(), "%%%", "", "é".encode().hex()):
            browser.cookies.clear()
            browser.cookies.set("anneal_begun", f"{seed}.{forged}")
            assert _onward(flow.finish(browser, asked)) == "/"


_ANSWERS: dict[str, dict[str, str | None]] = {
    "another state": {"state": "x" * 43},
    "no state": {"state": None},
    "no code": {"code": None},
    "an endless code": {"code": "c" * 5000},
    "another issuer": {"iss": "https://evil.example"},
    "no issuer, of a provider that names itself": {"iss": None},
    "a refusal": {"code": None, "error": "access_denied"},
    "a refusal that is a script": {"code": None, "error": "<script>alert(1)</script>"},
}
_ID_TOKENS: dict[str, dict[str, Any]] = {
    "of another sign-in": {"nonce": "another"},
    "of none": {"nonce": None},
    "of another client": {"aud": "another"},
    "of several clients": {"aud": [CLIENT, "another"]},
    "made for another client": {"azp": "another"},
    "expired": {"exp": int(time.time()) - 60},
    "of another issuer": {"iss": "https://evil.example"},
    "without a subject": {"sub": None},
}


def test_an_answer_that_is_not_right_signs_nobody_in(flow: Flow) -> None:
    for words, changed in _ANSWERS.items():
        with flow.browser() as browser:
            response = flow.finish(browser, flow.begin(browser), **changed)
            assert response.status_code == 403, words
            assert "Not signed in" in response.text, words
            assert "<script>alert" not in response.text
            assert "anneal_session" not in browser.cookies
    assert not flow.provider.forms, "nothing was asked with it"
    with flow.browser() as browser, flow.browser() as victim:  # the answer that another browser began
        asked = flow.begin(browser)
        assert flow.finish(victim, asked).status_code == 403
        flow.begin(victim)
        assert flow.finish(victim, asked).status_code == 403
    for words, claims in _ID_TOKENS.items():
        flow.of_token = claims
        with flow.browser() as browser:
            assert flow.signed_in(browser).status_code == 403, words
            assert "anneal_session" not in browser.cookies
    flow.of_token, flow.by = {}, "evil"
    with flow.browser() as browser:
        assert flow.signed_in(browser).status_code == 403
    flow.by = "one"
    for exchange in (
        (400, {"error": "invalid_grant"}),
        (200, {}),
        (200, {"id_token": 7}),
        (200, {"id_token": "a.b.c"}),
    ):
        flow.exchange = exchange
        with flow.browser() as browser:
            assert flow.signed_in(browser).status_code == 403
    with flow.services.db.read() as session:
        assert session.scalars(select(SubjectSession)).all() == []


def test_who_has_no_place_here_is_told_so(flow: Flow) -> None:
    flow.provider.person = {"sub": "mia"}
    placeless: list[tuple[dict[str, Any], str]] = [
        ({"tenant": None}, "names no tenant"),
        ({"tenant": "nobody"}, "nobody"),
        ({"roles": []}, "no role"),
    ]
    for claims, words in placeless:
        flow.of_token = claims
        with flow.browser() as browser:
            response = flow.signed_in(browser)
            assert response.status_code == 403
            assert words in response.text.replace("&#39;", "'")
            assert "anneal_session" not in browser.cookies
    flow.of_token = {}
    flow.services.tenants.switch("alice", on=False, actor="test")
    with flow.browser() as browser:
        assert "switched off" in flow.signed_in(browser).text
    refused = _events(flow.services, "session.refuse")
    assert [(e.actor, e.detail["reason"]) for e in refused] == [
        ("oidc:mia", "tenant_missing"),
        ("oidc:mia", "tenant_missing"),
        ("oidc:mia", "role_missing"),
        ("oidc:mia", "tenant_disabled"),
    ]
    flow.services.tenants.switch("alice", on=True, actor="test")
    with flow.browser() as browser:
        flow.signed_in(browser)
        assert browser.get("/jobs").status_code == 200
        flow.services.tenants.switch("alice", on=False, actor="test")
        flow.services.auth._known.clear()
        assert browser.get("/jobs").status_code == 403


def test_what_the_id_token_lacks_the_provider_tells_of_the_same_person(flow: Flow) -> None:
    flow.of_token = {"tenant": None, "roles": None}
    flow.provider.person = {"sub": "mia", "tenant": "alice", "roles": ["anneal-admin"]}
    with flow.browser() as browser:
        flow.signed_in(browser)
        assert browser.get("/v1/tenant").json()["role"] == "admin"
        assert browser.get("/keys").status_code == 200
    assert "Bearer opaque" in flow.provider.authorizations
    flow.provider.person = {"sub": "somebody else", "tenant": "alice", "roles": ["anneal-admin"]}
    with flow.browser() as browser:
        assert flow.signed_in(browser).status_code == 403


def test_a_session_ends_by_time_and_with_the_provider_away(flow: Flow) -> None:
    with flow.browser() as browser:
        flow.signed_in(browser)
        token = token_in(browser.get("/jobs"))
        flow.provider.broken = dict.fromkeys(
            ("/.well-known/openid-configuration", "/jwks", "/token"), lambda: (503, b"")
        )
        assert browser.get("/jobs").status_code == 200
        asked = flow.begin(browser)
        response = flow.finish(browser, asked)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        with flow.services.db.write() as uow:
            uow.session.execute(update(SubjectSession).values(expires_at=utcnow()))
        flow.services.auth._known.clear()
        assert browser.get("/jobs").status_code == 303
        assert browser.post("/logout", data={"csrf": token}).headers["location"] == "/login"


@pytest.mark.usefixtures("one_minute")
def test_attempts_are_counted_by_address(settings: Settings) -> None:
    with local_provider() as provider:
        changed = {
            "oidc": OidcSettings(issuer=provider.issuer, client_id=CLIENT, client_secret="a:b c"),
            "public_url": "https://anneal.example",
            "limits": LimitSettings(sign_ins_per_minute=2),
        }
        app = create_app(settings.model_copy(update=changed), dispatch=lambda job: True)
        with serving(app) as url, httpx.Client(base_url=url, headers=HTML) as browser:
            begun = browser.get("/login/oidc").headers["set-cookie"]
            for attribute in ("__Host-anneal_begun=", "Secure", "HttpOnly", "SameSite=lax", "Path=/"):
                assert attribute in begun
            kept = begun.partition(";")[0]
            state = parse_qs(urlsplit(browser.get("/login/oidc").headers["location"]).query)["state"][0]
            kept_state = {"Cookie": browser.get("/login/oidc").headers["set-cookie"].partition(";")[0]}
            codes = [
                browser.get(f"/login/oidc/callback?state={state}&code=x", headers=kept_state).status_code
                for _ in range(3)
            ]
            assert codes == [403, 403, 429]
            assert kept not in ("", kept_state["Cookie"])
            assert not provider.forms


@pytest.mark.parametrize(("methods", "where"), [(["client_secret_basic"], "header"), (["client_secret_post"], "form")])
def test_the_service_shows_who_it_is(settings: Settings, methods: list[str], where: str) -> None:
    with local_provider() as provider:
        provider.document["token_endpoint_auth_methods_supported"] = methods
        oidc = OidcSettings(issuer=provider.issuer, client_id=CLIENT, client_secret="a:b c")
        changed = {"oidc": oidc, "public_url": "http://127.0.0.1:8000"}
        app = create_app(settings.model_copy(update=changed), dispatch=lambda job: True)
        with serving(app) as url:
            create_key(app.state.services.db, "alice", "first")
            flow = Flow(url, app.state.services, provider)
            with flow.browser() as browser:
                assert _onward(flow.signed_in(browser)) == "/jobs"
        (form,) = provider.forms
        sent = next((a for a in provider.authorizations if a.startswith("Basic ")), None)
        if where == "form":
            assert (form["client_secret"], sent) == ("a:b c", None)
        else:
            assert sent is not None
            assert "client_secret" not in form
            name, _, secret = base64.b64decode(sent.removeprefix("Basic ")).decode().partition(":")
            assert (unquote(name), unquote(secret.replace("+", " "))) == (CLIENT, "a:b c")


def test_without_a_provider_there_is_nothing_to_sign_in_at(settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"require_keys": True}), dispatch=lambda job: True)
    with serving(app) as url, httpx.Client(base_url=url, headers=HTML) as browser:
        for path in ("/login/oidc", "/login/oidc/callback?code=x&state=y"):
            assert browser.get(path).status_code == 404
        assert "Sign in at" not in browser.get("/login").text
