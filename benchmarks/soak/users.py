"""Users of the soak: each uploads models of its own, submits jobs and waits for them, as a careful client does: what
failed is tried again with the same idempotency key, at whichever API process answers."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from tests.factories import onnx_models
from tests.factories.every_stage import Route

Json = dict[str, Any]
_PATIENCE_S = 180.0
_FEATURES = 16
_TERMINAL = ("succeeded", "failed", "cancelled")


class GaveUp(Exception):
    """The service did not take a request for minutes, or refused what it should not."""


@dataclass
class Accepted:
    """What the service said it has taken: model id → SHA-256, job id → idempotency key, and how each job ended."""

    models: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    ended: dict[str, Json] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class User:
    """Of one tenant. `call` retries; everything else is made of it."""

    def __init__(self, name: str, key: str, urls: Sequence[str], accepted: Accepted, seed: int) -> None:
        self.name, self.accepted = name, accepted
        self._urls = itertools.cycle(urls)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._draw = random.Random(seed)
        self._seeds = itertools.count(seed * 100_000)

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The first answer that is none of an outage. Raises `GaveUp`."""
        headers = {**self._headers, **request.pop("headers", {})}
        deadline, last = time.monotonic() + _PATIENCE_S, ""
        while time.monotonic() < deadline:
            try:
                answer = httpx.request(method, f"{next(self._urls)}{path}", headers=headers, timeout=20, **request)
            except httpx.HTTPError as error:
                last = type(error).__name__
            else:
                if answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                    return answer
                last = f"{answer.status_code} {answer.text[:200]}"
            time.sleep(0.3 + self._draw.random() * 0.4)
        raise GaveUp(f"{method} {path}: {last}")

    def model(self) -> str:
        """A new model, uploaded in one request or, sometimes, in parts."""
        seed = next(self._seeds)
        raw = onnx_models.mlp(features=_FEATURES, hidden=32, classes=4, seed=seed).SerializeToString()
        digest = hashlib.sha256(raw).hexdigest()
        key = f"model-{self.name}-{seed}"
        if self._draw.random() < 0.4:
            answer = self._in_parts(raw, digest, key)
        else:
            query = f"?name={key}&filename=net.onnx"
            answer = self.call("POST", f"/v1/models{query}", content=raw, headers={"Idempotency-Key": key})
        self._expect(answer, 201)
        identity = str(answer.json()["id"])
        with self.accepted.lock:
            self.accepted.models[identity] = digest
        return identity

    def _in_parts(self, raw: bytes, digest: str, key: str) -> httpx.Response:
        """As the client library does: what is not known to have arrived is sent again, a lost session begins anew."""
        for attempt in range(20):
            body = {"filename": "net.onnx", "size_bytes": len(raw), "sha256": digest}
            session = self.call("POST", "/v1/uploads", json=body, headers={"Idempotency-Key": f"{key}-u{attempt}"})
            self._expect(session, 201)
            upload = session.json()
            for url in upload["part_urls"]:  # it is one: the models are small
                self._put(url, raw)
            done = self.call("POST", f"/v1/uploads/{upload['id']}/complete")
            while done.status_code == 202 or (done.status_code == 409 and "complet" in done.text):
                time.sleep(0.2)
                done = self.call("POST", f"/v1/uploads/{upload['id']}/complete")
            if done.status_code != 200:
                continue  # expired, or its parts are gone: the session is told to be unusable
            fields = {"name": key, "upload_id": upload["id"]}
            made = self.call("POST", "/v1/models", json=fields, headers={"Idempotency-Key": f"{key}-m{attempt}"})
            if made.status_code == 201:
                return made
        raise GaveUp(f"{key}: no upload session came to its end")

    def _put(self, url: str, raw: bytes) -> None:
        if url.startswith("/"):
            self._expect(self.call("PUT", url, content=raw), 200, 201, 204)
            return
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            try:
                if httpx.put(url, content=raw, timeout=20).status_code in (200, 201, 204):
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise GaveUp("PUT of a part: the storage did not take it")

    def dataset(self) -> str:
        """Data for any of the models, so that there is something to quantize by and to check against."""
        seed = next(self._seeds)
        inputs = np.random.default_rng(seed).normal(size=(64, _FEATURES)).astype(np.float32)
        raw = io.BytesIO()
        np.savez(raw, **{onnx_models.mlp(features=_FEATURES).graph.input[0].name: inputs})
        return self._put_in("datasets", "data.npz", raw.getvalue(), seed)

    def submit(self, model_id: str) -> str:
        """One of two needs some second, the other goes through most stages."""
        body: Json = {
            "model_id": model_id,
            "target": {"backends": ["onnxruntime"]},
            "benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
            "budget_seconds": 60,
        }
        if self._draw.random() < 0.5:
            body["precisions"] = ["fp32"]
        else:
            data = {"dataset_id": self.dataset()}
            body |= {"calibration": data, "validation": {**data, "max_accuracy_loss_percent": 100}}
        return self._submit(body)

    def ask(self, route: Route) -> str:
        """A job that goes that way; nobody waits for its end."""
        number = next(self._seeds)
        models = []
        for filename, raw in route.models(number):
            models.append(self._put_in("models", filename, raw, next(self._seeds)))
            with self.accepted.lock:
                self.accepted.models[models[-1]] = hashlib.sha256(raw).hexdigest()
        return self._submit(route.body(models, self._put_in("datasets", "data.npz", route.data(number), number)))

    def _put_in(self, where: str, filename: str, raw: bytes, number: int) -> str:
        key = f"{where}-{self.name}-{number}"
        path = f"/v1/{where}?name={key}&filename={filename}"
        answer = self.call("POST", path, content=raw, headers={"Idempotency-Key": key})
        self._expect(answer, 201)
        return str(answer.json()["id"])

    def _submit(self, body: Json) -> str:
        key = f"job-{self.name}-{next(self._seeds)}"
        answer = self.call("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": key})
        self._expect(answer, 202)
        job_id = str(answer.json()["id"])
        with self.accepted.lock:
            self.accepted.jobs[job_id] = key
        return job_id

    def wait(self, job_id: str, over: threading.Event) -> Json | None:
        while not over.is_set():
            answer = self.call("GET", f"/v1/jobs/{job_id}?wait=5")
            self._expect(answer, 200)
            job: Json = answer.json()
            if job["status"] in _TERMINAL:
                with self.accepted.lock:
                    self.accepted.ended[job_id] = job
                return job
        return None

    def work(self, over: threading.Event) -> None:
        """One job after the other, until then."""
        while not over.is_set():
            try:
                job_id = self.submit(self.model())
                job = self.wait(job_id, over)
                if job is not None and job["status"] == "succeeded" and self._draw.random() < 0.3:
                    self._download(job["engine_ids"][0])
            except GaveUp as error:
                with self.accepted.lock:
                    self.accepted.trouble.append(f"{self.name}: {error}")

    def _download(self, engine_id: str) -> None:
        sha256 = self.call("GET", f"/v1/engines/{engine_id}").json()["sha256"]
        answer = self.call("GET", f"/v1/engines/{engine_id}/download", follow_redirects=True)
        self._expect(answer, 200)
        if hashlib.sha256(answer.content).hexdigest() != sha256:
            raise GaveUp(f"{engine_id}: other bytes than its digest says")

    def _expect(self, answer: httpx.Response, *codes: int) -> None:
        if answer.status_code not in codes:
            raise GaveUp(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text[:300]}")
