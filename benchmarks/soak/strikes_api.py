"""What happens to API processes: killed in the middle of an upload, while they join its parts, right after a commit; a
clock that is off."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.db.orm import IdempotencyKey, Upload
from app.db.uow import Database
from benchmarks.soak.recoveries import Struck, alive
from benchmarks.soak.strikes import Field, Strike
from tests.cluster.cluster import Managed
from tests.factories import onnx_models

_OFF_S = 300
_ENOUGH_S = 6.0


class ApiStrikes:
    def __init__(self, field: Field, db: Database) -> None:
        self.field = field
        self._db = db
        self.broken: list[str] = []  # promises that an API process did not keep

    def kinds(self) -> dict[str, Strike]:
        return {
            "API killed in mid-upload": self.in_mid_upload,
            "API killed in `completing`": self.in_completing,
            "API killed right after a commit": self.after_commit,
            "API's clock 5 minutes ahead": lambda: self.clock_off(_OFF_S),
            "API's clock 5 minutes behind": lambda: self.clock_off(-_OFF_S),
        }

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.field.key}"}

    def _one(self) -> tuple[Managed, str, str]:
        """An API process, its URL, and another one's."""
        apis, urls = self.field.cluster.apis, self.field.cluster.urls
        number = self.field.draw.randrange(len(apis))
        return apis[number], urls[number], urls[number - 1]

    def _raw(self) -> bytes:
        seed = self.field.draw.randrange(1 << 30)
        return onnx_models.mlp(features=64, hidden=4096, seed=seed).SerializeToString()

    def _back(self, url: str) -> Callable[[], bool]:
        return lambda: alive(url)

    def in_mid_upload(self) -> Struck:
        api, url, _ = self._one()
        raw, sent = self._raw(), threading.Event()

        def slowly() -> Iterator[bytes]:
            for start in range(0, len(raw), 1 << 16):
                yield raw[start : start + (1 << 16)]
                if start > len(raw) // 2:
                    sent.set()
                time.sleep(0.02)

        path = f"{url}/v1/models?name={secrets.token_hex(4)}&filename=net.onnx"
        thread = _quietly(lambda: httpx.post(path, content=slowly(), headers=self._headers, timeout=20))
        sent.wait(10)
        began = time.monotonic()
        api.kill()
        thread.join(30)
        return Struck(began, served=self._back(url))

    def in_completing(self) -> Struck | None:
        """Between the row that says so and the content's own; whoever is asked then goes on with it."""
        api, url, other = self._one()
        raw = self._raw()
        body = {"filename": "net.onnx", "size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
            upload = httpx.post(f"{other}/v1/uploads", json=body, headers=self._headers, timeout=20).json()
            for target in upload["part_urls"]:
                httpx.put(target if target.startswith("http") else f"{other}{target}", content=raw, timeout=20)
            return self._killed_at_it(api, url, other, str(upload["id"]))
        return None

    def _killed_at_it(self, api: Managed, url: str, other: str, upload_id: str) -> Struck | None:
        path = f"/v1/uploads/{upload_id}/complete"

        def reads(method: str, asked: str) -> bool:
            return method == "GET" and upload_id in asked and "uploadId" not in asked

        with self.field.gate.misbehaving(holds=reads):  # it has joined the parts, and reads them to check the digest
            thread = _quietly(lambda: httpx.post(f"{url}{path}", headers=self._headers, timeout=30))
            deadline = time.monotonic() + 10
            while self._status(upload_id) != "completing" or not self.field.gate.struck:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.01)
            began = time.monotonic()
            api.kill()
        thread.join(30)

        def completed() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.post(f"{other}{path}", headers=self._headers, timeout=25).status_code == 200
            return False

        return Struck(began, served=completed)

    def _status(self, upload_id: str) -> str | None:
        with contextlib.suppress(SQLAlchemyError), self._db.read() as session:
            return session.scalar(select(Upload.status).where(Upload.id == upload_id))
        return None

    def after_commit(self) -> Struck | None:
        """Of a job: it is there, and nobody was told. The same request with the same key answers with that very job."""
        api, url, other = self._one()
        raw = onnx_models.mlp(seed=self.field.draw.randrange(1 << 30)).SerializeToString()
        key = f"after-commit-{secrets.token_hex(8)}"
        headers = {**self._headers, "Idempotency-Key": key}
        with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
            path = f"{other}/v1/models?name={key}&filename=net.onnx"
            model = httpx.post(path, content=raw, headers=self._headers, timeout=20).json()
            spec = {"model_id": model["id"], "budget_seconds": 60, "precisions": ["fp32"]}
            submit: dict[str, Any] = {"json": spec, "headers": headers, "timeout": 20}
            thread = _quietly(lambda: httpx.post(f"{url}/v1/jobs", **submit))
            deadline = time.monotonic() + 10
            while (job_id := self._known(key)) is None:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.001)
            began = time.monotonic()
            api.kill()
            thread.join(30)
            return Struck(began, served=lambda: self._again(other, submit, job_id))
        return None

    def _known(self, key: str) -> str | None:
        with contextlib.suppress(SQLAlchemyError), self._db.read() as session:
            return session.scalar(select(IdempotencyKey.resource_id).where(IdempotencyKey.key == key))
        return None

    def _again(self, url: str, submit: dict[str, Any], job_id: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.post(f"{url}/v1/jobs", **submit)
            if answer.status_code < 300:
                if answer.json()["id"] != job_id:
                    self.broken.append(f"{job_id} was answered as {answer.json()['id']} the second time")
                return True
        return False

    def clock_off(self, seconds: int) -> Struck | None:
        field = self.field
        if field.clock is None:
            return None
        api, url, _ = self._one()
        api.told = {"LD_PRELOAD": str(field.clock), "CLOCK_OFF_S": str(seconds)}
        starts = api.starts
        try:
            api.signal(signal.SIGTERM)
            deadline = time.monotonic() + 30
            while (api.starts == starts or not alive(url)) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(_ENOUGH_S)
        finally:
            api.told = {}
        began = time.monotonic()
        api.signal(signal.SIGTERM)
        return Struck(began, served=self._back(url))


def _quietly(work: Callable[[], object]) -> threading.Thread:
    """In a thread; what was asked may or may not have happened."""

    def run() -> None:
        with contextlib.suppress(httpx.HTTPError):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
