"""Large files through the proxy, and beside it: nothing of them is gathered in the memory of an API process or the
proxy, nor held back."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests.cluster.conftest import Front, requests_of, wait_for

SIZE = 192 << 20
ROOM = 48 << 20  # bytes that a process may grow by, whatever passes it


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose bytes cannot be made smaller."""
    path = tmp_path_factory.mktemp("large") / "data.npz"
    values = np.random.default_rng(1).integers(0, 2**32, size=SIZE // 4, dtype=np.uint32).view(np.float32)
    np.savez(path, x=np.nan_to_num(values, nan=0, posinf=0, neginf=0).reshape(-1, 1024))
    return path


def digest_of(chunks: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()


def pieces(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


@contextmanager
def growth(front: Front) -> Iterator[dict[str, int]]:
    """Filled while it lasts: by how many bytes each API process and the proxy grew at most."""
    assert front.cluster.proxy is not None
    watched = {managed.name: managed for managed in (*front.cluster.apis, front.cluster.proxy)}
    processes = {name: psutil.Process(managed.process.pid) for name, managed in watched.items() if managed.process}
    before = {name: process.memory_info().rss for name, process in processes.items()}
    grown, ended = dict.fromkeys(before, 0), threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            for name, process in processes.items():
                grown[name] = max(grown[name], process.memory_info().rss - before[name])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield grown
    finally:
        ended.set()
        thread.join(10)


def warm(front: Front) -> None:
    """Both processes have received and read a file once: what that loads is not the large file's."""
    for url in front.cluster.urls:
        with httpx.Client(base_url=url, headers=front.headers, timeout=60) as http:
            http.post(
                f"/v1/datasets?name={secrets.token_hex(4)}&filename=x.npz", content=b"PK\x03\x04" + bytes(1 << 22)
            )


def test_an_upload_and_its_download(front: Front, large: Path) -> None:
    wanted = digest_of(pieces(large))
    warm(front)
    with front.http(timeout=300) as http, growth(front) as grown:
        sent = http.post("/v1/datasets?name=large&filename=data.npz", content=pieces(large))
        assert sent.status_code == 201, sent.text
        assert sent.json()["sha256"] == wanted
        path = f"/v1/datasets/{sent.json()['id']}/download"
        answer = http.get(path)
        assert answer.status_code == 307
        assert answer.headers["location"].startswith(front.cluster.s3_server.endpoint_url), (
            "the storage sends it itself"
        )
        with httpx.stream("GET", answer.headers["location"], timeout=300) as stream:
            assert digest_of(stream.iter_bytes(1 << 20)) == wanted
        assert int(http.head(path).headers["content-length"]) == large.stat().st_size
    print(f"{large.stat().st_size >> 20} MiB: grown by MiB { ({k: v >> 20 for k, v in grown.items()}) }")
    assert all(size < ROOM for size in grown.values()), grown


def test_presigned_parts(front: Front, large: Path) -> None:
    """They go to the storage, four at once; what comes by the proxy is words about them."""
    size, wanted = large.stat().st_size, digest_of(pieces(large))
    with front.http(timeout=300) as http, growth(front) as grown:
        body = {"filename": "data.npz", "size_bytes": size, "sha256": wanted}
        upload = http.post("/v1/uploads", json=body, headers={"Idempotency-Key": secrets.token_hex(8)}).json()
        assert len(upload["part_urls"]) == upload["parts"] > 2

        def put(number: int, url: str) -> int:
            assert url.startswith(front.cluster.s3_server.endpoint_url)
            with large.open("rb") as file:
                file.seek(number * upload["part_size"])
                return httpx.put(url, content=file.read(upload["part_size"]), timeout=300).status_code

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(put, range(upload["parts"]), upload["part_urls"])) == {200}
        done = http.post(f"/v1/uploads/{upload['id']}/complete")
        while done.status_code == 202:
            time.sleep(0.5)
            done = http.post(f"/v1/uploads/{upload['id']}/complete")
        assert done.status_code == 200, done.text
        made = http.post("/v1/datasets", json={"name": "in-parts", "upload_id": upload["id"]})
        assert made.status_code == 201, made.text
        assert made.json()["sha256"] == wanted
    print(f"{size >> 20} MiB in {upload['parts']} parts: grown by MiB { ({k: v >> 20 for k, v in grown.items()}) }")
    assert all(grown[api.name] < ROOM for api in front.cluster.apis), grown


def test_an_upload_is_passed_on_while_it_is_sent(front: Front) -> None:
    """The API has the beginning of a body whose end was not sent yet."""
    arrived, sent = threading.Event(), threading.Event()
    folders = [front.cluster.folder / api.name / "tmp" for api in front.cluster.apis]

    def received() -> int:
        return sum(path.stat().st_size for folder in folders for path in folder.glob("incoming-*"))

    def body() -> Iterator[bytes]:
        yield b"PK\x03\x04" + bytes(8 << 20)
        sent.set()
        assert arrived.wait(60)
        yield bytes(1024)

    def upload() -> None:
        with front.http() as http:
            answer = http.post("/v1/datasets?name=slow&filename=x.npz", content=body())
            assert answer.status_code == 422, answer.text

    with ThreadPoolExecutor(1) as pool:
        uploading = pool.submit(upload)
        try:
            assert sent.wait(30)
            wait_for(lambda: received() >= 4 << 20, 30)
        finally:
            arrived.set()
        uploading.result()


def test_uploads_that_break_off_turn_nobody_away(front: Front) -> None:
    """A client that sends half of its bodies spoils nothing for the others."""

    def half() -> Iterator[bytes]:
        yield bytes(1 << 20)
        raise ConnectionAbortedError

    for _ in range(12):
        with pytest.raises(ConnectionAbortedError), front.http() as http:
            http.post("/v1/models?name=half&filename=m.onnx", content=half(), headers={"Content-Length": str(2 << 20)})
    before = [requests_of(url) for url in front.cluster.urls]
    with front.http() as http:
        assert {http.get("/v1/models").status_code for _ in range(20)} == {200}
    after = [requests_of(url) for url in front.cluster.urls]
    assert all(b < a for b, a in zip(before, after, strict=True)), "both still serve"
