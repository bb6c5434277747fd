"""What a worker tells of itself: counts of its stages and jobs, the port that they are told on, and spans."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import structlog

from app.db.base import utcnow
from app.db.orm import Job
from app.domain.failures import FailureKind, StageFailure
from app.jobs.ledger import Claim, LeaseLost
from app.jobs.logs import log_context
from app.operations import tracing
from app.operations.tracing import (
    NO_ATTRIBUTES,
    NO_TRACING,
    Attributes,
    Kind,
    Span,
    Tracing,
    make_tracing,
    traceparent_of,
)
from app.settings import Settings, TracingSettings, WorkerSettings
from app.sharing.service import HelpHold
from tests.servers import free_port
from workers.pipeline.isolated import Interrupted
from workers.telemetry import exposition as exposition_module
from workers.telemetry.exposition import Exposition
from workers.telemetry.telling import Telemetry
from workers.telemetry.watch import StageSeen

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Recorded(Tracing):
    """Keeps what it is told; a span's traceparent is its name."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []

    def start(
        self, name: str, *, parent: str | None = None, kind: Kind = "internal", attributes: Attributes = NO_ATTRIBUTES
    ) -> Span:
        told: dict[str, Any] = {"name": name, "parent": parent, "kind": kind, **attributes}
        self.spans.append(told)

        class Kept(Span):
            def end(
                self, attributes: Attributes = NO_ATTRIBUTES, *, name: str | None = None, failed: str | None = None
            ) -> None:
                told.update(attributes, ended=True, failed=failed)

        return Kept(name)


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    found = Telemetry(Settings(), "worker-1", {})
    found.tracing = Recorded()
    yield found
    found.close()


def value(telemetry: Telemetry, name: str, **labels: str) -> float:
    return telemetry.metrics.registry.get_sample_value(name, labels) or 0.0


def job() -> Job:
    return Job(
        id="job_1",
        tenant_id="tnt_1",
        queue="anneal.cpu",
        traceparent=CALLER,
        correlation_id="req-1",
        created_at=utcnow() - timedelta(seconds=40),
    )


def claim(token: int = 1) -> Claim:
    return Claim("job_1", "tnt_1", token, "worker-1", 1, utcnow(), 0.0)


def failing(code: str) -> StageFailure:
    return StageFailure(code, "It failed.", FailureKind.MODEL)


def test_stages_are_counted_by_how_they_ended(telemetry: Telemetry) -> None:
    with telemetry.stage(StageSeen("build", "openvino")):
        pass
    seen = StageSeen("build", "openvino", seconds=3.0, waited=2.0, tries=3)
    with telemetry.stage(seen):
        telemetry.waiting()
        assert value(telemetry, "anneal_machine_waiting") == 1
        with telemetry.held(alone=False):
            assert value(telemetry, "anneal_machine_waiting") == 0
    with telemetry.stage(StageSeen("export", cached=True)):
        pass
    with pytest.raises(StageFailure), telemetry.stage(StageSeen("export", cached=True)):
        raise failing("bad_model")

    def interrupted() -> None:
        with telemetry.stage(StageSeen("benchmark", tries=1)):
            telemetry.waiting()
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert value(telemetry, "anneal_stage_seconds_count", stage="build", backend="openvino") == 2
    assert value(telemetry, "anneal_stage_seconds_sum", stage="build", backend="openvino") == 3
    assert value(telemetry, "anneal_stage_cache_misses_total", stage="build") == 2
    assert value(telemetry, "anneal_stage_cache_hits_total", stage="export") == 2
    assert value(telemetry, "anneal_stage_cache_misses_total", stage="export") == 0
    assert value(telemetry, "anneal_stage_failures_total", stage="export", code="bad_model") == 1
    assert value(telemetry, "anneal_stage_retries_total", stage="build") == 2
    assert value(telemetry, "anneal_machine_wait_seconds_sum") == 2
    assert value(telemetry, "anneal_machine_waiting") == 0, "whoever was interrupted waits no more"


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        (lambda a: a.judged(30.0, 60.0, shipped=True), "succeeded"),
        (lambda a: a.judged(60.0, 60.0, shipped=False), "failed"),
        (lambda a: a.failed("bad_model"), "failed"),
        (lambda a: a.failed("storage_unavailable", again=True), "retried"),
        (Interrupted(), "shutdown"),
        (LeaseLost("job_1"), "lease_lost"),
        (KeyError("database"), "error"),
    ],
    ids=["shipped", "nothing ships", "failed", "retried", "stopped", "lost", "fault"],
)
def test_attempts_are_counted_by_what_became_of_them(telemetry: Telemetry, ends: Any, outcome: str) -> None:
    def attempt() -> None:
        with telemetry.attempt(job(), claim(), lambda: "shutdown") as told:
            assert structlog.contextvars.get_contextvars()["tenant_id"] == "tnt_1"
            assert value(telemetry, "anneal_worker_busy") == 1
            if isinstance(ends, BaseException):
                raise ends
            ends(told)

    if isinstance(ends, BaseException):
        with pytest.raises(type(ends)):
            attempt()
    else:
        attempt()
    assert "job_id" not in structlog.contextvars.get_contextvars()
    assert value(telemetry, "anneal_worker_busy") == 0
    assert value(telemetry, "anneal_job_attempts_total", queue="anneal.cpu") == 1
    assert value(telemetry, "anneal_job_attempt_seconds_count", queue="anneal.cpu", outcome=outcome) == 1
    assert value(telemetry, "anneal_leases_lost_total") == (outcome == "lease_lost")
    assert 40 <= value(telemetry, "anneal_job_wait_seconds_sum", queue="anneal.cpu") < 60
    assert isinstance(telemetry.tracing, Recorded)
    (span,) = telemetry.tracing.spans
    assert (span["parent"], span["anneal.job.id"], span["anneal.outcome"]) == (CALLER, "job_1", outcome)
    assert (span["failed"] is None) == (outcome in ("succeeded", "shutdown"))


def test_only_the_first_claim_tells_how_long_a_job_waited(telemetry: Telemetry) -> None:
    with telemetry.attempt(job(), claim(token=2), lambda: None) as told:
        told.judged(54.0, 60.0, shipped=True)
    assert value(telemetry, "anneal_job_wait_seconds_count", queue="anneal.cpu") == 0
    assert value(telemetry, "anneal_job_budget_used_ratio_bucket", le="0.9") == 1
    assert value(telemetry, "anneal_job_budget_used_ratio_bucket", le="0.75") == 0


def test_stages_are_spans_of_their_job(telemetry: Telemetry) -> None:
    with telemetry.attempt(job(), claim(), lambda: None) as told:
        with told.stage(StageSeen("export", cached=True)):
            pass
        with pytest.raises(StageFailure), told.stage(StageSeen("build", "openvino", "c1", waited=1.5, tries=2)):
            raise failing("out_of_memory")
        told.failed("out_of_memory")
    assert isinstance(telemetry.tracing, Recorded)
    _, export, build = telemetry.tracing.spans
    assert (export["name"], export["parent"], export["anneal.cached"]) == ("stage export", "job", True)
    assert (export["anneal.backend"], export["anneal.outcome"], export["failed"]) == ("none", "succeeded", None)
    assert (build["anneal.backend"], build["anneal.candidate"], build["anneal.tries"]) == ("openvino", "c1", 2)
    assert (build["anneal.outcome"], build["failed"], build["ended"]) == ("failed", "out_of_memory", True)


def test_help_is_a_span_of_the_job_that_is_helped(telemetry: Telemetry) -> None:
    hold = HelpHold("job_1", "tnt_1", "worker-2", "c" * 64, 1, 1, {"traceparent": CALLER})
    with telemetry.help(hold) as told, told.stage(StageSeen("build", "openvino")):
        pass
    with pytest.raises(LeaseLost), telemetry.help(hold):
        raise LeaseLost("job_1")
    with pytest.raises(StageFailure), telemetry.help(hold):
        raise failing("out_of_memory")
    assert isinstance(telemetry.tracing, Recorded)
    answered, build, lost, failed = telemetry.tracing.spans
    assert (answered["name"], answered["parent"], answered["anneal.job.id"]) == ("help", CALLER, "job_1")
    assert (build["name"], build["parent"]) == ("stage build", "help")
    assert [s["anneal.outcome"] for s in (answered, lost, failed)] == ["answered", "lease_lost", "failed"]
    assert [s["failed"] for s in (answered, lost, failed)] == [None, None, "out_of_memory"]


@pytest.mark.parametrize(
    ("actor", "told"),
    [
        ("key:key_7", {"key_id": "key_7"}),
        ("oidc:auth0|ada:1", {"subject": "auth0|ada:1"}),
        ("local", {}),
        (None, {}),  # of a job that the release before took
    ],
)
def test_lines_about_a_job_say_who_submitted_it(actor: str | None, told: dict[str, str]) -> None:
    ids = {"job_id": "job_1", "tenant_id": "tnt_1"}
    given = Job(id="job_1", tenant_id="tnt_1", correlation_id="req-1", actor=actor)
    assert log_context(given) == {**ids, "correlation_id": "req-1", **told}


def test_chores_are_counted(telemetry: Telemetry) -> None:
    telemetry.swept({"expired": 2, "redispatched": 0})
    telemetry.collected({"blobs": 3}, 0.5)
    telemetry.chore_failed("collector")
    for outcome in ("delivered", "failed", "given_up"):
        telemetry.delivered(outcome)
    assert value(telemetry, "anneal_swept_jobs_total", what="expired") == 2
    assert value(telemetry, "anneal_collected_total", kind="blobs") == 3
    assert value(telemetry, "anneal_collector_seconds_total") == 0.5
    assert value(telemetry, "anneal_chore_failures_total", chore="collector") == 1
    assert value(telemetry, "anneal_webhook_deliveries_total", outcome="given_up") == 1


def read(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_a_worker_answers_on_its_port() -> None:
    port = free_port()
    telemetry = Telemetry(Settings(worker=WorkerSettings(metrics_port=port)), "worker-1", {})
    telemetry.start()
    try:
        telemetry.swept({"expired": 1})
        assert 'anneal_swept_jobs_total{what="expired"} 1.0' in read(port)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            read(port, "/v1/jobs")
        second = Telemetry(Settings(worker=WorkerSettings(metrics_port=port)), "worker-2", {})
        second.start()  # the port is taken: it works on without
        assert second.exposition.port is None
        second.close()
    finally:
        telemetry.close()
    with pytest.raises(OSError):
        read(port)


def test_by_default_a_worker_listens_nowhere() -> None:
    telemetry = Telemetry(Settings(), "worker-1", {})
    telemetry.start()
    assert telemetry.exposition.port is None
    assert telemetry.tracing is NO_TRACING


def test_nothing_is_rendered_anew_while_something_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition_module, "_AT_ONCE_S", 0.0)
    rendered, measuring = [], [True]

    def render() -> bytes:
        rendered.append(1)
        return b"anneal %d\n" % len(rendered)

    exposition = Exposition(render, lambda: measuring[0])
    assert [exposition.told() for _ in range(3)] == [b"anneal 1\n"] * 3
    measuring[0] = False
    assert exposition.told() == b"anneal 2\n"


def test_a_client_that_keeps_silent_holds_up_nobody() -> None:
    import socket

    exposition = Exposition(lambda: b"anneal 1\n", lambda: False)
    exposition.start("127.0.0.1", port := free_port())
    try:
        with socket.create_connection(("127.0.0.1", port)):
            assert read(port) == "anneal 1\n"
    finally:
        exposition.close()


def test_the_device_is_not_asked_while_something_is_measured(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers import devices

    readings = iter([{"memory_used_bytes": 1e9}, {"memory_used_bytes": 2e9, "utilization_ratio": 0.5}])
    monkeypatch.setattr(type(devices.HOST), "reading", lambda self, hardware: next(readings))
    assert value(telemetry, "anneal_device_memory_used_bytes") == 1e9
    with telemetry.held(alone=True):
        assert value(telemetry, "anneal_device_memory_used_bytes") == 1e9
    with telemetry.held(alone=False):
        assert "anneal_device_utilization_ratio 0.5" in telemetry.metrics.render().decode()


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        (CALLER, CALLER),
        (CALLER.replace("00-", "cc-", 1) + "-what-comes-later", CALLER),
        (None, None),
        ("", None),
        (CALLER.upper(), None),
        (CALLER.replace("00-", "ff-", 1), None),
        (CALLER.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), None),
        (CALLER.replace("b7ad6b7169203331", "0" * 16), None),
        (CALLER[:-1], None),
        (CALLER + "0", None),
        (CALLER + "\n", None),
    ],
)
def test_what_counts_as_a_traceparent(sent: str | None, taken: str | None) -> None:
    assert traceparent_of(sent) == taken


def test_without_tracing_a_callers_trace_is_handed_on() -> None:
    assert NO_TRACING.start("job", parent=CALLER).traceparent == CALLER
    assert NO_TRACING.start("job").traceparent is None


def test_tracing_without_its_packages_is_said_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "app.operations.otel", None)
    settings = Settings(tracing=TracingSettings(exporter_otlp_endpoint="http://127.0.0.1:1"))
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(tracing, "log", _Log(told))
    assert make_tracing(settings, "anneal-api", "1") is NO_TRACING
    (line,) = told
    assert "otel" in line["remedy"]


class _Log:
    def __init__(self, told: list[dict[str, Any]]) -> None:
        self._told = told

    def warning(self, _event: str, **fields: Any) -> None:
        self._told.append(fields)


def test_threads_share_the_metrics(telemetry: Telemetry) -> None:
    def count() -> None:
        for _ in range(200):
            with telemetry.stage(StageSeen("export", cached=True)):
                pass

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(telemetry, "anneal_stage_cache_hits_total", stage="export") == 800
