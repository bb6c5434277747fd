"""Spans by OpenTelemetry's SDK, sent by OTLP over HTTP. Imported only where they are asked for.

A thread of the SDK's sends them in batches. What the receiver does not take in time is dropped, and nobody who records
a span ever waits for it.
"""

from __future__ import annotations

import threading

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.operations.tracing import NO_ATTRIBUTES, Attributes, Kind, Span, Tracing

_KINDS = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}
_SEND_S = 5  # one request to the receiver
_EVERY_MS = 2000
_KEPT = 2048  # spans that wait to be sent; further ones are dropped
_LAST_S = 2.0  # at the end, for what is left


class _Recorded(Span):
    def __init__(self, span: OtelSpan) -> None:
        context = span.get_span_context()
        super().__init__(f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}")
        self._span = span

    def end(
        self, attributes: Attributes = NO_ATTRIBUTES, *, name: str | None = None, failed: str | None = None
    ) -> None:
        self._span.set_attributes(dict(attributes))
        if name is not None:
            self._span.update_name(name)
        if failed is not None:
            self._span.set_status(StatusCode.ERROR, failed)
        self._span.end()


class OtelTracing(Tracing):
    """`endpoint`: of the receiver, without `/v1/traces`. What is sampled, and with which headers it is sent, say the
    variables of OpenTelemetry (`OTEL_TRACES_SAMPLER`, `OTEL_EXPORTER_OTLP_HEADERS`, …)."""

    def __init__(self, endpoint: str, service: str, instance: str) -> None:
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        # Not at the interpreter's exit: it would wait there for a receiver that is away.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_SEND_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=_KEPT, schedule_delay_millis=_EVERY_MS)
        )
        self._tracer = self._provider.get_tracer("anneal")
        self._parents = TraceContextTextMapPropagator()

    def start(
        self, name: str, *, parent: str | None = None, kind: Kind = "internal", attributes: Attributes = NO_ATTRIBUTES
    ) -> Span:
        context = self._parents.extract({} if parent is None else {"traceparent": parent})
        span = self._tracer.start_span(name, context=context, kind=_KINDS[kind], attributes=dict(attributes))
        return _Recorded(span)

    def close(self) -> None:
        last = threading.Thread(target=self._provider.shutdown, name="spans-last", daemon=True)
        last.start()
        last.join(_LAST_S)
