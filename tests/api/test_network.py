"""What only shows on a real connection: bodies that end early, a full disk, many uploads at once, memory."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.http.services import Services
from app.scratch import remove_stale
from app.settings import Settings
from tests.api.conftest import assert_problem, files_in
from tests.factories import onnx_models

ROOT = Path(__file__).resolve().parents[2]


def connect(base_url: str) -> socket.socket:
    host, _, port = base_url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(connection: socket.socket) -> str:
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks).decode()


def eventually(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("path", ["/v1/models?filename=a.onnx", "part", "form", "chunked"])
def test_body_cut_off_half_way(base_url: str, settings: Settings, path: str, model_bytes: bytes) -> None:
    with httpx.Client(base_url=base_url) as client:
        upload = client.post("/v1/uploads", json={"filename": "a.onnx", "size_bytes": 20 << 20}).json()
        target, method, extra = path, "POST", "Content-Length: 20971520\r\n"
        if path == "part":
            target, method = upload["part_urls"][0], "PUT"
        if path in ("form", "chunked"):
            target = "/v1/models?filename=a.onnx"
        if path == "form":
            extra += "Content-Type: multipart/form-data; boundary=b\r\n"
        if path == "chunked":
            extra = "Transfer-Encoding: chunked\r\n"
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{extra}\r\n".encode()
        part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.onnx"\r\n\r\n'
        body = {"form": part, "chunked": b"2000000\r\n"}.get(path, b"") + bytes(12 << 20)
        with connect(base_url) as connection:
            connection.sendall(head + body)
            eventually(lambda: files_in(settings.temp_dir))
        eventually(lambda: not files_in(settings.temp_dir))
        blobs = [file for file in files_in(settings.home_dir / "blobs") if file.name != "key"]
        assert blobs == []
        assert client.get("/v1/models").json()["items"] == []
        assert client.get(upload["links"]["self"]).json()["received_parts"] == []
        assert client.post("/v1/models?filename=a.onnx", content=model_bytes).status_code == 201


def test_declared_too_large_is_answered_at_once(base_url: str) -> None:
    for path in ("/v1/models", "/v1/jobs"):
        with connect(base_url) as connection:
            head = (
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 99999999999\r\n\r\n"
            )
            connection.sendall(head.encode() + b"x" * 1000)
            answer = read_all(connection)
        assert answer.startswith("HTTP/1.1 413")
        assert '"code": "too_large"' in answer


def test_a_killed_process_leaves_nothing_for_long(settings: Settings) -> None:
    settings.temp_dir.mkdir()
    old, new, other = (settings.temp_dir / name for name in ("incoming-old", "incoming-new", "other"))
    for path in (old, new, other):
        path.write_bytes(b"x")
        if path != new:
            os.utime(path, (1, 1))
    folder = settings.temp_dir / "incoming-folder"
    folder.mkdir()
    (folder / "blob").write_bytes(b"x")
    os.utime(folder, (1, 1))
    assert remove_stale(settings.temp_dir) == 2
    assert not old.exists()
    assert not folder.exists()
    assert new.exists()
    assert other.exists()


def test_many_uploads_at_once(base_url: str, services: Services, model_bytes: bytes) -> None:
    """The same content from many clients is one blob with a row each."""
    statuses: list[int] = []

    def upload(number: int) -> None:
        response = httpx.post(f"{base_url}/v1/models?name=m{number}&filename=a.onnx", content=model_bytes, timeout=30)
        statuses.append(response.status_code)

    threads = [threading.Thread(target=upload, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [201] * 12
    assert len(files_in(services.settings.home_dir / "blobs")) == 1


def test_polls_are_answered_while_others_wait(base_url: str, client: httpx.Client, job: dict[str, Any]) -> None:
    """Long polls and event streams hold no thread."""
    path = job["links"]["self"]
    waiting = [
        threading.Thread(target=httpx.get, args=(f"{base_url}{path}?wait=30",), kwargs={"timeout": 40})
        for _ in range(60)
    ]
    for thread in waiting:
        thread.start()
    time.sleep(0.5)
    started = time.monotonic()
    assert client.get(path).status_code == 200
    assert time.monotonic() - started < 5
    client.post(job["links"]["cancel"])
    for thread in waiting:
        thread.join()
    assert time.monotonic() - started < 20


@pytest.fixture
def process(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """The API as a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "ANNEAL_HOME": str(settings.home_dir), "ANNEAL_PORT": str(port)}
    environment["ANNEAL_LOG_JSON"] = "true"

    process = subprocess.Popen(
        [sys.executable, "-m", "app", "api"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if re.search("running on|startup complete", line):
                break
        eventually(lambda: _answers(port))
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        process.port = port  # type: ignore[attr-defined]  # handed to the test with the process
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) in (0, -signal.SIGTERM)
        drain.join()
        process.stderr.close()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_disk_full(process: Any, settings: Settings, model_bytes: bytes) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
    base_url = f"http://127.0.0.1:{process.port}"
    with httpx.Client(base_url=base_url, timeout=30) as client:
        large = onnx_models.mlp(features=1024, hidden=5000).SerializeToString()
        assert len(large) > 16 << 20
        for request in (
            {"content": large},
            {"files": {"file": ("a.onnx", large)}},
        ):
            problem = assert_problem(client.post("/v1/models?filename=a.onnx", **request), 507, "storage_full")
            assert problem["retryable"] is True
        upload = client.post("/v1/uploads", json={"filename": "a.onnx", "size_bytes": len(large)}).json()
        assert_problem(client.put(upload["part_urls"][0], content=large), 507, "storage_full")
        assert not files_in(settings.temp_dir)
        assert [file for file in files_in(settings.home_dir / "blobs") if file.name != "key"] == []
        assert client.get("/v1/models").json()["items"] == []
        assert client.post("/v1/models?filename=a.onnx", content=model_bytes).status_code == 201


def test_memory_is_flat(process: Any, settings: Settings) -> None:
    """Half a GiB comes in; the process grows by less than 64 MiB."""
    memory = psutil.Process(process.pid)
    size = 512 << 20
    peak = threading.Event()
    seen: list[int] = []

    def watch() -> None:
        while not peak.is_set():
            seen.append(memory.memory_info().rss)
            time.sleep(0.01)

    def body() -> Iterator[bytes]:
        block = bytes(1 << 20)
        for _ in range(size >> 20):
            yield block

    base_url = f"http://127.0.0.1:{process.port}"
    with httpx.Client(base_url=base_url, timeout=120) as client:
        assert client.post("/v1/models?filename=warm.onnx", content=b"x").status_code == 422
        before = memory.memory_info().rss
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            response = client.post("/v1/models?filename=a.onnx", content=body())
        finally:
            peak.set()
            watcher.join()
    assert_problem(response, 422, "invalid_model")
    assert max(seen) - before < 64 << 20
    assert not files_in(settings.temp_dir)
