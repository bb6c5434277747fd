"""Two engines as one model of Triton: of their bundles, by the API, checked before a byte is sent."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from anneal_client import Client
from app.db.base import utcnow
from app.db.orm import Tenant
from app.http.services import Services
from tests.api.conftest import assert_problem
from tests.api.test_bundles import CONTENTS, add_engine, bundle

Tensor = tuple[str, str, list[int]]
A: Tensor = ("a", "TYPE_FP32", [8])
B: Tensor = ("b", "TYPE_FP32", [4])


def model(name: str, inputs: list[Tensor], outputs: list[Tensor], batch: int = 8) -> dict[str, Any]:
    """What a worker tells of one, with its files."""
    fields = ("name", "data_type", "dims")
    told = {"name": name, "max_batch_size": batch}
    told |= {k: [dict(zip(fields, t, strict=True)) for t in v] for k, v in (("input", inputs), ("output", outputs))}
    files = {f"{name}/1/model.onnx": "model.onnx", f"{name}/config.pbtxt": "triton/config.pbtxt"}
    return {"triton": {"files": files, "model": told}}


@pytest.fixture
def made(services: Services, job: dict[str, Any], tmp_path: Path) -> Any:
    def make(kinds: dict[str, Any], **options: Any) -> str:
        return add_engine(services, job, bundle(kinds), tmp_path, **options).split("/")[3]

    return make


def url(first: str, second: str, *connect: str) -> str:
    query = httpx.QueryParams([("kind", "triton"), ("then", second), *(("connect", c) for c in connect)])
    return f"/v1/engines/{first}/bundle?{query}"


def test_both_engines_and_their_ensemble_are_one_archive(client: httpx.Client, made: Any, tmp_path: Path) -> None:
    first, second = made(model("one", [A], [B])), made(model("two", [B, A], [A], batch=4))
    answer = client.get(url(first, second))
    assert answer.status_code == 200, answer.text
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        names = archive.getnames()
        texts = {name: archive.extractfile(name).read() for name in names}  # type: ignore[union-attr]  # files only
    assert {name.split("/")[0] for name in names} == {"one", "two", "one-then-two"}
    assert texts["two/1/model.onnx"] == CONTENTS["model.onnx"]
    config = texts["one-then-two/config.pbtxt"].decode()
    assert 'platform: "ensemble"' in config
    assert "max_batch_size: 4" in config
    assert config.count('name: "a"') == 1, "an input of both is one input"
    assert 'name: "a_out"' in config, "and an output of that name has another one"
    part = client.get(url(first, second), headers={"Range": "bytes=700-900"})
    assert (part.status_code, part.content) == (206, answer.content[700:901])
    head = client.head(url(first, second))
    assert (head.status_code, head.headers["etag"]) == (200, answer.headers["etag"])
    with Client(str(client.base_url)) as ours:
        path = ours.download_bundle(first, tmp_path / "m.tar", kind="triton", then=second, connect={"b": "b"})
    assert path.read_bytes() == answer.content


def test_names_may_hold_colons_and_one_output_go_to_several_inputs(client: httpx.Client, made: Any) -> None:
    first = made(model("one", [A], [("out:0", *B[1:]), ("out", *B[1:])]))
    second = made(model("two", [("in:0", *B[1:]), ("in", *B[1:])], [A]))
    text = client.get(url(first, second, "out:0:in:0", "out:0:in")).text
    assert text.count('value: "one/out:0"') == 3
    assert 'one/out"' not in text


def test_an_output_that_gives_its_name_to_an_input_takes_no_others(client: httpx.Client, made: Any) -> None:
    first, second = made(model("one", [A], [B])), made(model("two", [B], [A, ("a_out", *A[1:])]))
    text = client.get(url(first, second)).text
    assert 'value: "a_out_out"' in text
    assert text.count('value: "a_out"') == 1


@pytest.mark.parametrize(
    ("first", "second", "connect", "words"),
    [
        (model("one", [A], [B]), model("one", [B], [A]), (), "Both are called 'one'"),
        (model("one", [A], [B], 0), model("two", [B], [A]), (), "'one' is served one by one"),
        (model("one", [A], [B]), model("two", [("b", "TYPE_INT64", [4])], [A]), (), "'b' (FP32 [4]) does not fit"),
        (model("one", [A], [B]), model("two", [("b", "TYPE_FP32", [5])], [A]), (), "does not fit 'b' (FP32 [5])"),
        (model("one", [A], [B]), model("two", [("b", "TYPE_FP32", [4, 1])], [A]), (), "does not fit"),
        (model("one", [A], [B, A]), model("two", [("x", *B[1:])], [A]), (), "No output of the first ('b', 'a')"),
        (model("one", [A], [B]), model("two", [B], [A]), ("b:x",), "'b:x' is no output:input"),
        (model("one", [A], [B]), model("two", [B], [A]), ("",), "'' is no output:input"),
        (model("one", [A], [B]), model("two", [B], [A]), ("b:b", "b:b"), "connected twice"),
        (model("one", [A], [B]), model("two", [B, ("a", "TYPE_INT64", [8])], [A]), (), "'a' (FP32 [8]) does not fit"),
    ],
    ids=["name", "batch", "type", "size", "rank", "unnamed", "unknown", "empty", "twice", "shared"],
)
def test_engines_that_do_not_fit(
    client: httpx.Client, made: Any, first: Any, second: Any, connect: tuple[str, ...], words: str
) -> None:
    problem = assert_problem(client.get(url(made(first), made(second), *connect)), 409, "engines_do_not_fit")
    assert words in problem["detail"]
    assert "connect=" in problem["remedy"]


def test_what_cannot_be_chained(client: httpx.Client, services: Services, made: Any) -> None:
    fits = made(model("one", [A], [B]))
    earlier = model("two", [B], [A])
    del earlier["triton"]["model"]
    without = {"triton": {"reason": "no type."}}
    for other, words in ((earlier, "before there were ensembles"), (without, "no type.")):
        problem = assert_problem(client.get(url(fits, made(other))), 404, "bundle_kind_missing")
        assert words in problem["detail"]
    strange = model("two", [B], [A])
    strange["triton"]["model"]["input"] = [{"name": "b"}]
    assert_problem(client.get(url(fits, made(strange))), 404, "bundle_kind_missing")
    assert_problem(client.get(url(fits, "eng_0000000000000000")), 404, "not_found")
    with services.db.write() as uow:
        uow.session.add(Tenant(id="tnt_other", name="other", created_at=utcnow()))
    theirs = made(model("two", [B], [A]), tenant="tnt_other")
    assert_problem(client.get(url(fits, theirs)), 404, "not_found")
    assert_problem(client.get(url(theirs, fits)), 404, "not_found")
    problem = assert_problem(client.get(f"/v1/engines/{fits}/bundle?then={fits}"), 422, "invalid_request")
    assert problem["errors"][0]["pointer"] == "/query/then"
    assert_problem(client.get(url(fits, fits, *["b:b"] * 101)), 422, "invalid_request")
