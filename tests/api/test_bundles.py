"""The kinds of an engine's bundle: other archives of the stored one's own bytes."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from anneal_client import Client
from app.artifacts.kinds import KINDS_FILE, index_of
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Engine
from app.http.services import Services
from app.main import create_app
from app.settings import Settings
from tests.api.conftest import assert_problem, serving
from tests.conftest import S3Bucket

WEIGHTS = bytes(range(256)) * 9_000
FILES = {"m/1/model.onnx": "model.onnx", "m/config.pbtxt": "triton/config.pbtxt"}
CONTENTS = {"model.onnx": WEIGHTS, "triton/config.pbtxt": b'name: "m"\n', "infer.py": b"print()\n"}


def bundle(kinds: dict[str, Any] | None, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in CONTENTS.items():
            with archive.open(name, "w", force_zip64=True) as member:  # a longer local header, as the worker's
                member.write(content)
    if kinds is not None:
        index = index_of(kinds, buffer)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(KINDS_FILE, index)
    return buffer.getvalue()


def add_engine(
    services: Services, job: dict[str, Any], content: bytes, folder: Path, tenant: str = LOCAL_TENANT
) -> str:
    path = folder / "bundle"
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    services.content.put(tenant, path, sha256)
    engine = Engine(
        id=new_id("eng"),
        tenant_id=tenant,
        job_id=job["id"],
        model_id=job["model_id"],
        backend="onnxruntime",
        format="onnx",
        precision="fp32",
        filename="m.onnx",
        sha256=sha256,
        size_bytes=len(content),
        bundle_filename="m-bundle.zip",
        bundle_sha256=sha256,
        bundle_size_bytes=len(content),
        hardware={},
        runtime={},
        metrics={},
    )
    with services.db.write() as uow:
        uow.session.add(engine)
    return f"/v1/engines/{engine.id}/bundle"


@pytest.fixture
def url(client: httpx.Client, job: dict[str, Any], services: Services, tmp_path: Path) -> str:
    kinds = {"triton": {"files": FILES}, "kserve": {"reason": "nothing was measured."}}
    return add_engine(services, job, bundle(kinds), tmp_path)


def test_a_kind_is_an_archive_of_the_stored_files(client: httpx.Client, url: str) -> None:
    answer = client.get(f"{url}?kind=triton")
    assert answer.status_code == 200, answer.text
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == sorted(FILES)
        for path, member in FILES.items():
            file = archive.extractfile(path)
            assert file is not None
            assert file.read() == CONTENTS[member]
    digest = hashlib.sha256(answer.content)
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-disposition"].startswith('attachment; filename="m-triton.tar"')
    head = client.head(f"{url}?kind=triton")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", answer.headers["etag"])
    assert client.get(f"{url}?kind=triton", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    for start, end in ((0, 0), (500, 1600), (1_000_000, 1_000_010), (len(answer.content) - 9, len(answer.content) - 1)):
        part = client.get(f"{url}?kind=triton", headers={"Range": f"bytes={start}-{end}"})
        assert (part.status_code, part.content) == (206, answer.content[start : end + 1])
    plain = client.get(url)
    assert plain.content == client.get(f"{url}?kind=python").content
    assert zipfile.is_zipfile(io.BytesIO(plain.content))


def test_the_client_verifies_it(client: httpx.Client, url: str, tmp_path: Path) -> None:
    with Client(str(client.base_url)) as ours:
        path = ours.download_bundle(url.split("/")[3], tmp_path / "m.tar", kind="triton")
    assert tarfile.is_tarfile(path)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (bundle({"kserve": {"reason": "nothing was measured."}}), "kserve", "no kserve bundle: nothing was measured."),
        (bundle({"kserve": {"reason": "x"}}), "triton", "made without it"),
        (bundle(None), "triton", "made without it"),
        (b"no archive", "triton", "made without it"),
        (bundle({"triton": {"files": FILES}})[:-30], "triton", "made without it"),
    ],
    ids=["reason", "other", "earlier version", "no archive", "cut off"],
)
def test_a_kind_that_is_not_there(
    client: httpx.Client, job: dict[str, Any], services: Services, tmp_path: Path, content: bytes, kind: str, words: str
) -> None:
    url = add_engine(services, job, content, tmp_path)
    problem = assert_problem(client.get(f"{url}?kind={kind}"), 404, "bundle_kind_missing")
    assert words in problem["detail"]
    assert "python" in problem["remedy"]
    assert client.get(url).content == content


def test_its_media_types_are_documented(client: httpx.Client, url: str) -> None:
    """Found by the long run of Schemathesis, once there was an engine."""
    answers = client.get("/openapi.json").json()["paths"]["/v1/engines/{engine_id}/bundle"]["get"]["responses"]
    for query in ("", "?kind=triton"):
        whole, part = client.get(f"{url}{query}"), client.get(f"{url}{query}", headers={"Range": "bytes=0-9"})
        for answer, status in ((whole, 200), (part, 206)):
            assert answer.status_code == status
            assert answer.headers["content-type"] in answers[str(status)]["content"]


def test_an_unknown_kind(client: httpx.Client, url: str) -> None:
    for kind in ("tensorflow", "", "Triton"):
        problem = assert_problem(client.get(f"{url}?kind={kind}"), 422, "invalid_request")
        assert problem["errors"][0]["pointer"] == "/query/kind"
    assert_problem(client.get("/v1/engines/eng_0/bundle?kind=triton"), 404, "not_found")


def test_what_the_worker_may_not_write() -> None:
    for path in ("../m", "/m", "a/../../m", "a\\m"):
        with pytest.raises(ValueError, match="leads out"):
            bundle({"triton": {"files": {path: "model.onnx"}}})
    with pytest.raises(ValueError, match="is compressed"):
        bundle({"triton": {"files": FILES}}, zipfile.ZIP_DEFLATED)
    with pytest.raises(KeyError):
        bundle({"triton": {"files": {"m": "not there"}}})


def test_on_s3_it_passes_through_the_api(
    settings: Settings, fresh_bucket: S3Bucket, model_bytes: bytes, tmp_path: Path
) -> None:
    app = create_app(
        settings.model_copy(update={"storage": fresh_bucket.settings(), "require_keys": False}),
        dispatch=lambda job: True,
    )
    with serving(app) as base, httpx.Client(base_url=base, timeout=30) as client:
        model = client.post("/v1/models?filename=a.onnx", content=model_bytes).json()
        job = client.post("/v1/jobs", json={"model_id": model["id"]}).json()
        url = add_engine(app.state.services, job, bundle({"triton": {"files": FILES}}), tmp_path)
        whole = client.get(f"{url}?kind=triton")
        assert whole.status_code == 200, whole.text
        assert hashlib.sha256(whole.content).hexdigest() == whole.headers["etag"].strip('"')
        part = client.get(f"{url}?kind=triton", headers={"Range": "bytes=512-2000"})
        assert part.content == whole.content[512:2001]
        assert client.get(url).status_code == 307
