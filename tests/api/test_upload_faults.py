"""Upload sessions under real faults: a database that fails at the last step, storage that goes away, completions that
take long, and two requests that want the same upload."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import boto3
import httpx
import psycopg
import pytest
from botocore.config import Config

from anneal_client import Client
from app.db.orm import Upload
from app.http.services import Services
from app.main import create_app
from app.settings import LimitSettings, Settings
from app.uploads.repository import UploadRepository
from tests.api.conftest import assert_problem, files_in, serving
from tests.factories import onnx_models

PART = 5 << 20
CONTENT = onnx_models.mlp(features=1024, hidden=2000).SerializeToString()  # two parts
LEASE_S = 1.0


class Relay:
    """A way to a server that can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.up = True
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.up = False
        for connection in [*self._open]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                if not self.up:
                    connection.close()
                    continue
                there = socket.create_connection(("127.0.0.1", self._target))
                for a, b in ((connection, there), (there, connection)):
                    self._open.add(a)
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()
        self._open.discard(source)


@pytest.fixture
def relay(s3_server: Any) -> Iterator[Relay]:
    with closing(Relay(int(s3_server.endpoint_url.rpartition(":")[2]))) as found:
        yield found


@pytest.fixture(params=["local", "s3"])
def settings(request: pytest.FixtureRequest, settings: Settings, migrated_postgres: str) -> Settings:
    """PostgreSQL, and each kind of storage."""
    limits = LimitSettings(part_bytes=PART, complete_wait_s=0.5, upload_lease_s=LEASE_S)
    changes: dict[str, Any] = {"database_url": migrated_postgres, "require_keys": False, "limits": limits}
    if request.param == "s3":
        bucket, relay = request.getfixturevalue("fresh_bucket"), request.getfixturevalue("relay")
        changes["storage"] = bucket.settings(S3_ENDPOINT_URL=f"http://127.0.0.1:{relay.port}")
    return settings.model_copy(update=changes)


@pytest.fixture
def served(settings: Settings) -> Iterator[Any]:
    app = create_app(settings, dispatch=lambda job: True)
    with serving(app) as url:
        app.state.url = url
        yield app


@pytest.fixture
def services(served: Any) -> Services:
    return served.state.services


@pytest.fixture
def client(served: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.state.url, timeout=30) as client:
        yield client


@pytest.fixture
def at_completion(settings: Settings) -> Callable[[str | None], None]:
    """What the database does when an upload is to become `completed`: SQL, or nothing any more."""
    url = settings.database.replace("+psycopg", "")

    def install(statement: str | None) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP TRIGGER IF EXISTS fault ON uploads")
            if statement is not None:
                body = f"BEGIN {statement}; RETURN NEW; END"
                connection.execute(
                    f"CREATE OR REPLACE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$"
                )
                when = "WHEN (NEW.status = 'completed' AND OLD.status <> 'completed')"
                connection.execute(
                    f"CREATE TRIGGER fault BEFORE UPDATE ON uploads FOR EACH ROW {when} EXECUTE FUNCTION fault()"
                )

    return install


def open_upload(client: httpx.Client, content: bytes = CONTENT, *, send: bool = True, **fields: Any) -> dict[str, Any]:
    body = {"filename": "big.onnx", "size_bytes": len(content), **fields}
    response = client.post("/v1/uploads", json=body)
    assert response.status_code == 201, response.text
    upload: dict[str, Any] = response.json()
    for number, url in enumerate(upload["part_urls"] if send else (), 1):
        part = content[(number - 1) * PART : number * PART]
        answer = httpx.put(url if "://" in url else f"{client.base_url}{url}", content=part, timeout=30)
        assert answer.status_code == 200, answer.text
    return upload


def completed(client: httpx.Client, path: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (state := client.get(path).json())["status"] == "completing":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return state


def left_in_storage(services: Services, settings: Settings) -> list[str]:
    """Keys of storage that belong to upload sessions, and multipart uploads under way."""
    keys = [found.key for found in services.content.store.list("tenants/") if "/uploads/" in found.key]
    if settings.storage_url.startswith("file://"):
        return keys + [str(path) for path in files_in(Path(settings.storage_url[7:]) / "uploads")]
    storage = settings.storage
    assert storage.s3_secret_access_key is not None
    s3 = boto3.client(
        "s3",
        endpoint_url=storage.s3_endpoint_url,
        aws_access_key_id=storage.s3_access_key_id,
        aws_secret_access_key=storage.s3_secret_access_key.get_secret_value(),
        region_name=storage.s3_region,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    with closing(s3):
        found = s3.list_multipart_uploads(Bucket=settings.storage_url[5:]).get("Uploads", [])
    return keys + [upload["Key"] for upload in found]


def is_away(answer: httpx.Response) -> bool:
    """An error of the service; or, on a busy machine, that it is still at it."""
    return answer.status_code >= 500 or answer.status_code == 202


def test_a_database_that_fails_once_the_blob_is_stored(
    client: httpx.Client, services: Services, settings: Settings, at_completion: Callable[[str | None], None]
) -> None:
    upload = open_upload(client, sha256=hashlib.sha256(CONTENT).hexdigest())
    path = upload["links"]["self"]
    at_completion("RAISE EXCEPTION 'the disk of the database is gone'")
    for _ in range(2):
        assert is_away(client.post(f"{path}/complete"))
        assert client.get(path).json()["status"] == "completing"
        assert_problem(client.put(f"{path}/parts/1", content=CONTENT[:PART]), 409, "upload_completing")
        assert_problem(client.get(f"{path}/parts/1"), 409, "upload_completing")
    at_completion(None)
    time.sleep(LEASE_S)
    client.post(f"{path}/complete")
    assert completed(client, path)["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    model = client.post("/v1/models", json={"upload_id": upload["id"]})
    assert model.status_code == 201, model.text
    download = client.get(model.json()["links"]["download"], follow_redirects=True)
    assert hashlib.sha256(download.content).hexdigest() == hashlib.sha256(CONTENT).hexdigest()
    assert left_in_storage(services, settings) == []
    assert not files_in(settings.temp_dir)


def test_a_completion_that_was_left_goes_on_when_somebody_looks(
    client: httpx.Client, services: Services, at_completion: Callable[[str | None], None]
) -> None:
    upload = open_upload(client)
    path = upload["links"]["self"]
    at_completion("RAISE EXCEPTION 'away'")
    assert is_away(client.post(f"{path}/complete"))
    at_completion(None)
    time.sleep(LEASE_S)
    assert completed(client, path)["status"] == "completed"


def test_a_long_completion_is_answered_and_followed(
    client: httpx.Client, at_completion: Callable[[str | None], None], tmp_path: Path, services: Services
) -> None:
    upload = open_upload(client)
    path = upload["links"]["self"]
    at_completion("PERFORM pg_sleep(2.5)")
    for _ in range(2):
        started = time.monotonic()
        answer = client.post(f"{path}/complete")
        assert (answer.status_code, answer.json()["status"]) == (202, "completing")
        assert time.monotonic() - started < 2
    assert client.get(path).json()["received_parts"] == []
    assert_problem(client.put(f"{path}/parts/1", content=CONTENT[:PART]), 409, "upload_completing")
    assert_problem(client.post("/v1/models", json={"upload_id": upload["id"]}), 409, "upload_not_completed")
    assert completed(client, path)["status"] == "completed"
    assert client.post(f"{path}/complete").status_code == 200
    # The client of this project follows it, and does not ask twice.
    (tmp_path / "net.onnx").write_bytes(CONTENT)
    with Client(str(client.base_url)) as own:
        model = own.upload_model(tmp_path / "net.onnx", parts_above=0)
    assert model["sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_the_thread_that_renews_a_lease_outlives_what_nobody_thought_of(
    client: httpx.Client, at_completion: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    renewals: list[float] = []
    renew = UploadRepository.renew

    def fails_once(self: UploadRepository, *arguments: Any) -> None:
        renewals.append(time.monotonic())
        if len(renewals) == 1:
            raise KeyError("what nobody thought of")
        renew(self, *arguments)

    monkeypatch.setattr(UploadRepository, "renew", fails_once)
    path = open_upload(client)["links"]["self"]
    at_completion("PERFORM pg_sleep(1.5)")
    assert client.post(f"{path}/complete").status_code == 202
    assert completed(client, path)["status"] == "completed"
    assert len(renewals) > 1


def test_a_wrong_digest_is_told_to_whoever_asks_later(
    client: httpx.Client, services: Services, settings: Settings
) -> None:
    upload = open_upload(client, sha256="0" * 64)
    path = upload["links"]["self"]
    client.post(f"{path}/complete")
    assert completed(client, path)["error"]["code"] == "digest_mismatch"
    for _ in range(2):
        assert_problem(client.post(f"{path}/complete"), 422, "digest_mismatch")
    assert left_in_storage(services, settings) == []


def test_a_wrong_digest_is_told_while_the_storage_forgets(
    client: httpx.Client, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may take longer than a request waits: the session has failed by then, and nobody is told 200."""
    forgets, forgotten = threading.Event(), services.uploads._clear

    def slowly(upload: Any, stored: bool) -> None:
        forgets.wait(30)
        forgotten(upload, stored)

    monkeypatch.setattr(services.uploads, "_clear", slowly)
    path = open_upload(client, sha256="0" * 64)["links"]["self"]
    try:
        client.post(f"{path}/complete")
        assert completed(client, path)["error"]["code"] == "digest_mismatch"
        for _ in range(2):
            assert_problem(client.post(f"{path}/complete"), 422, "digest_mismatch")
    finally:
        forgets.set()


def test_two_data_sets_do_not_come_of_one_upload(
    client: httpx.Client, at_completion: Callable[[str | None], None]
) -> None:
    for headers in ({}, {"Idempotency-Key": "k"}):
        upload = open_upload(client)
        client.post(f"{upload['links']['self']}/complete")
        assert completed(client, upload["links"]["self"])["status"] == "completed"

        def create(_: int, upload: str = upload["id"], headers: dict[str, str] = headers) -> httpx.Response:
            body = {"name": "one", "upload_id": upload}
            return httpx.post(f"{client.base_url}/v1/models", json=body, headers=headers, timeout=30)

        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(create, range(4)))
        made = {answer.json()["id"] for answer in answers if answer.status_code == 201}
        assert len(made) == 1, [answer.text for answer in answers]
        refused = [answer for answer in answers if answer.status_code != 201]
        assert len(refused) == (0 if headers else 3)
        for answer in refused:
            assert_problem(answer, 409, "upload_consumed")


@pytest.mark.parametrize("settings", ["s3"], indirect=True)
def test_storage_that_is_away_at_the_end_forgets_later(
    client: httpx.Client, services: Services, settings: Settings, relay: Relay
) -> None:
    upload = open_upload(client)
    path = upload["links"]["self"]
    relay.cut()
    for _ in range(2):
        assert_problem(client.delete(path), 503, "storage_unavailable")
        assert client.get(path).json()["status"] == "aborted"
    relay.up = True
    assert left_in_storage(services, settings)
    time.sleep(LEASE_S)
    services.uploads.expire_uploads()
    assert left_in_storage(services, settings) == []
    assert client.delete(path).status_code == 204
    with services.db.read() as session:
        assert session.get_one(Upload, upload["id"]).status == "aborted"


@pytest.mark.parametrize("settings", ["s3"], indirect=True)
def test_storage_that_is_away_at_the_beginning(
    client: httpx.Client, services: Services, settings: Settings, relay: Relay
) -> None:
    body, headers = {"filename": "a.onnx", "size_bytes": 10}, {"Idempotency-Key": "k"}
    relay.cut()
    assert_problem(client.post("/v1/uploads", json=body, headers=headers), 503, "storage_unavailable")
    relay.up = True
    first = client.post("/v1/uploads", json=body, headers=headers)
    assert first.status_code == 201, first.text
    assert client.post("/v1/uploads", json=body, headers=headers).json()["id"] == first.json()["id"]
    assert len(left_in_storage(services, settings)) == 1
    assert client.delete(first.json()["links"]["self"]).status_code == 204
    assert left_in_storage(services, settings) == []


def test_urls_are_signed_one_by_one(client: httpx.Client) -> None:
    response = client.post("/v1/uploads?part_urls=false", json={"filename": "a.onnx", "size_bytes": len(CONTENT)})
    upload = response.json()
    assert (upload["part_urls"], upload["parts"]) == ([], 2)
    for number in (1, 2):
        part = CONTENT[(number - 1) * PART : number * PART]
        found = client.get(f"{upload['links']['self']}/parts/{number}").json()
        assert found["size_bytes"] == len(part)
        url = found["url"] if "://" in found["url"] else f"{client.base_url}{found['url']}"
        assert httpx.put(url, content=part + b"x").status_code in (403, 422)
        assert httpx.put(url, content=part, timeout=30).status_code == 200
    assert_problem(client.get(f"{upload['links']['self']}/parts/3"), 422, "part_number_invalid")
    again = client.get(upload["links"]["self"], params={"part_urls": "false"}).json()
    assert len(again["received_parts"]) == 2
    client.post(f"{upload['links']['self']}/complete")
    assert completed(client, upload["links"]["self"])["status"] == "completed"
