"""Capabilities, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.capabilities.service import offered
from app.db.base import utcnow
from app.db.orm import Worker
from app.http.health import CachedReadiness, Readiness
from app.http.services import Services
from app.settings import Settings
from tests.api.conftest import HARDWARE, report_worker


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


def test_health_and_readiness(client: httpx.Client, services: Services, settings: Settings) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["checks"]["worker"] == {"ok": False, "detail": "No live worker."}
    report_worker(services)
    deadline = time.monotonic() + 5  # probes of the same second share one answer
    while (response := client.get("/readyz")).status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert response.status_code == 200, response.text
    assert response.json()["ready"] is True
    assert {name: check["ok"] for name, check in response.json()["checks"].items()} == dict.fromkeys(
        ("database", "queue", "storage", "worker"), True
    )


def test_probes_at_the_same_time_share_one_run_and_one_thread() -> None:
    runs: list[int] = []

    def take() -> Readiness:
        runs.append(threading.get_ident())
        time.sleep(0.2)
        return Readiness(ready=True, checks={})

    async def probe() -> list[Readiness]:
        cached = CachedReadiness(take)
        first = await asyncio.gather(*(cached() for _ in range(100)))
        assert len(runs) == 1
        assert await cached() is first[0]
        await asyncio.sleep(1.1)
        return [*first, await cached()]

    results = asyncio.run(probe())
    assert len(runs) == 2
    assert results[-1] is not results[0]


def test_a_run_that_breaks_is_not_kept() -> None:
    answers = iter([RuntimeError("boom"), Readiness(ready=True, checks={})])

    def take() -> Readiness:
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
