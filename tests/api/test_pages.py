"""The pages: what a browser gets, and what nobody gets by one."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from app.db.orm import LOCAL_TENANT, Job
from app.domain.job_state import JobStatus, Trigger
from app.http.services import Services
from app.jobs.repository import JobRepository
from app.web.vendoring import faults
from tests.api.conftest import assert_problem
from tests.factories.filled import fill

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def token_in(page: httpx.Response) -> str:
    found = re.search(r'<meta name="csrf-token" content="([0-9a-f]{64})">', page.text)
    assert found, page.text[:500]
    return found[1]


def _nothing_inline(page: str) -> None:
    """What the policy would refuse."""
    assert not re.search(r"<script(?![^>]*\ssrc=)", page)
    assert not re.search(r"<style|\sstyle=|\son\w+=[\"']", page)


@pytest.fixture
def browser(client: httpx.Client) -> httpx.Client:
    client.headers.update(HTML)
    return client


def test_the_root_is_a_page_for_browsers_and_what_it_was_for_others(client: httpx.Client) -> None:
    for accept in ("*/*", "application/json", "application/json, text/html"):
        assert_problem(client.get("/", headers={"Accept": accept}), 404, "not_found")
    page = client.get("/", headers=HTML)
    assert page.status_code == 200
    assert "No worker is there" in page.text
    assert f"'{client.base_url.netloc.decode()}/v1/models?name=resnet" in page.text, "what is told works here"


def test_every_page_loads_and_keeps_its_policy(browser: httpx.Client, job: dict[str, Any]) -> None:
    paths = [
        "/",
        "/jobs",
        "/jobs?status=queued",
        "/jobs?status=",
        "/jobs/new",
        f"/jobs/{job['id']}",
        "/jobs/rows",
        "/models",
    ]
    paths += [
        f"/models/{job['model_id']}",
        f"/models/{job['model_id']}?ask=yes",
        "/datasets",
        "/engines",
        "/workers",
        "/account",
        "/keys",
        "/webhooks?status=failed",
        "/docs",
        f"/compare?job={job['id']}",
    ]
    paths += [f"/jobs/new?like={job['id']}", f"/jobs/new?model={job['model_id']}", "/compare"]
    for path in paths:
        page = browser.get(path)
        assert page.status_code == 200, (path, page.text)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "script-src 'self';" in policy
        _nothing_inline(page.text)
        for loaded in re.findall(r'(?:src|href)="([^"#]+\.(?:js|css|svg)\?[^"]*)"', page.text):
            assert loaded.startswith("/static/"), "nothing from anywhere else"
            file = browser.get(loaded)
            assert file.status_code == 200, loaded
            assert "immutable" in file.headers["cache-control"]
    assert browser.get("/login", follow_redirects=False).headers["location"] == "/"


def test_files_of_others_are_those_of_the_lock() -> None:
    assert list(faults()) == []


def test_names_with_markup_are_shown_as_they_are(
    browser: httpx.Client, worker: Services, model_bytes: bytes, npz: Any
) -> None:
    import numpy as np

    params = {"name": HOSTILE, "filename": "a.onnx"}
    model = browser.post("/v1/models", params=params, content=model_bytes).json()
    data = npz(x=np.zeros((4, 8), np.float32))
    browser.post("/v1/datasets", params={**params, "filename": "a.npz"}, content=data)
    job = browser.post("/v1/jobs", json={"model_id": model["id"]}).json()
    news = {"candidate": "c", "name": HOSTILE, "backend": "b", "precision": HOSTILE, "standing": "refused",
            "speedup": None, "loss_percent": None, "reason": HOSTILE}  # fmt: skip
    with worker.db.write() as uow:
        JobRepository(uow.session).update(job["id"], [], {}, "candidates", {"candidates": [news], "leader": None})
    seen = ("/", "/jobs", "/jobs/new", f"/jobs/{job['id']}", "/models", f"/models/{model['id']}", "/datasets")
    for path in (*seen, f"/compare?job={job['id']}"):
        page = browser.get(path).text
        assert "&lt;script&gt;alert(1)" in page, path
        assert "<script>alert" not in page, path
        assert "<img" not in page, path


def test_a_form_counts_only_from_a_page_of_this_browser(browser: httpx.Client, job: dict[str, Any]) -> None:
    fields = {"model": job["model_id"], "objective": "latency", "budget": "60", "once": "1"}
    cancel = f"/jobs/{job['id']}/cancel"
    assert browser.post("/jobs", data=fields).status_code == 403
    token = token_in(browser.get("/jobs/new"))
    seed = browser.cookies["anneal_seed"]
    for wrong in ("", "0" * 64, token[:-1] + ("0" if token[-1] != "0" else "1"), "ä"):
        for path in ("/jobs", cancel, "/login", "/logout"):
            refused = browser.post(path, data={**fields, "csrf": wrong}, follow_redirects=False)
            assert refused.status_code == 403, (path, wrong)
            assert "Refused" in refused.text
    browser.cookies.clear()
    assert browser.post("/jobs", data={**fields, "csrf": token}).status_code == 403, "the token alone is not enough"
    browser.cookies.set("anneal_seed", seed)
    response = browser.post("/jobs", data={**fields, "csrf": token}, follow_redirects=False)
    assert response.status_code == 303, response.text
    again = browser.post("/jobs", data={**fields, "csrf": token}, follow_redirects=False)
    assert again.headers["location"] == response.headers["location"], "sent twice, it is one job"
    assert (
        browser.post(cancel, data={"csrf": token}, follow_redirects=False).headers["location"] == f"/jobs/{job['id']}"
    )
    assert browser.get(f"/v1/jobs/{job['id']}", headers={"Accept": "*/*"}).json()["status"] == "cancelled"
    seed_cookie = httpx.get(browser.base_url.join("/jobs"), headers=HTML).headers["set-cookie"]
    assert "HttpOnly" in seed_cookie
    assert "SameSite=strict" in seed_cookie


def test_what_is_wrong_with_a_form_is_said_and_nothing_typed_is_lost(
    browser: httpx.Client, worker: Services, model: dict[str, Any]
) -> None:
    token = token_in(browser.get("/jobs/new"))
    fields = {"csrf": token, "model": model["id"], "objective": "latency", "loss": "much", "p99": "-3", "budget": "1e9",
              "batch_sizes": "1, 8, many", "hardware": "cpu-none"}  # fmt: skip
    page = browser.post("/jobs", data=fields)
    assert page.status_code == 422
    for words in ("Accuracy loss, at most: ", "p99 latency, at most: ", "Time for the job, at most: ", "Batch sizes: "):
        assert words in page.text
    assert 'value="much"' in page.text
    page = browser.post("/jobs", data={"csrf": token, "model": model["id"], "hardware": "cpu-none"})
    assert page.status_code == 422
    assert "cpu-none" in page.text
    page = browser.post("/jobs", data={"csrf": token, "model": "mdl_0"})
    assert "There is no model" in page.text
    good = {"csrf": token, "model": model["id"], "loss": "0,5", "p99": "20", "budget": "60", "batch_sizes": "1 4",
            "precisions": ["fp32", "int8"], "strict": "yes", "allow_noisy": "yes"}  # fmt: skip
    job_id = browser.post("/jobs", data=good, follow_redirects=False).headers["location"].rpartition("/")[2]
    spec = browser.get(f"/v1/jobs/{job_id}").json()["spec"]
    assert spec["validation"]["max_accuracy_loss_percent"] == 0.5
    assert spec["validation"]["strict"] is True
    assert spec["constraints"]["p99_latency_ms"] == 20
    assert (spec["benchmark"]["batch_sizes"], spec["precisions"]) == ([1, 4], ["fp32", "int8"])
    assert spec["benchmark"]["allow_noisy"] is True
    assert 'name="allow_noisy" value="yes" checked' in browser.get(f"/jobs/new?like={job_id}").text


def test_a_job_like_another_says_what_the_form_has_no_place_for(
    browser: httpx.Client, worker: Services, model: dict[str, Any]
) -> None:
    spec = {"model_id": model["id"], "priority": 3, "traffic": {"rate_per_second": 400, "slo": {"p99_latency_ms": 20}},
            "validation": {"confidence": 0.99}, "quantization": {"training": {"mode": "auto"}}}  # fmt: skip
    job_id = browser.post("/v1/jobs", json=spec).json()["id"]
    page = browser.get(f"/jobs/new?like={job_id}").text
    lost = page.partition("more than this form has a place for")[2].partition("Left as it is")[0]
    assert re.findall("<code>(.*?)</code>", lost) == ["validation.confidence", "traffic", "priority"]
    assert 'name="training" value="auto" checked' in page
    asked = browser.get(f"/jobs/{job_id}").text
    assert "400 requests/s with p99 within 20 ms" in asked
    assert "<dt>Training<dd>auto" in asked
    plain = browser.post("/v1/jobs", json={"model_id": model["id"]}).json()["id"]
    assert "more than this form has a place for" not in browser.get(f"/jobs/new?like={plain}").text


def test_a_model_s_page_shows_its_structure(browser: httpx.Client, model: dict[str, Any]) -> None:
    page = browser.get(f"/models/{model['id']}").text
    structure = page.partition("<h2>Structure</h2>")[2].partition("</ol>")[0]
    for words in ("<b>input</b> batch×8", "Gemm → Relu → Gemm", "<b>logits</b> batch×4"):
        assert words in structure, structure


def test_what_is_not_there_is_a_page_too(browser: httpx.Client) -> None:
    for path in ("/jobs/job_0", "/jobs/nothing", "/models/mdl_0", "/datasets/x", "/compare?job=job_0"):
        page = browser.get(path)
        assert page.status_code == 404, path
        assert "<h1>Not found</h1>" in page.text
    nowhere = browser.get("/job")
    assert nowhere.status_code == 404
    assert "There is nothing at this path." in nowhere.text
    assert nowhere.headers["content-type"].startswith("text/html")
    assert_problem(browser.get("/job", headers={"Accept": "*/*"}), 404, "not_found")
    assert_problem(browser.get("/v1/nothing"), 404, "not_found")
    assert browser.patch("/login", headers={"Accept": "*/*"}).headers["allow"] == "GET, POST"
    assert browser.get("/jobs?status=odd").status_code == 422
    assert browser.get("/jobs?cursor=!!").status_code == 422


def test_a_list_of_many_jobs_reads_one_page_of_them(browser: httpx.Client, services: Services) -> None:
    fill(services.db.engine, 10_000)
    statements: list[str] = []
    event.listen(services.db.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    for query in ("", "?status=failed"):
        asked = []
        for _ in range(5):  # what the service asks by itself now and then comes between
            statements.clear()
            page = browser.get(f"/jobs{query}")
            asked.append(len([s for s in statements if s.startswith("SELECT")]))
            if asked[-1] <= 2:
                break
        assert page.text.count('name="job"') == 50
        assert min(asked) <= 2, "one for the jobs, one for their engines"
        assert all("stages" not in s.partition("FROM")[0] for s in statements), "no large column"
        seen = set(re.findall(r'value="(job_\w+)"', page.text))
        found = re.search(r'rel="next" href="([^"]+)"', page.text)
        assert found
        older = browser.get(found[1].replace("&amp;", "&"))
        assert older.text.count('name="job"') == 50
        assert not seen & set(re.findall(r'value="(job_\w+)"', older.text))


def _claim(services: Services, job_id: str) -> None:
    with services.db.write() as uow:
        job = uow.session.get_one(Job, job_id)
        values = {"claimed_at": job.created_at, "started_at": job.created_at, "progress": 0.25}
        JobRepository(uow.session).apply(job_id, Trigger.CLAIM, source=JobStatus.QUEUED, values=values)


def test_a_job_s_page_is_live_until_its_end(browser: httpx.Client, worker: Services, job: dict[str, Any]) -> None:
    _claim(worker, job["id"])
    fast = {"candidate": "a", "name": "static int8", "backend": "b", "precision": "int8", "standing": "screened",
            "speedup": {"ratio": 2.5, "low": 2.4, "high": 2.6}, "loss_percent": 0.1, "reason": None}  # fmt: skip
    page = browser.get(f"/jobs/{job['id']}").text
    assert f'sse-connect="/jobs/{job["id"]}/live"' in page
    assert "Time left of the budget of 15 min" in page
    events: list[str] = []
    with browser.stream("GET", f"/jobs/{job['id']}/live") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        body = ""
        for chunk in stream.iter_text():
            body += chunk
            if body.count("event: job") == 1 and len(events) == 0:
                events.append("told")
                with worker.db.write() as uow:
                    news = {"candidates": [fast], "leader": "a"}
                    JobRepository(uow.session).update(job["id"], [], {}, "candidates", news)
            if "leads with 2.5x" in body and len(events) == 1:
                events.append("ended")
                with worker.db.write() as uow:
                    JobRepository(uow.session).apply(job["id"], Trigger.CANCEL, source=JobStatus.RUNNING)
    assert events == ["told", "ended"]
    assert "static int8" in body
    assert body.rstrip().endswith("event: end\ndata:"), "the browser is told not to come again"
    assert 'hx-get="/jobs/' in body.rpartition("event: job")[2], "and fetches what came out"
    assert "sse-connect" not in browser.get(f"/jobs/{job['id']}").text


def test_a_stream_of_one_that_has_ended_says_so_at_once(browser: httpx.Client, job: dict[str, Any]) -> None:
    browser.post(f"/v1/jobs/{job['id']}/cancel")
    body = browser.get(f"/jobs/{job['id']}/live").text
    assert "event: job" in body
    assert "event: end" in body
    assert browser.get("/jobs/job_0/live").status_code == 404


def test_the_local_tenant_needs_no_session(browser: httpx.Client, services: Services, job: dict[str, Any]) -> None:
    page = browser.get("/jobs").text
    assert "Sign out" not in page
    assert "/keys" not in page
    assert services.jobs.get(LOCAL_TENANT, job["id"]).id == job["id"]
