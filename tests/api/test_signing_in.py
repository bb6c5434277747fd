"""A browser that signs in with an API key: it may open all of its own tenant, and nothing of others'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update

from app.db.accounts import BrowserSession
from app.db.base import utcnow
from app.http.services import Services
from app.main import create_app
from app.settings import Settings
from app.tenants import create_key, revoke_key
from tests.api.conftest import assert_problem, report_worker, serving
from tests.api.test_pages import HTML, token_in


@pytest.fixture
def keyed(settings: Settings) -> Iterator[tuple[str, Services]]:
    app = create_app(settings.model_copy(update={"require_keys": True}), dispatch=lambda job: True)
    with serving(app) as url:
        report_worker(app.state.services)
        yield url, app.state.services


@pytest.fixture
def keys(keyed: tuple[str, Services]) -> dict[str, str]:
    return {name: create_key(keyed[1].db, name, f"key of {name}") for name in ("alice", "bob")}


@contextmanager
def sign_in(url: str, key: str, wanted: str = "/jobs") -> Iterator[tuple[httpx.Client, httpx.Response]]:
    """A browser, and what it was answered."""
    with httpx.Client(base_url=url, headers=HTML, timeout=20) as browser:
        token = token_in(browser.get("/login"))
        yield browser, browser.post("/login", data={"csrf": token, "key": key, "next": wanted})


def _job_of(url: str, key: str, model_bytes: bytes) -> dict[str, Any]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as client:
        model = client.post("/v1/models?name=mlp&filename=a.onnx", content=model_bytes).json()
        job: dict[str, Any] = client.post("/v1/jobs", json={"model_id": model["id"]}).json()
        return job


def test_who_is_not_signed_in_is_led_to_do_so_and_back(keyed: tuple[str, Services], keys: dict[str, str]) -> None:
    url, _ = keyed
    with httpx.Client(base_url=url, headers=HTML) as browser:
        for path in (
            "/",
            "/jobs",
            "/jobs/job_1",
            "/models",
            "/datasets",
            "/workers",
            "/webhooks",
            "/keys",
            "/compare",
            "/jobs/new",
        ):
            response = browser.get(path)
            assert (response.status_code, response.headers["location"].partition("?")[0]) == (303, "/login"), path
        assert browser.get("/jobs?status=failed").headers["location"] == "/login?next=%2Fjobs%3Fstatus%3Dfailed"
        assert browser.get("/docs").status_code == 200
        foreign = browser.get("/jobs", headers={"Sec-Fetch-Site": "cross-site"})
        assert 'http-equiv="refresh"' in foreign.text, "led here by another site, it asks again as its own"
        assert_problem(browser.get("/", headers={"Accept": "*/*"}), 404, "not_found")
        link = browser.get("/v1/jobs/job_1/report", headers={"Sec-Fetch-Mode": "navigate"})
        assert link.headers["location"] == "/login?next=%2Fv1%2Fjobs%2Fjob_1%2Freport"
        assert_problem(browser.get("/v1/jobs/job_1/report"), 401, "unauthorized")
        assert browser.get("/jobs/rows", headers={"HX-Request": "true"}).headers["hx-redirect"] == "/login"
    with sign_in(url, keys["alice"]) as (browser, response):
        assert (response.status_code, response.headers["location"]) == (303, "/jobs")
        cookie = response.headers["set-cookie"]
        assert "anneal_session=" in cookie
        for attribute in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
            assert attribute in cookie
        assert "Secure" not in cookie
        assert keys["alice"] not in cookie
        assert browser.get("/login?next=%2Fmodels").headers["location"] == "/models", "who is signed in goes on"
        foreign = browser.get("/login?next=%2Fmodels", headers={"Sec-Fetch-Site": "cross-site"})
        assert 'http-equiv="refresh"' in foreign.text
    for wanted in ("//evil.example", "https://evil.example", "/\\evil.example", "\\evil", "jobs", "/\tx", ""):
        with sign_in(url, keys["alice"], wanted) as (_, response):
            assert response.headers["location"] == "/", wanted


def test_the_cookie_is_for_tls_alone_where_the_page_came_by_it(
    keyed: tuple[str, Services], keys: dict[str, str]
) -> None:
    with httpx.Client(base_url=keyed[0], headers=HTML) as browser:
        data = {"csrf": token_in(browser.get("/login")), "key": keys["alice"]}
        response = browser.post("/login", data=data, headers={"Origin": "https://anneal.example"})
        assert "; Secure" in response.headers["set-cookie"]


def test_a_wrong_key_signs_nobody_in(keyed: tuple[str, Services], keys: dict[str, str]) -> None:
    revoked = create_key(keyed[1].db, "alice", "old")
    assert revoke_key(keyed[1].db, revoked)
    for key in ("", "ank_wrong", revoked, "ä" * 10, "x" * 10_000, "\x00"):
        with sign_in(keyed[0], key) as (browser, response):
            assert response.status_code == 403
            assert "not a live key" in response.text
            assert "anneal_session" not in browser.cookies


def test_a_browser_opens_all_of_its_own_and_nothing_of_others(
    keyed: tuple[str, Services], keys: dict[str, str], model_bytes: bytes
) -> None:
    url, _ = keyed
    own, others = (_job_of(url, keys[name], model_bytes) for name in ("alice", "bob"))
    with sign_in(url, keys["alice"]) as (browser, _):
        for path in ("", "/live", "/outcome"):
            assert browser.get(f"/jobs/{others['id']}{path}").status_code == 404
        token = token_in(browser.get("/jobs"))
        assert browser.post(f"/jobs/{others['id']}/cancel", data={"csrf": token}).status_code == 404
        for path in (f"/models/{others['model_id']}", f"/compare?job={own['id']}&job={others['id']}"):
            assert browser.get(path).status_code == 404
        for path in (f"/jobs/new?like={others['id']}", f"/v1/jobs/{others['id']}", f"/v1/models/{others['model_id']}"):
            assert browser.get(path).status_code == 404
        for path in ("/", "/jobs", "/models", "/compare", f"/jobs?model_id={others['model_id']}"):
            assert others["id"] not in browser.get(path).text
        assert own["id"] in browser.get("/jobs").text
        assert browser.get(f"/jobs/{own['id']}").status_code == 200
        assert browser.get(f"/v1/jobs/{own['id']}").json()["id"] == own["id"]
        assert browser.get(f"/v1/models/{own['model_id']}/download").content == model_bytes
        shown = browser.get("/keys").text
        assert "key of alice" in shown
        assert "key of bob" not in shown


def test_the_api_takes_a_session_only_from_a_page_of_this_service(
    keyed: tuple[str, Services], keys: dict[str, str], model_bytes: bytes
) -> None:
    with sign_in(keyed[0], keys["alice"]) as (browser, _):
        target = "/v1/models?filename=a.onnx"
        assert_problem(browser.post(target, content=model_bytes), 403, "csrf")
        assert_problem(browser.post(target, content=model_bytes, headers={"X-CSRF-Token": "0" * 64}), 403, "csrf")
        token = token_in(browser.get("/models"))
        assert browser.post(target, content=model_bytes, headers={"X-CSRF-Token": token}).status_code == 201
        bearer = {"Authorization": f"Bearer {keys['bob']}"}
        assert browser.post(target, content=model_bytes, headers=bearer).status_code == 201, "a key needs no token"
        assert len(browser.get("/v1/models").json()["items"]) == 1, "and is who asks, whatever the cookie says"


def test_a_session_ends_by_signing_out_with_its_key_and_by_time(
    keyed: tuple[str, Services], keys: dict[str, str]
) -> None:
    url, services = keyed
    with sign_in(url, keys["alice"]) as (browser, _):
        session = browser.cookies["anneal_session"]
        token = token_in(browser.get("/jobs"))
        out = browser.post("/logout", data={"csrf": token})
        assert out.headers["location"] == "/login"
        assert "anneal_session" not in browser.cookies
        browser.cookies.set("anneal_session", session)
        assert browser.get("/jobs").status_code == 303, "a copy of the cookie is worth nothing either"
    assert session.encode() not in b"".join(f.read_bytes() for f in services.settings.home_dir.glob("anneal.db*"))
    with sign_in(url, keys["bob"]) as (browser, _):
        assert browser.get("/v1/jobs").status_code == 200
        assert revoke_key(services.db, keys["bob"])
        services.auth.forget(browser.cookies["anneal_session"])  # else it is remembered for two seconds
        assert_problem(browser.get("/v1/jobs"), 401, "unauthorized")
    with sign_in(url, keys["alice"]) as (browser, _):
        with services.db.write() as uow:
            uow.session.execute(update(BrowserSession).values(expires_at=utcnow() - timedelta(seconds=1)))
        assert browser.get("/jobs").status_code == 303
    with sign_in(url, keys["alice"]), services.db.read() as found:
        assert found.scalar(select(func.count()).select_from(BrowserSession)) == 1, "what is over is forgotten"
