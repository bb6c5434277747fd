"""The client against a service that drops connections, restarts and answers nonsense, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anneal_client import (
    AnnealError,
    AsyncClient,
    Client,
    Conflict,
    ConnectionFailed,
    DigestMismatch,
    Event,
    InvalidRequest,
    JobFailed,
    NotFound,
    Unavailable,
    UploadInterrupted,
    WaitTimeout,
)
from anneal_client.events import changes, parse_stream
from tests.factories.faulty_service import (
    FaultyService,
    answer_json,
    body,
    cut_off,
    drop,
    faulty_service,
    problem,
    ranged,
    stream,
)


class Looped:
    """An `AsyncClient`, each call in an event loop: what blocks and what does not is held to the same tests."""

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self._client, self._runner = client, runner

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = getattr(self._client, name)(*args, **kwargs)
            return self._iterated(found) if hasattr(found, "__anext__") else self._runner.run(found)

        return call

    def _iterated(self, items: Any) -> Iterator[Any]:
        while True:
            try:
                yield self._runner.run(anext(items))
            except StopAsyncIteration:
                return


@pytest.fixture
def service() -> Iterator[FaultyService]:
    with faulty_service() as server:
        yield server


@pytest.fixture(params=["blocking", "looped"])
def client(
    request: pytest.FixtureRequest, service: FaultyService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Any]:
    monkeypatch.setattr("anneal_client.transport.MAX_PAUSE_S", 0.05)
    monkeypatch.setenv("ANNEAL_CACHE", str(tmp_path / "cache"))
    if request.param == "blocking":
        with Client(service.url, "secret", retries=3) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        looped = Looped(AsyncClient(service.url, "secret", retries=3), runner)
        yield looped
        looped.close()


def test_a_creating_call_is_retried_with_the_same_idempotency_key(service: FaultyService, client: Client) -> None:
    unavailable = problem(503, code="storage_unavailable", detail="Not now.")
    service.on("POST", "/v1/jobs", drop, unavailable, answer_json(202, {"id": "job_1"}))
    assert client.submit({"model_id": "mdl_0"}, model_id="mdl_1") == {"id": "job_1"}
    keys = {headers["idempotency-key"] for _, _, headers, _ in service.seen}
    assert len(service.seen) == 3
    assert len(keys) == 1
    assert json.loads(service.seen[0][3]) == {"model_id": "mdl_1"}
    assert service.seen[0][2]["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, NotFound), (409, Conflict), (422, InvalidRequest), (500, Unavailable), (503, Unavailable)],
)
def test_problem_documents_become_typed_errors(
    service: FaultyService, client: Client, status: int, kind: type[AnnealError]
) -> None:
    errors = [{"pointer": "/model_id", "message": "is missing"}]
    members = {"code": "some_code", "detail": "It is so.", "remedy": "Do that.", "tensor": "x", "errors": errors}
    service.on("GET", "/v1/jobs/job_1", problem(status, **members))
    with pytest.raises(kind) as caught:
        client.job("job_1")
    error = caught.value
    assert (error.code, error.detail, error.remedy, error.status) == ("some_code", "It is so.", "Do that.", status)
    assert "/model_id is missing" in str(error)
    assert "tensor 'x'" in str(error)
    assert len(service.seen) == (4 if status == 503 else 1)


def test_answers_that_are_no_json_are_errors(service: FaultyService, client: Client) -> None:
    service.on("GET", "/v1/capabilities", body(200, b"<html>", Content_Type="text/html"))
    with pytest.raises(AnnealError, match="unexpected_response"):
        client.capabilities()
    service.on("GET", "/v1/jobs/x", body(500, b"<html>oops"))
    with pytest.raises(Unavailable, match="http_500"):
        client.job("x")


def test_nobody_listening_and_addresses_that_are_none(service: FaultyService, client: Client) -> None:
    service.on("GET", "/v1/capabilities", drop)
    with pytest.raises(ConnectionFailed):
        client.capabilities()
    assert len(service.seen) == 4
    for address in ("localhost:8000", "ftp://host", "http://", "http://[::"):
        with pytest.raises(AnnealError, match="invalid_url"):
            Client(address)


def test_a_file_is_uploaded_raw_with_its_digest_and_sent_again_whole(
    service: FaultyService, client: Client, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "m.onnx").write_bytes(content)
    service.on("POST", "/v1/models", drop, answer_json(201, {"id": "mdl_1"}))
    assert client.upload_model(tmp_path / "m.onnx", "näme & co")["id"] == "mdl_1"
    for _, path, headers, received in service.seen:
        assert received == content
        assert path == "/v1/models?name=n%C3%A4me+%26+co&filename=m.onnx"
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert headers["content-digest"] == f"sha-256=:{digest}:"
        assert headers["content-length"] == str(len(content))
    assert len({headers["idempotency-key"] for _, _, headers, _ in service.seen}) == 1


def test_parts_go_where_told_without_the_key_and_missing_ones_are_resumed(
    service: FaultyService, client: Client, tmp_path: Path
) -> None:
    content = b"".join(bytes([n]) * 1000 for n in range(4))[:3500]
    (tmp_path / "d.npz").write_bytes(content)
    foreign = f"http://localhost:{service.server_address[1]}/bucket"  # another origin, as a presigned URL is
    urls = [f"{foreign}/1", f"{foreign}/2", "/v1/uploads/upl_1/parts/3", "/v1/uploads/upl_1/parts/4"]
    session = {"id": "upl_1", "part_size": 1000, "part_urls": urls, "size_bytes": 3500, "received_parts": []}
    service.on("POST", "/v1/uploads", answer_json(201, session))
    ok = body(200, b"")
    service.on("PUT", "/bucket/1", drop, ok)
    service.on("PUT", "/bucket/2", ok)
    service.on("PUT", "/v1/uploads/upl_1/parts/3", problem(422, code="wrong_part", detail="No."))
    service.on("PUT", "/v1/uploads/upl_1/parts/4", ok)
    with pytest.raises(UploadInterrupted) as caught:
        client.upload_dataset(tmp_path / "d.npz", parts_above=100, workers=2)
    assert caught.value.upload_id == "upl_1"
    foreign_puts = [headers for _, path, headers, _ in service.seen if path.startswith("/bucket")]
    assert foreign_puts
    assert not any("authorization" in headers for headers in foreign_puts)
    assert all(headers["content-length"] == "1000" for headers in foreign_puts)

    service.seen.clear()
    there = [{"number": 1, "size_bytes": 1000}, {"number": 2, "size_bytes": 1000}]
    service.on("GET", "/v1/uploads/upl_1", answer_json(200, {**session, "received_parts": there}))
    service.on("PUT", "/v1/uploads/upl_1/parts/3", ok)
    service.on("POST", "/v1/uploads/upl_1/complete", answer_json(200, {"id": "upl_1"}))
    service.on("POST", "/v1/datasets", answer_json(201, {"id": "dst_1"}))
    assert client.upload_dataset(tmp_path / "d.npz", upload_id="upl_1") == {"id": "dst_1"}
    puts = sorted((path, received) for method, path, _, received in service.seen if method == "PUT")
    assert puts == [("/v1/uploads/upl_1/parts/3", content[2000:3000]), ("/v1/uploads/upl_1/parts/4", content[3000:])]
    assert json.loads(service.seen[-1][3]) == {"name": "d", "upload_id": "upl_1"}


def test_a_download_resumes_by_range_and_is_verified(service: FaultyService, client: Client, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4000
    sha256 = hashlib.sha256(content).hexdigest()
    service.on("GET", "/v1/engines/eng_1", answer_json(200, {"id": "eng_1", "sha256": sha256}))
    quoted = f'"{sha256}"'
    download = "/v1/engines/eng_1/download"
    service.on("GET", download, cut_off(content, 300_000, ETag=quoted), ranged(content, quoted))
    path = client.download_engine("eng_1", tmp_path / "sub" / "engine.onnx")
    assert path.read_bytes() == content
    ranges = [headers.get("range") for _, target, headers, _ in service.seen if target == download]
    assert ranges[0] is None
    assert ranges[1] is not None
    assert [p.name for p in path.parent.iterdir()] == ["engine.onnx"]

    # A whole part left by an earlier process needs no byte more; foreign bytes are found out and removed.
    part = path.with_name(f".engine.onnx.{sha256[:16]}.part")
    part.write_bytes(content)
    client.download_engine("eng_1", path)
    part.write_bytes(b"x" * len(content))
    with pytest.raises(DigestMismatch):
        client.download_engine("eng_1", path)
    assert not part.exists()
    part.write_bytes(b"x" * (len(content) + 1))
    assert client.download_engine("eng_1", path).read_bytes() == content


def test_a_bundle_is_verified_by_its_etag_through_a_redirect(
    service: FaultyService, client: Client, tmp_path: Path
) -> None:
    foreign = f"http://localhost:{service.server_address[1]}/bucket/b"
    sha256 = hashlib.sha256(b"bundle").hexdigest()
    redirect = body(307, b"", Location=foreign, ETag=f'"{sha256}"')
    service.on("GET", "/v1/engines/eng_1/bundle", redirect)
    service.on("GET", "/bucket/b", body(200, b"bundle", ETag='"0123"'))
    assert client.download_bundle("eng_1", tmp_path / "b.zip").read_bytes() == b"bundle"
    assert "authorization" not in service.seen[-1][2]
    service.on("GET", "/bucket/b", body(200, b"other", ETag='"0123"'))
    with pytest.raises(DigestMismatch):
        client.download_bundle("eng_1", tmp_path / "c.zip")
    assert not (tmp_path / "c.zip").exists()


def test_events_resume_after_the_last_one_seen(service: FaultyService, client: Client) -> None:
    first = 'id: 1\nevent: state\ndata: {"status": "running"}\n\n: ping\n\nid: 2\nevent: stage\ndata: {"stage"'
    second = 'id: 2\nevent: stage\ndata: {"stage": "export"}\n\nid: 3\nevent: state\ndata: {"status": "succeeded"}\n\n'
    service.on("GET", "/v1/jobs/job_1/events", stream(first), problem(503, code="x", detail="y"), stream(second))
    service.on(
        "GET", "/v1/jobs/job_1", answer_json(200, {"status": "running"}), answer_json(200, {"status": "succeeded"})
    )
    seen: list[Event] = []
    assert client.wait("job_1", seen.append)["status"] == "succeeded"
    assert [event.id for event in seen] == ["1", "2", "3"]
    resumed = [headers.get("last-event-id") for _, path, headers, _ in service.seen if path.endswith("/events")]
    assert resumed == [None, "1", "1"]


def test_without_a_stream_the_job_is_polled(service: FaultyService, client: Client) -> None:
    error = {"code": "no_feasible_candidate", "detail": "None fits.", "remedy": "Allow more."}
    stages = [{"name": "export", "status": "succeeded", "cached": True}]
    service.on("GET", "/v1/jobs/job_1/events", body(200, b"{}", Content_Type="application/json"))
    service.on(
        "GET",
        "/v1/jobs/job_1",
        answer_json(200, {"status": "running", "progress": 0.1, "stages": []}, ETag='"a"'),
        body(304, b""),
        answer_json(200, {"status": "failed", "progress": 0.5, "stages": stages, "error": error}),
    )
    seen: list[Event] = []
    with pytest.raises(JobFailed) as caught:
        client.wait("job_1", seen.append)
    assert (caught.value.code, caught.value.remedy) == ("no_feasible_candidate", "Allow more.")
    kinds = [(event.type, event.data.get("status")) for event in seen if event.type != "progress"]
    assert kinds == [("state", "running"), ("stage", "succeeded"), ("state", "failed")]
    assert any(headers.get("if-none-match") == '"a"' for _, _, headers, _ in service.seen)
    assert client.wait("job_1", check=False)["status"] == "failed"


def test_events_of_a_job_that_is_not_there(service: FaultyService, client: Client) -> None:
    service.on("GET", "/v1/jobs/job_1.*", problem(404, code="not_found", detail="There is no job."))
    with pytest.raises(NotFound):
        list(client.events("job_1"))


def test_event_stream_grammar() -> None:
    lines = ["data:one", "data: two", "", "event: note", "", "id: 7", "data: {}", "", "retry: 5", "data", ""]
    assert list(parse_stream(lines)) == [
        Event("message", {"message": "one\ntwo"}),
        Event("message", {}, "7"),
        Event("message", {"message": ""}, "7"),
    ]
    assert list(changes({}, {"status": "queued"})) == [Event("state", {"status": "queued", "error": None})]


def test_a_wait_ends_with_the_job_or_with_its_time(service: FaultyService, client: Client) -> None:
    running = stream('id: 1\nevent: progress\ndata: {"progress": 0.5}\n\n')
    service.on("GET", "/v1/jobs/job_1/events", running)
    service.on("GET", "/v1/jobs/job_1", answer_json(200, {"id": "job_1", "status": "running"}))
    seen: list[Event] = []
    with pytest.raises(WaitTimeout, match=r"running after 0\.3 s"):
        client.wait("job_1", seen.append, timeout_s=0.3)
    assert {event.type for event in seen} == {"progress"}


def test_calls_block_in_a_notebook_too(service: FaultyService) -> None:
    """Where an event loop runs already, in the same thread."""
    told = 'id: 1\nevent: state\ndata: {"status": "succeeded"}\n\n'
    service.on("GET", "/v1/jobs/job_1/events", stream(told))
    service.on("GET", "/v1/jobs/job_1", answer_json(200, {"id": "job_1", "status": "succeeded"}))
    service.on("GET", "/v1/jobs", answer_json(200, {"items": [{"id": "job_1"}] * 3, "next_cursor": None}))

    async def cell() -> None:
        with Client(service.url) as client:
            assert client.wait("job_1").status == "succeeded"
            assert next(client.jobs()).id == "job_1"  # the rest is not asked for
            assert len(list(client.jobs())) == 3
        await asyncio.sleep(0)

    asyncio.run(cell())


def test_lists_are_followed_page_by_page(service: FaultyService, client: Client) -> None:
    first = {"items": [{"id": "job_3"}, {"id": "job_2"}], "next_cursor": "c&1"}
    second = {"items": [{"id": "job_1"}], "next_cursor": None}
    service.on("GET", "/v1/jobs", answer_json(200, first), problem(503, code="x", detail="y"), answer_json(200, second))
    jobs = client.jobs(status="failed")
    assert next(jobs).id == "job_3"
    assert len(service.seen) == 1
    assert [job.id for job in jobs] == ["job_2", "job_1"]
    assert service.queries == ["status=failed&limit=100", *["status=failed&limit=100&cursor=c%261"] * 2]


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, Any]:
        return {n: f for n, f in vars(kind).items() if callable(f) and not n.startswith("_")}

    blocking, looped = calls(Client), calls(AsyncClient)
    assert list(blocking) == list(looped)
    for name, call in blocking.items():
        here, there = inspect.signature(call).parameters, inspect.signature(looped[name]).parameters
        assert {n: (p.kind, p.default) for n, p in here.items()} == {n: (p.kind, p.default) for n, p in there.items()}
        assert call.__doc__ is not None
        assert call.__doc__ == looped[name].__doc__
