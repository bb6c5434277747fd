"""Capabilities, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import make_url, text

from app import main
from app.background import Background, tell_of_dead_threads
from app.capabilities.service import offered
from app.db.base import utcnow
from app.db.migrate import upgrade
from app.db.orm import Worker
from app.http.health import CachedReadiness, Examiner, Probe, Readiness
from app.http.services import Services
from app.jobs.watcher import JobWatcher
from app.main import create_app
from app.settings import Settings
from tests import servers
from tests.api.conftest import HARDWARE, report_worker, serving

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
READY = Readiness(ready=True, status="ready", missing=[], checks={})


def test_capabilities(client: httpx.Client, services: Services) -> None:
    empty = client.get("/v1/capabilities").json()
    assert (empty["workers"], empty["devices"], empty["backends"]) == ([], [], [])
    report_worker(services)
    body = client.get("/v1/capabilities").json()
    assert body["devices"] == ["cpu"]
    assert body["backends"] == ["onnxruntime"]
    assert body["precisions"] == ["fp32", "int8"]
    assert body["formats"] == ["archive", "onnx"]
    assert body["hardware"] == ["cpu-test"]
    assert body["workers"][0]["hardware"] == HARDWARE
    assert body["workers"][0]["backends"][0]["versions"] == {"onnxruntime": "1.32.0"}
    isolation = body["workers"][0]["isolation"]
    assert (isolation["landlock"], isolation["network"], isolation["network_of_load_tests"]) == (4, "none", "own")
    assert "Linux 6.12" in isolation["missing"][0]


def test_a_worker_comes_and_goes(services: Services) -> None:
    capabilities = services.capabilities
    assert not capabilities.heartbeat("worker-1")
    report_worker(services)
    report_worker(services)
    assert [w.id for w in capabilities.live()] == ["worker-1"]
    capabilities.stopped("worker-1")
    assert capabilities.live() == []
    assert [w.id for w in capabilities.known()] == ["worker-1"]
    assert capabilities.heartbeat("worker-1")
    assert len(capabilities.live()) == 1
    with services.db.write() as uow:
        uow.session.get_one(Worker, "worker-1").last_seen_at = utcnow() - timedelta(seconds=11)
    assert capabilities.live() == []
    assert len(capabilities.known()) == 1
    with services.db.write() as uow:
        uow.session.get_one(Worker, "worker-1").last_seen_at = utcnow() - timedelta(hours=25)
    assert capabilities.known() == []
    assert offered([])["devices"] == []


def _readiness(client: httpx.Client, *, until: Callable[[dict[str, Any]], bool]) -> httpx.Response:
    """Questions of the same second share one answer."""
    deadline = time.monotonic() + 60
    while not until((response := client.get("/readyz")).json()):
        assert time.monotonic() < deadline, response.text
        time.sleep(0.1)
    return response


def _is_ready(body: dict[str, Any]) -> bool:
    return body["ready"] is True


def _is_not_ready(body: dict[str, Any]) -> bool:
    return not _is_ready(body)


def test_health_and_readiness(client: httpx.Client, services: Services, settings: Settings) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    response = client.get("/readyz")
    assert response.status_code == 200, "polls and downloads go on without a worker"
    body = response.json()
    assert (body["ready"], body["status"], body["missing"]) == (True, "degraded", ["worker"])
    assert body["checks"]["worker"] == {"ok": False, "detail": "No live worker."}
    report_worker(services)
    response = _readiness(client, until=lambda body: body["status"] == "ready")
    assert response.status_code == 200
    body = response.json()
    assert (body["ready"], body["missing"]) == (True, [])
    assert {name: check["ok"] for name, check in body["checks"].items()} == dict.fromkeys(
        ("process", "database", "migrations", "queue", "storage", "worker", "background"), True
    )


def test_what_the_jobs_need_is_named_and_what_nothing_works_without_is_refused(
    worker: Services, client: httpx.Client, settings: Settings
) -> None:
    blobs = settings.home_dir / "blobs"
    shutil.rmtree(blobs, ignore_errors=True)
    blobs.write_text("a file where a folder should be")
    response = _readiness(client, until=lambda body: bool(body["missing"]))
    assert (response.status_code, response.json()["missing"]) == (200, ["storage"])
    blobs.unlink()
    _readiness(client, until=lambda body: not body["missing"])
    for revision, ready in (("0001", False), ("9999", True)):  # an older one; one of a version to come
        with worker.db.write() as uow:
            uow.session.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
        response = _readiness(client, until=_is_ready if ready else _is_not_ready)
        assert response.status_code == (200 if ready else 503)
        assert response.json()["status"] == ("ready" if ready else "unavailable")
        assert ("migrations" in response.json()["missing"]) is not ready
        if not ready:
            assert "app migrate" in response.json()["checks"]["migrations"]["detail"]


def test_a_database_that_is_stopped_is_named(settings: Settings) -> None:
    """Without it every request fails: nothing may be sent here."""
    with ExitStack() as server:
        url = server.enter_context(servers.postgres())
        changed = settings.model_copy(update={"database_url": url, "require_keys": False})
        upgrade(changed.database)
        with serving(create_app(changed, dispatch=lambda job: True)) as base, httpx.Client(base_url=base) as client:
            assert client.get("/readyz").json()["missing"] == ["worker"]
            server.close()
            response = _readiness(client, until=_is_not_ready)
            assert (response.status_code, response.json()["status"]) == (503, "unavailable")
            assert {"database", "migrations", "worker"} == set(response.json()["missing"])
            assert "password" not in response.text
            assert str(make_url(url).password) not in response.text


def test_a_check_that_hangs_is_named_and_not_begun_again() -> None:
    hanging, begun = threading.Event(), []

    def hang() -> str:
        begun.append(1)
        hanging.wait(20)
        return "ok"

    async def ask() -> None:
        examine = Examiner([Probe("storage", hang), Probe("database", lambda: "ok", needed=True)], patience_s=0.2)
        for _ in range(3):
            found = await examine()
            assert (found.ready, found.status, found.missing) == (True, "degraded", ["storage"])
            assert "not answered" in found.checks["storage"].detail
        assert len(begun) == 1
        hanging.set()
        deadline = time.monotonic() + 60
        while (await examine()).missing:
            assert time.monotonic() < deadline

    asyncio.run(ask())


def test_a_task_that_dies_runs_again_and_is_named(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, model_bytes: bytes
) -> None:
    broken: list[str] = []

    def once(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def broken_once(*arguments: Any) -> Any:
            if name not in broken:
                broken.append(name)
                raise KeyError("what nobody thought of")
            return call(*arguments)

        return broken_once

    monkeypatch.setattr(main, "remove_stale", once("cleaner", main.remove_stale))
    monkeypatch.setattr(JobWatcher, "_wake", staticmethod(once("job-watcher", JobWatcher._wake)))
    with serving(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        services: Services = app.state.services
        report_worker(services)
        model = client.post("/v1/models?filename=m.onnx", content=model_bytes).json()
        job = client.post("/v1/jobs", json={"model_id": model["id"]}).json()
        assert client.get(job["links"]["self"], params={"wait": 0.5}).status_code == 200  # the watcher looks, and dies
        body = _readiness(client, until=lambda body: "background" in body["missing"]).json()
        assert body["ready"] is True
        detail = body["checks"]["background"]["detail"]
        assert "cleaner" in detail
        assert "job-watcher" in detail
        timer = threading.Timer(0.5, services.jobs.cancel, ("tnt_local", job["id"]))
        timer.start()
        started = time.monotonic()
        etag = client.get(job["links"]["self"]).headers["etag"]
        waited = client.get(job["links"]["self"], params={"wait": 15}, headers={"If-None-Match": etag})
        timer.join()
        assert waited.json()["status"] == "cancelled", "it watches again"
        assert time.monotonic() - started < 14
    assert sorted(broken) == ["cleaner", "job-watcher"]


def test_a_thread_that_dies_is_told() -> None:
    before = threading.excepthook
    background = Background()
    tell_of_dead_threads(background.note_death)
    try:
        for name, target in (("fine", lambda: None), ("failing", lambda: {}["what nobody thought of"])):
            thread = threading.Thread(target=target, name=name)
            thread.start()
            thread.join()
    finally:
        threading.excepthook = before
    assert background.died_of_late() == ["failing"]
    assert background.died_of_late(within_s=0) == []


def test_questions_at_the_same_time_share_one_run() -> None:
    runs: list[int] = []

    async def take() -> Readiness:
        runs.append(1)
        await asyncio.sleep(0.2)
        return READY

    async def probe() -> list[Readiness]:
        cached = CachedReadiness(take)
        first = await asyncio.gather(*(cached() for _ in range(100)))
        assert len(runs) == 1
        assert await cached() is first[0]
        await asyncio.sleep(1.1)
        return [*first, await cached()]

    asyncio.run(probe())
    assert len(runs) == 2


def test_a_run_that_breaks_is_not_kept() -> None:
    answers = iter([RuntimeError("boom"), READY])

    async def take() -> Readiness:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def probe() -> None:
        cached = CachedReadiness(take)
        with pytest.raises(RuntimeError):
            await cached()
        assert (await cached()).ready

    asyncio.run(probe())


def test_metrics(client: httpx.Client, job: dict[str, Any]) -> None:
    client.get(job["links"]["self"])
    text = client.get("/metrics").text
    assert 'anneal_jobs{status="queued"} 1.0' in text
    assert 'anneal_queue_depth{queue="' in text
    assert "anneal_live_workers 1.0" in text
    assert 'anneal_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"} 1.0' in text
    assert job["id"] not in text
    assert "anneal_uploaded_bytes_total" in text
    assert "anneal_database_up 1.0" in text
    assert 'anneal_queue_workers{queue="anneal.cpu"} 1.0' in text
    assert 'anneal_jobs_failed_total{code="internal"} 0.0' in text
    assert "anneal_tenant" not in text, "anybody may ask"


def test_polls_that_wait_are_counted_apart(client: httpx.Client, job: dict[str, Any]) -> None:
    client.get(job["links"]["self"], params={"wait": 0.01})
    text = client.get("/metrics").text
    assert 'anneal_http_requests_total{method="GET",route="/v1/jobs/{job_id}?wait",status="200"} 1.0' in text
    assert 'route="/v1/jobs/{job_id}"' not in text


@pytest.mark.parametrize("sent", [TRACEPARENT, "00-not-a-traceparent-01", None])
def test_a_callers_trace_stays_with_the_job(
    client: httpx.Client, worker: Services, model: dict[str, Any], sent: str | None
) -> None:
    headers = {} if sent is None else {"traceparent": sent}
    job = client.post("/v1/jobs", json={"model_id": model["id"]}, headers=headers).json()
    row = worker.jobs.get("tnt_local", job["id"])
    assert row.traceparent == (sent if sent == TRACEPARENT else None)
    assert "traceparent" not in job
