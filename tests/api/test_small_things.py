"""Corners of HTTP and of numbers and names, each of which was answered wrongly once."""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import helper

from tests.api.conftest import assert_problem
from tests.factories import onnx_models


def test_head_has_no_ranges_and_is_allowed(client: httpx.Client, model: dict[str, Any], model_bytes: bytes) -> None:
    path = model["links"]["download"]
    head = client.head(path, headers={"Range": "bytes=0-9"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(model_bytes)))
    assert "content-range" not in head.headers
    for target, allowed in (
        (path, "GET, HEAD"),
        ("/v1/models", "GET, POST"),
        (model["links"]["self"], "DELETE, GET"),
        ("/v1/uploads/upl_0/parts/1", "GET, PUT"),
        ("/healthz", "GET"),
    ):
        response = client.patch(target)
        assert_problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == allowed


def test_a_key_whose_resource_was_deleted_makes_no_other(client: httpx.Client, model_bytes: bytes) -> None:
    headers = {"Idempotency-Key": "k"}

    def create() -> httpx.Response:
        return client.post("/v1/models?filename=a.onnx", content=model_bytes, headers=headers)

    made = create().json()
    assert client.delete(made["links"]["self"]).status_code == 204
    problem = assert_problem(create(), 409, "idempotency_resource_gone")
    assert problem["remedy"]


def test_a_job_is_the_same_request_with_and_without_defaults(
    client: httpx.Client, worker: Any, model: dict[str, Any]
) -> None:
    """What a later version adds to the spec does not make a repeated request another one."""
    headers = {"Idempotency-Key": "k"}
    first = client.post("/v1/jobs", json={"model_id": model["id"], "search": {}}, headers=headers).json()
    again = client.post("/v1/jobs", json={"model_id": model["id"], "budget_seconds": 900}, headers=headers)
    assert again.json()["id"] == first["id"]


@pytest.mark.parametrize("number", [2**31, 2**40, 2**63 - 1, -1])
@pytest.mark.parametrize("field", ["opset", "ir_version"])
def test_numbers_beyond_the_database(client: httpx.Client, field: str, number: int) -> None:
    graph = onnx_models.mlp().graph
    opset = helper.make_opsetid("", number if field == "opset" else 17)
    model = helper.make_model(graph, opset_imports=[opset])
    if field == "ir_version":
        model.ir_version = number
    response = client.post("/v1/models?filename=a.onnx", content=model.SerializeToString())
    assert_problem(response, 422, "invalid_model")


@pytest.mark.parametrize("shape", ["(1, 0, 10**30)", "(10**30, 0)", f"({2**63}, 0)", "(1, 0, 99999999999999999999)"])
def test_dimensions_beyond_the_database(client: httpx.Client, shape: str) -> None:
    shape = shape.replace("10**30", str(10**30))
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("input.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    response = client.post("/v1/datasets?filename=d.npz", content=data.getvalue())
    assert_problem(response, 422, "invalid_dataset")
    good = io.BytesIO()
    np.savez(good, input=np.zeros((2, 8), np.float32))
    assert client.post("/v1/datasets?filename=d.npz", content=good.getvalue()).status_code == 201


def test_ids_that_are_none(client: httpx.Client) -> None:
    for upload_id in ("\x00", "upl_\x00", "a" * 70, "upl_'; --", ""):
        for path in ("/v1/models", "/v1/datasets"):
            assert_problem(client.post(path, json={"upload_id": upload_id}), 422, "invalid_request")


@pytest.mark.parametrize(
    ("character", "taken"),
    [("\u202e", False), ("\u2066", False), ("\u0085", False), ("\x1b", False), ("\u200d", True), ("\u200f", True)],
)
def test_characters_in_names_are_the_same_everywhere(
    client: httpx.Client, model_bytes: bytes, character: str, taken: bool
) -> None:
    name = f"a{character}b"

    def refused(response: httpx.Response) -> bool:
        if response.status_code == 422:
            assert_problem(response, 422, response.json()["code"])
        return response.status_code == 422

    def renamed(old: str) -> bytes:
        model = onnx_models.mlp()
        for node in model.graph.node:
            node.input[:] = [name if value == old else value for value in node.input]
        model.graph.input[0].name = name
        return model.SerializeToString()

    data = io.BytesIO()
    np.savez(data, **{name: np.zeros((2, 8), np.float32)})
    post = client.post
    answers = {
        "name": post("/v1/models", params={"name": name, "filename": "a.onnx"}, content=model_bytes),
        "file name": post("/v1/models", params={"filename": f"{name}.onnx"}, content=model_bytes),
        "form": post("/v1/models", files={"file": ("a.onnx", model_bytes)}, data={"name": name}),
        "upload": post("/v1/uploads", json={"filename": f"{name}.onnx", "size_bytes": 10}),
        "filter": client.get("/v1/models", params={"name": name}),
        "tensor": post("/v1/models?filename=a.onnx", content=renamed("input")),
        "array": post("/v1/datasets?filename=d.npz", content=data.getvalue()),
    }
    assert {what: not refused(answer) for what, answer in answers.items()} == dict.fromkeys(answers, taken)


def test_a_model_that_describes_itself_at_length(client: httpx.Client) -> None:
    """Its names would come back with every answer about it."""
    model = onnx_models.mlp()
    for number in range(700):
        model.graph.output.add().CopyFrom(model.graph.output[0])
        model.graph.output[-1].name = f"{number:02000}"
    response = client.post("/v1/models?filename=a.onnx", content=model.SerializeToString())
    assert "take" in assert_problem(response, 422, "invalid_model")["detail"]


def test_the_document_tells_the_bounds(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    parameters = {p["name"]: p["schema"] for p in document["paths"]["/v1/models"]["post"]["parameters"]}
    assert _bound(parameters["name"], "maxLength") == 200
    assert _bound(parameters["filename"], "maxLength") == 255
    parameters = {p["name"]: p["schema"] for p in document["paths"]["/v1/jobs"]["get"]["parameters"]}
    assert _bound(parameters["cursor"], "pattern")
    schemas = document["components"]["schemas"]
    assert schemas["Benchmark"]["properties"]["batch_sizes"]["uniqueItems"]
    assert schemas["Quantization"]["properties"]["keep_nodes"]["maxItems"] == 1000


def _bound(schema: dict[str, Any], name: str) -> Any:
    return next(found[name] for found in (schema, *schema.get("anyOf", ())) if name in found)
