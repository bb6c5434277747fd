"""Spans by OpenTelemetry's own SDK, as a receiver gets them; and where there is none."""

from __future__ import annotations

import subprocess
import sys
import time

from app.operations.otel import OtelTracing
from app.operations.tracing import make_tracing
from app.settings import Settings, TracingSettings
from tests.factories.otlp import receiving
from tests.servers import free_port

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_spans_arrive_as_they_were_told() -> None:
    with receiving() as receiver:
        settings = Settings(tracing=TracingSettings(exporter_otlp_endpoint=f"{receiver.url}/"))
        tracing = make_tracing(settings, "anneal-worker", "w1")
        attributes = {"anneal.cached": True, "anneal.tries": 2, "anneal.waited_seconds": 1.5}
        job = tracing.start("job", parent=f"00-{TRACE}-{PARENT}-01", kind="consumer", attributes={"anneal.job.id": "j"})
        stage = tracing.start("stage build", parent=job.traceparent, attributes=attributes)
        stage.end({"anneal.outcome": "failed"}, failed="bad_model")
        job.end(name="a better name")
        tracing.start("of its own").end()
        tracing.close()
    assert [path for path, _ in receiver.requests] == ["/v1/traces"]
    stage_found, job_found, own = receiver.spans
    assert (job_found["trace_id"], job_found["parent_id"], job_found["name"]) == (TRACE, PARENT, "a better name")
    assert job_found["kind"] == 5, "consumer"
    assert job_found["resource"]["service.name"] == "anneal-worker"
    assert job_found["resource"]["service.instance.id"] == "w1"
    assert (stage_found["trace_id"], stage_found["parent_id"]) == (TRACE, job_found["span_id"])
    assert stage_found["attributes"] == {**attributes, "anneal.outcome": "failed"}
    assert stage_found["status"] == (2, "bad_model")
    assert (own["parent_id"], own["trace_id"] == TRACE) == ("", False)


def test_what_a_caller_does_not_sample_is_handed_on_and_not_sent() -> None:
    with receiving() as receiver:
        tracing = OtelTracing(receiver.url, "anneal-api", "1")
        span = tracing.start("POST", parent=f"00-{TRACE}-{PARENT}-00")
        assert span.traceparent is not None
        assert span.traceparent.startswith(f"00-{TRACE}-")
        assert span.traceparent.endswith("-00")
        span.end()
        tracing.close()
    assert receiver.spans == []


def test_nobody_waits_for_a_receiver_that_is_away() -> None:
    """Neither who records more spans than are kept, nor the process at its end."""
    code = (
        "import sys; from app.operations.otel import OtelTracing\n"
        "tracing = OtelTracing(sys.argv[1], 'anneal-api', '1')\n"
        "for _ in range(5000): tracing.start('POST').end()\n"
        "tracing.close()"
    )
    command = [sys.executable, "-c", code, f"http://127.0.0.1:{free_port()}"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 30, "it ends"


def test_without_an_endpoint_it_is_not_imported() -> None:
    """By us: the client of Redis imports the rest where it is installed."""
    code = (
        "import sys; from app.operations.tracing import make_tracing; from app.settings import Settings; "
        "make_tracing(Settings(), 'a', 'b'); import app.http.middleware, workers.telemetry.telling; "
        "sys.exit(any(m.startswith(('opentelemetry.exporter', 'app.operations.otel')) for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
