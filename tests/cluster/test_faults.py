"""Processes of the cluster that die, hang, or are taken away while callers and jobs go on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.cluster import Managed
from tests.cluster.conftest import Front, away, healthy, live_workers, wait_for
from tests.cluster.topology import COUNTS
from tests.factories.deployment import Deployment, job_row

SLOW: dict[str, Any] = {"benchmark": {"batch_sizes": [1], "min_seconds": 3, "allow_noisy": True}, "budget_seconds": 30}


def holder(front: Front, job_id: str) -> Managed | None:
    """The worker that runs the job now."""
    home = front.cluster.folder / "api0"
    db = Deployment(home, front.cluster.environment, 0).database()
    try:
        row = job_row(db, job_id)
    finally:
        db.close()
    if row.status != "running":
        return None
    return next((worker for worker in front.cluster.workers if worker.name == row.lease_owner), None)


def test_a_killed_worker_loses_no_job(front: Front, tmp_path: Path) -> None:
    with front.client() as client:
        job = front.submit(client, tmp_path, seed=11, **SLOW)
        wait_for(lambda: holder(front, job["id"]))
        worker = holder(front, job["id"])
        assert worker is not None
        starts = worker.starts
        worker.kill()
        ended = client.wait(job["id"])
        assert ended["status"] == "succeeded", ended["error"]
    wait_for(lambda: worker.starts > starts and live_workers(front.cluster) == COUNTS["worker"])


def test_a_worker_that_is_stopped_gives_its_job_to_another(front: Front, tmp_path: Path) -> None:
    with front.client() as client:
        job = front.submit(client, tmp_path, seed=12, **SLOW)
        wait_for(lambda: holder(front, job["id"]))
        worker = holder(front, job["id"])
        assert worker is not None
        with away(worker):
            worker.signal(signal.SIGTERM)
            assert worker.process is not None
            assert worker.process.wait(30) == 0
            ended = client.wait(job["id"])
            assert ended["status"] == "succeeded", ended["error"]
    wait_for(lambda: live_workers(front.cluster) == COUNTS["worker"])


@pytest.mark.parametrize("which", [0, 1])
def test_an_api_process_is_taken_away_and_comes_back(front: Front, which: int) -> None:
    """SIGTERM, as a release does it, one process after the other: what reads notices nothing."""
    api, callers = front.cluster.apis[which], front.callers()
    with callers.at_work():
        callers.wait_for(100)
        with away(api):
            api.signal(signal.SIGTERM)
            assert api.process is not None
            assert api.process.wait(30) == -signal.SIGTERM, "it ended what it had begun, and not by a kill"
            callers.wait_for(200)
        wait_for(lambda: healthy(front.cluster))
        callers.wait_for(50)
    print(f"{len(callers.calls)} calls, of which again: {callers.failures}")
    callers.check(retries=1)
    assert not [call for call in callers.calls if call.what.startswith("GET") and call.failures]


def test_a_hanging_api_process_is_left_out(front: Front) -> None:
    """It takes connections and answers nothing: after some seconds nobody is sent there."""
    api = front.cluster.apis[0]
    with away(api), front.http(timeout=3) as http:
        api.signal(signal.SIGSTOP, whole=True)
        try:

            def served() -> bool:
                return all(http.get("/v1/models").status_code == 200 for _ in range(10))

            wait_for(served, 60)
            assert served()
        finally:
            api.signal(signal.SIGCONT, whole=True)
    wait_for(lambda: healthy(front.cluster))


def test_a_killed_proxy_comes_back_with_its_upstreams(front: Front, tmp_path: Path) -> None:
    proxy = front.cluster.proxy
    assert proxy is not None
    with front.client() as client:
        job = front.submit(client, tmp_path, seed=13)
        with away(proxy):
            proxy.kill()
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{front.cluster.url}/healthz", timeout=5)
        assert client.wait(job["id"])["status"] == "succeeded"


def test_without_any_api_process_the_proxy_says_so(front: Front) -> None:
    first, second = front.cluster.apis
    with away(first), away(second), front.http() as http:
        for api in (first, second):
            api.kill()
        answer = http.get("/v1/jobs")
        assert answer.status_code in (502, 503)
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert (problem["code"], problem["status"]) == ("api_unreachable", answer.status_code)
        assert problem["retryable"]
    wait_for(lambda: healthy(front.cluster))
