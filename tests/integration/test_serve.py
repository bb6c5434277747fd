"""`python -m app serve`, what `make serve` runs: up with one command, and gone without a trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from app.settings import load_settings
from tests.factories.deployment import FAST, deployment, gone
from tests.servers import free_port


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    environment = {**os.environ, **FAST, "ANNEAL_HOME": str(tmp_path / "home"), "ANNEAL_PORT": str(port)}
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "app", "serve"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").json()["status"] == "ready":
                break
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    else:
        process.kill()
        pytest.fail((tmp_path / "log").read_text())
    yield process, url
    if process.poll() is None:
        process.kill()
    process.wait()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3, "API, worker and the worker's zygote"
    return children


def test_what_it_cannot_begin_with_is_said_with_the_remedy(tmp_path: Path) -> None:
    """A port that is taken, an address that is not this machine's, a file where its folder should be."""
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for told, words in (
            ({"ANNEAL_PORT": port}, ["already", "anneal serve --port"]),
            (
                {"ANNEAL_HOST": "no.such.host.invalid", "ANNEAL_REQUIRE_KEYS": "true"},
                ["no.such.host.invalid", "--host"],
            ),
            ({"ANNEAL_PORT": str(free_port()), "ANNEAL_HOME": str(tmp_path / "file")}, ["file", "anneal serve --home"]),
        ):
            environment = {**os.environ, "ANNEAL_HOME": str(tmp_path / "home"), **told}
            command = [sys.executable, "-m", "app", "serve"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
            assert done.returncode == 1, told
            assert all(word in done.stderr for word in words), done.stderr
            assert "Traceback" not in done.stderr
            assert len(done.stderr.splitlines()) == 1, "nothing was started"


def test_an_installation_without_a_worker_s_libraries_says_what_adds_them(tmp_path: Path) -> None:
    script = (
        "import importlib.util as u; real = u.find_spec; u.find_spec = lambda name, *a: None if name == 'onnx' else "
        "real(name, *a); from app.__main__ import main; main(['serve'])"
    )
    environment = {**os.environ, "ANNEAL_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "A worker needs onnx," in done.stderr
    assert "anneal serve --with cpu,openvino" in done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(served: tuple[subprocess.Popen[bytes], str], number: signal.Signals) -> None:
    process, _ = served
    family = _family(process)
    process.send_signal(number)
    assert process.wait(timeout=15) == 0
    assert gone(family, timeout_s=1)


def test_even_a_killed_supervisor_leaves_nothing_behind(served: tuple[subprocess.Popen[bytes], str]) -> None:
    process, _ = served
    family = _family(process)
    process.kill()
    process.wait()
    assert gone(family, timeout_s=15)


def test_a_killed_worker_is_replaced(served: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = served
    before = {w["id"] for w in httpx.get(f"{url}/v1/capabilities").json()["workers"]}
    (worker,) = [p for p in _family(process) if "workers" in p.cmdline()]
    worker.kill()
    deadline = time.monotonic() + 60
    while not {w["id"] for w in httpx.get(f"{url}/v1/capabilities").json()["workers"]} - before:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_without_keys_nothing_that_came_through_a_proxy_is_answered(tmp_path: Path) -> None:
    """A proxy's address is loopback, its client's is anywhere."""
    with deployment(tmp_path / "home") as deployed:
        for header in ("X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "Via", "X-Real-IP", "CF-Connecting-IP"):
            response = httpx.get(f"{deployed.url}/v1/models", headers={"Host": "127.0.0.1", header: "203.0.113.9"})
            assert (response.status_code, response.json()["code"]) == (403, "forwarded_request"), header
            assert "ANNEAL_REQUIRE_KEYS" in response.json()["remedy"]
        for host in ("testserver", "anneal.example", "127.0.0.1.evil.example"):
            assert httpx.get(f"{deployed.url}/v1/models", headers={"Host": host}).status_code == 421
        assert httpx.get(f"{deployed.url}/v1/models", headers={"Host": "localhost"}).status_code == 200
        key = deployed.create_key("acme")
    with deployment(tmp_path / "home", {"ANNEAL_REQUIRE_KEYS": "true"}) as deployed:
        behind = {"Host": "anneal.example", "X-Forwarded-For": "203.0.113.9"}
        assert httpx.get(f"{deployed.url}/v1/models", headers=behind).status_code == 401
        behind["Authorization"] = f"Bearer {key}"
        assert httpx.get(f"{deployed.url}/v1/models", headers=behind).status_code == 200


@pytest.mark.parametrize("name", ["DATABASE_URL", "BROKER_URL", "STORAGE_URL"])
def test_keys_are_asked_for_as_soon_as_anything_is_shared(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = {"DATABASE_URL": "postgresql://db/anneal", "BROKER_URL": "redis://broker/0", "STORAGE_URL": "s3://bucket"}[
        name
    ]
    environment = {**os.environ, "ANNEAL_HOME": str(tmp_path), "ANNEAL_REQUIRE_KEYS": "false", name: url}
    command = [sys.executable, "-m", "app", "api"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert "without API keys" in done.stderr
    monkeypatch.setenv(name, url)
    assert load_settings().keys_required


def test_it_refuses_to_listen_beyond_loopback_without_keys(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "ANNEAL_HOME": str(tmp_path),
        "ANNEAL_HOST": "0.0.0.0",
        "ANNEAL_REQUIRE_KEYS": "false",
        "ANNEAL_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "app", "serve"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert "without API keys" in done.stderr
