"""A deployment with API keys for two tenants, and what the tests of bad input ask of every refusal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from onnx import ModelProto
from sqlalchemy import select

from app.blobs.references import is_referenced
from app.db.orm import Blob, Dataset, Job, SourceModel, Upload
from tests.factories.deployment import Deployment, deployment
from tests.factories.pace import paced

Json = dict[str, Any]

QUICK: Json = {
    "validation": {"max_accuracy_loss_percent": 100},
    "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
    "budget_seconds": paced(12),
}

# What a client must never see: traces, addresses, places in a library's source.
_LEAKS = re.compile(r"Traceback|File \"|0x[0-9a-f]{6,}|\b[\w-]+\.(?:cc|cpp|h|py):\d+|site-packages|/tmp/|/root/|/home/")


@dataclass
class Tenant:
    """One tenant's view of the service: plain HTTP, as any client speaks it."""

    http: httpx.Client
    key: str

    def upload(self, data: bytes | ModelProto, filename: str = "m.onnx", kind: str = "models") -> httpx.Response:
        content = data if isinstance(data, bytes) else data.SerializeToString()
        return self.http.post(f"/v1/{kind}", params={"filename": filename}, content=content)

    def stored(self, data: bytes | ModelProto, filename: str = "m.onnx", kind: str = "models") -> str:
        """The id of an upload that has to be taken."""
        response = self.upload(data, filename, kind)
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def submit(self, model_id: str, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/jobs", json={"model_id": model_id, **QUICK, **fields})

    def ended(self, response: httpx.Response, timeout_s: float = 180) -> Json:
        """The job at its end."""
        assert response.status_code == 202, response.text
        job: Json = response.json()
        deadline = time.monotonic() + timeout_s
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            assert time.monotonic() < deadline, job
            job = self.http.get(f"/v1/jobs/{job['id']}", params={"wait": 20}).json()
        return job

    def run(self, data: bytes | ModelProto, filename: str = "m.onnx", **fields: Any) -> Json:
        """Upload a model that has to be taken and optimize it."""
        return self.ended(self.submit(self.stored(data, filename), **fields))


@dataclass
class Besieged:
    """The deployment under attack; `worker` is the process that has to survive everything."""

    deployed: Deployment
    acme: Tenant
    rival: Tenant
    worker: Any

    def assert_clean(self, text: str) -> None:
        """No trace, no path of this machine and no library's source in what a client reads."""
        leak = _LEAKS.search(text)
        assert leak is None, (leak, text[:2000])
        for secret in (str(self.deployed.home), str(Path.cwd()), sys.prefix):
            assert secret not in text

    def assert_problem(self, response: httpx.Response, status: int, code: str, *, remedy: bool = True) -> Json:
        """A problem document with everything that a person needs."""
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        problem: Json = response.json()
        assert problem["code"] == code, problem
        assert len(problem["detail"]) > 10
        if remedy:
            assert problem.get("remedy"), problem
        self.assert_clean(response.text)
        return problem

    def assert_failed(self, job: Json, code: str, *, stage: str, remedy: bool = True) -> Json:
        """A job that failed with a typed error, here and in its events; its worker lives."""
        assert job["status"] == "failed", job
        error: Json = job["error"]
        assert error["code"] == code, error
        assert error["stage"] == stage
        assert len(error["detail"]) > 10
        if remedy:
            assert error.get("remedy"), error
        assert not {"kind", "cacheable", "reproduce"} & set(error)
        events = self.acme.http.get(f"/v1/jobs/{job['id']}/events").text
        last = [line for line in events.splitlines() if line.startswith("data: ")][-1]
        assert json.loads(last.removeprefix("data: "))["error"] == error
        self.assert_clean(json.dumps(job) + events)
        assert self.worker.poll() is None, self.deployed.logs()
        return error

    def assert_nothing_left(self) -> None:
        """Scratch folders are empty; every stored file has its row, every row its file, and somebody needs each."""
        home = self.deployed.home
        deadline = time.monotonic() + 60
        folders = (home / "tmp", home / "work", home / "blobs" / "tmp")
        while left := [f"{at}/{name}" for folder in folders for at, _, names in os.walk(folder) for name in names]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        tenants = home / "blobs" / "objects" / "tenants"
        files = {p.relative_to(tenants).parts for p in tenants.rglob("*") if p.is_file()}
        on_disk = {(parts[0], parts[-1]) for parts in files if parts[1] == "blobs"}
        assert {parts for parts in files if parts[1] != "blobs"} == set(), "left by upload sessions"
        db = self.deployed.database()
        try:
            with db.read() as session:
                rows = {(b.tenant_id, b.sha256) for b in session.scalars(select(Blob))}
                assert on_disk == rows
                orphans = [row for row in rows if not is_referenced(session, *row)]
                assert orphans == []
                named = {(m.tenant_id, m.sha256) for m in session.scalars(select(SourceModel)) if m.deleted_at is None}
                named |= {(d.tenant_id, d.sha256) for d in session.scalars(select(Dataset)) if d.deleted_at is None}
                assert named <= rows
                assert session.scalars(select(Job).where(Job.status.in_(("queued", "running")))).all() == []
                assert session.scalars(select(Upload).where(Upload.status == "completed")).all() == []
        finally:
            db.close()


@contextlib.contextmanager
def besieged(home: Path, extra: Mapping[str, str]) -> Iterator[Besieged]:
    """The embedded default with keys, small limits, and one worker that is never replaced."""
    limits = {
        "ANNEAL_REQUIRE_KEYS": "1",
        "WORKER_STAGE_MEMORY_MB": "900",
        "LIMIT_UPLOAD_BYTES": str(16 << 20),
        "LIMIT_UNPACKED_BYTES": str(64 << 20),
    }
    with deployment(home, {**limits, **extra}) as deployed, contextlib.ExitStack() as stack:
        tenants = []
        for name in ("acme", "rival"):
            key = deployed.create_key(name)
            headers = {"Authorization": f"Bearer {key}"}
            http = stack.enter_context(httpx.Client(base_url=deployed.url, headers=headers, timeout=60))
            tenants.append(Tenant(http, key))
        worker = deployed.start_hurried_worker()
        deployed.wait_ready(timeout_s=90)
        yield Besieged(deployed, tenants[0], tenants[1], worker)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped(members: Sequence[tuple[str, bytes]], *, link: str | None = None) -> bytes:
    """A .zip of these members; `link` names one that is stored as a symbolic link to its content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.create_system = 3
            info.external_attr = (0o120777 if name == link else 0o100644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return buffer.getvalue()
