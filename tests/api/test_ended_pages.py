"""Pages of jobs that have ended: with a report, with what failed and what to do, and of one that compares machines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Engine
from app.domain.job_state import JobStatus, Trigger
from app.http.services import Services
from app.settings import Settings
from app.tenants import caller_of_session, create_key, sign_in, sign_out
from tests.api.test_jobs import REPORT, advance, finish
from tests.api.test_pages import HTML, _nothing_inline


@pytest.fixture
def browser(client: httpx.Client) -> httpx.Client:
    client.headers.update(HTML)
    return client


def _engine_of(job: dict[str, Any], metrics: dict[str, Any], tenant_id: str) -> Engine:
    return Engine(
        id=new_id("eng"), tenant_id=tenant_id, job_id=job["id"], model_id=job["model_id"], backend="onnxruntime",
        format="onnx", precision="int8", filename="m.onnx", sha256="0" * 64, size_bytes=153_000,
        bundle_filename="m.zip", bundle_sha256="1" * 64, bundle_size_bytes=1_200_000,
        hardware={"cpu_model": "Test CPU"}, runtime={}, metrics=metrics, created_at=utcnow(),
    )  # fmt: skip


def deliver(services: Services, job: dict[str, Any], folder: Path, tenant_id: str = LOCAL_TENANT) -> Engine:
    """The job ends with a report and an engine."""
    path = folder / "report.json"
    path.write_text(json.dumps(REPORT))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    services.content.put(tenant_id, path, sha256)
    engine = _engine_of(job, {"speedup": "2.2x", "latency_ms": 17264.3, "speedup_ci": [2.1, 2.3]}, tenant_id)
    with services.db.write() as uow:
        uow.session.add(engine)
    finish(services, job["id"], report_sha256=sha256, engine_ids=[engine.id])
    return engine


def test_a_job_that_succeeded_shows_its_report_and_downloads(
    browser: httpx.Client, services: Services, job: dict[str, Any], tmp_path: Path
) -> None:
    engine = deliver(services, job, tmp_path)
    page = browser.get(f"/jobs/{job['id']}").text
    for words in ("What did I gain?", "Can I trust it?", "What next?", "Bundle, 1.2 MB", "&lt;b&gt;", "CPU &amp; co"):
        assert words in page
    assert f'href="/v1/engines/{engine.id}/bundle"' in page
    assert "<script>alert" not in page
    assert "Cancel the job" not in page
    _nothing_inline(page)
    part = browser.get(f"/jobs/{job['id']}/outcome").text
    assert "What did I gain?" in part
    assert "<html" not in part
    assert "<b>2.2x</b>, 17,260 ms" in browser.get("/jobs").text
    side = browser.get(f"/compare?job={job['id']}").text
    for words in ("2.1 to 2.3", "17,260 ms", "Test CPU", "onnxruntime, int8"):
        assert words in side


def test_engines_are_listed_and_compared_whether_their_job_is_there_or_not(
    browser: httpx.Client, services: Services, job: dict[str, Any], tmp_path: Path
) -> None:
    engine = deliver(services, job, tmp_path)
    listed = browser.get("/engines").text
    for words in (engine.id, "onnxruntime, int8", "2.2x", "17,260", "153 kB", f'href="/jobs/{job["id"]}"'):
        assert words in listed
    side = browser.get(f"/compare?engine={engine.id}&job={job['id']}").text
    assert side.count("2.1 to 2.3") == 2, "the engine, and the job that delivered it"
    assert side.count("at most 1 percentage points") == 2, "with what was asked for"
    assert browser.delete(f"/v1/jobs/{job['id']}", headers={"Accept": "*/*"}).status_code == 204
    for path in ("/engines", f"/compare?engine={engine.id}"):
        page = browser.get(path)
        assert page.status_code == 200, page.text
        assert engine.id[-6:] in page.text
        assert f"/jobs/{job['id']}" not in page.text, "a link that leads nowhere"
    missing = browser.get(f"/compare?engine={job['id']}")
    assert missing.status_code == 404
    assert "There is no engine" in missing.text


def test_a_job_that_failed_says_why_and_what_to_do(
    browser: httpx.Client, services: Services, job: dict[str, Any]
) -> None:
    error = {"code": "export_failed", "detail": "the node <b> cannot be read", "remedy": "Export it with opset 17.",
             "stage": "export", "node": "<img src=x>"}  # fmt: skip
    advance(services, job["id"], Trigger.CLAIM, JobStatus.QUEUED, started_at=utcnow())
    advance(services, job["id"], Trigger.FAIL, JobStatus.RUNNING, error=error)
    page = browser.get(f"/jobs/{job['id']}").text
    for words in (
        "the node &lt;b&gt; cannot be read",
        "Export it with opset 17.",
        "export_failed",
        "&lt;img src=x&gt;",
    ):
        assert words in page
    assert "<img" not in page
    assert "the node &lt;b&gt; cannot be read" in browser.get("/jobs?status=failed").text


def test_what_a_compared_job_is_shown_as(browser: httpx.Client, worker: Services, model: dict[str, Any]) -> None:
    spec = {
        "model_id": model["id"],
        "targets": [{"hardware": "cpu-test", "price_per_hour": 1.0}],
        "traffic": {"rate_per_second": 5, "slo": {"p99_latency_ms": 50}},
    }
    parent = browser.post("/v1/jobs", json=spec).json()
    page = browser.get(f"/jobs/{parent['id']}")
    assert page.status_code == 200, page.text
    assert "one for each machine" in page.text
    (child,) = parent["children"]
    assert f'href="/jobs/{child["id"]}"' in page.text
    assert "a comparison of machines" in browser.get(f"/jobs/{child['id']}").text
    browser.post(f"/v1/jobs/{parent['id']}/cancel")
    assert "cpu-test" in browser.get(f"/jobs/{parent['id']}").text


@pytest.fixture
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """On PostgreSQL where the test asks for it."""
    if "on_postgres" not in request.node.name:
        return settings
    url = request.getfixturevalue("migrated_postgres")
    return settings.model_copy(update={"database_url": url, "require_keys": False})


def test_lists_and_sessions_on_postgres(
    browser: httpx.Client, services: Services, job: dict[str, Any], tmp_path: Path
) -> None:
    deliver(services, job, tmp_path)
    paths = ("/", "/jobs", "/jobs?status=succeeded", "/engines", f"/jobs/{job['id']}", f"/compare?job={job['id']}")
    for path in paths:
        assert job["id"] in browser.get(path).text, path
    key = create_key(services.db, "alice", "one")
    token = sign_in(services.db, key)
    assert token is not None
    assert caller_of_session(services.db, token) is not None
    sign_out(services.db, token)
    assert caller_of_session(services.db, token) is None
    assert sign_in(services.db, "ank_wrong") is None
