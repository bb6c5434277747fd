"""Engines, and what every download can do: conditional and range requests, HEAD, redirects."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.blobs.content import blob_key
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Engine
from app.errors import AppError
from app.http.downloads import etag_matches, parse_range
from app.http.services import Services
from app.main import create_app
from app.names import content_disposition
from app.settings import Settings
from tests.api.conftest import assert_problem, serving
from tests.conftest import S3Bucket

CONTENT = bytes(range(256)) * 10_000


def add_engine(services: Services, job: dict[str, Any], folder: Path) -> str:
    digests = {}
    for name, content in (("engine", CONTENT), ("bundle", b"bundle")):
        path = folder / name
        path.write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
        services.content.put(LOCAL_TENANT, path, digests[name])
    engine = Engine(
        id=new_id("eng"),
        tenant_id=LOCAL_TENANT,
        job_id=job["id"],
        model_id=job["model_id"],
        backend="onnxruntime",
        format="onnx",
        precision="int8",
        filename="mödel.onnx",
        sha256=digests["engine"],
        size_bytes=len(CONTENT),
        bundle_filename="bundle.zip",
        bundle_sha256=digests["bundle"],
        bundle_size_bytes=6,
        hardware={"id": "cpu-test"},
        runtime={"threads": 2},
        metrics={"latency_ms": 1.5},
    )
    with services.db.write() as uow:
        uow.session.add(engine)
    return engine.id


@pytest.fixture
def engine(client: httpx.Client, job: dict[str, Any], services: Services, tmp_path: Path) -> dict[str, Any]:
    response = client.get(f"/v1/engines/{add_engine(services, job, tmp_path)}")
    assert response.status_code == 200, response.text
    return response.json()


def test_resource(client: httpx.Client, engine: dict[str, Any], job: dict[str, Any]) -> None:
    assert client.get(engine["links"]["job"]).json()["id"] == job["id"]
    assert client.get(job["links"]["engines"]).json() == {"items": [engine], "next_cursor": None}
    assert client.get("/v1/engines", params={"model_id": job["model_id"]}).json()["items"] == [engine]
    assert client.get("/v1/engines?job_id=job_0").json()["items"] == []
    assert_problem(client.get("/v1/engines?job_id=%00"), 422, "invalid_request")
    for path in ("/v1/engines/eng_0", "/v1/engines/eng_0/download", "/v1/engines/eng_0/bundle"):
        assert_problem(client.get(path), 404, "not_found")


def test_download(client: httpx.Client, engine: dict[str, Any]) -> None:
    response = client.get(engine["links"]["download"])
    assert response.status_code == 200
    assert response.content == CONTENT
    digest = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
    assert response.headers["etag"] == f'"{engine["sha256"]}"'
    assert response.headers["content-length"] == str(len(CONTENT))
    assert response.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-disposition"] == (
        "attachment; filename=\"m_del.onnx\"; filename*=UTF-8''m%C3%B6del.onnx"
    )
    head = client.head(engine["links"]["download"])
    assert head.content == b""
    same = ("etag", "content-length", "repr-digest", "content-disposition", "accept-ranges")
    assert {k: head.headers[k] for k in same} == {k: response.headers[k] for k in same}
    assert client.get(engine["links"]["bundle"]).content == b"bundle"


def test_conditional(client: httpx.Client, engine: dict[str, Any]) -> None:
    path, etag = engine["links"]["download"], f'"{engine["sha256"]}"'
    for value in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        response = client.get(path, headers={"If-None-Match": value})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    assert client.get(path, headers={"If-None-Match": '"x"'}).status_code == 200


def test_range(client: httpx.Client, engine: dict[str, Any]) -> None:
    for header, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=1048576-", 1 << 20, None),
        ("bytes=-5", len(CONTENT) - 5, None),
        ("bytes=-99999999", 0, None),
        ("bytes=5-99999999", 5, None),
        ("bytes= 5-9", 5, 10),
    ):
        response = client.get(engine["links"]["download"], headers={"Range": header})
        assert response.status_code == 206
        wanted = CONTENT[start:end]
        assert response.content == wanted
        assert response.headers["content-length"] == str(len(wanted))
        assert response.headers["content-range"] == f"bytes {start}-{start + len(wanted) - 1}/{len(CONTENT)}"


def test_range_that_is_not_there(client: httpx.Client, engine: dict[str, Any]) -> None:
    path = engine["links"]["download"]
    for header in (f"bytes={len(CONTENT)}-", "bytes=-0"):
        response = client.get(path, headers={"Range": header})
        assert_problem(response, 416, "range_not_satisfiable")
        assert response.headers["content-range"] == f"bytes */{len(CONTENT)}"
    for ignored in ("bytes=9-5", "bytes=a-b", "bytes=-", "items=0-1", "bytes=0-1,5-6", "bytes=" + "9" * 40 + "-"):
        assert client.get(path, headers={"Range": ignored}).status_code == 200
    etag = f'"{engine["sha256"]}"'
    assert client.get(path, headers={"Range": "bytes=0-0", "If-Range": etag}).status_code == 206
    for other in ('"x"', f"W/{etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert client.get(path, headers={"Range": "bytes=0-0", "If-Range": other}).status_code == 200


def test_a_head_request_knows_no_range(client: httpx.Client, engine: dict[str, Any]) -> None:
    """RFC 9110 14.2: Range is defined for GET."""
    path = engine["links"]["download"]
    for header in ("bytes=0-9", f"bytes={len(CONTENT)}-"):
        head = client.head(path, headers={"Range": header})
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(CONTENT)))
        assert "content-range" not in head.headers
    for path in (engine["links"]["download"], engine["links"]["bundle"], f"{engine['links']['model']}/download"):
        assert_problem(client.patch(path), 405, "method_not_allowed")
        assert client.patch(path).headers["allow"] == "GET, HEAD"


def test_resumed_download(client: httpx.Client, engine: dict[str, Any]) -> None:
    path = engine["links"]["download"]
    half = client.get(path, headers={"Range": "bytes=0-999999"}).content
    rest = client.get(path, headers={"Range": f"bytes={len(half)}-"}).content
    assert half + rest == CONTENT


def test_missing_bytes(client: httpx.Client, engine: dict[str, Any], services: Services) -> None:
    services.content.store.delete(blob_key(LOCAL_TENANT, engine["sha256"]))
    assert_problem(client.get(engine["links"]["download"]), 503, "content_missing")


def test_pure_parts() -> None:
    assert parse_range("bytes=0-4", 10) == (0, 5)
    assert parse_range("bytes=3-3", 4) == (3, 1)
    with pytest.raises(AppError):
        parse_range("bytes=0-", 0)
    assert etag_matches(None, '"a"') is False
    assert content_disposition('a"b\r\n.onnx').startswith('attachment; filename="a_b_.onnx"')


@pytest.fixture
def s3_app(settings: Settings, fresh_bucket: S3Bucket) -> Iterator[tuple[Any, str]]:
    changes = {"storage": fresh_bucket.settings(), "require_keys": False}
    app = create_app(settings.model_copy(update=changes), dispatch=lambda job: True)
    with serving(app) as url:
        yield app, url


def test_s3(s3_app: tuple[Any, str], model_bytes: bytes, settings: Settings) -> None:
    _, url = s3_app
    with httpx.Client(base_url=url, timeout=30) as client:
        raw = client.post("/v1/models?filename=a.onnx", content=model_bytes)
        assert raw.status_code == 201, raw.text
        path = raw.json()["links"]["download"]
        redirect = client.get(path, headers={"Range": "bytes=0-9"})
        assert redirect.status_code == 307
        assert httpx.get(redirect.headers["location"], headers={"Range": "bytes=0-9"}).content == model_bytes[:10]
        download = httpx.get(redirect.headers["location"])
        assert download.content == model_bytes
        assert "a.onnx" in download.headers["content-disposition"]
        assert client.head(path).headers["content-length"] == str(len(model_bytes))
        assert client.get(path, headers={"If-None-Match": redirect.headers["etag"]}).status_code == 304

        big = model_bytes + b""
        upload = client.post("/v1/uploads", json={"filename": "b.onnx", "size_bytes": len(big)}).json()
        assert not upload["part_urls"][0].startswith("/")
        assert httpx.put(upload["part_urls"][0], content=big).status_code == 200
        received = client.get(upload["links"]["self"]).json()["received_parts"]
        assert received == [{"number": 1, "size_bytes": len(big)}]
        done = client.post(upload["links"]["complete"])
        assert done.status_code == 200, done.text
        assert done.json()["sha256"] == hashlib.sha256(big).hexdigest()
        model = client.post("/v1/models", json={"upload_id": upload["id"]})
        assert model.status_code == 201, model.text

        lie = client.post("/v1/uploads", json={"filename": "c.onnx", "size_bytes": len(big) + 1}).json()
        assert httpx.put(lie["part_urls"][0], content=big).status_code == 403, "the length is signed"
        assert_problem(client.post(lie["links"]["complete"]), 409, "upload_incomplete")
        assert client.delete(lie["links"]["self"]).status_code == 204
        assert client.get("/readyz").json()["checks"]["storage"]["ok"] is True
    assert not list(settings.temp_dir.rglob("*"))
