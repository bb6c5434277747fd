"""A job on a chain of models: what is refused when it is submitted, and what holds its models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import ModelProto

from anneal_client import Client
from anneal_client.io import run
from app.domain.job_state import JobStatus, Trigger
from app.http.services import Services
from app.jobs.ledger import JobLedger
from app.main import create_app
from app.settings import Settings
from app.tenants import create_key
from tests.api.conftest import assert_problem, report_worker, serving
from tests.api.test_engines import add_engine
from tests.api.test_jobs import advance
from tests.factories import onnx_models
from tests.factories.chains import encoder, head

Json = dict[str, Any]


@pytest.fixture
def upload(client: httpx.Client) -> Callable[..., str]:
    return lambda model: _sent(client, model)


def _sent(client: httpx.Client, model: ModelProto) -> str:
    answer = client.post("/v1/models?name=m&filename=m.onnx", content=model.SerializeToString())
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def chain(first: str, *then: str | Json, **more: Any) -> Json:
    links = [link if isinstance(link, dict) else {"model_id": link} for link in then]
    return {"model_id": first, "chain": {"then": links, **more.pop("chain", {})}, **more}


def test_a_chain_is_one_model_to_what_is_checked(
    client: httpx.Client, worker: Services, upload: Callable[..., str], npz: Callable[..., bytes]
) -> None:
    """Data, shapes, batch axes, the metric and the traffic are about the whole."""
    first, second = upload(encoder()), upload(head())
    x, w = np.zeros((6, 8), np.float32), np.ones((6, 1), np.float32)
    whole, half = (
        client.post("/v1/datasets?filename=d.npz", content=npz(**arrays)).json()["id"]
        for arrays in ({"input": x, "weight": w, "labels": np.zeros(6, np.int64)}, {"input": x})
    )
    body = chain(first, second, validation={"dataset_id": whole, "metric": "top1"})
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["spec"]["chain"] == {"then": [{"model_id": second, "connect": None}], "deploy": "merged"}
    assert job["links"]["model"] == f"/v1/models/{first}"
    for change, pointer, words in (
        ({"validation": {"dataset_id": half}}, "/validation/dataset_id", "'weight'"),
        ({"shapes": {"embedding": {"min": [1, 16], "opt": [1, 16], "max": [1, 16]}}}, "/shapes/embedding", "'weight'"),
        ({"inputs": {"embedding": {"batch_axis": 0}}}, "/inputs/embedding/batch_axis", "no input"),
        ({"quantization": {"training": {"mode": "always"}}}, "/quantization/training/mode", "one model"),
    ):
        problem = assert_problem(client.post("/v1/jobs", json={**body, **change}), 422, "invalid_request")
        assert problem["errors"][0]["pointer"] == pointer
        assert words in json.dumps(problem["errors"])
        assert problem["remedy"]


def test_models_that_do_not_fit_are_refused_with_the_place(
    client: httpx.Client, worker: Services, upload: Callable[..., str], dispatched: list[str]
) -> None:
    first, second, narrow = upload(encoder()), upload(head()), upload(head(width=8))
    ids = upload(onnx_models.embedding())
    for body, pointer, words in (
        (chain(first, narrow), "/chain/then/0/connect/embedding", "does not fit"),
        (chain(first, second, narrow), "/chain/then/1/connect", "no output of the first ('logits')"),
        (chain(first, {"model_id": second, "connect": {"embeding": "embedding"}}), "/chain/then/0/connect/embeding",
         "no input 'embeding'"),
        (chain(first, {"model_id": second, "connect": {"embedding": "x"}}), "/chain/then/0/connect/embedding",
         "no output 'x'"),
        (chain(first, ids), "/chain/then/0/connect/", "does not fit"),
        (chain(first, "mdl_0000000000000000"), "/chain/then/0/model_id", "unknown model"),
        (chain(first), "/body/chain/then", "at least 1"),
        (chain(first, second, chain={"deploy": "both"}), "/body/chain/deploy", "'merged' or 'ensemble'"),
        (chain(first, {"id": second}), "/body/chain/then/0/", "no such field"),
        (chain(first, second, chain={"deploy": "ensemble"}, engines_per_bundle=2), "/body", "one engine of each"),
    ):  # fmt: skip
        problem = assert_problem(client.post("/v1/jobs", json=body), 422, "invalid_request")
        pointers = [error["pointer"] for error in problem["errors"]]
        assert any(p.startswith(pointer) for p in pointers), problem
        assert words in json.dumps(problem, ensure_ascii=False), problem
    assert dispatched == []


def test_another_tenant_s_model_is_none(settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"require_keys": True}), dispatch=lambda job: True)
    with serving(app) as url:
        report_worker(app.state.services)
        alice, bob = (
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20)
            for key in (create_key(app.state.services.db, name, "k") for name in ("alice", "bob"))
        )
        with alice, bob:
            first = _sent(alice, encoder())
            theirs = _sent(bob, head())
            answers = [alice.post("/v1/jobs", json=chain(first, i)) for i in ("mdl_0000000000000000", theirs)]
            told = [assert_problem(answer, 422, "invalid_request")["errors"] for answer in answers]
    assert told == [[{"pointer": "/chain/then/0/model_id", "message": "unknown model"}]] * 2


@dataclass
class _Held:
    job_id: str


def test_every_model_of_a_chain_is_held_until_the_job_has_ended(
    client: httpx.Client, services: Services, worker: Services, upload: Callable[..., str]
) -> None:
    first, second, third = upload(encoder()), upload(head()), upload(onnx_models.mlp(features=4))
    job = client.post("/v1/jobs", json=chain(first, second, third)).json()
    for model in (first, second, third):
        assert job["id"] in assert_problem(client.delete(f"/v1/models/{model}"), 409, "in_use")["detail"]
    ledger = JobLedger(services.db, services.content, lambda job: True, services.settings.worker)
    _, models, _ = ledger.load(_Held(job["id"]))  # type: ignore[arg-type]  # reads the id only
    assert [model.id for model in models] == [first, second, third]
    advance(services, job["id"], Trigger.CANCEL, JobStatus.QUEUED)
    for model in (first, second, third):
        assert client.delete(f"/v1/models/{model}").status_code == 204
    assert client.get(job["links"]["self"]).json()["spec"]["chain"]["then"][1]["model_id"] == third


def test_a_job_and_its_engine_are_found_by_each_model_of_its_chain(
    client: httpx.Client, services: Services, worker: Services, upload: Callable[..., str], tmp_path: Path
) -> None:
    first, second, third = upload(encoder()), upload(head()), upload(onnx_models.mlp(features=4))
    both = client.post("/v1/jobs", json=chain(first, second)).json()["id"]
    all_three = client.post("/v1/jobs", json=chain(first, second, third)).json()["id"]
    alone = client.post("/v1/jobs", json={"model_id": second}).json()["id"]
    for model, wanted in ((first, [all_three, both]), (second, [alone, all_three, both]), (third, [all_three])):
        page = client.get("/v1/jobs", params={"model_id": model}).json()
        assert [job["id"] for job in page["items"]] == wanted
    page = client.get("/v1/jobs", params={"model_id": second, "limit": 1}).json()
    rest = client.get("/v1/jobs", params={"model_id": second, "limit": 1, "cursor": page["next_cursor"]}).json()
    assert [job["id"] for job in rest["items"]] == [all_three]
    assert all_three[-6:] in client.get(f"/models/{third}").text
    engines = [add_engine(services, client.get(f"/v1/jobs/{job}").json(), tmp_path) for job in (both, all_three, alone)]
    for model, numbers in ((first, (1, 0)), (second, (2, 1, 0)), (third, (1,))):
        found = [engine["id"] for engine in client.get("/v1/engines", params={"model_id": model}).json()["items"]]
        assert found == [engines[i] for i in numbers]
    page = client.get("/v1/engines", params={"model_id": second, "limit": 2}).json()
    rest = client.get("/v1/engines", params={"model_id": second, "limit": 2, "cursor": page["next_cursor"]}).json()
    assert [engine["id"] for engine in rest["items"]] == [engines[0]]
    listed = client.get("/jobs", params={"model_id": third}, headers={"Accept": "text/html"}).text
    assert "m, then 2 more" in listed
    assert "only of m<" in listed


def test_the_same_request_is_the_same_job(
    client: httpx.Client, worker: Services, upload: Callable[..., str], dispatched: list[str]
) -> None:
    first, second, other = upload(encoder()), upload(head()), upload(head(seed=5))
    headers = {"Idempotency-Key": "once"}
    answers = [client.post("/v1/jobs", json=chain(first, second), headers=headers) for _ in range(2)]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert_problem(client.post("/v1/jobs", json=chain(first, other), headers=headers), 409, "idempotency_conflict")
    assert len(dispatched) == 1


class _Submits(Client):
    """Does not wait for what no worker takes here."""

    def optimize(self, model: Any, data: Any = None, **spec: Any) -> Any:
        return self.submit(run(self._core.prepared(model, data, None, spec)))


def test_the_page_s_example(
    base_url: str,
    worker: Services,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dispatched: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, model in (("encoder.onnx", encoder()), ("head.onnx", head())):
        onnx_models.save(model, tmp_path / name)
    np.savez("data.npz", input=np.zeros((6, 8), np.float32), weight=np.ones((6, 1), np.float32))
    page = Path(__file__).resolve().parents[2] / "docs/how-to/chain-models.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    with _Submits(base_url) as client:
        names: Json = {"client": client}
        for block in blocks:
            exec(block, names)
        assert [names["result"].id] == dispatched
        assert client.job(dispatched[0]).spec["chain"]["deploy"] == "merged"
