"""Logs: one shape for every logger, the correlation id in every line, no secret in any."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from app.logging import bind_correlation_id, configure_logging, correlation_id, new_correlation_id, redact


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=True, level="info")
    bind_correlation_id("req-1")
    structlog.get_logger("anneal.jobs").info("job submitted", job_id="job_1", sizes=(1, 2))
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "job submitted",
        "level": "info",
        "logger": "anneal.jobs",
        "correlation_id": "req-1",
        "job_id": "job_1",
        "sizes": [1, 2],
    }


@pytest.mark.parametrize("name", ["uvicorn.error", "uvicorn.access", "celery.task", "sqlalchemy.engine", "other"])
def test_loggers_of_libraries_have_the_same_shape(capsys: pytest.CaptureFixture[str], name: str) -> None:
    own = logging.StreamHandler(sys.stderr)
    logging.getLogger(name.partition(".")[0]).addHandler(own)
    configure_logging(json=True, level="INFO")
    bind_correlation_id("task-1")
    logging.getLogger(name).warning("%s of %d", "part", 3, extra={"path": "/v1"})
    logging.getLogger(name).debug("not this")
    if name == "other":
        logging.getLogger(name).removeHandler(own)
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert len(found) == 1
    line = json.loads(found[0])
    assert (line["event"], line["logger"], line["level"]) == ("part of 3", name, "warning")
    assert (line["correlation_id"], line["path"]) == ("task-1", "/v1")


def test_what_uvicorn_says_twice_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=True, level="INFO")
    logging.getLogger("uvicorn.error").info("running on %s", "here", extra={"color_message": "\x1b[1mrunning\x1b[0m"})
    (line,) = lines(capsys)
    assert line["event"] == "running on here"
    assert "color_message" not in line


def test_exceptions_are_one_line_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=True, level="INFO")
    for logger in (structlog.get_logger("a"), logging.getLogger("b")):
        try:
            raise ValueError("cannot reach postgresql://anneal:hunter2@db/x")
        except ValueError:
            logger.exception("failed")
    for line in lines(capsys):
        assert "ValueError: cannot reach postgresql://anneal:[redacted]@db/x" in line["exception"]
        assert "hunter2" not in json.dumps(line)
        assert line["level"] == "error"


def test_a_terminal_gets_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=False, level="INFO")
    structlog.get_logger("x").info("hello", job_id="job_1", authorization="Bearer abcdefgh")
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logging.getLogger("uvicorn.error").exception("oops")
    text = capsys.readouterr().err
    assert "hello" in text
    assert "job_id=job_1" in text
    assert "abcdefgh" not in text
    assert "RuntimeError: boom" in text


def test_configured_twice_is_configured_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=True, level="INFO")
    configure_logging(json=True, level="WARNING")
    structlog.get_logger("x").info("too low")
    structlog.get_logger("x").warning("once")
    assert [line["event"] for line in lines(capsys)] == ["once"]
    with pytest.raises(ValueError, match="unknown log level"):
        configure_logging(json=True, level="loud")


def test_what_json_does_not_know_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=True, level="INFO")
    structlog.get_logger("x").info("odd", thing={1}, raw=b"\xff", error=KeyError("k"))
    (line,) = lines(capsys)
    assert line["thing"] == "{1}"
    assert line["error"] == "KeyError: 'k'"


@pytest.mark.parametrize(
    ("key", "hidden"),
    [
        ("Authorization", True),
        ("proxy-authorization", True),
        ("password", True),
        ("s3_secret_access_key", True),
        ("api_key", True),
        ("X-Api-Key", True),
        ("token", True),
        ("access_token", True),
        ("Set-Cookie", True),
        ("webhook_signature", True),
        ("fencing_token", False),
        ("tokens", False),
        ("key", False),
        ("stage_key", False),
        ("correlation_id", False),
    ],
)
def test_secrets_by_name(key: str, hidden: bool) -> None:
    value = redact(None, "info", {"outer": {"list": [{key: "s3cr3t"}]}, key: "s3cr3t"})
    assert ("s3cr3t" not in repr(value)) is hidden
    assert redact(None, "info", {key: None}) == {key: None}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [redacted]"),
        ("redis://:pa55@host:1/0 and s3://bucket/k", "redis://:[redacted]@host:1/0 and s3://bucket/k"),
        (
            "GET /b/k?X-Amz-Credential=AK&X-Amz-Signature=ff00&x=1",
            "GET /b/k?X-Amz-Credential=[redacted]&X-Amz-Signature=[redacted]&x=1",
        ),
        ("http://localhost:8000/v1/jobs", "http://localhost:8000/v1/jobs"),
        ("basic usage of it", "basic usage of it"),
    ],
)
def test_secrets_in_text(text: str, clean: str) -> None:
    assert redact(None, "info", {"event": text, "more": [text]}) == {"event": clean, "more": [clean]}


def test_headers_as_pairs() -> None:
    event = {"headers": [(b"authorization", b"Bearer abcdefgh"), ("host", "x")]}
    assert redact(None, "info", event) == {"headers": [[b"authorization", "[redacted]"], ["host", "x"]]}


def test_a_loop_in_the_data_ends() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    assert "again" in redact(None, "info", {"loop": loop})["loop"]


def test_correlation_ids_from_clients() -> None:
    assert correlation_id() is None
    assert bind_correlation_id("abc-1.2:3_4") == "abc-1.2:3_4" == correlation_id()
    for bad in (None, "", "a b", "a\nb", "x" * 129, "ä", "a\n"):
        made = bind_correlation_id(bad)
        assert made not in (bad, "abc-1.2:3_4")
        assert made == correlation_id()
    assert new_correlation_id() != new_correlation_id()


def test_correlation_ids_of_tasks_do_not_mix() -> None:
    async def request(value: str) -> str | None:
        bind_correlation_id(value)
        await asyncio.sleep(0.001)
        return await asyncio.to_thread(correlation_id)

    async def both() -> list[str | None]:
        return list(await asyncio.gather(request("a"), request("b")))

    assert asyncio.run(both()) == ["a", "b"]
    assert correlation_id() is None


def test_importing_it_configures_nothing() -> None:
    code = "import logging, app.logging; assert not logging.getLogger().handlers"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
