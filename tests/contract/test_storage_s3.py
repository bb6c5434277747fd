"""What only S3 has: presigned URLs, credentials, a network that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import botocore.auth
import httpx
import pytest

from app.db import clock
from app.db.clock import SharedClock
from app.errors import AppError
from app.settings import StorageSettings
from app.storage import s3
from app.storage.base import BlobNotFound, InvalidUpload, StoredPart
from app.storage.s3 import S3Store
from tests.conftest import S3Bucket
from tests.servers import free_port

MIB = 1 << 20


@pytest.fixture
def store(fresh_bucket: S3Bucket) -> S3Store:
    return S3Store(fresh_bucket.name, "p", fresh_bucket.settings())


def _put(store: S3Store, tmp_path: Path, key: str, content: bytes) -> None:
    (tmp_path / "source").write_bytes(content)
    store.put_file(key, tmp_path / "source", move=True)


def _settings(port: int) -> StorageSettings:
    return StorageSettings.model_validate(
        {"S3_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    )


def test_presigned_get(store: S3Store, tmp_path: Path) -> None:
    _put(store, tmp_path, "k", bytes(range(200)))
    url = store.presigned_get("k", filename="Größe 1.onnx", expires_s=60)
    assert url is not None
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert answer.content == bytes(range(200))
    disposition = answer.headers["content-disposition"]
    assert disposition == "attachment; filename=\"Gr__e 1.onnx\"; filename*=UTF-8''Gr%C3%B6%C3%9Fe%201.onnx"
    part = httpx.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))


def test_presigned_get_is_for_this_object_and_this_hour(store: S3Store, tmp_path: Path) -> None:
    _put(store, tmp_path, "k", b"x")
    _put(store, tmp_path, "other", b"secret")
    url = store.presigned_get("k", filename="f", expires_s=1)
    assert url is not None
    assert httpx.get(url.replace("/p/k?", "/p/other?")).status_code == 403
    assert httpx.get(url[:-4] + ("0000" if url[-4:] != "0000" else "1111")).status_code == 403
    assert httpx.put(url, content=b"y").status_code == 403
    time.sleep(2.1)
    assert httpx.get(url).status_code == 403


@pytest.mark.parametrize("minutes", [-10, -5, 0, 5])
def test_presigned_urls_end_when_they_should_where_this_machine_s_clock_is_off(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    _put(store, tmp_path, "k", b"content")
    upload, off, shared = store.begin_upload("u"), timedelta(minutes=minutes), SharedClock()
    asked = shared.reading()
    shared.learn(datetime.now(UTC), asked, shared.reading())
    right = clock._own
    monkeypatch.setattr(s3, "CLOCK", shared)
    monkeypatch.setattr(clock, "_own", lambda: right() + off.total_seconds())
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: datetime.now(UTC) + off)
    before = time.time()
    urls = {
        "GET": store.presigned_get("k", filename="f", expires_s=400),
        "PUT": store.presigned_part("u", upload, 1, size_bytes=1, expires_s=400),
    }
    after = time.time()
    for method, url in urls.items():
        assert url is not None
        assert httpx.request(method, url, content=b"x" if method == "PUT" else None).status_code == 200
        told = parse_qs(urlsplit(url).query)
        signed = datetime.strptime(told["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        assert before - 2 <= signed.timestamp() + int(told["X-Amz-Expires"][0]) - 400 <= after + 2


def test_presigned_parts(store: S3Store) -> None:
    upload = store.begin_upload("u")
    contents = {2: b"b" * 100, 1: b"a" * (5 * MIB)}
    for number, content in contents.items():
        url = store.presigned_part("u", upload, number, size_bytes=len(content), expires_s=60)
        assert url is not None
        for wrong in (content + b"x", content[:-1]):
            assert httpx.put(url, content=wrong).status_code == 403, "a part has its size, no other"
        assert httpx.put(url, content=content).status_code == 200
        assert httpx.put(url.replace("partNumber=", "partNumber=1"), content=b"x").status_code == 403
    parts = store.list_parts("u", upload)
    assert [(p.number, p.size_bytes) for p in parts] == [(1, 5 * MIB), (2, 100)]
    store.complete_upload("u", upload, parts)
    with store.open("u") as stream:
        assert stream.read() == contents[1] + contents[2]


def test_presigned_urls_carry_the_public_address(fresh_bucket: S3Bucket, tmp_path: Path) -> None:
    public = fresh_bucket.server.endpoint_url.replace("127.0.0.1", "localhost")
    store = S3Store(fresh_bucket.name, "", fresh_bucket.settings(S3_PUBLIC_ENDPOINT_URL=public))
    _put(store, tmp_path, "k", b"content")
    url = store.presigned_get("k", filename="f", expires_s=60)
    assert url is not None
    assert url.startswith(public + "/")
    assert httpx.get(url).content == b"content"


def test_parts_too_small(store: S3Store, tmp_path: Path) -> None:
    upload = store.begin_upload("u")
    parts: list[StoredPart] = []
    for number in (1, 2):
        (tmp_path / "part").write_bytes(b"tiny")
        parts.append(store.put_part("u", upload, number, tmp_path / "part"))
    with pytest.raises(InvalidUpload, match="EntityTooSmall"):
        store.complete_upload("u", upload, parts)
    assert store.size("u") is None


def test_keys_stay_below_the_prefix(fresh_bucket: S3Bucket, tmp_path: Path) -> None:
    whole = S3Store(fresh_bucket.name, "", fresh_bucket.settings())
    part = S3Store(fresh_bucket.name, "a", fresh_bucket.settings())
    _put(whole, tmp_path, "a/k", b"1")
    _put(whole, tmp_path, "ab/k", b"2")
    assert [o.key for o in part.list("")] == ["k"]
    assert part.size("k") == 1
    assert {o.key for o in whole.list("a")} == {"a/k", "ab/k"}


@pytest.mark.parametrize("wrong", [{"AWS_SECRET_ACCESS_KEY": "nope"}, {"AWS_ACCESS_KEY_ID": "nobody"}])
def test_wrong_credentials(fresh_bucket: S3Bucket, tmp_path: Path, wrong: dict[str, str]) -> None:
    store = S3Store(fresh_bucket.name, "", fresh_bucket.settings(**wrong))
    (tmp_path / "f").write_bytes(b"x")
    for call in (
        lambda: store.put_file("k", tmp_path / "f"),
        lambda: store.open("k"),
        store.check,
        lambda: store.begin_upload("k"),
        lambda: list(store.list("")),
    ):
        with pytest.raises(AppError) as raised:
            call()
        assert raised.value.code == "storage_unavailable"
        assert "credentials" in raised.value.detail


def test_no_such_bucket(fresh_bucket: S3Bucket, tmp_path: Path) -> None:
    store = S3Store("no-such-bucket-here", "", fresh_bucket.settings())
    (tmp_path / "f").write_bytes(b"x")
    calls = (store.check, lambda: store.begin_upload("k"), lambda: list(store.list("")))
    for call in calls:
        with pytest.raises(AppError) as raised:
            call()
        assert raised.value.code == "storage_unavailable"


def test_nobody_listens() -> None:
    store = S3Store("bucket", "", _settings(free_port()))
    started = time.monotonic()
    with pytest.raises(AppError) as raised:
        store.check()
    assert raised.value.code == "storage_unavailable"
    assert raised.value.retryable
    assert time.monotonic() - started < 3, "readiness answers soon"


# Failures that a real server cannot be asked for: a server that answers as told.


@contextmanager
def _server(handler: type[BaseHTTPRequestHandler]) -> Iterator[S3Store]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    store = S3Store("bucket", "", _settings(server.server_port))
    try:
        yield store
    finally:
        store.close()
        server.shutdown()
        server.server_close()
        thread.join()


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # it knows "100 Continue", which the SDK waits for

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (507, "XMinioStorageFull", "storage_full"),
        (507, "InsufficientStorage", "storage_full"),
        (403, "QuotaExceeded", "storage_full"),
        (400, "EntityTooLarge", "storage_full"),
        (403, "AccessDenied", "storage_unavailable"),
        (418, "SomethingNew", "storage_unavailable"),
    ],
)
def test_refused_writes(tmp_path: Path, status: int, code: str, expected: str) -> None:
    class Full(_Quiet):
        def do_HEAD(self) -> None:
            self.answer(404)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(status, f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode())

    source = tmp_path / "f"
    source.write_bytes(b"x" * 1000)
    with _server(Full) as store, pytest.raises(AppError) as raised:
        store.put_file("k", source, move=True)
    assert raised.value.code == expected
    assert source.exists(), "what was not stored is not consumed"


class _Breaking(_Quiet):
    """Serves one object, and hangs up after 300,000 bytes of every answer."""

    content = bytes(range(256)) * 4096
    asked: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.asked.append(wanted)
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        body = self.content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:300_000])
        self.close_connection = True


def test_a_broken_download_goes_on_where_it_stopped() -> None:
    class Handler(_Breaking):
        asked: ClassVar[list[str]] = []

    with _server(Handler) as store, store.open("k", 48_576) as stream:
        assert stream.read() == Handler.content[48_576:]
    assert len(Handler.asked) == 4
    assert len(set(Handler.asked)) == 4


def test_a_download_that_always_breaks_ends() -> None:
    class Handler(_Breaking):
        asked: ClassVar[list[str]] = []
        content = bytes(4 * MIB)

    with _server(Handler) as store, store.open("k") as stream, pytest.raises(AppError) as raised:
        stream.read()
    assert raised.value.code == "storage_unavailable"
    assert raised.value.retryable


def test_a_missing_object_is_not_an_unavailable_storage(store: S3Store, tmp_path: Path) -> None:
    with pytest.raises(BlobNotFound):
        store.fetch("none", tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
