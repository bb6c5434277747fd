"""The operator's command line, on the service's own database."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from app.admin import __main__ as admin
from app.capabilities.service import CapabilityService
from app.db.base import make_engine, utcnow
from app.db.uow import Database
from app.domain.roles import Role
from app.settings import OidcSettings, Settings
from app.tenants import caller_of_key, caller_of_session
from app.tenants.callers import caller_of_subject
from app.tenants.sessions import sign_in_subject
from tests.factories.oidc import local_provider


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit code, rows, and what was said."""
    monkeypatch.setattr(admin, "load_settings", lambda: settings)

    def run(*arguments: str) -> tuple[int, list[Any], str]:
        code = admin.main(["--json", *arguments])
        told = capsys.readouterr()
        rows = [json.loads(line) if line.startswith("{") else line for line in told.out.splitlines()]
        return code, rows, told.err

    return run


def test_tenants_and_keys(run: Any, settings: Settings) -> None:
    code, (acme,), _ = run("tenants", "create", "acme")
    assert (code, acme["name"], acme["plan"], acme["disabled_at"]) == (0, "acme", "default", None)
    assert run("tenants", "create", "acme")[0] == 1
    assert [row["name"] for row in run("tenants", "list")[1]] == ["acme", "local"]
    code, (key,), said = run("keys", "create", "--tenant", "acme", "--role", "submit", "--days", "7")
    assert (code, len(key)) == (0, 47)
    (row,) = run("keys", "list", "--tenant", acme["id"])[1]
    assert (row["role"], row["tenant"]) == ("submit", "acme")
    assert row["id"] in said
    assert row["expires_at"] is not None
    db = Database(make_engine(settings.database))
    try:
        caller = caller_of_key(db, key)
        assert caller is not None
        assert (caller.tenant_id, caller.role) == (acme["id"], "submit")
        code, (new,), _ = run("keys", "rotate", row["id"], "--grace-hours", "0")
        assert code == 0
        old = caller_of_key(db, key)
        assert old is not None
        assert old.expired()
        assert run("keys", "revoke", new)[0] == 0
        assert caller_of_key(db, new) is None
        assert run("tenants", "disable", "acme")[1][0]["disabled_at"] is not None
        assert run("tenants", "enable", "acme")[1][0]["disabled_at"] is None
    finally:
        db.close()
    for arguments in (("keys", "revoke", "key_0"), ("keys", "revoke", "ä\0"), ("tenants", "disable", "nobody"),
                      ("keys", "create", "--tenant", "nobody"), ("tenants", "create", "")):  # fmt: skip
        code, rows, said = run(*arguments)
        assert (code, rows) == (1, []), arguments
        assert said
    assert run("keys", "create", "--tenant", "acme", "--days", "0")[0] == 2
    with pytest.raises(SystemExit):
        run("keys", "create", "--tenant", "acme", "--role", "root")


def test_plans(run: Any) -> None:
    run("tenants", "create", "acme")
    code, (small,), _ = run("plans", "set", "small", "--stored-bytes", "1000", "--active-jobs", "2")
    assert (code, small["stored_bytes"], small["gpu_seconds"]) == (0, 1000, None)
    assert [plan["name"] for plan in run("plans", "list")[1]] == ["default", "small"]
    _, rows, said = run("tenants", "plan", "acme", "--plan", "small", "--active-jobs", "none", "--gpu-seconds", "60")
    assert "plan small" in said
    found = {row["limit"]: (row["allowed"], row["by"]) for row in rows}
    assert found["stored_bytes"] == (1000, "the plan")
    assert found["gpu_seconds"] == (60, "its own")
    assert found["active_jobs"][0] == 1000, "as many as the service takes"
    _, rows, _ = run("tenants", "plan", "acme", "--clear")
    assert {row["limit"]: row["allowed"] for row in rows}["active_jobs"] == 2
    for arguments in (("plans", "set", "x", "--stored-bytes", "many"), ("plans", "set", "x", "--active-jobs", "-1"),
                      ("tenants", "plan", "acme", "--plan", "nothing")):  # fmt: skip
        code, _, said = run(*arguments)
        assert code == 1, arguments
        assert said


def test_what_was_done_is_told_to_the_operator(run: Any) -> None:
    run("tenants", "create", "acme")
    run("keys", "create", "--tenant", "acme")
    run("plans", "set", "small")
    rows = run("audit")[1]
    assert {row["action"] for row in rows} == {"tenant.create", "key.create", "plan.set"}
    assert all(row["actor"].startswith("operator:") for row in rows)
    (made,) = run("audit", "--tenant", "acme", "--action", "key.create")[1]
    assert made["tenant"] == "acme"
    assert len(run("audit", "--limit", "1")[1]) == 1


def test_workers_and_their_jobs(run: Any, settings: Settings) -> None:
    db = Database(make_engine(settings.database))
    backend = {"name": "onnxruntime", "versions": {}, "devices": ["cpu"], "precisions": ["fp32"]}
    one: dict[str, Any] = {"hardware": {"id": "cpu-x"}, "backends": [backend], "formats": ["onnx"]}
    try:
        CapabilityService(db, settings).report("w1", hostname="h", queues=["anneal.cpu"], **one)
        (row,) = run("workers", "list")[1]
        assert (row["id"], row["state"], row["jobs"]) == ("w1", "live", [])
        assert run("workers", "drain", "w1")[0] == 0
        assert run("workers", "list")[1][0]["state"] == "draining"
        assert run("workers", "drain", "--undo", "w1")[0] == 0
        assert run("retention", "set", "local", "jobs=30")[0] == 0
    finally:
        db.close()
    done = {(event["action"], event["resource"]) for event in run("audit")[1]}
    assert {("worker.drain", "w1"), ("worker.resume", "w1"), ("tenant.retention", "tnt_local")} <= done
    for arguments in (("workers", "drain", "w2"), ("jobs", "requeue", "job_0"), ("jobs", "requeue", "--worker", "w1")):
        code, rows, said = run(*arguments)
        assert (code, rows) == (1, []), arguments
        assert said


def test_for_people(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(admin, "load_settings", lambda: settings)
    assert admin.main(["tenants", "list"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["id", "name"]
    assert "local" in line
    assert admin.main(["keys", "list"]) == 0
    assert "None." in capsys.readouterr().err
    away = settings.model_copy(update={"database_url": "postgresql://nobody@127.0.0.1:1/x"})
    monkeypatch.setattr(admin, "load_settings", lambda: away)
    assert admin.main(["tenants", "list"]) == 3
    assert "Traceback" not in capsys.readouterr().err


def test_every_noun_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for noun in admin.NOUNS:
        with pytest.raises(SystemExit) as end:
            admin.main([noun, "--help"])
        assert end.value.code == 0
        assert noun in capsys.readouterr().out


def test_who_is_signed_in_by_the_provider(run: Any, settings: Settings) -> None:
    run("tenants", "create", "acme")
    assert run("sessions", "list", "--tenant", "acme")[:2] == (0, [])
    db = Database(make_engine(settings.database))
    try:
        caller = caller_of_subject(db, "acme", "mia", Role.READ, utcnow())
        assert caller is not None
        token = sign_in_subject(db, caller, "Mia", timedelta(hours=1))
        (row,) = run("sessions", "list")[1]
        assert (row["subject"], row["name"], row["tenant"], row["role"]) == ("mia", "Mia", "acme", "read")
        assert run("sessions", "end", "mia")[0] == 0
        assert caller_of_session(db, token) is None
        assert run("sessions", "end", "mia")[0] == 1
    finally:
        db.close()


def test_the_doctor_tries_the_identity_provider(run: Any, settings: Settings) -> None:
    with local_provider() as provider:
        settings.oidc = OidcSettings(issuer=provider.issuer, audience="a", cli_client_id="cli", tenants={"x": "acme"})
        code, rows, _ = run("doctor")
        told = [row["needed_by"] for row in rows if row.get("problem") == "identity_provider" and "what" in row]
        assert code == 1
        assert told == [
            "OIDC_TENANTS: there is no tenant 'acme'",
            "it offers no device_authorization_endpoint, which OIDC_CLI_CLIENT_ID needs",
        ]
        run("tenants", "create", "acme")
        provider.document["device_authorization_endpoint"] = f"{provider.issuer}/device"
        code, rows, _ = run("doctor")
        assert (code, rows[0]) == (0, {"looked_at": "identity provider", "issuer": provider.issuer, "keys": 1})
        provider.document["issuer"] = "https://another.example"
        code, rows, _ = run("doctor")
        assert (code, rows[0]["problem"], rows[0]["what"]) == (1, "identity_provider", provider.issuer)
        assert "another.example" in rows[0]["needed_by"]
    assert run("doctor")[0] == 1, "it is away"
