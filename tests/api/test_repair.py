"""A stored file that is damaged gives way to the same content sent again, by whichever way it comes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.blobs.content import blob_key, sha256_file
from app.db.orm import LOCAL_TENANT, Job
from app.http.services import Services
from app.jobs.ledger import JobLedger
from app.settings import Settings
from tests.api.conftest import assert_problem


def _stored(settings: Settings, content: bytes) -> Path:
    digest = hashlib.sha256(content).hexdigest()
    return settings.home_dir / "blobs" / "objects" / blob_key(LOCAL_TENANT, digest)


def _damage(path: Path, *, cut: bool = False) -> None:
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content[:-1] if cut else content)


def _find(services: Services, settings: Settings, content: bytes) -> None:
    """What a worker does that has found the digest wrong."""

    def dispatch(_job: Job) -> bool:
        return True

    ledger = JobLedger(services.db, services.content, dispatch, settings.worker)
    assert not ledger.discard(LOCAL_TENANT, hashlib.sha256(content).hexdigest()), "only its owner has it"


def _is_whole(path: Path) -> bool:
    return sha256_file(path) == path.name


@pytest.mark.parametrize("cut", [True, False])
def test_sent_again(
    client: httpx.Client, services: Services, settings: Settings, model_bytes: bytes, model: dict[str, Any], cut: bool
) -> None:
    path = _stored(settings, model_bytes)
    _damage(path, cut=cut)
    if not cut:
        client.post("/v1/models?filename=m.onnx", content=model_bytes)
        assert not _is_whole(path), "nobody has looked yet"
        _find(services, settings, model_bytes)
    assert client.post("/v1/models?filename=m.onnx", content=model_bytes).status_code == 201
    assert client.get(model["links"]["download"]).content == model_bytes
    assert not [found for found in (settings.home_dir / "blobs" / "tmp").rglob("*") if found.is_file()]
    inode = path.stat().st_ino
    client.post("/v1/models?filename=m.onnx", content=model_bytes)
    assert path.stat().st_ino == inode, "it is trusted again, and not written once more"


def test_sent_again_with_the_same_key(
    client: httpx.Client, services: Services, settings: Settings, model_bytes: bytes
) -> None:
    def send() -> httpx.Response:
        return client.post("/v1/models?filename=m.onnx", content=model_bytes, headers={"Idempotency-Key": "k"})

    first = send().json()
    _damage(_stored(settings, model_bytes))
    _find(services, settings, model_bytes)
    assert send().json() == first
    assert _is_whole(_stored(settings, model_bytes))


def test_sent_again_in_parts(client: httpx.Client, settings: Settings, services: Services, model_bytes: bytes) -> None:
    def upload() -> str:
        opened = client.post("/v1/uploads", json={"filename": "m.onnx", "size_bytes": len(model_bytes)}).json()
        assert client.put(opened["part_urls"][0], content=model_bytes).status_code == 200
        assert client.post(opened["links"]["complete"]).status_code == 200
        upload_id: str = opened["id"]
        return upload_id

    path, damaged = _stored(settings, model_bytes), upload()
    _damage(path)
    _find(services, settings, model_bytes)
    problem = assert_problem(client.post("/v1/models", json={"upload_id": damaged}), 503, "blob_corrupted")
    assert "Upload the same file again" in problem["remedy"]
    assert client.post("/v1/models", json={"upload_id": upload()}).status_code == 201
    assert _is_whole(path)
    assert client.post("/v1/models", json={"upload_id": damaged}).status_code == 201
