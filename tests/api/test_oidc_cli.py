"""`anneal login --oidc`: the service says whom it trusts, a person agrees elsewhere, tokens are renewed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from anneal_client.cli import logins
from anneal_client.cli.exits import Exit
from anneal_client.cli.main import main
from app.main import create_app
from app.settings import OidcSettings, Settings
from app.tenants import create_key
from tests.api.conftest import assert_problem, report_worker, serving
from tests.factories.oidc import AUDIENCE, LocalProvider, local_provider

Trusting = tuple[str, LocalProvider]


@pytest.fixture(autouse=True)
def nobody_s_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANNEAL_URL", "ANNEAL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANNEAL_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture
def trusting(settings: Settings) -> Iterator[Trusting]:
    with local_provider() as provider:
        issuer = provider.issuer
        provider.document |= {
            "device_authorization_endpoint": f"{issuer}/device",
            "scopes_supported": ["offline_access"],
        }
        provider.device = {
            "device_code": "d3v1ce", "user_code": "ABCD-EFGH", "verification_uri": f"{issuer}/go", "interval": 0.01,
            "verification_uri_complete": f"{issuer}/go?user_code=ABCD-EFGH", "expires_in": 60,
        }  # fmt: skip
        oidc = OidcSettings(issuer=issuer, audience=AUDIENCE, cli_client_id="cli")
        changed = {"oidc": oidc, "public_url": "http://127.0.0.1:8000"}
        app = create_app(settings.model_copy(update=changed), dispatch=lambda job: True)
        with serving(app) as url:
            report_worker(app.state.services)
            create_key(app.state.services.db, "alice", "first")
            yield url, provider


def _kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(logins.config_file().read_text())
    return found


def _age(url: str) -> None:
    """As if the token had ended."""
    kept = _kept()
    kept["tokens"][url]["expires_at"] = 0.0
    logins.config_file().write_text(json.dumps(kept))


def test_a_person_logs_in_and_stays_so(trusting: Trusting, capsys: pytest.CaptureFixture[str]) -> None:
    url, provider = trusting
    answers: list[dict[str, Any]] = [{"error": "authorization_pending"}, {"error": "authorization_pending"}]

    def tokens(form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if form["grant_type"].endswith("device_code") and answers:
            return 400, answers.pop()
        used = form.get("refresh_token", "")
        return 200, {"access_token": provider.token(jti=used), "expires_in": 300, "refresh_token": used + "r"}

    provider.tokens = tokens
    assert main(["login", url, "--oidc"]) == Exit.OK
    said = capsys.readouterr().out
    assert f"{provider.issuer}/go?user_code=ABCD-EFGH" in said
    assert "ABCD-EFGH." in said
    begun, *polls = provider.forms
    assert (begun["client_id"], begun["scope"]) == ("cli", "openid offline_access")
    assert begun["audience"] == begun["resource"] == AUDIENCE
    assert [p["device_code"] for p in polls] == ["d3v1ce"] * 3
    assert logins.config_file().stat().st_mode & 0o077 == 0
    assert main(["jobs"]) == Exit.OK
    assert len(provider.forms) == 4, "it has not ended"
    for expected in ("rr", "rrr"):  # each refresh token is taken once
        _age(url)
        assert main(["jobs"]) == Exit.OK
        assert _kept()["tokens"][url]["refresh_token"] == expected
    # The provider agrees no more: the service says what it thinks of the old token
    provider.tokens = lambda _form: (400, {"error": "invalid_grant"})
    kept = _kept()
    kept["tokens"][url] |= {"access_token": provider.token(exp=int(time.time()) - 60), "expires_at": 0.0}
    logins.config_file().write_text(json.dumps(kept))
    capsys.readouterr()
    assert main(["jobs"]) == Exit.UNAUTHORIZED
    assert "--oidc" in capsys.readouterr().err
    assert main(["logout", url]) == Exit.OK
    assert _kept()["tokens"] == {}


def test_who_does_not_agree_is_not_logged_in(trusting: Trusting, capsys: pytest.CaptureFixture[str]) -> None:
    url, provider = trusting
    for error in ("access_denied", "expired_token", "\x1b[31mred"):
        provider.tokens = lambda _form, error=error: (400, {"error": error})
        assert main(["login", url, "--oidc"]) == Exit.UNAUTHORIZED
        assert "\x1b" not in capsys.readouterr().err
    provider.device["expires_in"] = 0.05
    provider.tokens = lambda _form: (400, {"error": "authorization_pending"})
    assert main(["login", url, "--oidc"]) == Exit.UNAUTHORIZED
    provider.device = {"error": "unauthorized_client"}
    assert main(["login", url, "--oidc"]) == Exit.UNAUTHORIZED
    provider.document["token_endpoint"] = "http://192.0.2.1/token"  # neither this machine nor HTTPS
    assert main(["login", url, "--oidc"]) == Exit.REFUSED
    provider.document["issuer"] = "https://evil.example"
    assert main(["login", url, "--oidc"]) == Exit.REFUSED
    assert not logins.config_file().exists()


def test_clients_find_the_provider(trusting: Trusting) -> None:
    url, provider = trusting
    told = httpx.get(f"{url}/.well-known/oauth-protected-resource").json()
    assert told["resource"] == "http://127.0.0.1:8000"
    assert told["authorization_servers"] == [provider.issuer]
    challenge = httpx.get(f"{url}/v1/jobs").headers["www-authenticate"]
    assert challenge.endswith('resource_metadata="http://127.0.0.1:8000/.well-known/oauth-protected-resource"')


def test_a_service_without_one_says_so(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert_problem(client.get("/.well-known/oauth-protected-resource"), 404, "not_found")
    assert main(["login", str(client.base_url), "--oidc"]) == Exit.REFUSED
    assert "no identity provider" in capsys.readouterr().err
