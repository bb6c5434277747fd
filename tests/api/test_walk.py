"""Every operation of the OpenAPI document, asked by whoever may not: with another tenant's ids, by a key and by a token
of the identity provider, and with too small a role. An operation that is new fails here until it is said what it is
asked with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from app.domain.roles import Role
from app.http.pagination import encode_cursor
from app.http.services import Services
from app.main import create_app
from app.settings import OidcSettings, Settings
from app.tenants import create_key
from app.tenants.keys import KeyService
from app.tenants.service import TenantService
from tests.api.conftest import assert_problem, report_worker, serving
from tests.api.test_ended_pages import deliver
from tests.factories.oidc import AUDIENCE, local_provider

# What a path's parameters are filled with: alice's own, by name; and what is nobody's, of the same kind.
_NOBODYS = {
    "model_id": "mdl_0",
    "dataset_id": "dst_0",
    "upload_id": "upl_0",
    "job_id": "job_0",
    "engine_id": "eng_0",
    "key_id": "key_0",
    "webhook_id": "whk_0",
    "delivery_id": "dlv_0",
    "number": "1",
    "tenant_id": "tnt_0",
    "worker_id": "w-0",
    "name": "a-plan",  # asked without a body, none is made
}
# Bodies that are right but for whose ids stand in the path.
_BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("put", "/v1/uploads/{upload_id}/parts/{number}"): {"content": b"x"},
    ("post", "/v1/keys/{key_id}/rotate"): {"json": {"grace_seconds": 0}},
    ("patch", "/v1/webhooks/{webhook_id}"): {"json": {"enabled": False}},
    ("post", "/v1/webhooks/{webhook_id}/rotate"): {"json": {"overlap_seconds": 0}},
}
# Operations without an id in their path, and how each is shown below to keep to its tenant.
_COLLECTIONS = {
    ("get", "/v1/models"): "list",
    ("get", "/v1/datasets"): "list",
    ("get", "/v1/jobs"): "list",
    ("get", "/v1/engines"): "list",
    ("get", "/v1/keys"): "list",
    ("get", "/v1/audit"): "list",
    ("get", "/v1/webhooks"): "list",
    ("get", "/v1/deliveries"): "list",
    ("get", "/v1/tenant"): "own",
    ("get", "/v1/capabilities"): "of all",
    ("post", "/v1/models"): "refers",
    ("post", "/v1/datasets"): "refers",
    ("post", "/v1/jobs"): "refers",
    ("post", "/v1/uploads"): "makes",
    ("post", "/v1/keys"): "makes",
    ("post", "/v1/webhooks"): "makes",
}
_NPZ = {"params": {"name": "d", "filename": "d.npz"}}


@dataclass
class Two:
    """A service with keys, and two tenants, of which alice has one of everything."""

    url: str
    services: Services
    document: dict[str, Any]
    keys: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def client(self, name: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.keys[name]}"}, timeout=20)

    def only(self, path: str) -> str:
        """The id of the one item of alice's list."""
        with self.client("alice") as alice:
            (item,) = alice.get(path).json()["items"]
        return str(item["id"])

    def operations(self) -> Iterator[tuple[str, str, str]]:
        """Method, path, and the role that its key needs."""
        for path, methods in self.document["paths"].items():
            for method, operation in methods.items():
                if path.startswith("/v1/"):
                    yield method, path, operation["security"][0]["ApiKey"][0]


@pytest.fixture
def two(settings: Settings, model_bytes: bytes, npz: Any, tmp_path: Path) -> Iterator[Two]:
    with local_provider() as provider:
        oidc = OidcSettings(issuer=provider.issuer, audience=AUDIENCE)
        app = create_app(settings.model_copy(update={"oidc": oidc}), dispatch=lambda job: True)
        with serving(app) as url:
            found = _two(app, url, model_bytes, npz, tmp_path)
            found.keys["bob's token"] = provider.token(tenant="bob", roles=["anneal-admin"])
            yield found


def _two(app: FastAPI, url: str, model_bytes: bytes, npz: Any, tmp_path: Path) -> Two:
    services: Services = app.state.services
    report_worker(services)
    found = Two(url, services, app.openapi())
    found.keys = {name: create_key(services.db, name, f"key of {name}") for name in ("alice", "bob")}
    alice = TenantService(services.db, services.settings.limits).get("alice")
    for role in (Role.READ, Role.SUBMIT, Role.OPERATOR):
        made = KeyService(services.db).make(alice.id, role.value, role, None, actor="test")
        found.keys[role.value] = made.secret
    found.keys["admin"] = found.keys["alice"]
    with found.client("alice") as client:
        content = npz(input=np.zeros((6, 8), np.float32))
        headers = {"Idempotency-Key": "same"}
        model = client.post("/v1/models?name=m&filename=m.onnx", content=model_bytes, headers=headers).json()
        dataset = client.post("/v1/datasets", content=content, **_NPZ).json()
        job = client.post("/v1/jobs", json={"model_id": model["id"]}).json()
        upload = client.post("/v1/uploads", json={"filename": "u.onnx", "size_bytes": 1}).json()
        key = client.post("/v1/keys", json={"name": "spare"}).json()
        webhook = client.post("/v1/webhooks", json={"url": "https://hooks.example/anneal"}).json()
    engine = deliver(services, job, tmp_path, alice.id)
    found.ids = {
        "model_id": model["id"],
        "dataset_id": dataset["id"],
        "upload_id": upload["id"],
        "job_id": job["id"],
        "engine_id": engine.id,
        "key_id": key["id"],
        "webhook_id": webhook["id"],
        "delivery_id": found.only("/v1/deliveries"),
        "number": "1",
    }
    return found


def _told(response: httpx.Response, own: str) -> dict[str, Any]:
    """What an answer says, but for the ids that were asked with."""
    return {k: v for k, v in response.json().items() if k not in ("detail", "instance", "request_id")} | {
        "detail": response.json()["detail"].replace(own, "ID")
    }


def test_another_tenants_ids_answer_like_ids_of_nobody(two: Two) -> None:
    asked = 0
    for who in ("bob", "bob's token"):
        with two.client(who) as bob:
            assert bob.get("/v1/tenant").json()["name"] == "bob"
            for method, path, needed in two.operations():
                if needed == Role.OPERATOR:  # of no tenant: nobody of one passes
                    filled = path.format(**_NOBODYS | two.ids)
                    response = bob.request(method, filled, headers={"Content-Type": "application/json"})
                    assert_problem(response, 403, "role_required")
                    continue
                if "{" not in path:
                    assert (method, path) in _COLLECTIONS, f"say how {method} {path} keeps to its tenant"
                    continue
                body = _BODIES.get((method, path), {})
                answers = []
                for ids in (two.ids, _NOBODYS):
                    response = bob.request(method, path.format(**ids), **body)
                    assert response.status_code == 404, (who, method, path, response.text)
                    if method != "head":
                        own = next(v for k, v in ids.items() if f"{{{k}}}" in path)
                        answers.append(_told(response, own))
                assert len(answers) == 0 or answers[0] == answers[1], (who, method, path)
                asked += 1
    assert asked > 40
    with two.client("alice") as alice:  # and nothing of it has done anything
        for path in ("models/{model_id}", "datasets/{dataset_id}", "uploads/{upload_id}", "keys/{key_id}"):
            found = alice.get("/v1/" + path.format(**two.ids)).json()
            assert found.get("revoked_at") is None
            assert found.get("status", "open") == "open"
        assert alice.get(f"/v1/engines/{two.ids['engine_id']}").status_code == 200
        assert alice.get("/v1/audit?action=job.cancel").json()["items"] == []


def test_lists_and_references_stay_with_their_tenant(two: Two, model_bytes: bytes) -> None:
    ids = two.ids
    with two.client("bob") as bob, two.client("alice") as alice:
        for (method, path), kind in _COLLECTIONS.items():
            if kind != "list":
                continue
            own, others = alice.get(path).json()["items"], bob.get(path).json()["items"]
            assert own, path
            assert not {item["id"] for item in own} & {item["id"] for item in others}, (method, path)
            for item in own:  # nor does a cursor of one page lead to another's
                cursor = encode_cursor(item["id"] + "z")
                assert [i["id"] for i in alice.get(path, params={"cursor": cursor}).json()["items"]], "it leads there"
                seen = bob.get(path, params={"cursor": cursor}).json()["items"]
                assert {i["id"] for i in seen} <= {i["id"] for i in others}, (path, seen)
        queries = ("engines?model_id={model_id}", "engines?job_id={job_id}", "jobs?model_id={model_id}")
        for query in (*queries, "deliveries?job_id={job_id}", "deliveries?webhook_id={webhook_id}"):
            assert alice.get("/v1/" + query.format(**ids)).json()["items"], query
            assert bob.get("/v1/" + query.format(**ids)).json()["items"] == [], query
        mine = bob.get("/v1/tenant").json()
        assert (mine["name"], mine["usage"]["stored_bytes"], mine["usage"]["upload_bytes"]) == ("bob", 0, 0)

        # What is another's cannot be built upon
        unknown = bob.post("/v1/jobs", json={"model_id": ids["model_id"]})
        assert_problem(unknown, 422, "invalid_request")
        nobodys = bob.post("/v1/jobs", json={"model_id": "mdl_0"})
        assert _told(unknown, ids["model_id"]) == _told(nobodys, "mdl_0")
        for kind in ("models", "datasets"):
            assert_problem(bob.post(f"/v1/{kind}", json={"upload_id": ids["upload_id"]}), 404, "not_found")

        # Neither an Idempotency-Key nor a digest reaches over: the same bytes are another resource, counted anew
        headers = {"Idempotency-Key": "same"}
        theirs = bob.post("/v1/models?name=m&filename=m.onnx", content=model_bytes, headers=headers)
        assert theirs.status_code == 201
        assert "idempotency-replayed" not in theirs.headers
        assert theirs.json()["id"] != ids["model_id"]
        assert bob.get("/v1/tenant").json()["usage"]["stored_bytes"] == len(model_bytes)
        spec = {"model_id": theirs.json()["id"], "calibration": {"dataset_id": ids["dataset_id"]}}
        assert_problem(bob.post("/v1/jobs", json=spec), 422, "invalid_request")


def test_an_idempotency_key_is_its_tenants_own(two: Two, model_bytes: bytes, npz: Any) -> None:
    takes = {
        path
        for path, methods in two.document["paths"].items()
        for parameter in methods.get("post", {}).get("parameters", ())
        if parameter["name"] == "Idempotency-Key"
    }
    bodies: dict[str, dict[str, Any]] = {
        "/v1/models": {"content": model_bytes, "params": {"name": "m", "filename": "m.onnx"}},
        "/v1/datasets": {"content": npz(input=np.zeros((6, 8), np.float32)), **_NPZ},
        "/v1/uploads": {"json": {"filename": "u.onnx", "size_bytes": 1}},
        "/v1/webhooks": {"json": {"url": "https://hooks.example/again"}},
    }
    assert takes == {"/v1/jobs", *bodies}, "say what it is asked with"
    models: dict[str, str] = {}
    for path in (*bodies, "/v1/jobs"):
        made = dict[str, str]()
        for who in ("alice", "bob"):
            body = bodies.get(path) or {"json": {"model_id": models[who]}}
            with two.client(who) as client:
                first, second = (client.post(path, headers={"Idempotency-Key": path}, **body) for _ in range(2))
            assert first.status_code in (201, 202), (who, path, first.text)
            assert "idempotency-replayed" not in first.headers, (who, path)
            assert second.headers["idempotency-replayed"] == "true", (who, path)
            made[who] = first.json()["id"]
            assert second.json()["id"] == made[who]
        assert made["alice"] != made["bob"], path
        models = made if path == "/v1/models" else models
    with two.client("bob") as bob:  # the very request of alice, with her key
        theirs = bob.post("/v1/jobs", json={"model_id": models["alice"]}, headers={"Idempotency-Key": "new"})
        assert_problem(theirs, 422, "invalid_request")
        again = bob.post("/v1/jobs", json={"model_id": models["alice"]}, headers={"Idempotency-Key": "/v1/jobs"})
        assert_problem(again, 409, "idempotency_conflict")


def test_an_answer_takes_as_long_for_anothers_id_as_for_nobodys(two: Two) -> None:
    """Asked in turns, so that a busy machine is the same for both. A gross difference only: one that looked at what is
    another's before it refuses it (its files, say) would tell."""
    with two.client("bob") as bob:
        for kind, name in (("models", "model_id"), ("jobs", "job_id"), ("engines", "engine_id")):
            theirs = two.ids[name]
            paths = (f"/v1/{kind}/{theirs}", f"/v1/{kind}/{theirs[:4]}{'0' * len(theirs[4:])}")
            took: tuple[list[float], list[float]] = ([], [])
            for n in range(120):
                begun = time.perf_counter()
                assert bob.get(paths[n % 2]).status_code == 404
                took[n % 2].append(time.perf_counter() - begun)
            a, b = (statistics.median(seconds) for seconds in took)
            assert 1 / 3 < a / b < 3, (kind, a, b)


def test_a_role_that_is_too_small_is_refused_everywhere(two: Two) -> None:
    needs = {(method, path): Role(needed) for method, path, needed in two.operations()}
    assert set(Role) == set(needs.values())
    for (method, path), needed in needs.items():
        if method not in ("get", "head"):
            assert needed is not Role.READ, f"{method} {path} changes something"
    for role in Role:
        with two.client(role.value) as client:
            for (method, path), needed in needs.items():
                # Nobody's ids: what is let in finds nothing. A body that is none: what is let in makes nothing.
                response = client.request(method, path.format(**_NOBODYS), headers={"Content-Type": "application/json"})
                refused = response.status_code == 403
                assert refused is not role.may(needed), (role, method, path, response.text)
                if refused and method != "head":
                    problem = assert_problem(response, 403, "role_required")
                    assert problem["role"] == role.value
                    assert not role.may(Role(problem["needed"]))


def test_the_embedded_default_may_do_all(client: httpx.Client, model: dict[str, Any]) -> None:
    mine = client.get("/v1/tenant").json()
    assert (mine["name"], mine["role"], mine["key_id"], mine["plan"]) == ("local", "admin", None, "default")
    assert mine["usage"]["stored_bytes"] == model["size_bytes"]
    assert mine["limits"]["active_jobs"] == 1000
    assert client.delete(model["links"]["self"]).status_code == 204
    done = [(e["actor"], e["action"], e["resource"]) for e in client.get("/v1/audit").json()["items"]]
    assert done == [("local", f"model.{verb}", model["id"]) for verb in ("delete", "create")]
