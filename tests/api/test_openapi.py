"""The committed OpenAPI document is that of the code, and names every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.main import create_app
from app.settings import Settings

COMMITTED = Path(__file__).resolve().parents[2] / "openapi.json"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(home=tmp_path_factory.mktemp("home"))).openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, o) for path, methods in document["paths"].items() for method, o in methods.items()]


def test_committed_document(document: dict[str, Any]) -> None:
    remedy = "run: python -m app openapi > openapi.json"
    assert json.loads(COMMITTED.read_text()) == json.loads(json.dumps(document)), remedy


def test_errors_are_problems(document: dict[str, Any]) -> None:
    reference = {"$ref": "#/components/schemas/Problem"}
    for path, method, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) >= 400 and (path, status) != ("/readyz", "503"):
                content = response["content"]
                assert content == {"application/problem+json": {"schema": reference}}, (path, method, status)
        if path.startswith("/v1"):
            assert {"401", "422", "500", "503"} <= set(operation["responses"])
            key, token = operation["security"]
            assert key["ApiKey"] in (["read"], ["submit"], ["admin"], ["operator"]), (path, method)
            assert token["AccessToken"] == key["ApiKey"], (path, method)


def test_described(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert all(operation.get("description") for _, _, operation in operations(document))
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    text = json.dumps(document)
    for name in set(_references(document)):
        assert name in schemas, name
    assert "/tmp" not in text


def test_whatever_a_job_may_ask_for_is_described(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    asked, seen = ["OptimizationSpec"], set[str]()
    while asked:
        name = asked.pop()
        seen.add(name)
        fields = schemas[name]["properties"]
        assert not [f"{name}.{field}" for field, told in fields.items() if not told.get("description")]
        asked += [found for found in _references(fields) if found not in seen]
    assert {"Target", "ShapeRange", "Validation", "Constraints", "Traffic", "Slo", "TensorRt", "Webhook"} <= seen


def test_the_report_has_a_schema_that_may_grow(document: dict[str, Any]) -> None:
    answer = document["paths"]["/v1/jobs/{job_id}/report"]["get"]["responses"]["200"]["content"]
    assert set(answer) == {"application/json", "text/html"}
    kinds = _references(answer["application/json"])
    assert kinds == ["Report", "Comparison"]
    schemas = document["components"]["schemas"]
    for name in (*kinds, "FinalMetrics", "CandidateReport", "ComparedTarget"):
        assert schemas[name]["additionalProperties"] is True, name
    assert {"analysis", "final_metrics", "candidates", "checks"} <= set(schemas["Report"]["properties"])


def test_limits_are_told(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["Benchmark"]["properties"]["batch_sizes"]["uniqueItems"] is True
    for path in ("/v1/models", "/v1/datasets"):
        parameters = {p["name"]: p["schema"] for p in document["paths"][path]["post"]["parameters"]}
        assert (parameters["name"]["minLength"], parameters["name"]["maxLength"]) == (1, 200)
        assert (parameters["filename"]["minLength"], parameters["filename"]["maxLength"]) == (1, 255)
    lists = [o for _, method, o in operations(document) if method == "get" and "Page" in json.dumps(o["responses"])]
    assert len(lists) == 12
    for operation in lists:
        (cursor,) = (p["schema"] for p in operation["parameters"] if p["name"] == "cursor")
        assert cursor["pattern"] == "^[A-Za-z0-9_-]{1,100}$"


def test_webhooks_are_described_by_the_job_document(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    body = document["webhooks"]["job-ended"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/JobEnded"}
    notice, job = schemas["JobNotice"]["properties"], schemas["JobOut"]["properties"]
    assert {name: job[name] for name in notice} == notice


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"].rsplit("/", 1)[1]] if isinstance(value.get("$ref"), str) else []
        return own + [name for item in value.values() for name in _references(item)]
    if isinstance(value, list):
        return [name for item in value for name in _references(item)]
    return []
