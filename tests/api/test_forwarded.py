"""Whose address a request has: what a trusted proxy says of it, and what nobody else can say."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_network

import httpx
import pytest
from sqlalchemy import select

from app.db.accounts import AuditEvent
from app.http.services import Services
from app.main import create_app
from app.settings import Settings
from tests.api.conftest import assert_problem, serving
from tests.api.test_pages import HTML, token_in

PROXY, STRANGER = "127.0.0.1", "127.0.0.9"


@pytest.fixture
def strict(settings: Settings, one_minute: None) -> Settings:
    """One attempt to sign in, one wrong key and two connections from an address; a proxy is trusted."""
    most = {"sign_ins_per_minute": 1, "wrong_keys_per_minute": 1, "connections_per_address": 2}
    limits = settings.limits.model_copy(update=most)
    changes = {"require_keys": True, "limits": limits, "trusted_proxies": [ip_network(PROXY)]}
    return settings.model_copy(update=changes)


@pytest.fixture
def behind(strict: Settings) -> Iterator[tuple[str, Services]]:
    app = create_app(strict, dispatch=lambda job: True)
    with serving(app, strict) as url:
        yield url, app.state.services


def attempt(url: str, source: str, forwarded: str) -> int:
    """The answer to a wrong key, sent from `source` with this X-Forwarded-For."""
    with httpx.Client(
        base_url=url,
        headers={**HTML, "X-Forwarded-For": forwarded},
        transport=httpx.HTTPTransport(local_address=source),
    ) as browser:
        return browser.post("/login", data={"csrf": token_in(browser.get("/login")), "key": "ank_wrong"}).status_code


def test_clients_of_a_trusted_proxy_are_counted_by_their_own_addresses(behind: tuple[str, Services]) -> None:
    url, services = behind
    assert [attempt(url, PROXY, "203.0.113.7") for _ in range(2)] == [403, 429]
    assert attempt(url, PROXY, "203.0.113.8") == 403
    with services.db.read() as session:
        actors = set(session.scalars(select(AuditEvent.actor)))
    assert {"address:203.0.113.7", "address:203.0.113.8"} <= actors


def test_wrong_keys_are_counted_by_the_address_behind_the_proxy(behind: tuple[str, Services]) -> None:
    def asked(forwarded: str) -> int:
        headers = {"X-Forwarded-For": forwarded, "Authorization": "Bearer ank_wrong"}
        return httpx.get(f"{behind[0]}/v1/jobs", headers=headers).status_code

    assert [asked("203.0.113.7") for _ in range(2)] == [401, 429]
    assert asked("203.0.113.8") == 401


def test_what_a_client_says_of_itself_to_a_proxy_is_not_believed(behind: tuple[str, Services]) -> None:
    url, _ = behind
    forged = (f"{invented}, 203.0.113.9" for invented in ("198.51.100.1", "127.0.0.1"))
    assert [attempt(url, PROXY, header) for header in forged] == [403, 429], "the last address is the proxy's word"


def test_a_stranger_cannot_forge_an_address(behind: tuple[str, Services]) -> None:
    url, _ = behind
    assert [attempt(url, STRANGER, header) for header in ("203.0.113.1", "203.0.113.2")] == [403, 429]


def test_nobody_is_believed_unless_it_is_said(strict: Settings) -> None:
    plain = strict.model_copy(update={"trusted_proxies": []})
    with serving(create_app(plain, dispatch=lambda job: True), plain) as url:
        assert [attempt(url, PROXY, header) for header in ("203.0.113.1", "203.0.113.2")] == [403, 429]


def test_a_proxy_may_open_more_connections_than_an_address(behind: tuple[str, Services]) -> None:
    url, _ = behind
    where = ("127.0.0.1", httpx.URL(url).port or 0)
    with ExitStack() as stack:

        def connect(source: str) -> socket.socket:
            return stack.enter_context(socket.create_connection(where, timeout=20, source_address=(source, 0)))

        def asked(connection: socket.socket) -> bytes:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return connection.recv(65536)

        assert all(b" 200 " in asked(connect(PROXY)) for _ in range(4))
        assert all(b" 200 " in asked(connect(STRANGER)) for _ in range(2))
        assert b"too_many_connections" in connect(STRANGER).recv(65536)


def test_a_service_without_keys_stays_shut_to_proxies(settings: Settings) -> None:
    trusting = settings.model_copy(update={"trusted_proxies": [ip_network(PROXY)]})
    with (
        serving(create_app(trusting, dispatch=lambda job: True), trusting) as url,
        httpx.Client(base_url=url) as client,
    ):
        for said in ("203.0.113.7", "127.0.0.1"):
            assert_problem(client.get("/v1/jobs", headers={"X-Forwarded-For": said}), 403, "forwarded_request")


def test_the_setting_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNEAL_TRUSTED_PROXIES", "10.1.0.0/16, 2001:db8::1")
    assert [str(network) for network in Settings().trusted_proxies] == ["10.1.0.0/16", "2001:db8::1/128"]
