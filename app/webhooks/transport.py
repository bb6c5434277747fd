"""Posts to an address that a client named, so an untrusted one: only addresses of the public internet are connected to
(unless the operator allows more), the address that was checked is the one connected to, no redirect is followed and no
answer is read."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from app.network import is_in, is_public
from app.settings import Settings


class UndeliverableWebhook(Exception):
    """The message says why this attempt failed. `status`: of the answer, if there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


# What `post` raises. ValueError: what is no URL after all (a broken IPv6 address, port 99999, a label of 70 letters)
FAILURES = (UndeliverableWebhook, OSError, ValueError, http.client.HTTPException)


class WebhookTransport:
    """Threads share it. `post` blocks, for `longest_s` at most."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.webhooks
        self.allow_private = settings.webhooks.allow_private
        if self.allow_private is None:
            # The embedded default: everybody is on this machine, and so may their receivers be.
            self.allow_private = settings.embedded and not settings.keys_required

    @property
    def longest_s(self) -> float:
        """To look up a name and to connect, or to the deadline of the whole; and what a busy machine adds."""
        return 3 * self._settings.timeout_s + 5

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """POST the JSON `body`; the status, which is 2xx. Raises one of `FAILURES` for any other."""
        headers = {"Content-Type": "application/json", "User-Agent": "anneal-webhook/1", **headers}
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        with (
            _Deadline(2 * self._settings.timeout_s) as deadline,
            self._connect(parts.scheme, parts.hostname or "", parts.port, deadline) as connection,
        ):
            connection.request("POST", target, body, headers)
            status = connection.getresponse().status
        if not 200 <= status < 300:
            raise UndeliverableWebhook(f"it answered {status}", status)
        return status

    @contextlib.contextmanager
    def _connect(
        self, scheme: str, host: str, port: int | None, deadline: _Deadline
    ) -> Iterator[http.client.HTTPConnection]:
        timeout_s = self._settings.timeout_s
        port = port or (443 if scheme == "https" else 80)
        address = self._address(host, port)
        # The name goes into the Host header and the certificate check, the checked address into the connection.
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=timeout_s)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.sock = socket.create_connection((address, port), timeout=timeout_s)
            deadline.watch(connection.sock)
            if scheme == "https":
                # The handshake comes after the wrapping: what is wrapped is another socket, to be watched in its turn.
                context = ssl.create_default_context()
                secured = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
                connection.sock = secured
                deadline.watch(secured)
                secured.do_handshake()
            yield connection

    def _address(self, host: str, port: int) -> str:
        for address in _resolve(host, port, self._settings.timeout_s):
            if (self.allow_private or is_public(address)) and not is_in(address, self._settings.deny):
                return address
        raise UndeliverableWebhook(f"{host} has no address that webhooks may reach")


class _Deadline:
    """Hangs up after so many seconds, whatever the connection is doing: a socket's time-out is per operation, and a
    receiver that trickles its answer must not keep a place for long."""

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._over = False
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        with self._lock:
            self._socket = connected
            if self._over:
                raise UndeliverableWebhook("it took too long to connect")

    def _expire(self) -> None:
        with self._lock:
            self._over = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own, which takes the TLS object away from under the thread that uses it.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _resolve(host: str, port: int, seconds: float) -> list[str]:
    """The host's addresses. The system's resolver knows no time-out, so it is left alone in a thread after that."""
    found: list[str] = []
    failed: list[Exception] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(str(address) for *_, (address, *_rest) in answers)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=look_up, name="webhook-dns", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UndeliverableWebhook(f"{host} could not be looked up in {seconds:g} s")
    if failed:
        raise failed[0]
    return found
