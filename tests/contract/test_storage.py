"""The storage contract, on a local folder and on a real S3 server."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from app.blobs.content import ContentStore, blob_key
from app.errors import AppError
from app.names import content_disposition
from app.settings import Settings
from app.storage.base import BlobNotFound, BlobStore, InvalidUpload, StoredPart
from app.storage.common import validate_key
from app.storage.factory import make_store
from app.storage.local import LocalStore
from app.storage.s3 import S3Store

MIB = 1 << 20
PART = 5 * MIB  # the smallest that S3 takes, save for the last one


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "local":
        return LocalStore(tmp_path / "blobs")
    bucket = request.getfixturevalue("fresh_bucket")
    return S3Store(bucket.name, "some/prefix", bucket.settings())


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[bytes], Path]:
    def make(content: bytes) -> Path:
        path = tmp_path / f"source-{uuid4().hex}"
        path.write_bytes(content)
        return path

    return make


def read(store: BlobStore, key: str, start: int = 0, length: int | None = None) -> bytes:
    with store.open(key, start, length) as stream:
        return stream.read()


# Objects


def test_a_file_comes_back_as_it_went(store: BlobStore, make_file: Callable[[bytes], Path], tmp_path: Path) -> None:
    content = os.urandom(3 * MIB + 17)
    source = make_file(content)
    store.put_file("a/b/c.bin", source)
    assert source.read_bytes() == content, "without `move` the source stays"
    assert store.size("a/b/c.bin") == len(content)
    assert read(store, "a/b/c.bin") == content
    target = tmp_path / "new" / "folder" / "fetched"
    store.fetch("a/b/c.bin", target)
    assert target.read_bytes() == content
    assert [p.name for p in target.parent.iterdir()] == ["fetched"]
    store.fetch("a/b/c.bin", target)
    assert [p.name for p in target.parent.iterdir()] == ["fetched"], "fetching over the same file leaves nothing else"


def test_a_large_file_goes_in_several_parts(
    store: BlobStore, make_file: Callable[[bytes], Path], tmp_path: Path
) -> None:
    content = os.urandom(MIB) * 37
    store.put_file("large", make_file(content), move=True)
    assert store.size("large") == len(content)
    store.fetch("large", tmp_path / "fetched")
    assert hashlib.sha256((tmp_path / "fetched").read_bytes()).digest() == hashlib.sha256(content).digest()
    assert read(store, "large", 16 * MIB - 3, 6) == content[16 * MIB - 3 : 16 * MIB + 3]


def test_an_empty_file(store: BlobStore, make_file: Callable[[bytes], Path], tmp_path: Path) -> None:
    store.put_file("empty", make_file(b""))
    assert store.size("empty") == 0
    assert read(store, "empty") == b""
    store.fetch("empty", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b""


@pytest.mark.parametrize("stored", [b"wrong", b"rig", b""])
def test_content_that_is_not_what_its_digest_says_is_not_handed_out(
    store: BlobStore, make_file: Callable[[bytes], Path], tmp_path: Path, stored: bytes
) -> None:
    digest = hashlib.sha256(b"right").hexdigest()
    store.put_file(blob_key("t", digest), make_file(stored))
    with pytest.raises(AppError, match=digest) as caught:
        ContentStore(store).fetch("t", digest, tmp_path / "fetched")
    assert (caught.value.code, caught.value.retryable) == ("blob_corrupted", True)
    assert not (tmp_path / "fetched").exists()


def test_content_that_was_damaged_on_the_way_is_fetched_again(
    store: BlobStore, make_file: Callable[[bytes], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"right").hexdigest()
    store.put_file(blob_key("t", digest), make_file(b"right"))
    fetches: list[Path] = []
    fetch = store.fetch

    def truncated_once(key: str, path: Path) -> None:
        fetch(key, path)
        fetches.append(path)
        if len(fetches) == 1:
            path.unlink()  # locally it is a link to the object
            path.write_bytes(b"rig")

    monkeypatch.setattr(store, "fetch", truncated_once)
    ContentStore(store).fetch("t", digest, tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"right"


def test_move_consumes_the_source(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    source = make_file(b"moved")
    store.put_file("moved", source, move=True)
    assert not source.exists()
    assert read(store, "moved") == b"moved"


@pytest.mark.parametrize("move", [False, True])
def test_an_existing_object_is_left_as_it_is(store: BlobStore, make_file: Callable[[bytes], Path], move: bool) -> None:
    store.put_file("k", make_file(b"first"))
    store.put_file("k", make_file(b"second"), move=move)
    assert read(store, "k") == b"first"


@pytest.mark.parametrize("move", [False, True])
def test_an_object_may_be_replaced(store: BlobStore, make_file: Callable[[bytes], Path], move: bool) -> None:
    store.put_file("k", make_file(b"first, and longer"))
    source = make_file(b"second")
    store.put_file("k", source, move=move, replace=True)
    assert (read(store, "k"), source.exists()) == (b"second", not move)
    store.put_file("other", make_file(b"third"), replace=True)
    store.copy("other", "k", replace=True)
    store.copy("other", "k", replace=True)
    assert (read(store, "k"), read(store, "other")) == (b"third", b"third")
    assert {found.key for found in store.list("")} == {"k", "other"}


@pytest.mark.parametrize("stored", [b"rig", b"wrong", b"right"])
@pytest.mark.parametrize("trusted", [True, False])
def test_stored_content_of_another_size_or_without_trust_is_replaced(
    store: BlobStore, make_file: Callable[[bytes], Path], stored: bytes, trusted: bool
) -> None:
    content, digest = ContentStore(store), hashlib.sha256(b"right").hexdigest()
    key = blob_key("t", digest)
    expected = stored if trusted and stored == b"wrong" else b"right"
    store.put_file(key, make_file(stored))
    source = make_file(b"right")
    content.put("t", source, digest, move=True, trusted=trusted)
    assert (read(store, key), source.exists()) == (expected, False)
    store.put_file(key, make_file(stored), replace=True)
    store.put_file("joined", make_file(b"right"))
    content.adopt("t", "joined", digest, 5, trusted=trusted)
    assert read(store, key) == expected


def test_many_writers_of_one_key(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    content = os.urandom(MIB)
    sources = [make_file(content) for _ in range(8)]
    failures: list[BaseException] = []
    barrier = threading.Barrier(8)

    def put(index: int) -> None:
        barrier.wait()
        try:
            store.put_file("same/key", sources[index], move=index % 2 == 0)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=put, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert read(store, "same/key") == content


def test_a_changed_source_does_not_change_the_object(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    source = make_file(b"before")
    store.put_file("k", source)
    source.write_bytes(b"after!")
    assert read(store, "k") == b"before"


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, None), (0, 10), (5, 1), (100, None), (990, 100), (999, 1), (1000, None), (2000, 5), (3, 0)],
)
def test_ranges(store: BlobStore, make_file: Callable[[bytes], Path], start: int, length: int | None) -> None:
    content = bytes(range(250)) * 4
    store.put_file("r", make_file(content))
    assert read(store, "r", start, length) == content[start : None if length is None else start + length]


def test_a_stream_reads_in_pieces_and_closes(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    content = os.urandom(2 * MIB)
    store.put_file("s", make_file(content))
    stream = store.open("s", 7, MIB)
    assert stream.readable()
    assert b"".join(iter(lambda: stream.read(100_000), b"")) == content[7 : 7 + MIB]
    stream.close()
    assert stream.closed
    # Given up half-way, as when a client goes.
    stream = store.open("s")
    stream.read(10)
    stream.close()


def test_what_is_not_there(store: BlobStore, tmp_path: Path) -> None:
    assert store.size("nothing/here") is None
    with pytest.raises(BlobNotFound):
        store.open("nothing/here")
    with pytest.raises(BlobNotFound):
        store.fetch("nothing/here", tmp_path / "out" / "f")
    assert list((tmp_path / "out").iterdir()) == []
    store.delete("nothing/here")
    assert list(store.list("")) == []


def test_a_folder_is_no_object(store: BlobStore, make_file: Callable[[bytes], Path], tmp_path: Path) -> None:
    store.put_file("a/b", make_file(b"x"))
    assert store.size("a") is None
    with pytest.raises(BlobNotFound):
        store.open("a")
    with pytest.raises(BlobNotFound):
        store.fetch("a", tmp_path / "f")
    with pytest.raises(BlobNotFound):
        store.open("a/b/c")
    assert store.size("a/b/c") is None
    store.delete("a/b/c")
    assert store.size("a/b") == 1


def test_a_copy_stands_by_itself(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    content = os.urandom(100_000)
    store.put_file("a/source", make_file(content))
    store.copy("a/source", "b/copy")
    store.copy("a/source", "b/copy")
    store.delete("a/source")
    assert (store.size("a/source"), read(store, "b/copy")) == (None, content)
    with pytest.raises(BlobNotFound):
        store.copy("a/source", "c/other")
    store.put_file("a/other", make_file(b"other"))
    store.copy("a/other", "b/copy")
    assert read(store, "b/copy") == content, "an existing object is left as it is"


def test_a_joined_upload_is_copied(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    upload = store.begin_upload("u/joined")
    content = os.urandom(PART + 1000)
    for number, part in enumerate((content[:PART], content[PART:]), 1):
        store.put_part("u/joined", upload, number, make_file(part))
    store.complete_upload("u/joined", upload, store.list_parts("u/joined", upload))
    store.copy("u/joined", "b/copy")
    store.delete("u/joined")
    assert read(store, "b/copy") == content


def test_every_upload_to_a_key_is_forgotten(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    mine = [store.begin_upload("u/key") for _ in range(2)]
    other = store.begin_upload("u/key2")
    store.abort_uploads("u/key")
    store.abort_uploads("u/nothing")
    for upload in mine:
        with pytest.raises(InvalidUpload):
            store.list_parts("u/key", upload)
    assert store.list_parts("u/key2", other) == []


def test_delete(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    store.put_file("d/1", make_file(b"1"))
    store.put_file("d/2", make_file(b"2"))
    store.delete("d/1")
    assert store.size("d/1") is None
    assert store.size("d/2") == 1
    store.put_file("d/1", make_file(b"again"))
    assert read(store, "d/1") == b"again"


def test_delete_of_a_joined_object(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    store.put_file("large", make_file(bytes(33 * MIB)))
    store.delete("large")
    assert store.size("large") is None


def test_list(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    source = make_file(b"abc")
    os.utime(source, (0, 0))  # an old file, as out of an archive, is a new object all the same
    for key in ("t1/aa/1", "t1/aa/2", "t1/ab/3", "t10/x", "u"):
        store.put_file(key, source)
    assert {o.key for o in store.list("")} == {"t1/aa/1", "t1/aa/2", "t1/ab/3", "t10/x", "u"}
    assert {o.key for o in store.list("t1/")} == {"t1/aa/1", "t1/aa/2", "t1/ab/3"}
    assert {o.key for o in store.list("t1")} == {"t1/aa/1", "t1/aa/2", "t1/ab/3", "t10/x"}
    assert {o.key for o in store.list("t1/a")} == {"t1/aa/1", "t1/aa/2", "t1/ab/3"}
    assert {o.key for o in store.list("t1/aa/1")} == {"t1/aa/1"}
    assert list(store.list("none")) == []
    for found in store.list(""):
        assert found.size_bytes == 3
        assert abs(datetime.now(UTC) - found.modified_at) < timedelta(minutes=2)


def test_list_can_delete_as_it_goes(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    source = make_file(b"abc")
    for index in range(20):
        store.put_file(f"d/{index}", source)
    for found in store.list("d/"):
        store.delete(found.key)
    assert list(store.list("d/")) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/./b",
        "a b",
        "a\\b",
        "a\nb",
        "ä",
        "a\x00b",
        "x" * 256,
        "a/" * 600 + "b",
    ],
)
def test_bad_keys_are_refused(store: BlobStore, make_file: Callable[[bytes], Path], tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="storage key"):
        store.put_file(key, make_file(b"x"))
    calls: list[Callable[[], object]] = [
        lambda: store.open(key),
        lambda: store.size(key),
        lambda: store.delete(key),
        lambda: store.fetch(key, tmp_path / "f"),
        lambda: store.begin_upload(key),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="storage key"):
            call()
    if key:
        assert validate_key("a/B-1_2.3") == "a/B-1_2.3"


def test_bad_prefixes_and_ranges_are_refused(store: BlobStore) -> None:
    with pytest.raises(ValueError, match="storage key"):
        list(store.list("../"))
    with pytest.raises(ValueError, match="range"):
        store.open("a", -1)
    with pytest.raises(ValueError, match="range"):
        store.open("a", 0, -1)


def test_a_link_is_not_followed(store: BlobStore, make_file: Callable[[bytes], Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(make_file(b"secret"))
    for move in (False, True):
        with pytest.raises(ValueError, match="regular file"):
            store.put_file("k", link, move=move)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="regular file"):
        store.put_file("k", tmp_path / "pipe")
    assert store.size("k") is None


def test_check(store: BlobStore) -> None:
    store.check()
    assert list(store.list("")) == []


# Uploads in parts


def test_parts_in_any_order_and_sent_again(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    first, second, third = os.urandom(PART), os.urandom(PART + 1), os.urandom(11)
    upload = store.begin_upload("up/1")
    assert list(store.list_parts("up/1", upload)) == []
    store.put_part("up/1", upload, 3, make_file(third))
    store.put_part("up/1", upload, 1, make_file(os.urandom(PART)))
    store.put_part("up/1", upload, 2, make_file(second))
    source = make_file(first)
    part = store.put_part("up/1", upload, 1, source)
    assert not source.exists()
    parts = store.list_parts("up/1", upload)
    assert [(p.number, p.size_bytes) for p in parts] == [(1, PART), (2, PART + 1), (3, 11)]
    assert parts[0] == part
    assert store.size("up/1") is None, "nothing to see before the end"
    store.complete_upload("up/1", upload, [parts[2], parts[0], parts[1]])
    assert read(store, "up/1") == first + second + third
    store.complete_upload("up/1", upload, list(parts))  # the first answer was lost
    assert {o.key for o in store.list("")} == {"up/1"}
    store.abort_upload("up/1", upload)  # too late to do harm
    assert read(store, "up/1") == first + second + third


def test_one_part(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    upload = store.begin_upload("one")
    store.complete_upload("one", upload, [store.put_part("one", upload, 1, make_file(b"tiny"))])
    assert read(store, "one") == b"tiny"


def test_parts_that_do_not_fit(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    upload = store.begin_upload("u")
    first = store.put_part("u", upload, 1, make_file(bytes(PART)))
    third = store.put_part("u", upload, 3, make_file(b"3"))
    absent = StoredPart(2, 1, "0" * 32)
    for parts, message in (
        ([], "no parts"),
        ([first, third], "Part 2 is missing"),
        ([third], "Part 1 is missing"),
        ([first, absent, third], "Part 2 is missing"),
        ([first, first], "named twice"),
        ([StoredPart(1, PART - 1, first.etag)], "bytes instead of"),
        ([StoredPart(1, PART, "0" * 32)], "sent again"),
    ):
        with pytest.raises(InvalidUpload, match=message):
            store.complete_upload("u", upload, parts)
    assert store.size("u") is None
    # And it goes on from there.
    second = store.put_part("u", upload, 2, make_file(bytes(PART)))
    store.complete_upload("u", upload, [first, second, third])
    assert store.size("u") == 2 * PART + 1


def test_unknown_uploads(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    upload = store.begin_upload("u")
    part = store.put_part("u", upload, 1, make_file(b"x"))
    for key, upload_id in (("other", upload), ("u", "0" * 32), ("u", "../objects"), ("u", "no such id")):
        with pytest.raises(InvalidUpload):
            store.list_parts(key, upload_id)
        with pytest.raises(InvalidUpload):
            store.put_part(key, upload_id, 1, make_file(b"y"))
        with pytest.raises(InvalidUpload):
            store.complete_upload(key, upload_id, [part])
        store.abort_upload(key, upload_id)
    for number in (0, -1, 10_001):
        with pytest.raises(InvalidUpload, match="between 1 and"):
            store.put_part("u", upload, number, make_file(b"y"))
    assert [p.number for p in store.list_parts("u", upload)] == [1]


def test_abort(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    upload = store.begin_upload("u")
    part = store.put_part("u", upload, 1, make_file(b"x"))
    store.abort_upload("u", upload)
    store.abort_upload("u", upload)
    with pytest.raises(InvalidUpload):
        store.put_part("u", upload, 1, make_file(b"x"))
    with pytest.raises(InvalidUpload):
        store.complete_upload("u", upload, [part])
    assert store.size("u") is None


def test_an_upload_does_not_replace_an_object(store: BlobStore, make_file: Callable[[bytes], Path]) -> None:
    store.put_file("u", make_file(b"first"))
    upload = store.begin_upload("u")
    part = store.put_part("u", upload, 1, make_file(b"another"))
    with pytest.raises(InvalidUpload, match="Another object"):
        store.complete_upload("u", upload, [part])
    assert read(store, "u") == b"first"


# The factory and the download header


def test_factory_takes_the_folder_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / "a b%20#?"
    settings = Settings(home=odd)
    store = make_store(settings)
    assert store.local_path("k") == odd / "blobs" / "objects" / "k"
    assert not odd.exists(), "nothing is made before the first write"


def test_factory_knows_s3_and_does_not_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_URL", "s3://bucket/some/prefix/")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    started = time.monotonic()
    store = make_store(Settings())
    assert isinstance(store, S3Store)
    url = store.presigned_get("k", filename="f", expires_s=60)
    assert url is not None
    assert url.startswith("http://127.0.0.1:1/bucket/some/prefix/k?")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("url", ["file://relative", "ftp://x/y", "s3://", "/just/a/path", "s3://bucket?x=1"])
def test_factory_refuses_other_urls(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("STORAGE_URL", url)
    with pytest.raises(ValueError, match="STORAGE_URL"):
        make_store(Settings())


@pytest.mark.parametrize(
    ("filename", "header"),
    [
        ("model.onnx", 'attachment; filename="model.onnx"'),
        ("my model.onnx", 'attachment; filename="my model.onnx"'),
        ("../../etc/passwd", 'attachment; filename="_.._etc_passwd"'),
        ('a"; x="b\r\nSet-Cookie: c', 'attachment; filename="a_; x=_b_Set-Cookie_ c"'),
        ("Größe.onnx", "attachment; filename=\"Gr__e.onnx\"; filename*=UTF-8''Gr%C3%B6%C3%9Fe.onnx"),
        ("50%41.bin", "attachment; filename=\"50%41.bin\"; filename*=UTF-8''50%2541.bin"),
        ("", 'attachment; filename="download"'),
        ("...", 'attachment; filename="download"'),
        ("\ud800", 'attachment; filename="_"'),
    ],
)
def test_content_disposition(filename: str, header: str) -> None:
    assert content_disposition(filename) == header
