"""Runs the processes of the embedded default: the API and one worker, which end together and leave nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

import structlog

from app.db.migrate import upgrade
from app.logging import configure_logging
from app.sandbox.features import found
from app.sandbox.syscalls import hide_from_tracing
from app.settings import Settings

log = structlog.get_logger(__name__)

_PR_SET_PDEATHSIG = 1
_OF_A_WORKER = ("numpy", "onnx", "onnxslim")
_OF_A_PROVIDER = ("jwt", "cryptography")
_GRACE_S = 8.0


def run_api(settings: Settings) -> int:
    """Serve the API in this process until SIGTERM or SIGINT: at `settings.host`, or at the sockets handed over."""
    from app.background import tell_of_dead_threads
    from app.http.ending import ApiServer, handed_over, listening_on
    from app.http.server import make_config, raise_descriptor_limit
    from app.main import create_app

    sockets = handed_over(settings)
    settings = listening_on(settings, sockets)
    refuse_open_server(settings)
    _refuse_unconfined(settings)
    _refuse_without_oidc(settings)
    hide_from_tracing()  # keys and passwords of the whole installation are in this process
    _logging(settings)
    raise_descriptor_limit()
    app = create_app(settings)
    tell_of_dead_threads(app.state.background.note_death)
    server = ApiServer(make_config(app, settings), settings.drain_s, app.state.ending)
    server.run(sockets or None)
    return 0 if server.started else 1


def refuse_open_server(settings: Settings) -> None:
    """Keys are optional in the embedded default only."""
    if not settings.keys_required and not settings.embedded:
        raise SystemExit(
            f"Refusing to listen on {settings.host} without API keys: that is for the embedded default, which listens "
            "on loopback and keeps database, broker and storage on this machine. Unset ANNEAL_REQUIRE_KEYS."
        )


def refuse_taken_address(settings: Settings) -> None:
    """Before anything is started or said."""
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            tried.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = port + 1 if port < 65_535 else 8000
            remedy = (
                f"Something listens there already, perhaps another `make serve`. Take another port: `make serve "
                f"PORT={other}`, `anneal serve --port {other}`, or ANNEAL_PORT={other}."
            )
        else:
            remedy = "ANNEAL_HOST and ANNEAL_PORT (`anneal serve --host --port`) say where to listen."
        raise SystemExit(f"Cannot listen on {host}:{port}: {error.strerror}. {remedy}") from None


def refuse_without_worker() -> None:
    """The service was installed without an extra: its worker would end as soon as it starts, again and again."""
    missing = [name for name in _OF_A_WORKER if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"A worker needs {', '.join(missing)}, which this installation does not have. `anneal serve --with "
            "cpu,openvino` adds them, or pip install 'anneal[cpu,openvino]'. `python -m app api` serves without one."
        )


def _refuse_without_oidc(settings: Settings) -> None:
    missing = [name for name in _OF_A_PROVIDER if settings.oidc.issuer and importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"OIDC_ISSUER is set, and {', '.join(missing)} is missing: pip install 'anneal[oidc]'.")


def _refuse_unconfined(settings: Settings) -> None:
    if settings.limits.inspect_sandbox == "required" and not (features := found()).enough:
        raise SystemExit(f"LIMIT_INSPECT_SANDBOX=required, and this machine leaves open: {features.missing()}")


def serve(settings: Settings) -> int:
    """Migrate, start API and worker, and wait. Ctrl-C, SIGTERM, or the death of either ends both."""
    refuse_open_server(settings)
    refuse_without_worker()
    refuse_taken_address(settings)
    hide_from_tracing()
    _logging(settings)
    try:
        settings.home_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "ANNEAL_HOME (`anneal serve --home`) names another folder."
        raise SystemExit(f"Cannot keep anything in {settings.home_dir}: {error.strerror}. {remedy}") from None
    upgrade(settings.database)
    stop: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    children = {
        "api": _start([sys.executable, "-m", "app", "api"]),
        "worker": _start([sys.executable, "-m", "workers"]),
    }
    log.info("serving", url=f"http://{settings.host}:{settings.port}", home=str(settings.home_dir))
    status = 0
    while not stop:
        ended = {name: p.returncode for name, p in children.items() if p.poll() is not None}
        if "api" in ended:
            log.error("api_ended", status=ended["api"])
            status = 1
            break
        if "worker" in ended and not stop:
            # The API goes on and so do the jobs: a new worker takes them up from their last finished stage.
            log.error("worker_ended", status=ended["worker"])
            time.sleep(1)
            children["worker"] = _start([sys.executable, "-m", "workers"])
        time.sleep(0.1)
    _stop([*children.values()])
    return status


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # A group of its own: a terminal's Ctrl-C reaches the supervisor only, which then ends everybody in order.
    # `preexec_fn` is safe here: this process has no threads.
    return subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent)  # noqa: PLW1509


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _stop(children: list[subprocess.Popen[bytes]]) -> None:
    for process in children:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in children:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _logging(settings: Settings) -> None:
    log_json = settings.log_json if settings.log_json is not None else not sys.stderr.isatty()
    configure_logging(json=log_json, level=settings.log_level)
