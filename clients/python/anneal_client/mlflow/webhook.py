"""A receiver of MLflow's webhooks: a new model version, or an alias that is set, starts a job; its engine is
registered.

    ANNEAL_WEBHOOK_SECRET=… python -m anneal_client.mlflow.webhook --port 8080 --anneal http://127.0.0.1:8000

An event that was answered with 202 is not lost when the receiver dies: it stands on the model version, and the next
start goes on with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from anneal_client.client import Client
from anneal_client.errors import AnnealError, ConnectionFailed, Unavailable
from anneal_client.mlflow import registry
from anneal_client.mlflow.registry import OPEN, SOURCE, STATE, Source, resolved
from anneal_client.mlflow.signature import NotUnderstood, NotVerified, verified
from anneal_client.mlflow.tracking import Logged

log = logging.getLogger(__name__)

CREATED, ALIAS = "model_version.created", "model_version_alias.created"
_MAX_BODY = 1 << 20
_AT_ONCE = 4  # jobs that are waited for; Anneal queues them itself
_IDLE_S = 15  # of a connection
_AGAIN_S = 30.0  # between attempts to reach Anneal or MLflow

Answer = tuple[int, dict[str, str]]


class Receiver:
    """`optimize`: what is done for a version, given its `models:/NAME/VERSION`. `aliases`: with some, a version is
    taken when it is given one of them, and not when it is made. `names`: the registered models to look at
    (None: all)."""

    def __init__(
        self,
        secret: str,
        optimize: Callable[[str], Logged],
        *,
        aliases: Sequence[str] = (),
        names: Sequence[str] | None = None,
    ) -> None:
        if not secret:
            raise ValueError("a receiver needs the webhook's secret")
        self._secret = secret
        self._optimize = optimize
        self._aliases = frozenset(aliases)
        self._names = None if names is None else frozenset(names)
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="anneal-mlflow")
        self._running: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def handle(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """The status and the JSON to answer a request with: 202 what is begun, 200 what is no matter of this receiver,
        401 what MLflow did not sign, 400 what is no event, 503 what MLflow shall send again."""
        try:
            delivery = verified(self._secret, headers, body)
        except NotVerified as error:
            return 401, {"error": str(error)}
        except NotUnderstood as error:
            return 400, {"error": str(error)}
        wanted = ALIAS if self._aliases else CREATED
        name, version = (str(delivery.data.get(key) or "") for key in ("name", "version"))
        if delivery.event != wanted or not name or not version:
            return 200, {"ignored": f"{delivery.event} starts nothing here"}
        if self._aliases and delivery.data.get("alias") not in self._aliases:
            return 200, {"ignored": "another alias"}
        if self._names is not None and name not in self._names:
            return 200, {"ignored": "another model"}
        try:
            # What the event tells is not taken at its word: the registry says what the version is.
            return self._take(resolved(f"models:/{name}/{version}"))
        except AnnealError as error:
            return 200, {"ignored": str(error)}
        except MlflowException as error:
            return 503, {"error": f"MLflow does not answer: {error}"}

    def _take(self, source: Source) -> Answer:
        if SOURCE in source.tags:
            return 200, {"ignored": "an engine that Anneal made"}
        if source.tags.get(STATE) not in (None, *OPEN):
            return 200, {"ignored": f"the version is {source.tags[STATE]} already"}
        if STATE not in source.tags:
            source.tag(STATE, OPEN[0])
        self._begin(source.uri)
        return 202, {"accepted": source.uri}

    def resume(self) -> list[str]:
        """Go on with what was begun before this process; answers the versions."""
        registered = mlflow.MlflowClient()
        versions = [v for state in OPEN for v in registered.search_model_versions(f"tags.`{STATE}` = '{state}'")]
        found = [f"models:/{v.name}/{v.version}" for v in versions if self._names is None or v.name in self._names]
        for uri in found:
            self._begin(uri)
        return found

    def resume_when_possible(self) -> None:
        """`resume`, as soon as MLflow answers; until `close`."""
        while not self._stopping.is_set():
            try:
                for uri in self.resume():
                    log.info("going on with %s", uri)
            except MlflowException as error:
                log.warning("what was begun before is not known yet: %s", error)
                self._stopping.wait(_AGAIN_S)
            else:
                return

    def _begin(self, uri: str) -> None:
        """Once for each version, however often it is told."""
        with self._lock:
            if uri not in self._running:
                self._running[uri] = self._pool.submit(self._run, uri)

    def _run(self, uri: str) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    logged = self._optimize(uri)
                except (ConnectionFailed, Unavailable) as error:
                    log.warning("%s waits for the service: %s", uri, error)
                    self._stopping.wait(_AGAIN_S)
                else:
                    log.info("%s: %s, %s", uri, logged.promise, logged.version_uri or "nothing registered")
                    return
        except Exception:  # whatever it is, the receiver goes on; the version's tags say what is known
            log.exception("%s was not optimized", uri)
        finally:
            with self._lock:
                self._running.pop(uri, None)

    def close(self) -> None:
        """Take nothing more. What runs is left to a next start."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def server(receiver: Receiver, host: str, port: int) -> ThreadingHTTPServer:
    """POST /: an event. GET /healthz: 200."""

    class Handler(BaseHTTPRequestHandler):
        timeout = _IDLE_S
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200 if self.path == "/healthz" else 404, {})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > _MAX_BODY:
                self.close_connection = True
                self._answer(413 if length.isdigit() else 411, {"error": "a body of at most 1 MiB, with its length"})
                return
            self._answer(*receiver.handle(dict(self.headers.items()), self.rfile.read(int(length))))

        def _answer(self, status: int, told: Mapping[str, str]) -> None:
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.info(format, *args)

    found = ThreadingHTTPServer((host, port), Handler)
    found.daemon_threads = True
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    options = _parser().parse_args(arguments)
    secret = os.environ.get("ANNEAL_WEBHOOK_SECRET", "")
    if not secret:
        print("Set ANNEAL_WEBHOOK_SECRET to the secret that the webhook was created with.", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    spec: dict[str, Any] = json.loads(options.spec.read_text(encoding="utf-8")) if options.spec else {}
    client = Client(options.anneal, os.environ.get("ANNEAL_API_KEY") or None)

    def optimize(uri: str) -> Logged:
        return registry.optimize(
            client,
            uri,
            spec,
            registered_model_name=options.register_as,
            alias=options.set_alias,
        )

    receiver = Receiver(secret, optimize, aliases=options.alias, names=options.model or None)
    http = server(receiver, options.host, options.port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=http.shutdown, daemon=True).start())
    threading.Thread(target=receiver.resume_when_possible, daemon=True).start()
    log.info("listening on %s:%s", options.host, http.server_port)
    http.serve_forever()
    receiver.close()
    logging.shutdown()
    os._exit(0)  # what is waited for stands on the versions; threads that wait are not


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m anneal_client.mlflow.webhook", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--anneal", default=os.environ.get("ANNEAL_URL", "http://127.0.0.1:8000"), help="the service")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--alias", action="append", default=[], help="take versions that are given this alias")
    parser.add_argument("--model", action="append", default=[], help="a registered model to look at (default: all)")
    parser.add_argument("--spec", type=Path, help="JSON file with fields of the job")
    parser.add_argument("--register-as", help="the registered model of the engines (default: NAME-anneal)")
    parser.add_argument("--set-alias", help="an alias for the engine's version")
    return parser


if __name__ == "__main__":
    sys.exit(main())
