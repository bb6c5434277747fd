"""Roles and limits as rules, and counting requests with nobody waiting for the counter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import copy_context
from pathlib import Path

import pytest
import redis
import structlog
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.audit import acting, current_actor, record
from app.db.accounts import AuditEvent
from app.db.base import Base, make_engine
from app.domain.plan import Limits, effective
from app.domain.roles import Role, needed_by
from app.http import rates
from app.http.middleware import admit
from app.http.rates import Rates
from app.queue.messages import on_gpu, queue_for
from app.tenants.callers import LOCAL, Caller
from tests import servers


def test_each_role_may_what_the_ones_before_it_may() -> None:
    table = [[role.may(needed) for needed in Role] for role in Role]
    assert table == [[i <= j for i in range(4)] for j in range(4)]
    assert [needed_by(method) for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE")] == [
        Role.READ, Role.READ, *[Role.SUBMIT] * 5,
    ]  # fmt: skip


def test_a_tenants_own_limits_go_before_its_plans() -> None:
    plan = {"stored_bytes": 10, "active_jobs": 5}
    assert effective(plan, None) == Limits(stored_bytes=10, active_jobs=5)
    assert effective(plan, {"active_jobs": None, "gpu_seconds": 0}) == Limits(stored_bytes=10, gpu_seconds=0)
    assert effective(None, None) == Limits()
    assert effective({"from_a_newer_version": 1}, {}) == Limits(), "read by the version before it"
    assert Limits(active_jobs=None).named() == {"active_jobs": None}
    for wrong in ({"stored_bytes": -1}, {"stored_bytes": 1.5}, {"stored_byte": 1}, {"gpu_seconds": 2**63}):
        with pytest.raises(ValidationError):
            Limits.model_validate(wrong)


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        (queue_for("cuda"), True),
        (queue_for("cuda-8.9", None, "pt2"), True),
        (queue_for("", "gpu-nvidia-l4"), True),
        (queue_for("cpu"), False),
        (queue_for("", "cpu-amd-epyc-8c", "pt2"), False),
        ("anneal.compared", False),
    ],
)
def test_which_jobs_run_on_a_gpu(queue: str, expected: bool) -> None:
    assert on_gpu(queue) is expected


# Audit rows


def test_a_row_says_who_acts_and_holds_no_secret(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'audit.db'}")
    Base.metadata.create_all(engine, tables=[Base.metadata.tables[name] for name in ("tenants", "audit_events")])
    assert current_actor() == "system"
    acting("key:key_1")
    key = "ank_" + "k" * 43
    with Session(engine) as session:
        detail = {"name": f"x {key}", "password": "p", "nested": {"token": "t", "n": 1}, "at": "\ud800"}
        record(session, None, current_actor(), "key.create", "key_2" + "\0" * 500, detail)
        session.commit()
        row = session.scalars(select(AuditEvent)).one()
    engine.dispose()
    assert row.actor == "key:key_1"
    assert row.id.startswith("aud_")
    assert row.resource is not None
    assert len(row.resource) == 200
    assert "\0" not in row.resource
    text = json.dumps(row.detail)
    assert "kkk" not in text
    assert row.detail["password"] == row.detail["nested"]["token"] == "[redacted]"
    assert row.detail["nested"]["n"] == 1


def test_log_lines_of_a_request_carry_tenant_and_key() -> None:
    def lines(caller: Caller) -> dict[str, object]:
        scope: dict[str, object] = {}
        admit(scope, caller)
        assert (scope["anneal.tenant"], scope["anneal.caller"]) == (caller.tenant_id, caller)
        assert current_actor() == caller.actor
        return structlog.contextvars.get_contextvars()

    keyed = copy_context().run(lines, Caller("tnt_1", Role.READ, "key_1"))
    assert (keyed["tenant_id"], keyed["key_id"]) == ("tnt_1", "key_1")
    assert "key_id" not in copy_context().run(lines, LOCAL)


# How often


async def _taken(counting: Rates, times: int, per_minute: int) -> list[bool | None]:
    found = []
    for _ in range(times):
        rate = await counting.take("tenant", "tnt_1", per_minute)
        found.append(None if rate is None else rate.exceeded)
    return found


def test_a_minute_has_so_many_requests() -> None:
    async def ask() -> None:
        counting = Rates("filesystem://localhost/")
        assert await _taken(counting, 4, 3) == [False, False, False, True]
        assert await _taken(counting, 1, 0) == [True]
        other = await counting.take("sign-in", "tnt_1", 3)
        assert other is not None
        assert (other.remaining, other.exceeded) == (2, False)
        assert int(other.headers()["RateLimit-Reset"]) >= 1
        await counting.close()

    asyncio.run(ask())


@contextmanager
def _server() -> Iterator[str]:
    with servers.redis_server() as url:
        yield url


def test_processes_count_together_and_redis_away_refuses_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_AWAY_S", 0.0)

    async def ask() -> None:
        with _server() as url:
            first, second = Rates(url), Rates(url)
            assert await _taken(first, 2, 3) == [False, False]
            assert await _taken(second, 2, 3) == [False, True], "what the other one counted counts"
            with closing(redis.Redis.from_url(url)) as client:
                names = [*client.scan_iter()]
                assert names
                assert all(b"anneal:rates" in name for name in names)
                assert all(client.ttl(name) > 0 for name in names), "it forgets by itself"
        with caplog.at_level("WARNING"):
            assert await _taken(first, 3, 3) == [None, None, None]
        assert await _taken(Rates("redis://127.0.0.1:1/0"), 1, 1) == [None]
        for counting in (first, second):
            await counting.close()

    asyncio.run(ask())
