"""`/v1/operator`: what `anneal-admin` does, over HTTP, for whoever has an operator's key and for nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from app.domain.job_state import JobStatus, Trigger
from app.domain.roles import Role
from app.http.services import Services
from app.main import create_app
from app.settings import Settings
from app.tenants import create_key
from tests.api.conftest import assert_problem, report_worker, serving
from tests.api.test_jobs import advance
from tests.api.test_pages import token_in
from tests.api.test_signing_in import sign_in


@dataclass
class Service:
    services: Services
    url: str
    rung: list[str]

    def client(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=20)


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    rung: list[str] = []

    def ring(job: Any) -> bool:
        rung.append(job.id)
        return True

    app = create_app(settings.model_copy(update={"require_keys": True}), dispatch=ring)
    with serving(app) as url:
        yield Service(app.state.services, url, rung)


@pytest.fixture
def operator(service: Service) -> Iterator[httpx.Client]:
    with service.client(create_key(service.services.db, "platform", "ops", Role.OPERATOR)) as client:
        yield client


def _tenant(operator: httpx.Client, name: str = "acme") -> dict[str, Any]:
    made = operator.post("/v1/operator/tenants", json={"name": name})
    assert made.status_code == 201, made.text
    return dict(made.json())


def test_a_tenant_from_its_first_key_to_being_switched_off(service: Service, operator: httpx.Client) -> None:
    tenant = _tenant(operator)
    assert (tenant["name"], tenant["plan"], tenant["disabled_at"]) == ("acme", "default", None)
    assert_problem(operator.post("/v1/operator/tenants", json={"name": "acme"}), 409, "tenant_exists")
    key = operator.post(f"{tenant['links']['self']}/keys", json={"name": "first", "role": "admin"})
    assert (key.status_code, key.headers["cache-control"]) == (201, "no-store")
    with service.client(key.json()["key"]) as acme:
        assert acme.get("/v1/tenant").json()["name"] == "acme"
        limits = {"plan": "team", "limits": {"active_jobs": 3}, "retention": {"jobs": 30, "models": None}}
        assert_problem(operator.patch(tenant["links"]["self"], json=limits), 404, "not_found")
        plan = operator.put("/v1/operator/plans/team", json={"limits": {"active_jobs": 9, "running_jobs": 2}})
        assert plan.json()["limits"]["running_jobs"] == 2
        assert [p["name"] for p in operator.get("/v1/operator/plans").json()["plans"]] == ["default", "team"]
        changed = operator.patch(tenant["links"]["self"], json=limits).json()
        assert (changed["plan"], changed["own_limits"]) == ("team", ["active_jobs"])
        assert (changed["limits"]["active_jobs"], changed["limits"]["running_jobs"]) == (3, 2)
        assert (changed["retention"]["jobs"], changed["retention"]["models"]) == (30, None)
        cleared = {"clear_limits": True, "retention": {"jobs": "default"}, "enabled": False}
        changed = operator.patch(tenant["links"]["self"], json=cleared).json()
        assert (changed["own_limits"], changed["limits"]["active_jobs"]) == ([], 9)
        assert changed["disabled_at"] is not None
        service.services.auth._known.clear()
        assert_problem(acme.get("/v1/tenant"), 403, "tenant_disabled")
    listed = operator.get("/v1/operator/tenants").json()["items"]
    assert {t["name"] for t in listed} == {"local", "platform", "acme"}
    done = operator.get(tenant["links"]["audit"]).json()["items"]
    actions = ["tenant.disable", "tenant.retention", "tenant.plan", "tenant.retention", "tenant.plan"]
    assert [row["action"] for row in done] == [*actions, "key.create", "tenant.create"]
    assert {row["actor"][:8] for row in done} == {"key:key_"}, "by whose key"


def test_keys_of_anybody(service: Service, operator: httpx.Client) -> None:
    tenant = _tenant(operator)
    made = operator.post(f"{tenant['links']['self']}/keys", json={"name": "ci", "role": "submit"}).json()
    (row,) = operator.get(tenant["links"]["keys"]).json()["items"]
    assert (row["id"], row["tenant_id"], "key" in row) == (made["id"], tenant["id"], False)
    second = operator.post(row["links"]["rotate"], json={"grace_seconds": 3600}).json()
    assert second["role"] == "submit"
    assert operator.delete(row["links"]["self"]).status_code == 204
    service.services.auth._known.clear()
    with service.client(made["key"]) as old, service.client(second["key"]) as new:
        assert old.get("/v1/tenant").status_code == 401
        assert new.get("/v1/tenant").status_code == 200


def test_nobody_makes_an_operators_key_or_takes_the_place_of_one(service: Service, operator: httpx.Client) -> None:
    own = operator.get("/v1/tenant").json()
    assert own["role"] == "operator"
    with service.client(create_key(service.services.db, "platform", "a mere admin")) as admin:
        wanted = {"name": "more", "role": "operator"}
        assert_problem(admin.post("/v1/keys", json=wanted), 422, "invalid_request")
        assert_problem(operator.post(f"/v1/operator/tenants/{own['id']}/keys", json=wanted), 422, "invalid_request")
        refused = assert_problem(admin.post(f"/v1/keys/{own['key_id']}/rotate"), 403, "role_required")
        assert "anneal-admin keys create --role operator" in refused["remedy"]
        assert admin.delete(f"/v1/keys/{own['key_id']}").status_code == 204, "nobody gains by it"


def test_workers_and_the_jobs_that_they_hold(service: Service, operator: httpx.Client, model_bytes: bytes) -> None:
    services = service.services
    report_worker(services)
    tenant = _tenant(operator)
    key = operator.post(f"{tenant['links']['self']}/keys", json={"name": "a", "role": "admin"}).json()["key"]
    with service.client(key) as acme:
        model = acme.post("/v1/models?name=m&filename=m.onnx", content=model_bytes).json()
        job = acme.post("/v1/jobs", json={"model_id": model["id"]}).json()
        (worker,) = operator.get("/v1/operator/workers").json()["workers"]
        assert (worker["state"], worker["jobs"]) == ("live", [])
        path = f"/v1/operator/workers/{worker['id']}"
        assert operator.post(f"{path}/drain").status_code == 204
        assert operator.get("/v1/operator/workers").json()["workers"][0]["state"] == "draining"
        assert operator.post(f"{path}/resume").status_code == 204
        assert_problem(operator.post("/v1/operator/workers/nobody/drain"), 404, "not_found")

        held = {"lease_owner": worker["id"], "fencing_token": 1}
        advance(services, job["id"], Trigger.CLAIM, JobStatus.QUEUED, **held)
        assert operator.get("/v1/operator/workers").json()["workers"][0]["jobs"] == [job["id"]]
        service.rung.clear()
        assert operator.post(f"{path}/requeue").json() == {"jobs": [job["id"]]}
        assert acme.get(job["links"]["self"]).json()["status"] == "queued"
        assert operator.post(f"/v1/operator/jobs/{job['id']}/requeue").json() == {"jobs": [job["id"]]}
        assert service.rung == [job["id"], job["id"]]
        assert_problem(operator.post("/v1/operator/jobs/job_0/requeue"), 404, "not_found")
    assert operator.get("/v1/operator/sessions").json() == {"sessions": []}
    assert operator.post("/v1/operator/sessions/end", json={"subject": "nobody"}).json() == {"ended": 0}


def test_the_embedded_default_is_no_operator(client: httpx.Client) -> None:
    refused = assert_problem(client.get("/v1/operator/tenants"), 403, "role_required")
    assert "anneal-admin" in refused["remedy"]


def test_nor_does_the_page_make_one(service: Service) -> None:
    key = create_key(service.services.db, "platform", "ops", Role.OPERATOR)
    with sign_in(service.url, key) as (browser, _):
        shown = browser.get("/keys")
        assert 'value="operator"' not in shown.text
        answer = browser.post("/keys", data={"csrf": token_in(shown), "name": "more", "role": "operator", "days": ""})
    assert answer.status_code == 422
    assert "There is no role" in answer.text
    tenant = service.services.tenants.get("platform")
    assert len(service.services.keys.page(tenant.id, limit=9)) == 1


def test_an_id_is_never_taken_for_a_name(service: Service, operator: httpx.Client) -> None:
    first = _tenant(operator)
    second = _tenant(operator, first["id"])  # a name like another's id
    path = f"/v1/operator/tenants/{first['id']}"
    changed = operator.patch(path, json={"enabled": False, "retention": {"jobs": 3}}).json()
    assert (changed["id"], changed["name"], changed["retention"]["jobs"]) == (first["id"], "acme", 3)
    other = operator.get(second["links"]["self"]).json()
    assert (other["disabled_at"], other["retention"]["jobs"]) == (None, None)
