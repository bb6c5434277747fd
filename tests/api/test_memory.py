"""What many large jobs cost the API: little, whoever lists and polls them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from sqlalchemy import event

from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Job
from app.http.services import Services
from app.jobs.documents import JobDocuments
from app.jobs.ledger import JobLedger
from app.jobs.outlook import Outlooks
from app.settings import Settings, WorkerSettings
from app.webhooks.sender import WebhookSender
from tests.api.conftest import assert_problem
from tests.factories.webhooks import deliver_due

LARGE = ["n" * 500] * 1000  # as a spec could hold in an earlier version


def add_jobs(services: Services, model_id: str, count: int, **fields: Any) -> list[str]:
    ids = [new_id("job") for _ in range(count)]
    now = utcnow()
    with services.db.write() as uow:
        for job_id in ids:
            columns = {"status": "queued", **fields}
            spec = {"model_id": model_id, "quantization": {"keep_nodes": LARGE}}
            uow.session.add(
                Job(
                    id=job_id,
                    tenant_id=LOCAL_TENANT,
                    model_id=model_id,
                    spec=spec,
                    queue="anneal.cpu",
                    correlation_id="c",
                    stages=[],
                    engine_ids=[],
                    created_at=now,
                    **columns,
                )
            )
    return ids


def test_specs_are_bounded(client: httpx.Client, worker: Services, model: dict[str, Any]) -> None:
    def submit(nodes: list[str]) -> httpx.Response:
        return client.post("/v1/jobs", json={"model_id": model["id"], "quantization": {"keep_nodes": nodes}})

    assert_problem(submit([f"/encoder/layers.{n}/self_attn/MatMul" for n in range(1001)]), 422, "invalid_request")
    problem = assert_problem(submit([f"{n:0512}" for n in range(900)]), 413, "spec_too_large")
    assert problem["remedy"]
    # What a person needs: every node of a large transformer that int8 could not keep
    assert submit([f"/encoder/layers.{n}/self_attn/MatMul" for n in range(1000)]).status_code == 202


def test_pages_end_before_they_grow_large(client: httpx.Client, services: Services, model: dict[str, Any]) -> None:
    ids = add_jobs(services, model["id"], 30)
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 200}
    while True:
        response = client.get("/v1/jobs", params=params)
        assert len(response.content) < 6 << 20
        page = response.json()
        assert page["items"]
        seen += [job["id"] for job in page["items"]]
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert seen == sorted(ids, reverse=True)
    one = client.get("/v1/jobs", params={"limit": 1}).json()
    assert [job["id"] for job in one["items"]] == [max(ids)]
    assert one["next_cursor"]


def test_documents_are_kept_by_their_bytes_and_once_a_job(services: Services, model_id: str) -> None:
    outlooks = Outlooks(services.db, services.capabilities)
    documents = JobDocuments(services.jobs, outlooks, services.policies, kept_bytes=3 << 20)
    ids = add_jobs(services, model_id, 20)
    for job_id in ids:
        assert len(documents.get(LOCAL_TENANT, job_id).body) > 500_000
        assert documents.kept_bytes < 4 << 20
    before = documents.kept_bytes
    for _ in range(20):
        services.jobs.cancel(LOCAL_TENANT, ids[-1])
        with services.db.write() as uow:
            uow.session.get_one(Job, ids[-1]).version += 1
        documents.get(LOCAL_TENANT, ids[-1])
    assert documents.kept_bytes < before + 10_000, "one version of a job is kept"


@pytest.fixture
def model_id(model: dict[str, Any]) -> str:
    return str(model["id"])


def test_sweeps_and_webhooks_leave_specs_where_they_are(services: Services, settings: Settings, model_id: str) -> None:
    statements: list[str] = []
    event.listen(services.db.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
    add_jobs(services, model_id, 1, start_by=utcnow())
    add_jobs(services, model_id, 2, status="running", lease_expires_at=utcnow(), fencing_token=1)
    ended = {
        "status": "succeeded",
        "finished_at": utcnow(),
        "webhook_url": "http://127.0.0.1:9/",
        "webhook_attempts": 0,
    }
    add_jobs(services, model_id, 2, **ended)
    sent: list[str] = []
    ledger = JobLedger(services.db, services.content, lambda job: not sent.append(job.id), WorkerSettings())
    statements.clear()
    assert ledger.sweep() == {"expired": 2, "overdue": 1}
    assert len(sent) == 2
    lists = [s for s in statements if s.startswith("SELECT") and "jobs.lease_expires_at <" in s]
    lists += [s for s in statements if s.startswith("SELECT") and "jobs.start_by <" in s]
    assert len(lists) == 2
    statements.clear()
    assert deliver_due(WebhookSender(services.db, settings)) == 0
    lists += [s for s in statements if s.startswith("SELECT") and "FROM jobs" in s]
    assert len(lists) > 3
    assert not [s for s in lists if "jobs.spec" in s or "jobs.stages" in s]
