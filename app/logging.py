"""Structured logs: JSON lines in production, readable lines in a terminal, both on stderr.

The standard library's loggers (uvicorn, Celery, SQLAlchemy, boto3) go through the same processors, so every line has
the same shape, carries the correlation id of the request or job it belongs to, and has no secret in it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import IO, Any
from uuid import uuid4

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_REDACTED = "[redacted]"
_CORRELATION_KEY = "correlation_id"
_CORRELATION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_SECRET_KEYS = (
    "password",
    "passwd",
    "secret",
    "authorization",
    "cookie",
    "apikey",
    "privatekey",
    "credential",
    "signature",
)
# A lease's fencing token is a counter, and a tokenizer's tokens are text.
_SECRET_TOKEN = re.compile(r"^(.*(access|auth|api|bearer|session|refresh|csrf|id))?token$")
_SECRETS_IN_TEXT = (
    # Authorization: Bearer …, Basic …, and the same as a dumped header
    (re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE), rf"\1 {_REDACTED}"),
    # scheme://user:password@host
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/?#@]*):[^\s/?#@]+@", re.IGNORECASE), rf"\1:{_REDACTED}@"),
    # keys of this service
    (re.compile(r"\bank_[A-Za-z0-9_-]{16,}"), f"ank_{_REDACTED}"),
    # presigned URLs
    (re.compile(r"\b(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+", re.IGNORECASE), rf"\1{_REDACTED}"),
)
_MAX_DEPTH = 6

# They bring handlers of their own, which would print every line twice and in another shape.
_FOREIGN = (
    "uvicorn",
    "uvicorn.error",
    "uvicorn.access",
    "celery",
    "celery.task",
    "celery.redirected",
)
# Below warning they tell every connection, retry, header and statement.
_CHATTY = (
    "boto3",
    "botocore",
    "s3transfer",
    "urllib3",
    "httpx",
    "httpcore",
    "kombu",
    "amqp",
    "asyncio",
    "sqlalchemy",
    "alembic",
)


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what `sys.stderr` is now, not to what it was at start: Celery and test runners replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> IO[str]:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:  # noqa: ARG002  # what logging.StreamHandler has
        raise AttributeError("the stream is always sys.stderr")


def configure_logging(json: bool, level: str) -> None:
    """Set up structlog and the root logger; replaces what was set up before. `ValueError` for an unknown `level`."""
    threshold = logging.getLevelNamesMapping().get(level.upper())
    if threshold is None:
        raise ValueError(f"unknown log level {level!r}; use DEBUG, INFO, WARNING, ERROR or CRITICAL")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.StackInfoRenderer(),
        # Before the redaction: a traceback may quote a URL with a password.
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
        redact,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: Processor
    if json:
        renderer = structlog.processors.JSONRenderer(default=str)
    else:
        colors = sys.stderr.isatty()
        renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
    handler = _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _without_twins, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(threshold)
    for name in _FOREIGN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        # Its own level would hide lines that were asked for, or show lines that were not.
        logger.setLevel(logging.NOTSET)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))


def _without_twins(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """uvicorn tells its messages twice, once with a terminal's escape codes."""
    event.pop("color_message", None)
    return event


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor: takes secrets out by the names of fields, and by their looks out of text."""
    return {key: _clean(key, value, _MAX_DEPTH) for key, value in event.items()}


def _clean(key: object, value: Any, depth: int) -> Any:
    if value is not None and _is_secret(key):
        return _REDACTED
    if isinstance(value, str):
        return _clean_text(value)
    if depth == 0:
        # What nests deeper is not worth following; as text it is still cleaned.
        return _clean_text(repr(value)) if isinstance(value, Mapping | list | tuple) else value
    if isinstance(value, Mapping):
        return {k: _clean(k, v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        # A header as a pair of name and value, as ASGI servers have them.
        if len(value) == 2 and isinstance(value[0], str | bytes) and _is_secret(value[0]):
            return [value[0], _REDACTED]
        return [_clean(None, item, depth - 1) for item in value]
    if isinstance(value, BaseException):
        return _clean_text(f"{type(value).__name__}: {value}")
    return value


def _is_secret(key: object) -> bool:
    if isinstance(key, bytes):
        key = key.decode("latin-1")
    if not isinstance(key, str):
        return False
    plain = key.lower().replace("_", "").replace("-", "")
    return any(word in plain for word in _SECRET_KEYS) or _SECRET_TOKEN.fullmatch(plain) is not None


def _clean_text(text: str) -> str:
    for pattern, replacement in _SECRETS_IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def new_correlation_id() -> str:
    """A fresh id, not yet bound."""
    return uuid4().hex


def bind_correlation_id(value: str | None) -> str:
    """Make `value` the correlation id of this context (request, task) and of what it logs, and return it. A client's
    value that is missing or unfit for a log line or a header is replaced by a new one."""
    accepted = value if value is not None and _CORRELATION_ID.fullmatch(value) else new_correlation_id()
    structlog.contextvars.bind_contextvars(**{_CORRELATION_KEY: accepted})
    return accepted


def correlation_id() -> str | None:
    """The correlation id of this context, or None outside of any."""
    value = structlog.contextvars.get_contextvars().get(_CORRELATION_KEY)
    return value if isinstance(value, str) else None
