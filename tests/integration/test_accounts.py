"""Keys, plans and what was done, on both databases."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import func, select

from app.db.accounts import LOCAL_TENANT, ApiKey, AuditEvent, Tenant
from app.db.base import utcnow
from app.db.uow import Database
from app.domain.plan import Limits
from app.domain.roles import Role
from app.errors import AppError
from app.settings import LimitSettings
from app.tenants import caller_of_key, caller_of_session, create_key, sign_in, sign_out
from app.tenants.callers import caller_of_subject
from app.tenants.keys import MOST_LIVE, KeyService
from app.tenants.repository import TenantRepository
from app.tenants.service import TenantService, limits_of
from app.tenants.sessions import end_sessions, sessions, sign_in_subject


def test_a_key_from_before_there_were_roles_may_all(database: Database) -> None:
    with database.write() as uow:
        uow.session.add(Tenant(id="tnt_1", name="acme"))
        uow.session.flush()
        columns = "id, tenant_id, name, key_sha256, created_at"
        connection = uow.session.connection()
        connection.exec_driver_sql(
            f"INSERT INTO api_keys ({columns}) VALUES ('key_1', 'tnt_1', 'old', '{'a' * 64}', '2026-11-01 12:00:00')"
        )
    with database.read() as session:
        assert session.get_one(ApiKey, "key_1").role == Role.ADMIN


def test_who_asks_with_a_key(database: Database) -> None:
    tenants, keys = TenantService(database, LimitSettings()), KeyService(database)
    key = create_key(database, "acme", "one")
    caller = caller_of_key(database, key)
    assert caller is not None
    assert (caller.tenant_name, caller.role, caller.requests_per_minute) == ("acme", Role.ADMIN, None)
    tenants.set_plan("small", Limits(requests_per_minute=5, active_jobs=1), actor="test")
    tenants.put_on("acme", "small", None, actor="test")
    limited = caller_of_key(database, key)
    assert limited is not None
    assert limited.requests_per_minute == 5
    tenants.put_on("acme", None, limits_of({"requests_per_minute": None}), actor="test")
    free = caller_of_key(database, key)
    assert free is not None
    assert free.requests_per_minute is None
    _, plan, limits, _ = tenants.standing("acme")
    assert (plan, limits.active_jobs) == ("small", 1)

    token = sign_in(database, key, "192.0.2.1")
    assert token is not None
    made = keys.rotate(caller.tenant_id, caller.key_id or "", timedelta(0), actor="test")
    session = caller_of_session(database, token)
    assert session is not None
    assert session.expired(), "with its key"
    new = caller_of_key(database, made.secret)
    assert new is not None
    with database.write() as uow:
        now = utcnow()
        repository = TenantRepository(uow.session)
        repository.used(made.row.id, now, now - timedelta(minutes=1))
        repository.used(made.row.id, now + timedelta(seconds=30), now - timedelta(seconds=30))
    used = caller_of_key(database, made.secret)
    assert used is not None
    assert used.last_used_at is not None
    assert abs((used.last_used_at - now).total_seconds()) < 1, "one write a minute"
    tenants.switch("acme", on=False, actor="test")
    off = caller_of_key(database, made.secret)
    assert off is not None
    with pytest.raises(AppError, match="tenant_disabled"):
        off.admitted()
    actions = [row.action for row in tenants.audit(caller.tenant_id, limit=50)]
    assert sorted(actions) == [
        "key.create", "key.rotate", "session.begin", "tenant.create", "tenant.disable", "tenant.plan", "tenant.plan",
    ]  # fmt: skip
    assert [row.action for row in tenants.audit(None, limit=50, action="plan.set")] == ["plan.set"]


def test_a_tenant_has_so_many_keys(database: Database) -> None:
    create_key(database, "acme", "one")
    keys, tenant = KeyService(database), TenantService(database, LimitSettings()).get("acme")
    with database.write() as uow:
        uow.session.add_all(
            ApiKey(id=f"key_{n}", tenant_id=tenant.id, name="n", key_sha256=f"{n:064}", created_at=utcnow())
            for n in range(MOST_LIVE - 1)
        )
    with pytest.raises(AppError, match="too_many_keys"):
        keys.make(tenant.id, "one more", Role.READ, None, actor="test")
    keys.revoke(tenant.id, "key_0", actor="test")
    keys.make(tenant.id, "one more", Role.READ, None, actor="test")
    with pytest.raises(AppError, match="not_found"):
        keys.revoke("tnt_local", "key_1", actor="test")


def test_a_row_stands_with_what_it_tells_of_or_not_at_all(database: Database) -> None:
    tenants = TenantService(database, LimitSettings())
    tenants.create("acme", actor="test")
    with pytest.raises(AppError, match="tenant_exists"):
        tenants.create("acme", actor="test")
    with pytest.raises(AppError, match="not_found"):
        tenants.put_on("acme", "nothing", None, actor="test")
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(AuditEvent)) == 1


def test_who_signed_in_at_the_identity_provider(database: Database) -> None:
    create_key(database, "acme", "one")
    TenantService(database, LimitSettings()).set_plan("default", Limits(requests_per_minute=7), actor="test")
    soon = utcnow() + timedelta(minutes=5)
    assert caller_of_subject(database, "nobody", "mia", Role.READ, soon) is None
    caller = caller_of_subject(database, "acme", "mia", Role.SUBMIT, soon)
    assert caller is not None
    assert (caller.tenant_name, caller.role, caller.actor, caller.requests_per_minute) == (
        "acme",
        "submit",
        "oidc:mia",
        7,
    )
    tokens = [sign_in_subject(database, caller, "Mia", timedelta(hours=n), "192.0.2.1") for n in (1, 0)]
    again = caller_of_session(database, tokens[0])
    assert again is not None
    assert (again.subject, again.role, again.key_id, again.requests_per_minute) == ("mia", "submit", None, 7)
    assert caller_of_session(database, tokens[1]) is None, "its time is over"
    sign_out(database, tokens[0])
    assert caller_of_session(database, tokens[0]) is None
    tokens = [sign_in_subject(database, caller, "Mia", timedelta(hours=1)) for _ in range(2)]
    other = sign_in_subject(database, replace(caller, subject="max"), "Max", timedelta(hours=1))
    assert [row.name for row in sessions(database, caller.tenant_id, limit=2)] == ["Max", "Mia"]
    assert sessions(database, LOCAL_TENANT, limit=9) == []
    assert end_sessions(database, "mia", actor="operator:test") == 2
    assert end_sessions(database, "mia\0", actor="operator:test") == 0
    assert [caller_of_session(database, token) is None for token in (*tokens, other)] == [True, True, False]
    with database.read() as session:
        events = [
            *session.scalars(select(AuditEvent).where(AuditEvent.action.like("session.%")).order_by(AuditEvent.id))
        ]
    assert {(e.actor, e.tenant_id) for e in events[:4]} == {("oidc:mia", caller.tenant_id)}
    assert (events[0].detail["address"], events[-1].action) == ("192.0.2.1", "session.end")
    assert (events[-1].actor, events[-1].detail) == ("operator:test", {"subject": "mia"})
