"""What holds up one request must not hold up the others: hostile files, storage that hangs, a crowd that waits."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.errors import AppError
from app.inspection.pool import Inspector
from app.settings import LimitSettings
from tests.factories import onnx_models
from tests.factories.deployment import deployment

GOOD = onnx_models.mlp(features=16).SerializeToString()
FIELDS = b"\x08\x07" * 5_900_000  # fields of a model, just below the limit: seconds of parsing


def slowest(url: str, path: str, until: threading.Event, headers: dict[str, str] | None = None) -> float:
    found = 0.0
    with httpx.Client(base_url=url, timeout=30, headers=headers) as client:
        while not until.is_set():
            started = time.monotonic()
            assert client.get(path).status_code == 200
            found = max(found, time.monotonic() - started)
            time.sleep(0.02)
    return found


def children(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "app.inspection.child" in child.cmdline()]


def test_files_that_take_long_to_look_into(tmp_path: Path) -> None:
    with deployment(tmp_path / "home") as deployed:

        def upload(content: bytes) -> int:
            return httpx.post(f"{deployed.url}/v1/models?filename=m.onnx", content=content, timeout=120).status_code

        assert upload(GOOD) == 201
        done = threading.Event()
        with ThreadPoolExecutor(4) as threads:
            polls = [threads.submit(slowest, deployed.url, path, done) for path in ("/healthz", "/v1/models")]
            try:
                assert list(threads.map(upload, [FIELDS] * 2)) == [422, 422]
            finally:
                done.set()
            assert max(poll.result() for poll in polls) < 1.5
        assert upload(GOOD) == 201
        api = psutil.Process(deployed.processes[0].pid)
        family = children(api)
        assert family
    assert psutil.wait_procs(family, timeout=5)[1] == []


@pytest.fixture
def inspect(tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    inspectors: list[Inspector] = []

    def run(content: bytes, **limits: float) -> dict[str, Any]:
        if not inspectors or limits:
            inspectors.append(Inspector(LimitSettings().model_copy(update=limits), processes=1))
        path = tmp_path / f"{threading.get_ident()}.onnx"
        path.write_bytes(content)
        return inspectors[-1].inspect("t", "model", path, "m.onnx")

    yield run
    for inspector in inspectors:
        inspector.close()


def test_a_file_that_takes_too_much_time_or_memory_is_refused_and_the_next_one_is_not(
    inspect: Callable[..., dict[str, Any]],
) -> None:
    assert inspect(GOOD, inspect_cpu_s=0.1)["format"] == "onnx"
    with pytest.raises(AppError, match="more time or memory") as refused:
        inspect(FIELDS)
    assert (refused.value.status, refused.value.code) == (422, "invalid_model")
    assert inspect(GOOD)["format"] == "onnx"
    names = b"".join(b"\x2a\x68\x42\x66" + b"%0102d" % n for n in range(220_000))  # initializers: of a graph
    length = len(names)
    varint = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14 & 127 | 128, length >> 21])
    large = b"\x08\x07\x3a" + varint + names
    # The same file is looked into where there is memory for it.
    with pytest.raises(AppError, match="no inputs"):
        inspect(large, inspect_memory_mb=1024)
    with pytest.raises(AppError, match="more time or memory"):
        inspect(large, inspect_memory_mb=48)
    assert inspect(GOOD)["format"] == "onnx"


def test_a_killed_process_is_told_as_such_and_replaced(inspect: Callable[..., dict[str, Any]]) -> None:
    assert inspect(GOOD)["format"] == "onnx"
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(inspect, FIELDS)
        (child,) = children(psutil.Process())
        while not [fork for fork in child.children() if fork.cpu_times().user >= 0.5]:
            time.sleep(0.01)
        forks = child.children()
        child.send_signal(signal.SIGKILL)
        with pytest.raises(AppError) as told:
            running.result(timeout=20)
    assert (told.value.status, told.value.retryable) == (503, True)
    assert psutil.wait_procs(forks, timeout=5)[1] == []
    assert inspect(GOOD)["format"] == "onnx"
    (child,) = children(psutil.Process())
    child.kill()  # while nobody asks
    child.wait()
    assert inspect(GOOD)["format"] == "onnx"


@contextlib.contextmanager
def hanging_server() -> Iterator[int]:
    """It takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=500) as listener:
        yield int(listener.getsockname()[1])


def test_storage_that_hangs_takes_only_its_own_threads(tmp_path: Path) -> None:
    with hanging_server() as port:
        extra = {
            "STORAGE_URL": "s3://bucket",
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
        }
        with deployment(tmp_path / "home", extra) as deployed:

            def upload(number: int) -> int:
                body = {"filename": "m.onnx", "size_bytes": 10 + number}
                with contextlib.suppress(httpx.HTTPError):
                    answer = httpx.post(f"{deployed.url}/v1/uploads", json=body, headers=deployed.headers, timeout=13)
                    return answer.status_code
                return 0

            done = threading.Event()
            with ThreadPoolExecutor(62) as threads:
                polls = [
                    threads.submit(slowest, deployed.url, path, done, deployed.headers)
                    for path in ("/v1/models", "/v1/jobs")
                ]
                started = time.monotonic()
                answers = list(threads.map(upload, range(60)))
                done.set()
                assert max(poll.result() for poll in polls) < 1.5
            assert time.monotonic() - started < 40
            assert answers.count(503) > 20, "whoever waits for a thread is told so"
            deployed.processes[0].kill()  # its threads hang on
