"""Deleting jobs and engines: what goes, what stays, and that nobody stumbles over it afterwards."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from sqlalchemy import func, select

from anneal_client import AsyncClient, Client, Conflict, NotFound
from app.blobs.retention import change_policy
from app.blobs.usage import bytes_of, stored_bytes_of
from app.capabilities.repository import StatisticsRepository
from app.db.orm import LOCAL_TENANT, JobEvent
from app.domain.job_state import JobStatus, Trigger
from app.http.services import Services
from tests.api.conftest import assert_problem
from tests.api.test_engines import CONTENT, add_engine
from tests.api.test_jobs import advance, finish


def _stored(services: Services, tmp_path: Path, text: str) -> str:
    path = tmp_path / "document"
    path.write_text(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    services.content.put(LOCAL_TENANT, path, sha256)
    seen = services.content.sight(services.db, LOCAL_TENANT, [sha256])
    with services.db.write() as uow:
        services.content.record(uow.session, seen, {sha256: len(text)})
    return sha256


@pytest.fixture
def ended(services: Services, job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A job that succeeded: report, manifest, an engine."""
    engine_id = add_engine(services, job, tmp_path)
    documents = {f"{name}_sha256": _stored(services, tmp_path, f'{{"{name}": 1}}') for name in ("report", "manifest")}
    finish(services, job["id"], engine_ids=[engine_id], **documents)
    return {**job, "engine_id": engine_id, **documents}


def test_an_engine_goes_and_its_job_names_it_no_more(
    client: httpx.Client, services: Services, ended: dict[str, Any]
) -> None:
    job, engine = ended["links"]["self"], f"/v1/engines/{ended['engine_id']}"
    sha256, etag = client.get(engine).json()["sha256"], client.get(job).headers["etag"]
    assert client.delete(engine).status_code == 204
    for path in (engine, f"{engine}/download", f"{engine}/bundle"):
        assert_problem(client.get(path), 404, "not_found")
    assert_problem(client.delete(engine), 404, "not_found")
    assert client.get(ended["links"]["engines"]).json() == {"items": [], "next_cursor": None}
    now = client.get(job)
    assert (now.json()["engine_ids"], now.json()["status"]) == ([], "succeeded")
    assert now.headers["etag"] != etag
    assert client.get(f"{job}/report").json() == {"report": 1}
    assert "was deleted" in client.get(f"{job}/events").text
    assert not services.content.exists(LOCAL_TENANT, sha256)
    assert client.get(f"/jobs/{ended['id']}", headers={"Accept": "text/html"}).status_code == 200


def test_a_job_goes_and_its_engines_stay(client: httpx.Client, services: Services, ended: dict[str, Any]) -> None:
    job = ended["links"]["self"]
    assert client.delete(job).status_code == 204
    for path in ("", "/events", "/report", "/manifest"):
        assert_problem(client.get(job + path), 404, "not_found")
    assert_problem(client.post(f"{job}/cancel"), 404, "not_found")
    assert_problem(client.delete(job), 404, "not_found")
    assert client.get("/v1/jobs").json()["items"] == []
    assert client.get("/jobs", headers={"Accept": "text/html"}).status_code == 200
    engine = client.get(f"/v1/engines/{ended['engine_id']}").json()
    assert engine["job_id"] == ended["id"]
    assert client.get(f"/v1/engines?job_id={ended['id']}").json()["items"] == [engine]
    assert client.get(engine["links"]["download"]).content == CONTENT
    for document in ("report_sha256", "manifest_sha256"):
        assert not services.content.exists(LOCAL_TENANT, ended[document])
    with services.db.read() as session:
        assert session.scalar(select(func.count()).select_from(JobEvent)) == 0
    assert client.delete(engine["links"]["self"]).status_code == 204, "also after its job"
    assert client.delete(ended["links"]["model"]).status_code == 204


def test_a_job_goes_with_its_engines_where_that_is_asked_for(
    client: httpx.Client, services: Services, ended: dict[str, Any]
) -> None:
    sha256 = client.get(f"/v1/engines/{ended['engine_id']}").json()["sha256"]
    assert client.delete(ended["links"]["self"], params={"engines": "true"}).status_code == 204
    assert client.get("/v1/engines").json()["items"] == []
    assert not services.content.exists(LOCAL_TENANT, sha256)


def test_a_job_that_has_not_ended_stays(client: httpx.Client, services: Services, job: dict[str, Any]) -> None:
    path = job["links"]["self"]
    problem = assert_problem(client.delete(path), 409, "job_active")
    assert f"{path}/cancel" in problem["remedy"]
    advance(services, job["id"], Trigger.CLAIM, JobStatus.QUEUED)
    assert_problem(client.delete(path), 409, "job_active")
    advance(services, job["id"], Trigger.CANCEL, JobStatus.RUNNING)
    assert client.delete(path).status_code == 204


def test_pages_go_on_where_jobs_and_engines_were_deleted(
    client: httpx.Client, services: Services, job: dict[str, Any], tmp_path: Path
) -> None:
    """Also where it is the one that a cursor names."""
    jobs = [job["id"]]
    for _ in range(4):
        jobs.append(client.post("/v1/jobs", json={"model_id": job["model_id"]}).json()["id"])
    for job_id in jobs:
        finish(services, job_id)
    engines = sorted(add_engine(services, job, tmp_path) for _ in range(5))
    for kind, ids in (("jobs", sorted(jobs)), ("engines", engines)):
        first = client.get(f"/v1/{kind}", params={"limit": 2}).json()
        assert [item["id"] for item in first["items"]] == ids[:2:-1]
        for gone in (ids[3], ids[2]):
            assert client.delete(f"/v1/{kind}/{gone}").status_code == 204
        rest = client.get(f"/v1/{kind}", params={"limit": 2, "cursor": first["next_cursor"]}).json()
        assert [item["id"] for item in rest["items"]] == ids[1::-1]


def test_a_key_whose_job_was_deleted_makes_no_other(
    client: httpx.Client, services: Services, worker: Services, model: dict[str, Any], dispatched: list[str]
) -> None:
    headers = {"Idempotency-Key": "again"}
    made = client.post("/v1/jobs", json={"model_id": model["id"]}, headers=headers).json()
    finish(services, made["id"])
    assert client.delete(made["links"]["self"]).status_code == 204
    again = client.post("/v1/jobs", json={"model_id": model["id"]}, headers=headers)
    assert_problem(again, 409, "idempotency_resource_gone")
    assert dispatched == [made["id"]]


def test_the_metrics_count_the_jobs_that_there_are(
    client: httpx.Client, services: Services, job: dict[str, Any]
) -> None:
    other = client.post("/v1/jobs", json={"model_id": job["model_id"]}).json()
    finish(services, job["id"])
    with services.db.write() as uow:
        assert StatisticsRepository(uow.session).tally(10) == 1
    finish(services, other["id"])  # not tallied yet
    assert _succeeded(services) == 2
    assert client.delete(job["links"]["self"]).status_code == 204
    assert _succeeded(services) == 1
    assert client.delete(other["links"]["self"]).status_code == 204
    assert _succeeded(services) == 0


def _succeeded(services: Services) -> int:
    with services.db.read() as session:
        return StatisticsRepository(session).job_counts()[0].get("succeeded", 0)


def test_what_a_tenant_holds_is_a_sum(
    client: httpx.Client, services: Services, model: dict[str, Any], ended: dict[str, Any], tmp_path: Path
) -> None:
    """Each content once, and not what is only cached."""
    _stored(services, tmp_path, "cached, say")

    def held() -> int:
        with services.db.read() as session:
            assert bytes_of(session, "tnt_other") == stored_bytes_of(session, "tnt_other") == 0
            found = bytes_of(session, LOCAL_TENANT)
            assert stored_bytes_of(session, LOCAL_TENANT) == found + len("cached, say")
            return found

    documents = len('{"report": 1}') + len('{"manifest": 1}')
    assert held() == model["size_bytes"] + documents, "the engine of this test has no row of its bytes"
    twin = client.post(
        "/v1/models", params={"filename": "twin.onnx"}, content=client.get(model["links"]["download"]).content
    )
    assert twin.status_code == 201
    assert held() == model["size_bytes"] + documents
    assert client.delete(ended["links"]["self"]).status_code == 204
    assert held() == model["size_bytes"]


def test_what_expires_says_when(
    client: httpx.Client, services: Services, ended: dict[str, Any], worker: Services
) -> None:
    paths = {"jobs": ended["id"], "engines": ended["engine_id"], "models": ended["model_id"]}
    live = client.post("/v1/jobs", json={"model_id": ended["model_id"]}).json()

    def said() -> dict[str, Any]:
        return {kind: client.get(f"/v1/{kind}/{found}").json()["expires_at"] for kind, found in paths.items()}

    # What a queued job can expect is in its document, too, and is known a moment after it came.
    while client.get(live["links"]["self"]).json()["queue"] is None:
        time.sleep(0.05)
    etags = [client.get(job["links"]["self"]).headers["etag"] for job in (ended, live)]
    assert said() == dict.fromkeys(paths)
    with services.db.write() as uow:
        change_policy(uow.session, LOCAL_TENANT, {"jobs": 3, "engines": 4, "models": 5, "uploads": 6}, ())
    services.policies._known.clear()
    for (kind, days), column in zip(
        {"jobs": 3, "engines": 4, "models": 5}.items(), ("finished_at", "created_at", "created_at"), strict=True
    ):
        document = client.get(f"/v1/{kind}/{paths[kind]}").json()
        since = datetime.fromisoformat(document[column])
        assert datetime.fromisoformat(document["expires_at"]) == since + timedelta(days=days)
        listed = {item["id"]: item for item in client.get(f"/v1/{kind}").json()["items"]}
        assert listed[paths[kind]] == document
    assert client.get(live["links"]["self"]).json()["expires_at"] is None
    now = client.get(ended["links"]["self"], headers={"If-None-Match": etags[0]})
    assert now.status_code == 200, "it says something else"
    assert client.get(ended["links"]["self"], headers={"If-None-Match": now.headers["etag"]}).status_code == 304
    assert client.get(live["links"]["self"], headers={"If-None-Match": etags[1]}).status_code == 304
    services.uploads._policies._known.clear()
    upload = client.post("/v1/uploads", json={"filename": "a.onnx", "size_bytes": 5}).json()
    lives = datetime.fromisoformat(upload["expires_at"]) - datetime.fromisoformat(upload["created_at"])
    assert lives == timedelta(days=6)


@pytest.fixture
def anneal(base_url: str) -> Iterator[Client]:
    with Client(base_url) as client:
        yield client


def test_the_client_deletes(anneal: Client, ended: dict[str, Any], client: httpx.Client) -> None:
    second = anneal.submit(model_id=ended["model_id"])
    with pytest.raises(Conflict, match="Cancel it first"):
        anneal.delete_job(second.id)
    anneal.delete_engine(ended["engine_id"])
    anneal.delete_job(ended["id"], engines=True)
    for call, gone in ((anneal.job, ended["id"]), (anneal.engine, ended["engine_id"])):
        with pytest.raises(NotFound):
            call(gone)


def test_so_does_the_one_for_event_loops(base_url: str, ended: dict[str, Any]) -> None:
    async def both() -> None:
        async with AsyncClient(base_url) as anneal:
            await anneal.delete_job(ended["id"], engines=True)
            with pytest.raises(NotFound):
                await anneal.delete_engine(ended["engine_id"])

    anyio.run(both)
