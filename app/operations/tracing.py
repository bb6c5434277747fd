"""Spans of requests, jobs and stages: OpenTelemetry's where they are asked for, else nothing, at no cost.

A span's parent is given as text, a `traceparent` (W3C Trace Context): it comes by HTTP, lies in a job's row, and is the
same across processes. Where nothing is recorded it is handed on, so that a caller's trace goes through a part of the
service that records none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import structlog

from app.settings import Settings

log = structlog.get_logger(__name__)

Kind: TypeAlias = Literal["internal", "server", "producer", "consumer"]
Attributes: TypeAlias = Mapping[str, str | int | float | bool]

NO_ATTRIBUTES: Attributes = MappingProxyType({})
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_LENGTH = 55


class Span:
    """One that is not recorded. `traceparent`: what is to be its children's parent."""

    def __init__(self, traceparent: str | None) -> None:
        self.traceparent = traceparent

    def end(
        self, attributes: Attributes = NO_ATTRIBUTES, *, name: str | None = None, failed: str | None = None
    ) -> None:
        """It is over. `name`: a better one than it began with; `failed`: why, where it did not go well."""


class Tracing:
    """Records nothing."""

    def start(
        self,
        name: str,  # noqa: ARG002
        *,
        parent: str | None = None,
        kind: Kind = "internal",  # noqa: ARG002
        attributes: Attributes = NO_ATTRIBUTES,  # noqa: ARG002
    ) -> Span:
        """Begin a span; the caller ends it. `parent`: a traceparent; without one, a trace begins."""
        return Span(parent)

    def close(self) -> None:
        """Send what is left, for a moment at most."""


NO_TRACING = Tracing()


def traceparent_of(value: str | None) -> str | None:
    """What a caller sent, where it is a traceparent; those of later versions count as far as they are known."""
    if value is None or _TRACEPARENT.fullmatch(value) is None:
        return None
    return f"00{value[2:_LENGTH]}"


def make_tracing(settings: Settings, service: str, instance: str) -> Tracing:
    """By the settings; where the extra `otel` is not installed, the log says so and nothing is recorded."""
    if not settings.tracing.exporter_otlp_endpoint:
        return NO_TRACING
    try:
        from app.operations.otel import OtelTracing
    except ImportError as error:
        log.warning("no_tracing", reason=str(error)[:200], remedy="Install the extra `otel`.")
        return NO_TRACING
    return OtelTracing(settings.tracing.exporter_otlp_endpoint, service, instance)
