"""The cluster as it is to be used: a job through the proxy, events as they happen, an API process that dies, what is
watched. The part of `make cluster-test` that `make test-integrations` runs, too."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import httpx

from tests.api.test_pages import HTML, token_in
from tests.cluster.conftest import Front, healthy, requests_of, wait_for
from tests.cluster.topology import COUNTS
from tests.integrations.environments import NoSystemPackage
from tests.integrations.test_prometheus import asked
from tests.unit.test_observability import rules

ENDED = ("succeeded", "failed", "cancelled")


def test_a_job_through_the_proxy(front: Front, tmp_path: Path) -> None:
    """Its events come while it waits and runs, not in one piece at the end; both API processes serve it."""
    before = [requests_of(url) for url in front.cluster.urls]
    with front.client() as client, front.http() as http:
        job = front.submit(client, tmp_path, seed=1)
        with http.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = stream.iter_lines()
            first = next(line for line in lines if line.startswith("data: "))
            assert client.job(job["id"])["status"] not in ENDED, "the first event is there before the last one is made"
            told = [first, *(line for line in lines if line.startswith("data: "))]
        assert json.loads(told[-1].removeprefix("data: "))["status"] == "succeeded"
        polled = http.get(f"/v1/jobs/{job['id']}", params={"wait": 30, "for": "end"}).json()
        assert polled["status"] == "succeeded", polled["error"]
        bundle = client.download_bundle(polled["engine_ids"][0], tmp_path / "bundle.zip")
        assert bundle.stat().st_size > 1000
    after = [requests_of(url) for url in front.cluster.urls]
    assert all(b < a for b, a in zip(before, after, strict=True)), "both have served it"


def test_a_killed_api_process_costs_a_retry_at_most(front: Front) -> None:
    callers = front.callers()
    with callers.at_work():
        callers.wait_for(100)
        front.cluster.apis[0].kill()  # the supervisor starts it again
        callers.wait_for(200)
        wait_for(lambda: healthy(front.cluster))
        callers.wait_for(50)
    print(f"{len(callers.calls)} calls, of which again: {callers.failures}")
    callers.check(retries=1)
    # What only reads is asked again by the proxy, but for an answer that had begun to come: that one is cut off.
    refused = [failure for failure in callers.failures if failure.startswith("GET") and "api_unreachable" in failure]
    assert not refused


def test_prometheus_watches_every_process(front: Front) -> None:
    if front.cluster.prometheus is None:
        raise NoSystemPackage(str(front.cluster.without_prometheus))
    port = httpx.URL(front.cluster.prometheus_url).port or 0
    wanted = {"anneal-api": COUNTS["api"], "anneal-worker": COUNTS["worker"]}

    def up() -> dict[str, int]:
        targets = asked(port, "targets", state="active")["activeTargets"]
        names = [target["labels"]["job"] for target in targets if target["health"] == "up"]
        return {name: names.count(name) for name in names}

    wait_for(lambda: up() == wanted)
    told = [rule for group in asked(port, "rules")["groups"] for rule in group["rules"]]
    assert len(told) == len(rules())
    wait_for(lambda: asked(port, "query", query="anneal:live_workers")["result"])
    told = [rule for group in asked(port, "rules")["groups"] for rule in group["rules"]]
    assert [rule for rule in told if rule["health"] != "ok"] == []


def test_the_proxy_tells_whose_request_it_is(front: Front) -> None:
    """The limit of sign-ins is of the client's address, whatever it says of itself; metrics are not for it."""

    def attempt(http: httpx.Client, token: str) -> int:
        headers = {"X-Forwarded-For": f"203.0.113.{secrets.randbelow(200) + 1}"}
        return http.post("/login", data={"csrf": token, "key": "ank_wrong"}, headers=headers).status_code

    def browser(source: str) -> httpx.Client:
        transport = httpx.HTTPTransport(local_address=source)
        return httpx.Client(base_url=front.cluster.url, headers=HTML, transport=transport, timeout=20)

    with browser("127.0.0.21") as one, browser("127.0.0.22") as other:
        token = token_in(one.get("/login"))
        codes = [attempt(one, token) for _ in range(32)]
        assert set(codes[:30]) == {403}
        assert codes[-1] == 429
        assert attempt(other, token_in(other.get("/login"))) == 403
        assert one.get("/metrics").status_code == 404
