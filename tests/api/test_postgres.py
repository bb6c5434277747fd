"""The queries that differ between databases, on PostgreSQL: JSON paths, locks, NUL bytes, duplicates."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from app.blobs.references import keep_result
from app.db.orm import LOCAL_TENANT, StageResult
from app.http.services import Services
from app.settings import Settings
from tests.api.conftest import assert_problem, files_in
from tests.factories import onnx_models


@pytest.fixture
def settings(settings: Settings, migrated_postgres: str) -> Settings:
    return settings.model_copy(update={"database_url": migrated_postgres, "require_keys": False})


def test_on_postgres(
    client: httpx.Client,
    services: Services,
    settings: Settings,
    job: dict[str, Any],
    npz: Callable[..., bytes],
    model_bytes: bytes,
) -> None:
    content = npz(input=np.zeros((6, 8), np.float32))
    dataset = client.post("/v1/datasets?filename=d.npz", content=content).json()
    spec = {"model_id": job["model_id"], "calibration": {"dataset_id": dataset["id"]}}
    second = client.post("/v1/jobs", json=spec).json()
    assert_problem(client.delete(dataset["links"]["self"]), 409, "in_use")
    assert_problem(client.delete(job["links"]["model"]), 409, "in_use")
    for made in (job, second):
        assert client.post(made["links"]["cancel"]).json()["status"] == "cancelled"
    assert client.delete(dataset["links"]["self"]).status_code == 204
    model = client.get(job["links"]["model"]).json()
    outputs = {"model": [{"name": "model.onnx", "sha256": model["sha256"], "size_bytes": 1}]}
    with services.db.write() as uow:
        row = StageResult(tenant_id=LOCAL_TENANT, key="0" * 64, stage="export", outputs=outputs, data={}, seconds=1.0)
        keep_result(uow.session, row)
    assert client.delete(job["links"]["model"]).status_code == 204
    assert len(files_in(settings.home_dir / "blobs")) == 1

    for body in ({"model_id": "a\x00"}, {"model_id": "m", "webhook": {"url": "http://a/\x00"}}):
        assert_problem(client.post("/v1/jobs", json=body), 422, "invalid_request")
    assert_problem(client.get("/v1/models/mdl_%00"), 404, "not_found")

    def send(_: int) -> str:
        headers = {"Idempotency-Key": "same"}
        response = httpx.post(f"{client.base_url}/v1/models?filename=a.onnx", content=model_bytes, headers=headers)
        return response.json()["id"]

    with ThreadPoolExecutor(6) as threads:
        assert len(set(threads.map(send, range(12)))) == 1
    assert len(client.get("/v1/models").json()["items"]) == 1
    assert client.get("/readyz").json()["checks"]["database"]["ok"] is True
    assert "anneal_jobs" in client.get("/metrics").text


def test_names_that_postgres_refuses(client: httpx.Client) -> None:
    for bad in ("x\0", "x\n"):
        model = onnx_models.mlp()
        for node in model.graph.node:
            node.input[:] = [bad if i == model.graph.input[0].name else i for i in node.input]
        model.graph.input[0].name = bad
        response = client.post("/v1/models?filename=a.onnx", content=model.SerializeToString())
        assert_problem(response, 422, "invalid_model")
    assert client.get("/v1/models").json()["items"] == []


def test_text_that_postgres_refuses_is_stored_all_the_same(services: Services) -> None:
    data = {"a\0": ["x\0y", "\ud800", "\U0001f600 \\u0000", {"\udfff": (1, None, 0.5)}]}
    with services.db.write() as uow:
        row = StageResult(tenant_id=LOCAL_TENANT, key="1" * 64, stage="export", outputs={}, data=data, seconds=1.0)
        keep_result(uow.session, row)
    with services.db.read() as session:
        stored = session.get_one(StageResult, (LOCAL_TENANT, "1" * 64)).data
    assert stored == {"a\ufffd": ["x\ufffdy", "\ufffd", "\U0001f600 \\u0000", {"\ufffd": [1, None, 0.5]}]}
