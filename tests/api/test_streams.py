"""Event streams and long polls: many on one job are cheap, and a revoked key ends them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import anyio.to_thread
import httpx
import pytest
from sqlalchemy import event

from app.db.orm import LOCAL_TENANT
from app.http.services import Services
from app.http.threads import SharedReads
from app.jobs.repository import JobRepository
from app.main import create_app
from app.settings import LimitSettings, Settings
from app.tenants import create_key, revoke_key
from tests.api.conftest import assert_problem, report_worker, serving

CROWD = 150


def note(services: Services, job_id: str, text: str) -> None:
    with services.db.write() as uow:
        JobRepository(uow.session).update(job_id, [], {}, "note", {"message": text})


def open_stream(base_url: str, path: str, headers: str = "") -> socket.socket:
    host, _, port = base_url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
    return connection


def read_until(connection: socket.socket, text: bytes) -> bytes:
    found = b""
    while text not in found:
        chunk = connection.recv(65536)
        assert chunk, found
        found += chunk
    return found


def test_a_crowd_on_one_job_reads_once(
    base_url: str, client: httpx.Client, services: Services, job: dict[str, Any]
) -> None:
    path = job["links"]["self"]
    with ExitStack() as stack:
        streams = [stack.enter_context(open_stream(base_url, f"{path}/events")) for _ in range(CROWD)]
        for stream in streams:
            read_until(stream, b'"queued"')
        polls = [stack.enter_context(open_stream(base_url, f"{path}?wait=30")) for _ in range(CROWD)]
        deadline = time.monotonic() + 60
        while services.waiting._taken[LOCAL_TENANT] < 2 * CROWD:  # on a busy machine that takes a while
            assert time.monotonic() < deadline
            time.sleep(0.05)
        statements: list[str] = []
        event.listen(services.db.engine, "before_cursor_execute", lambda *a: statements.append(a[2]))
        note(services, job["id"], "now")
        started = time.monotonic()
        answered = client.get("/v1/models")
        assert answered.status_code == 200
        for stream in streams:
            read_until(stream, b'"now"')
        for poll in polls:
            assert read_until(poll, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert time.monotonic() - started < 15
        assert len([s for s in statements if "job_events" in s and s.startswith("SELECT")]) < 10
        assert len([s for s in statements if s.startswith("SELECT") and "jobs.spec" in s]) < 20
    client.post(job["links"]["cancel"])


@pytest.fixture
def few(settings: Settings) -> Iterator[tuple[str, Services]]:
    limits = LimitSettings(waiting_per_tenant=3)
    changed = settings.model_copy(update={"require_keys": True, "limits": limits})
    app = create_app(changed, dispatch=lambda job: True)
    with serving(app) as url:
        report_worker(app.state.services)
        yield url, app.state.services


def submit(url: str, services: Services, tenant: str, model_bytes: bytes) -> tuple[str, str]:
    key = create_key(services.db, tenant, "test")
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) as client:
        model = client.post("/v1/models?filename=m.onnx", content=model_bytes).json()
        return key, client.post("/v1/jobs", json={"model_id": model["id"]}).json()["links"]["self"]


def test_streams_are_limited_by_tenant(few: tuple[str, Services], model_bytes: bytes) -> None:
    url, services = few
    (mine, my_path), (theirs, their_path) = (submit(url, services, name, model_bytes) for name in ("a", "b"))
    with ExitStack() as stack:
        for _ in range(3):
            stream = open_stream(url, f"{my_path}/events", f"Authorization: Bearer {mine}\r\n")
            read_until(stack.enter_context(stream), b"queued")
        headers = {"Authorization": f"Bearer {mine}"}
        problem = assert_problem(httpx.get(f"{url}{my_path}/events", headers=headers), 429, "too_many_streams")
        assert problem["retryable"]
        started = time.monotonic()
        assert httpx.get(f"{url}{my_path}?wait=20", headers=headers, timeout=30).status_code == 200
        assert time.monotonic() - started < 5, "a long poll is answered at once"
        with open_stream(url, f"{their_path}/events", f"Authorization: Bearer {theirs}\r\n") as other:
            read_until(other, b"queued")
    deadline = time.monotonic() + 60
    while services.waiting.full("a") and time.monotonic() < deadline:
        time.sleep(0.05)
    with open_stream(url, f"{my_path}/events", f"Authorization: Bearer {mine}\r\n") as stream:
        read_until(stream, b"queued")


def test_a_revoked_key_ends_what_waits(few: tuple[str, Services], model_bytes: bytes) -> None:
    url, services = few
    key, path = submit(url, services, "a", model_bytes)
    headers = {"Authorization": f"Bearer {key}"}
    with ThreadPoolExecutor(1) as threads, open_stream(url, f"{path}/events", f"Authorization: Bearer {key}\r\n") as s:
        read_until(s, b"queued")
        poll = threads.submit(httpx.get, f"{url}{path}?wait=30", headers=headers, timeout=40)
        time.sleep(0.3)
        assert revoke_key(services.db, key)
        started = time.monotonic()
        read_until(s, b"0\r\n\r\n")  # the end of the stream
        assert time.monotonic() - started < 10
        time.sleep(2)
        note(services, path.rpartition("/")[2], "secret")
        assert poll.result().status_code == 401


def test_the_key_comes_before_the_body(few: tuple[str, Services]) -> None:
    url, _ = few
    for content in (b"{", b"[" * 200_000, b'{"model_id": 1}', b" " * (2 << 20)):
        response = httpx.post(f"{url}/v1/jobs", content=content, headers={"Content-Type": "application/json"})
        assert_problem(response, 401, "unauthorized")
    for method, path in (("POST", "/v1/models"), ("PUT", "/v1/uploads/upl_0/parts/1"), ("POST", "/v1/uploads")):
        assert_problem(httpx.request(method, url + path, content=b"{"), 401, "unauthorized")


def test_a_crowd_that_waits_takes_no_thread_that_answers_short_requests() -> None:
    """Two hundred jobs change at once: that many reads, each as slow as a busy database makes it."""

    async def crowd() -> float:
        reads = SharedReads(threads=4)
        waiting = [asyncio.ensure_future(reads.read(number, time.sleep, 0.05)) for number in range(200)]
        await asyncio.sleep(0.01)
        began = time.monotonic()
        for _ in range(10):
            await anyio.to_thread.run_sync(time.sleep, 0)
        took = time.monotonic() - began
        assert sum(task.done() for task in waiting) < 200
        for task in waiting:
            task.cancel()
        return took

    assert asyncio.run(crowd()) < 1.5, "they would wait for the last of them: for 2.5 s"
