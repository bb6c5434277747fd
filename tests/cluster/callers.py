"""Who asks and makes things through the proxy all the time, as a careful client does: what fails is sent again, with
the same Idempotency-Key."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

_PATIENCE_S = 60.0
_AGAIN = (502, 503, 504)
_PAUSE_S = 0.2


@dataclass
class Call:
    """How one came to its end: `failures` are what its earlier attempts met, `status` what the last one."""

    what: str
    status: int = 0
    failures: list[str] = field(default_factory=list)
    made: str | None = None


def careful(client: httpx.Client, what: str, **request: Any) -> Call:
    """Send until there is an answer that is none of an outage."""
    call, deadline = Call(what), time.monotonic() + _PATIENCE_S
    method, path = what.split(" ", 1)
    while time.monotonic() < deadline:
        try:
            answer = client.request(method, path, **request)
        except httpx.HTTPError as error:
            call.failures.append(type(error).__name__)
        else:
            call.status = answer.status_code
            if call.status not in _AGAIN:
                call.made = answer.json().get("id") if method == "POST" else None
                return call
            call.failures.append(f"{call.status} {answer.json()['code']}")
        time.sleep(_PAUSE_S)
    return call


@dataclass
class Callers:
    """Those of one tenant; `calls`: what they did so far."""

    url: str
    key: str
    calls: list[Call] = field(default_factory=list)
    _ending: threading.Event = field(default_factory=threading.Event)

    def _ask(self, what: str) -> None:
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=30) as client:
            while not self._ending.is_set():
                request: dict[str, Any] = {}
                if what.startswith("POST"):
                    request["headers"] = {"Idempotency-Key": secrets.token_hex(8)}
                    request["json"] = {"filename": "net.onnx", "size_bytes": 1000}
                self.calls.append(careful(client, what, **request))
                self._ending.wait(0.01)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Three of them read, two make upload sessions."""
        kinds = ["GET /v1/jobs", "GET /v1/models", "GET /v1/capabilities", *(2 * ["POST /v1/uploads?part_urls=false"])]
        threads = [threading.Thread(target=self._ask, args=(kind,), daemon=True) for kind in kinds]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join(_PATIENCE_S + 30)
            assert not any(thread.is_alive() for thread in threads)

    def wait_for(self, count: int, seconds: float = 60) -> None:
        """Until there are so many more of them."""
        wanted, deadline = len(self.calls) + count, time.monotonic() + seconds
        while len(self.calls) < wanted:
            assert time.monotonic() < deadline, "nobody is answered"
            time.sleep(0.02)

    def check(self, retries: int) -> None:
        """All were answered, after so many attempts more at most; nothing was made twice."""
        wrong = [call for call in self.calls if call.status not in (200, 201) or len(call.failures) > retries]
        assert not wrong, wrong[:5]
        made = [call.made for call in self.calls if call.what.startswith("POST")]
        assert made
        assert len(set(made)) == len(made)

    @property
    def failures(self) -> list[str]:
        return [f"{call.what}: {failure}" for call in self.calls for failure in call.failures]
