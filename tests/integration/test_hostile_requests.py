"""What bad requests and curious neighbours get, end to end."""

from __future__ import annotations

import base64
import hashlib
import socket
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from app.network import is_in, is_public
from app.settings import WebhookSettings
from tests.factories import onnx_models
from tests.factories.hostile import Besieged, Json, besieged, npz

pytestmark = pytest.mark.timeout(280)

GOOD = onnx_models.mlp(features=16).SerializeToString()
ONE = {"target": {"backends": ["onnxruntime"]}, "precisions": ["fp32"]}  # candidate, where a job shall just succeed


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Besieged]:
    with besieged(tmp_path_factory.mktemp("hostile_requests") / "home", {"WEBHOOK_MAX_ATTEMPTS": "1"}) as found:
        yield found


@pytest.fixture(scope="module")
def model_id(service: Besieged) -> str:
    return service.acme.stored(GOOD)


@pytest.fixture(scope="module")
def succeeded(service: Besieged, model_id: str) -> Json:
    """A job of acme that went well, on data of its own."""
    samples = np.random.default_rng(0).normal(size=(80, 16))
    data = service.acme.stored(npz(input=samples.astype(np.float32)), "d.npz", "datasets")
    spec = {"calibration": {"dataset_id": data}, "validation": {"dataset_id": data, "max_accuracy_loss_percent": 100}}
    job = service.acme.ended(service.acme.submit(model_id, **spec))
    assert job["status"] == "succeeded", (job["error"], service.deployed.logs())
    return job


# Bodies


def _digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def test_wrong_digest(service: Besieged) -> None:
    headers = {"Content-Digest": _digest(b"something else")}
    response = service.acme.http.post("/v1/models?filename=m.onnx", content=GOOD, headers=headers)
    service.assert_problem(response, 422, "digest_mismatch")


def test_a_body_cut_off_half_way(service: Besieged) -> None:
    """The client goes after half of what it declared, once with the file as the body and once as a part."""
    upload = service.acme.http.post("/v1/uploads", json={"filename": "m.onnx", "size_bytes": 9 << 20}).json()
    for target in ("POST /v1/models?filename=m.onnx", f"PUT {upload['part_urls'][0]}"):
        head = (
            f"{target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {service.acme.key}\r\n"
            f"Content-Length: {9 << 20}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", service.deployed.port), timeout=10) as connection:
            connection.sendall(head.encode() + bytes(5 << 20))
    assert service.acme.http.get(f"/v1/uploads/{upload['id']}").json()["received_parts"] == []
    assert service.acme.http.delete(f"/v1/uploads/{upload['id']}").status_code == 204


def test_sizes_that_lie(service: Besieged) -> None:
    http = service.acme.http
    response = http.post("/v1/uploads", json={"filename": "m.onnx", "size_bytes": 1 << 40})
    service.assert_problem(response, 413, "too_large", remedy=False)
    service.assert_problem(http.post("/v1/models", content=bytes(17 << 20)), 413, "too_large", remedy=False)
    upload = http.post("/v1/uploads", json={"filename": "m.onnx", "size_bytes": len(GOOD) + 1}).json()
    response = http.put(upload["part_urls"][0], content=GOOD)
    service.assert_problem(response, 422, "part_size_mismatch", remedy=False)
    service.assert_problem(http.post(f"/v1/uploads/{upload['id']}/complete"), 409, "upload_incomplete")
    service.assert_problem(http.post("/v1/models", json={"upload_id": upload["id"]}), 409, "upload_not_completed")
    http.delete(f"/v1/uploads/{upload['id']}")
    wanted = {"filename": "m.onnx", "size_bytes": len(GOOD), "sha256": "0" * 64}
    upload = http.post("/v1/uploads", json=wanted).json()
    assert http.put(upload["part_urls"][0], content=GOOD).status_code == 200
    service.assert_problem(http.post(f"/v1/uploads/{upload['id']}/complete"), 422, "digest_mismatch")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b"[" * 200_000, 400, id="deep"),
        pytest.param(b'{"model_id": "' + b"a" * (2 << 20) + b'"}', 413, id="huge"),
        pytest.param(b'{"model_id": "x", "budget_seconds": ' + b"9" * 100_000 + b"}", 400, id="long number"),
        pytest.param(b'{"model_id": "\xff"}', 400, id="no utf-8"),
        pytest.param(b'{"model_id": "a\\u0000"}', 422, id="NUL"),
        pytest.param(b'{"model_id": "\\ud800"}', 422, id="half a surrogate pair"),
        pytest.param(b"[]", 422, id="array"),
        pytest.param(b"", 422, id="empty"),
    ],
)
def test_hostile_json(service: Besieged, body: bytes, status: int) -> None:
    response = service.acme.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) < 10_000
    service.assert_clean(response.text)


def test_many_mistakes_get_a_short_answer(service: Besieged, model_id: str) -> None:
    shapes = {f"x{n}": {"min": [1], "opt": [1], "max": [1]} for n in range(2000)}
    response = service.acme.submit(model_id, shapes=shapes)
    assert len(service.assert_problem(response, 422, "invalid_request")["errors"]) == 50


@pytest.mark.parametrize("name", ["a\r\nX-Evil: 1.onnx", "a\0.onnx", "../m.onnx", "/m.onnx", "..", "a" * 300, "a\\b"])
def test_hostile_file_names(service: Besieged, name: str) -> None:
    problem = service.assert_problem(service.acme.upload(GOOD, name), 422, "invalid_request", remedy=False)
    assert problem["errors"][0]["pointer"] == "/filename"


def test_a_strange_file_name_comes_back_as_one_harmless_header(service: Besieged) -> None:
    name = 'ä";a=b\u2028.onnx'
    model = service.acme.stored(GOOD, name)
    response = service.acme.http.get(f"/v1/models/{model}/download")
    assert response.headers["content-disposition"].startswith('attachment; filename="')
    assert response.headers["content-disposition"].count('"') == 2
    job = service.acme.ended(service.acme.submit(model, **ONE))
    assert job["status"] == "succeeded", job["error"]
    engine = service.acme.http.get(f"/v1/engines/{job['engine_ids'][0]}").json()
    assert "/" not in engine["filename"]
    assert engine["filename"].isascii()


# States


def test_a_model_in_use_is_not_deleted_and_an_ended_job_is_not_cancelled(service: Besieged) -> None:
    model = service.acme.stored(onnx_models.mlp(features=5))
    job = service.acme.submit(model, benchmark={"batch_sizes": [1], "min_seconds": 600}).json()
    service.assert_problem(service.acme.http.delete(f"/v1/models/{model}"), 409, "in_use")
    assert service.acme.http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 202
    deadline = time.monotonic() + 60
    while service.acme.http.get(f"/v1/jobs/{job['id']}").json()["status"] != "cancelled":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again = service.acme.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert (again.status_code, again.json()["status"]) == (202, "cancelled")
    service.assert_problem(service.acme.http.get(f"/v1/jobs/{job['id']}/report"), 404, "no_report")
    assert service.acme.http.delete(f"/v1/models/{model}").status_code == 204
    service.assert_problem(service.acme.submit(model), 422, "invalid_request")


def test_idempotency_keys_hold_one_request(service: Besieged, model_id: str, succeeded: Json) -> None:
    headers = {"Idempotency-Key": "one"}
    body = {"model_id": model_id, "benchmark": {"batch_sizes": [1], "min_seconds": 0.1}, "budget_seconds": 60, **ONE}
    first = service.acme.http.post("/v1/jobs", json=body, headers=headers)
    assert service.acme.http.post("/v1/jobs", json=body, headers=headers).json()["id"] == first.json()["id"]
    other = service.acme.http.post("/v1/jobs", json={**body, "budget_seconds": 99}, headers=headers)
    service.assert_problem(other, 409, "idempotency_conflict")
    upload = service.acme.http.post("/v1/models?filename=m.onnx", content=GOOD, headers=headers)
    service.assert_problem(upload, 409, "idempotency_conflict")
    # The same key in another tenant's hands is another key
    theirs = service.rival.http.post("/v1/models?filename=m.onnx", content=GOOD, headers=headers)
    assert theirs.status_code == 201
    assert service.acme.ended(first)["status"] == "succeeded"


@pytest.mark.parametrize("last", ["abc", "-1", "1.5", "9" * 19])
def test_event_ids_that_are_none(service: Besieged, succeeded: Json, last: str) -> None:
    response = service.acme.http.get(f"/v1/jobs/{succeeded['id']}/events", headers={"Last-Event-ID": last})
    service.assert_problem(response, 422, "invalid_request", remedy=False)


def test_an_event_id_beyond_the_end_ends_the_stream(service: Besieged, succeeded: Json) -> None:
    response = service.acme.http.get(f"/v1/jobs/{succeeded['id']}/events", headers={"Last-Event-ID": "9" * 18})
    assert (response.status_code, "data:" in response.text) == (200, False)


# Tenants


def test_nothing_of_another_tenant_can_be_reached(service: Besieged, model_id: str, succeeded: Json) -> None:
    acme, rival = service.acme.http, service.rival.http
    (engine_id,) = succeeded["engine_ids"]
    data = succeeded["spec"]["validation"]["dataset_id"]
    upload = acme.post("/v1/uploads", json={"filename": "m.onnx", "size_bytes": 4}).json()
    reads = [f"/v1/{kind}/{i}{tail}" for kind, i, tails in (
        ("models", model_id, ("", "/download")),
        ("datasets", data, ("", "/download")),
        ("jobs", succeeded["id"], ("", "/report", "/manifest", "/events")),
        ("engines", engine_id, ("", "/download", "/bundle")),
        ("uploads", upload["id"], ("",)),
    ) for tail in tails]  # fmt: skip
    for path in reads:
        assert acme.get(path).status_code == 200, path
        service.assert_problem(rival.get(path), 404, "not_found", remedy=False)
        etag = acme.get(path).headers.get("etag", '"x"')
        service.assert_problem(rival.get(path, headers={"If-None-Match": etag}), 404, "not_found", remedy=False)
        service.assert_problem(httpx.get(service.deployed.url + path), 401, "unauthorized")
    writes = [
        ("DELETE", f"/v1/models/{model_id}"),
        ("DELETE", f"/v1/datasets/{data}"),
        ("POST", f"/v1/jobs/{succeeded['id']}/cancel"),
        ("PUT", f"/v1/uploads/{upload['id']}/parts/1"),
        ("POST", f"/v1/uploads/{upload['id']}/complete"),
        ("DELETE", f"/v1/uploads/{upload['id']}"),
    ]
    for method, path in writes:
        content = b"evil" if method == "PUT" else None
        service.assert_problem(rival.request(method, path, content=content), 404, "not_found", remedy=False)
    service.assert_problem(rival.post("/v1/models", json={"upload_id": upload["id"]}), 404, "not_found", remedy=False)
    service.assert_problem(service.rival.submit(model_id), 422, "invalid_request")
    own = service.rival.stored(GOOD)
    for section in ("calibration", "validation"):
        response = service.rival.submit(own, **{section: {"dataset_id": data}})
        service.assert_problem(response, 422, "invalid_request")
    for kind in ("datasets", "jobs", "engines"):
        assert rival.get(f"/v1/{kind}").json()["items"] == []
    assert rival.get("/v1/engines", params={"job_id": succeeded["id"]}).json()["items"] == []
    assert model_id not in rival.get("/v1/models").text
    assert acme.get(f"/v1/uploads/{upload['id']}").json()["received_parts"] == []
    assert acme.delete(f"/v1/uploads/{upload['id']}").status_code == 204


def test_the_same_content_is_not_shared_over_tenants(service: Besieged, succeeded: Json) -> None:
    """The neighbour's cache must not answer: that would tell that somebody has this model."""
    job = service.rival.ended(service.rival.submit(service.rival.stored(GOOD), **ONE))
    assert job["status"] == "succeeded"
    first = {stage["key"]: stage for stage in reversed(job["stages"])}  # candidates of one job share their first steps
    assert not any(stage["cached"] for stage in first.values())


def test_webhooks_reach_neither_this_machine_nor_stop_for_a_bad_one(service: Besieged, model_id: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        port = listener.getsockname()[1]
        urls = [
            f"http://127.0.0.1:{port}/",
            f"http://[::ffff:127.0.0.1]:{port}/",
        ]
        for url in urls:
            job = service.acme.ended(service.acme.submit(model_id, webhook={"url": url}, **ONE))
            assert job["status"] == "succeeded"
            deadline = time.monotonic() + 60
            while "webhook given up" not in (text := _events(service, job)):
                assert time.monotonic() < deadline, (url, service.deployed.logs())
                time.sleep(0.2)
            service.assert_clean(text)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("::ffff:127.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("192.0.0.192", False),  # a cloud's metadata
        ("168.63.129.16", False),  # another's
        ("100.100.100.200", False),  # a third one's
        ("fd00:ec2::254", False),
        ("64:ff9b:1::a9fe:a9fe", False),
        ("64:ff9b:1:fffe::1", False),
        ("::ffff:0:a9fe:a9fe", False),
        ("::ffff:0:0808:0808", False),
        ("2001:0:7f00:1::", False),  # Teredo
        ("3fff::1", False),
        ("5f00::1", False),
        ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
    ],
)
def test_addresses_that_webhooks_may_reach(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_an_operators_deny_list_holds_whatever_stands_for_an_address() -> None:
    deny = WebhookSettings.model_validate({"deny": "10.1.0.0/16, 2606:4700::/32,8.8.8.8"}).deny
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::808:808", "2606:4700::1"):
        assert is_in(address, deny), address
    for address in ("10.2.0.1", "8.8.4.4", "2606:2800::1"):
        assert not is_in(address, deny), address


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1", "http://x:99999/", "http://x:0/", "http://a..b/", "http:///path", "http://?",
        "ftp://a/", "http://a b/",
        "http://" + "a" * 64 + ".example/", "http://" + "a." * 130 + "b/", "http://a/\u00e4", "http://[fe80::1%25eth0]/",
        "http://\u2100.example/", "http://a/\u0007", "http://[1.2.3]/", "http://a/\u202e",
    ],
)  # fmt: skip
def test_an_impossible_webhook_is_refused_with_the_job(service: Besieged, model_id: str, url: str) -> None:
    response = service.acme.submit(model_id, webhook={"url": url})
    problem = service.assert_problem(response, 422, "invalid_request", remedy=False)
    assert problem["errors"][0]["pointer"] == "/body/webhook/url"


def _events(service: Besieged, job: Json) -> str:
    return service.acme.http.get(f"/v1/jobs/{job['id']}/events").text


def test_after_all_that_the_same_worker_serves_and_nothing_is_left(service: Besieged) -> None:
    job = service.acme.run(onnx_models.conv_net(), **ONE)
    assert job["status"] == "succeeded", job["error"]
    assert service.worker.poll() is None
    service.assert_nothing_left()
    log = service.deployed.logs()
    assert "internal_error" not in log
    assert "Traceback" not in log
