"""API processes that are ended and started anew, one by one, under clients that try nothing twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.capabilities.service import CapabilityService
from app.db.base import make_engine
from app.db.migrate import upgrade
from app.db.uow import Database
from app.sandbox.features import Features
from app.settings import Settings
from tests.api.conftest import BACKENDS, HARDWARE
from tests.factories import onnx_models
from tests.factories.deployment import deployment
from tests.factories.rolling import Load, SharedApi, expect, plain_environment, shared_api

CONTENT = onnx_models.mlp().SerializeToString()
DRAIN_S = 1.0
# Longer than the drain: a long poll that waits for nothing, and a body that is still being sent when it is over.
WAIT_S = 30
SLOW_S = 2.5


@pytest.fixture
def api(tmp_path: Path) -> Iterator[SharedApi]:
    home = tmp_path / "home"
    home.mkdir()
    settings = Settings(home=home)
    upgrade(settings.database)
    _report_worker(settings)
    environment = plain_environment(home, {"ANNEAL_DRAIN_S": str(DRAIN_S)})
    with shared_api(environment, tmp_path) as found:
        yield found


def _report_worker(settings: Settings) -> None:
    """Jobs are taken in and stay queued: nobody runs them."""
    db = Database(make_engine(settings.database))
    CapabilityService(db, settings).report(
        "worker-1",
        hostname="host",
        hardware=HARDWARE,
        backends=BACKENDS,
        formats=["onnx"],
        queues=["anneal.cpu", "anneal.hw.cpu-test"],
        isolation=Features(landlock=4, seccomp=True, namespaces=True).to_json("auto"),
    )
    db.close()


def _upload(client: httpx.Client) -> str:
    answer = expect(client.post("/v1/models?filename=m.onnx", content=CONTENT), 201)
    model_id: str = answer.json()["id"]
    return model_id


def _upload_slowly(client: httpx.Client) -> None:
    def body() -> Iterator[bytes]:
        for begin in range(0, len(CONTENT), len(CONTENT) // 8):
            yield CONTENT[begin : begin + len(CONTENT) // 8]
            time.sleep(SLOW_S / 8)

    headers = {"Content-Length": str(len(CONTENT))}
    expect(client.post("/v1/models?filename=m.onnx", content=body(), headers=headers), 201)


def _load(url: str, jobs: list[str]) -> Load:
    load = Load(url)

    def submit(client: httpx.Client) -> None:
        job = expect(client.post("/v1/jobs", json={"model_id": _upload(client)}), 202).json()
        jobs.append(job["id"])
        assert expect(client.get(job["links"]["self"]), 200).json()["status"] == "queued"

    def wait(client: httpx.Client) -> None:
        if jobs:
            expect(client.get(f"/v1/jobs/{jobs[0]}?wait={WAIT_S}&for=end"), 200)

    def follow(client: httpx.Client) -> None:
        """It ends whole, by itself."""
        if jobs:
            with client.stream("GET", f"/v1/jobs/{jobs[0]}/events") as stream:
                expect(stream, 200)
                told = [line for line in stream.iter_lines() if line.startswith("id:")]
            assert told or load.over

    def look(client: httpx.Client) -> None:
        expect(client.get("/v1/jobs?limit=5"), 200)

    load.keep_doing("look", look)
    load.keep_doing("submit", submit)
    load.keep_doing("upload slowly", _upload_slowly)
    load.keep_doing("wait", wait, pause_s=0.1)
    load.keep_doing("follow", follow, pause_s=0.1)
    return load


def test_processes_that_share_a_socket_are_restarted_one_by_one(api: SharedApi) -> None:
    first, _ = api.start(), api.start()
    jobs = list[str]()
    load = _load(api.url, jobs)
    try:
        api.end(first)
        api.start()
        # All of them: what comes meanwhile waits in the socket, which whoever starts them keeps.
        before = load.done.copy()
        for process in [*api.processes]:
            api.end(process)
        api.start()
        deadline = time.monotonic() + 60
        while any(load.done[name] == before[name] for name in ("look", "submit", "upload slowly")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        load.stop()
        for job_id in jobs[:1]:  # whoever waits is answered
            httpx.post(f"{api.url}/v1/jobs/{job_id}/cancel", timeout=60)
        load.end()
    assert not load.problems
    assert min(load.done[name] for name in ("look", "submit", "upload slowly", "wait", "follow")) > 1, load.done
    with httpx.Client(base_url=api.url) as client:
        assert len(set(jobs)) == len(jobs)
        for job_id in jobs:
            assert client.get(f"/v1/jobs/{job_id}").status_code == 200


def test_behind_a_proxy_a_process_says_that_it_ends_and_serves_until_then(tmp_path: Path) -> None:
    with deployment(tmp_path / "home", {"ANNEAL_DRAIN_S": "60"}) as deployed:
        process = deployed.processes[-1]
        kept = httpx.Client(base_url=deployed.url)
        assert kept.get("/v1/jobs").headers.get("connection") != "close"
        process.send_signal(signal.SIGTERM)
        deployed.wait_for(lambda: httpx.get(f"{deployed.url}/readyz").status_code == 503)
        body: dict[str, Any] = httpx.get(f"{deployed.url}/readyz").json()
        assert "process" in body["missing"]
        assert not body["ready"]
        assert httpx.get(f"{deployed.url}/healthz").status_code == 200
        answer = kept.get("/v1/jobs")
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        kept.close()
        process.send_signal(signal.SIGINT)  # it need not serve on
        process.wait(30)
