"""Submitting, polling, following and cancelling jobs; report and manifest."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from app.blobs.content import sha256_file
from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Job, Worker
from app.domain.job_state import JobStatus, Trigger
from app.http.services import Services
from app.jobs.repository import JobRepository
from app.jobs.schemas import JobOut
from tests.api.conftest import assert_problem


def advance(services: Services, job_id: str, trigger: Trigger, source: JobStatus, **values: Any) -> None:
    with services.db.write() as uow:
        assert JobRepository(uow.session).apply(job_id, trigger, source=source, values=values) is not None


def later(seconds: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def finish(services: Services, job_id: str, **values: Any) -> None:
    advance(services, job_id, Trigger.CLAIM, JobStatus.QUEUED, started_at=utcnow())
    advance(services, job_id, Trigger.COMPLETE, JobStatus.RUNNING, progress=1.0, **values)


def test_submit(client: httpx.Client, job: dict[str, Any], dispatched: list[str]) -> None:
    assert dispatched == [job["id"]]
    assert JobOut.model_validate(job).id == job["id"]
    assert (job["status"], job["progress"], job["cancel_requested"]) == ("queued", 0, False)
    assert job["spec"]["objective"] == "latency"
    assert job["spec"]["benchmark"]["batch_sizes"] == [1, 8]
    response = client.get(job["links"]["self"])
    assert response.json() == job
    assert {"self", "events", "cancel", "model", "engines"} <= set(job["links"])


def test_correlation_id_reaches_the_job(client: httpx.Client, worker: Services, model: dict[str, Any]) -> None:
    response = client.post("/v1/jobs", json={"model_id": model["id"]}, headers={"X-Request-ID": "trace-1"})
    assert response.headers["x-request-id"] == "trace-1"
    assert response.headers["location"] == response.json()["links"]["self"]
    assert worker.jobs.get(LOCAL_TENANT, response.json()["id"]).correlation_id == "trace-1"


def test_bad_specs(client: httpx.Client, worker: Services, model: dict[str, Any], dispatched: list[str]) -> None:
    good = {"model_id": model["id"]}
    for change in (
        {"objective": "speed"},
        {"unknown": 1},
        {"model_id": "mdl_0"},
        {"model_id": "\x00"},
        {"target": {"backends": ["a\x00"]}},
        {"shapes": {"input": {"min": [2, 8], "opt": [1, 8], "max": [4, 8]}}},
        {"shapes": {"other": {"min": [1], "opt": [1], "max": [1]}}},
        {"calibration": {"dataset_id": "dst_0"}},
        {"constraints": {"p99_latency_ms": -1}},
        {"webhook": {"url": "file:///etc/passwd"}},
    ):
        problem = assert_problem(client.post("/v1/jobs", json={**good, **change}), 422, "invalid_request")
        assert problem["errors"]
    offer = client.post("/v1/jobs", json={**good, "target": {"device": "cuda"}})
    assert "cpu" in json.dumps(assert_problem(offer, 422, "unavailable_target"))
    for body in (b"", b"{", b"[]", b"null", b'{"model_id": NaN}', b'{"model_id": "\\ud800"}'):
        response = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert_problem(response, 422, "invalid_request")
    for body in (b"\xff", b"[" * 100_000):
        response = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code in (400, 422), response.text
        assert response.headers["content-type"] == "application/problem+json"
    assert dispatched == []


def test_a_typo_is_told_the_names_that_are_allowed(
    client: httpx.Client, worker: Services, model: dict[str, Any]
) -> None:
    for change, pointer, meant, there in (
        ({"validaton": {}}, "/body/validaton", "validation", "budget_seconds"),
        ({"validation": {"max_acuracy_loss": 1}}, "/body/validation/max_acuracy_loss", None, "confidence"),
        ({"constraints": {"p99_latency": 20}}, "/body/constraints/p99_latency", "p99_latency_ms", "max_size_mb"),
        ({"targets": [{"hardware": "a", "price": 1}]}, "/body/targets/0/price", "price_per_hour", "currency"),
        ({"shapes": {"x": {"mni": [1]}}}, "/body/shapes/x/mni", "min", "opt"),
        ({"traffic": {"slo": {"p99": 20}}}, "/body/traffic/slo/p99", None, "timeout_ms"),
        ({"validation": {"max_loss": 1}}, "/body/validation/max_loss", "max_accuracy_loss_percent", "max_samples"),
    ):
        response = client.post("/v1/jobs", json={"model_id": model["id"], **change})
        problem = assert_problem(response, 422, "invalid_request")
        told = {error["pointer"]: error["message"] for error in problem["errors"]}[pointer]
        assert told.startswith("there is no such field")
        assert there in told
        if meant:
            assert f"did you mean {meant}?" in told


def test_what_is_no_json_is_told_so(client: httpx.Client) -> None:
    for body, headers, words in (
        ("{model_id: mdl_1}", {"Content-Type": "application/json"}, "this is no JSON: Expecting property name"),
        ('{"model_id": "mdl_1"}', {"Content-Type": "application/x-www-form-urlencoded"}, "curl --json"),
        ('{"model_id": "mdl_1"}', {"Content-Type": "text/plain"}, "Content-Type: application/json"),
    ):
        problem = assert_problem(client.post("/v1/jobs", content=body, headers=headers), 422, "invalid_request")
        assert words in problem["errors"][0]["message"]
        assert words in problem["detail"]


def test_metrics_that_cannot_be_formed(
    client: httpx.Client, worker: Services, model: dict[str, Any], npz: Callable[..., bytes]
) -> None:
    x = np.zeros((6, 8), np.float32)
    floats, classes, plain = (
        client.post("/v1/datasets?filename=d.npz", content=npz(input=x, **more)).json()["id"]
        for more in ({"labels": np.zeros(6)}, {"labels": np.zeros(6, np.int64)}, {})
    )
    for spec, word, pointer in (
        ({"validation": {"metric": "top1"}}, "needs validation data", "/validation/metric"),
        ({"validation": {"metric": "macro_f1", "dataset_id": plain}}, "`labels`", "/validation/metric"),
        ({"validation": {"metric": "top1", "dataset_id": floats}}, "class numbers", "/validation/dataset_id"),
        ({"validation": {"dataset_id": floats}}, "class numbers", "/validation/dataset_id"),
        (
            {"validation": {"metric": "mean_iou"}, "calibration": {"dataset_id": classes}},
            "maps",
            "/calibration/dataset_id",
        ),
        ({"validation": {"metric": "top5", "dataset_id": classes}}, "more than 5", "/validation/metric"),
    ):
        response = client.post("/v1/jobs", json={"model_id": model["id"], **spec})
        problem = assert_problem(response, 422, "invalid_request")
        assert word in problem["detail"]
        assert problem["errors"][0]["pointer"] == pointer
        assert problem["remedy"]
    for metric in ("auto", "top1", "macro_f1", "agreement", "kl", "spearman", "psnr"):
        spec = {"model_id": model["id"], "validation": {"metric": metric, "dataset_id": classes}}
        response = client.post("/v1/jobs", json=spec)
        assert response.status_code == 202, response.text
        assert response.json()["spec"]["validation"]["metric"] == metric


def test_traffic_that_cannot_be(client: httpx.Client, worker: Services, model: dict[str, Any]) -> None:
    trace = [0.1 * i for i in range(30)]
    for told, word, pointer in (
        ({"batch_mix": {"1": 0.5}}, "sum to 0.5", "/body/traffic/batch_mix"),
        ({"arrival": "trace", "trace": [*trace, 1.0]}, "out of order", "/body/traffic/trace"),
        ({"arrival": "trace", "trace": [*trace, 99.0]}, "a gap of", "/body/traffic"),
        ({"shape_mix": [{"dims": {"no": [1, 8]}, "share": 1}]}, "is missing", "/traffic/shape_mix/0/dims"),
    ):
        body = {"model_id": model["id"], "traffic": {"slo": {"p99_latency_ms": 20}, **told}}
        problem = assert_problem(client.post("/v1/jobs", json=body), 422, "invalid_request")
        assert problem["errors"][0]["pointer"] == pointer
        assert any(word in e["message"] for e in problem["errors"]), problem
    spec = {"model_id": model["id"], "traffic": {"slo": {"p99_latency_ms": 20}, "rate_per_second": 5}}
    response = client.post("/v1/jobs", json=spec)
    assert response.status_code == 202, response.text
    assert response.json()["spec"]["traffic"]["batch_mix"] == {"1": 1.0}


def test_idempotency(client: httpx.Client, worker: Services, model: dict[str, Any], dispatched: list[str]) -> None:
    def submit(**more: Any) -> httpx.Response:
        return client.post("/v1/jobs", json={"model_id": model["id"], **more}, headers={"Idempotency-Key": "k"})

    first, again = submit(), submit(objective="latency")
    assert first.json() == again.json()
    assert again.status_code == 202
    assert again.headers["idempotency-replayed"] == "true"
    assert_problem(submit(objective="throughput"), 409, "idempotency_conflict")
    assert dispatched == [first.json()["id"]]


def test_concurrent_duplicates_make_one_job(client: httpx.Client, worker: Services, model: dict[str, Any]) -> None:
    answers: list[str] = []

    def submit() -> None:
        response = client.post("/v1/jobs", json={"model_id": model["id"]}, headers={"Idempotency-Key": "same"})
        answers.append(response.json()["id"])

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == 1


def test_etag(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    first = client.get(job["links"]["self"])
    etag = first.headers["etag"]
    assert etag.startswith('"')
    same = client.get(job["links"]["self"], headers={"If-None-Match": etag})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    assert client.get(job["links"]["self"], headers={"If-None-Match": f'"x", W/{etag}'}).status_code == 304
    advance(services, job["id"], Trigger.CLAIM, JobStatus.QUEUED, started_at=utcnow(), stage="export")
    changed = client.get(job["links"]["self"], headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != etag
    assert (changed.json()["status"], changed.json()["stage"]) == ("running", "export")


def test_a_queued_job_says_what_it_can_expect(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    assert job["queue"] == {"position": 1, "ahead": 0, "expected_start": job["created_at"], "waiting_for": None}
    path = client.post("/v1/jobs", json={"model_id": job["model_id"]}).json()["links"]["self"]
    deadline = time.monotonic() + 60
    while (second := client.get(path)).json()["queue"] is None:  # the picture of the queue is older
        assert time.monotonic() < deadline
        time.sleep(0.1)
    etag = second.headers["etag"]
    assert second.json()["queue"]["position"] == 2
    assert client.get(path, headers={"If-None-Match": etag}).status_code == 304
    client.post(job["links"]["cancel"])
    deadline = time.monotonic() + 60
    while (moved := client.get(path, headers={"If-None-Match": etag})).status_code == 304:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert moved.json()["queue"]["position"] == 1
    assert moved.headers["etag"] != etag, "the ETag is a strong one"
    # Whoever waits for a change of the job is not woken by its position.
    assert client.get(path, params={"wait": 0.3}, headers={"If-None-Match": moved.headers["etag"]}).status_code == 304
    with services.db.write() as uow:
        uow.session.get_one(Worker, "worker-1").stopped_at = utcnow()
    deadline = time.monotonic() + 60
    while (alone := client.get(path).json()["queue"])["waiting_for"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (alone["position"], alone["waiting_for"]) == (None, "no live worker with cpu")
    advance(services, second.json()["id"], Trigger.CLAIM, JobStatus.QUEUED)
    assert client.get(path).json()["queue"] is None


def test_priority_and_the_longest_wait(client: httpx.Client, worker: Services, model: dict[str, Any]) -> None:
    def submit(**fields: Any) -> httpx.Response:
        return client.post("/v1/jobs", json={"model_id": model["id"], **fields})

    plain = submit().json()
    assert (plain["spec"]["priority"], plain["spec"]["max_queue_seconds"]) == (0, None)
    asked = submit(priority=-3, max_queue_seconds=90).json()
    assert (asked["spec"]["priority"], asked["spec"]["max_queue_seconds"]) == (-3, 90)
    row = worker.jobs.get(LOCAL_TENANT, asked["id"])
    assert row.start_by is not None
    assert (row.priority, (row.start_by - row.created_at).total_seconds()) == (-3, 90)
    assert not {"priority", "max_queue_seconds"} & set(row.spec), "the release before would refuse the job"
    for wrong in ({"priority": 11}, {"priority": -11}, {"priority": 1.5}, {"max_queue_seconds": 0}):
        assert_problem(submit(**wrong), 422, "invalid_request")


def test_a_job_that_nobody_took_in_time_ends_though_no_worker_lives(
    client: httpx.Client, worker: Services, model: dict[str, Any]
) -> None:
    job = client.post("/v1/jobs", json={"model_id": model["id"], "max_queue_seconds": 1}).json()
    ended = client.get(job["links"]["self"], params={"wait": 30, "for": "end"}).json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "queued_too_long")
    assert ended["error"]["remedy"]


def test_long_poll(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    path = job["links"]["self"]
    etag = client.get(path).headers["etag"]
    started = time.monotonic()
    assert client.get(path, params={"wait": 0.3}, headers={"If-None-Match": etag}).status_code == 304
    assert 0.25 < time.monotonic() - started < 5

    timer = later(0.3, lambda: advance(services, job["id"], Trigger.CLAIM, JobStatus.QUEUED))
    started = time.monotonic()
    response = client.get(path, params={"wait": 20})
    assert response.json()["status"] == "running"
    assert 0.25 < time.monotonic() - started < 5
    timer.join()

    started = time.monotonic()
    # What the client knows is old: no waiting
    assert client.get(path, params={"wait": 20}, headers={"If-None-Match": etag}).json()["status"] == "running"
    advance(services, job["id"], Trigger.COMPLETE, JobStatus.RUNNING)
    etag = client.get(path).headers["etag"]
    # Ended: it will not change any more
    assert client.get(path, params={"wait": 20}, headers={"If-None-Match": etag}).status_code == 304
    assert time.monotonic() - started < 5


def test_a_poll_for_a_state_or_the_end_is_not_answered_at_every_tick(
    client: httpx.Client, job: dict[str, Any], services: Services
) -> None:
    path = job["links"]["self"]
    begun = later(0.3, lambda: advance(services, job["id"], Trigger.CLAIM, JobStatus.QUEUED))
    started = time.monotonic()
    assert client.get(path, params={"wait": 20, "for": "state"}).json()["status"] == "running"
    assert time.monotonic() - started < 10
    begun.join()

    seen: list[int] = []

    def ticks_then_end() -> None:
        for progress in (0.1, 0.2, 0.3):
            with services.db.write() as uow:
                changes = {"progress": progress}
                version = JobRepository(uow.session).update(job["id"], [], changes, "progress", changes)
                assert version is not None
                seen.append(version)
            time.sleep(0.3)
        advance(services, job["id"], Trigger.COMPLETE, JobStatus.RUNNING, progress=1.0)

    # An ETag that is old by now does not answer it either.
    headers = {"If-None-Match": client.get(path).headers["etag"]}
    ticking = later(0.2, ticks_then_end)
    answer = client.get(path, params={"wait": 20, "for": "end"}, headers=headers)
    assert answer.json()["status"] == "succeeded"
    ticking.join()
    assert len(seen) == 3
    # Ended: nothing is waited for.
    started = time.monotonic()
    assert client.get(path, params={"wait": 20, "for": "end"}).json()["status"] == "succeeded"
    assert time.monotonic() - started < 5
    problem = assert_problem(client.get(path, params={"wait": 1, "for": "ever"}), 422, "invalid_request")
    assert problem["errors"] == [{"pointer": "/query/for", "message": "must be one of change, state, end"}]


def test_a_poll_for_the_end_gives_up_after_its_time(
    client: httpx.Client, job: dict[str, Any], services: Services
) -> None:
    ticking = later(0.1, lambda: advance(services, job["id"], Trigger.CLAIM, JobStatus.QUEUED))
    started = time.monotonic()
    assert client.get(job["links"]["self"], params={"wait": 0.8, "for": "end"}).json()["status"] == "running"
    assert time.monotonic() - started > 0.7
    ticking.join()


def test_bad_wait(client: httpx.Client) -> None:
    for wait in ("-1", "x", "nan", "inf", "3601"):
        assert_problem(client.get(f"/v1/jobs/job_0?wait={wait}"), 422, "invalid_request")


def test_list(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    second = client.post("/v1/jobs", json={"model_id": job["model_id"]}).json()
    finish(services, job["id"])
    ids = [item["id"] for item in client.get("/v1/jobs").json()["items"]]
    assert ids == [second["id"], job["id"]]
    page = client.get("/v1/jobs?limit=1").json()
    assert [item["id"] for item in page["items"]] == [second["id"]]
    rest = client.get("/v1/jobs", params={"cursor": page["next_cursor"]}).json()
    assert [item["id"] for item in rest["items"]] == [job["id"]]
    assert [item["id"] for item in client.get("/v1/jobs?status=succeeded").json()["items"]] == [job["id"]]
    assert client.get("/v1/jobs?model_id=mdl_0").json()["items"] == []
    for query in ("status=done", "model_id=%00", "cursor=x"):
        assert client.get(f"/v1/jobs?{query}").status_code == 422


def test_cancel(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    response = client.post(job["links"]["cancel"])
    assert (response.status_code, response.json()["status"]) == (202, "cancelled")
    assert client.post(job["links"]["cancel"]).json() == response.json()
    running = client.post("/v1/jobs", json={"model_id": job["model_id"]}).json()
    advance(services, running["id"], Trigger.CLAIM, JobStatus.QUEUED)
    body = client.post(running["links"]["cancel"]).json()
    assert (body["status"], body["cancel_requested"]) == ("running", True)
    assert_problem(client.post("/v1/jobs/job_0/cancel"), 404, "not_found")


def events_of(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith((":", "retry")))
        if fields:
            events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return events


def test_events_end_with_the_job_and_resume(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    timer = later(0.3, lambda: finish(services, job["id"]))
    with client.stream("GET", job["links"]["events"]) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of("".join(response.iter_text()))
    timer.join()
    assert [event[2]["status"] for event in events] == ["queued", "running", "succeeded"]
    assert [event[0] for event in events] == [1, 2, 3]
    resumed = client.get(job["links"]["events"], headers={"Last-Event-ID": "2"})
    assert events_of(resumed.text) == events[2:]
    assert events_of(client.get(job["links"]["events"], headers={"Last-Event-ID": "3"}).text) == []
    for bad in ("x", "-1", "9" * 30):
        answer = client.get(job["links"]["events"], headers={"Last-Event-ID": bad})
        assert_problem(answer, 422, "invalid_request")


def test_events_of_a_message_with_newlines(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    with services.db.write() as uow:
        JobRepository(uow.session).update(job["id"], [], {}, "note", {"message": "a\n\nevent: state\ndata: {}\u2028"})
    client.post(job["links"]["cancel"])
    events = events_of(client.get(job["links"]["events"]).text)
    assert [event[1] for event in events] == ["state", "note", "state"]
    assert events[1][2]["message"].startswith("a\n\nevent")


REPORT = {
    "analysis": {"model": "<script>alert(1)</script>", "hardware": "CPU & co", "original_latency_ms": 15.2},
    "optimizations_applied": [{"name": "ONNX fusion", "impact": None}],
    "final_metrics": {"latency_ms": 6.8, "speedup": "2.2x", "memory_mb": None},
    "deployment_config": {"batch_size": 16, "dynamic_batching": True},
    "recommendations": ["use <b>"],
    "baseline": {"id": "baseline", "name": "the original", "batches": {"1": {"p50_ms": 15.2}}},
    "candidates": [
        {
            "id": "c1",
            "name": "int8",
            "status": "picked",
            "reason": "the fastest",
            "batches": {"1": {"p50_ms": 6.8, "speedup": {"ratio": 2.2, "low": 2.1, "high": 2.3}}},
        },
        {"id": "c2", "name": "'\"><img src=x>", "status": "kept", "batches": {"1": {"p50_ms": 14}}},
    ],
    "checks": [{"name": "accuracy", "value": 0.1, "limit": 1.0, "passed": True}, {"name": "p99", "passed": None}],
}


def test_report_and_manifest(client: httpx.Client, job: dict[str, Any], services: Services, tmp_path: Any) -> None:
    for kind in ("report", "manifest"):
        assert_problem(client.get(f"{job['links']['self']}/{kind}"), 409, f"{kind}_not_ready")
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    sha256 = sha256_file(path)
    services.content.put(LOCAL_TENANT, path, sha256)
    finish(services, job["id"], report_sha256=sha256, manifest_sha256=sha256)
    links = client.get(job["links"]["self"]).json()["links"]
    report = client.get(links["report"])
    assert report.headers["content-type"] == "application/json"
    assert report.json() == client.get(links["manifest"]).json() == REPORT
    page = client.get(links["report"], headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert "<img" not in page.text
    assert "&lt;script&gt;" in page.text
    assert page.text.count("<rect") == 3
    assert page.text.count("<circle") == 1
    assert client.get(links["report"], headers={"Accept": "application/json, text/html"}).json() == REPORT


def test_failed_job_has_no_report(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    error = {"code": "unknown_op", "detail": "…", "node": "n", "remedy": "Use another."}
    advance(services, job["id"], Trigger.FAIL, JobStatus.QUEUED, error=error)
    body = client.get(job["links"]["self"]).json()
    assert JobOut.model_validate(body).status == "failed"
    assert body["error"] == error
    assert_problem(client.get(f"{job['links']['self']}/report"), 404, "no_report")


def test_stored_rows_fit_the_schema(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    stages = [{"name": "export", "status": "succeeded", "cached": True, "started_at": None, "seconds": 1.5}]
    finish(services, job["id"], stages=stages, engine_ids=["eng_1"])
    body = client.get(job["links"]["self"]).json()
    document = JobOut.model_validate(body)
    assert document.finished_at is not None
    assert set(body) == set(JobOut.model_fields)
    assert body["stages"] == stages
    with services.db.read() as session:
        assert session.get_one(Job, job["id"]).version == 3


def test_what_an_older_version_has_stored_is_shown_as_it_is(
    client: httpx.Client, job: dict[str, Any], services: Services
) -> None:
    """A spec is judged when it comes in: what could be said then stays readable."""
    with services.db.write() as uow:
        row = uow.session.get_one(Job, job["id"])
        row.spec = {**row.spec, "once_possible": [1.5, "ä\u2028"], "budget_seconds": -1}
        row.version += 1
    spec = client.get(job["links"]["self"]).json()["spec"]
    assert (spec["once_possible"], spec["budget_seconds"]) == ([1.5, "ä\u2028"], -1)
    assert client.get("/v1/jobs").json()["items"] == [client.get(job["links"]["self"]).json()]
