"""A really migrated database, a folder store and the whole application behind a real HTTP server in a thread."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI

from app.db.orm import Job
from app.http.server import make_config
from app.http.services import Services
from app.logging import configure_logging
from app.main import create_app
from app.sandbox.features import Features
from app.settings import LimitSettings, Settings
from tests.factories import onnx_models
from tests.factories.migrated import migrated_sqlite

HARDWARE = {"id": "cpu-test", "kind": "cpu", "cpu_model": "Test CPU", "isa": ["avx2"], "cores": 2}
BACKENDS = [
    {
        "name": "onnxruntime",
        "versions": {"onnxruntime": "1.32.0"},
        "devices": ["cpu"],
        "precisions": ["fp32", "int8"],
    }
]


@pytest.fixture(scope="session", autouse=True)
def _logging() -> None:
    """As in production: a traceback drawn for a terminal takes seconds."""
    configure_logging(json=True, level="WARNING")


@pytest.fixture(scope="session")
def migrated() -> Path:
    """A migrated SQLite file, to be copied."""
    return migrated_sqlite()


@pytest.fixture
def settings(tmp_path: Path, migrated: Path) -> Settings:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(migrated, home / "anneal.db")
    return Settings(home=home, limits=LimitSettings(upload_bytes=64 << 20))


@pytest.fixture
def one_minute() -> None:
    """There is time until the clock's next minute, from which on a limit per minute forgets what was before."""
    if (left := 60 - time.time() % 60) < 15:
        time.sleep(left)


@pytest.fixture
def dispatched() -> list[str]:
    """Ids of the jobs that were sent to the queue."""
    return []


@pytest.fixture
def app(settings: Settings, dispatched: list[str]) -> FastAPI:
    def dispatch(job: Job) -> bool:
        dispatched.append(job.id)
        return True

    return create_app(settings, dispatch=dispatch)


@pytest.fixture
def base_url(app: FastAPI) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=20) as client:
        yield client


@pytest.fixture
def services(app: FastAPI, base_url: str) -> Services:
    return app.state.services


@pytest.fixture
def worker(services: Services) -> Services:
    """A live worker has reported itself."""
    report_worker(services)
    return services


def report_worker(services: Services) -> None:
    services.capabilities.report(
        "worker-1",
        hostname="host",
        hardware=HARDWARE,
        backends=BACKENDS,
        formats=["onnx", "archive"],
        queues=["anneal.cpu", "anneal.hw.cpu-test"],
        isolation=Features(landlock=4, seccomp=True, namespaces=True).to_json("auto"),
    )


@pytest.fixture(scope="session")
def model_bytes() -> bytes:
    return onnx_models.mlp().SerializeToString()


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., bytes]:
    def make(**arrays: Any) -> bytes:
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return path.read_bytes()

    return make


@pytest.fixture
def model(client: httpx.Client, model_bytes: bytes) -> dict[str, Any]:
    """An uploaded model."""
    response = client.post("/v1/models", params={"name": "mlp", "filename": "mlp.onnx"}, content=model_bytes)
    assert response.status_code == 201, response.text
    return response.json()


@pytest.fixture
def job(client: httpx.Client, worker: Services, model: dict[str, Any]) -> dict[str, Any]:
    """A queued job."""
    response = client.post("/v1/jobs", json={"model_id": model["id"]})
    assert response.status_code == 202, response.text
    return response.json()


@contextmanager
def serving(app: FastAPI, settings: Settings | None = None) -> Iterator[str]:
    """A real HTTP server in a thread; its base URL. `settings`: the server's own, as to limits and proxies."""
    own = (settings or Settings()).model_copy(update={"port": 0})
    server = uvicorn.Server(make_config(app, own, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive()


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The response is this problem document, with every member that each of them has."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["code"] == code, document
    assert document["type"] == f"urn:anneal:problem:{code}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document["instance"] == response.request.url.path
    assert document["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return document
