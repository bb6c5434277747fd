"""`GET /v1/models/{id}/compatibility`: the question, who may answer it, and what is answered."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import httpx
import pytest

from app.compatibility import service as compatibility
from app.http.services import Services
from tests.api.conftest import BACKENDS, HARDWARE
from tests.factories import onnx_models

ANSWER = {
    "backend": "tensorrt-rtx",
    "accepted": False,
    "how": "parsed",
    "refused": [
        {"code": "unsupported_op", "reason": "no such operator", "node": "det", "op": "Det", "remedy": "Drop it."}
    ],
    "refused_count": 1,
    "precisions": [{"name": "fp16", "admitted": True, "reason": None, "needs": "compute capability 8.0 or later"}],
    "changes": ["Drop it."],
    "notes": [],
    "versions": {"tensorrt-rtx": "1.7"},
}
EXAMINES = {"onnxruntime": "onnxruntime 1.32", "tensorrt-rtx": "tensorrt-rtx 1.7"}


def report(services: Services, worker: str = "worker-1", **examines: str) -> None:
    services.capabilities.report(
        worker,
        hostname="host",
        hardware=HARDWARE,
        backends=BACKENDS,
        formats=["onnx", "archive"],
        queues=[],
        examines=examines or EXAMINES,
    )


@pytest.fixture
def asked(client: httpx.Client) -> Callable[[], httpx.Response]:
    body = onnx_models.mlp().SerializeToString()
    model = client.post("/v1/models", params={"name": "m", "filename": "m.onnx"}, content=body).json()
    path = model["links"]["compatibility"]
    return lambda: client.get(path)


def test_without_a_worker_it_waits(asked: Callable[[], httpx.Response]) -> None:
    answer = asked()
    assert (answer.status_code, answer.headers["Retry-After"]) == (202, "2")
    assert answer.json()["status"] == "pending"
    assert "No live worker" in answer.json()["detail"]


def test_asked_taken_answered(asked: Callable[[], httpx.Response], services: Services) -> None:
    report(services)
    first = asked()
    assert first.status_code == 202
    assert [(b["name"], b["status"], b["accepted"]) for b in first.json()["backends"]] == [
        ("onnxruntime", "pending", None),
        ("tensorrt-rtx", "pending", None),
    ]
    question = services.compatibility.take("worker-1", EXAMINES, ["onnx"])
    assert question is not None
    assert question.backends == ("onnxruntime", "tensorrt-rtx")
    assert services.compatibility.take("worker-2", EXAMINES, ["onnx"]) is None, "one at a time"
    services.compatibility.answer(question, "tensorrt-rtx", ANSWER)
    assert asked().status_code == 202
    services.compatibility.fail(question, ["onnxruntime"], {"code": "timed_out", "detail": "too slow"})
    last = asked()
    assert last.status_code == 200
    body = last.json()
    assert body["status"] == "complete"
    failed, told = body["backends"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "timed_out")
    assert (told["accepted"], told["refused"][0]["node"], told["changes"]) == (False, "det", ["Drop it."])
    assert told["answered_at"]
    assert asked().json() == body, "the answer stays"


def test_another_version_is_asked_anew(asked: Callable[[], httpx.Response], services: Services) -> None:
    report(services)
    asked()
    question = services.compatibility.take("worker-1", EXAMINES, ["onnx"])
    assert question is not None
    for backend in EXAMINES:
        services.compatibility.answer(question, backend, ANSWER)
    assert asked().status_code == 200
    report(services, **{**EXAMINES, "tensorrt-rtx": "tensorrt-rtx 1.8"})
    assert [b["name"] for b in asked().json()["backends"] if b["status"] == "pending"] == ["tensorrt-rtx"]


def test_a_lost_worker_and_one_that_comes_back(
    asked: Callable[[], httpx.Response], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(services, onnxruntime="1")
    asked()
    monkeypatch.setattr(compatibility, "LEASE", timedelta(seconds=-1))
    first = services.compatibility.take("worker-1", ["onnxruntime"], ["onnx"])
    second = services.compatibility.take("worker-2", ["onnxruntime"], ["onnx"])
    assert first is not None
    assert second is not None
    assert not services.compatibility.renew(first)
    services.compatibility.answer(first, "onnxruntime", ANSWER)
    assert asked().status_code == 202, "who lost it answers no more"
    services.compatibility.give_back(second, ["onnxruntime"])
    for worker in ("a", "b"):  # what was given back does not count, the worker that was lost before it does
        assert services.compatibility.take(worker, ["onnxruntime"], ["onnx"]) is not None
    assert services.compatibility.take("d", ["onnxruntime"], ["onnx"]) is None
    (told,) = asked().json()["backends"]
    assert (told["status"], told["error"]["code"]) == ("failed", "worker_lost")


def test_only_who_can_answers(asked: Callable[[], httpx.Response], services: Services) -> None:
    report(services)
    asked()
    assert services.compatibility.take("w", ["openvino"], ["onnx"]) is None
    assert services.compatibility.take("w", ["onnxruntime"], ["pt2"]) is None
    question = services.compatibility.take("w", ["onnxruntime", "openvino"], ["onnx"])
    assert question is not None
    assert question.backends == ("onnxruntime",)


def test_of_a_model_that_is_not_there(client: httpx.Client) -> None:
    assert client.get("/v1/models/mdl_nothing/compatibility").status_code == 404


def test_a_deleted_model_is_examined_no_more(
    asked: Callable[[], httpx.Response], services: Services, client: httpx.Client
) -> None:
    report(services)
    model_id = asked().json()["model_id"]
    assert client.delete(f"/v1/models/{model_id}").status_code == 204
    assert services.compatibility.take("w", EXAMINES, ["onnx"]) is None
    assert asked().status_code == 404


def test_what_workers_examine_is_listed(services: Services, client: httpx.Client) -> None:
    report(services)
    (worker,) = client.get("/v1/capabilities").json()["workers"]
    assert worker["examines"] == EXAMINES
    assert "examines" not in worker["hardware"]
