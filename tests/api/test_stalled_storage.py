"""Storage that stalls for one file, behind a real S3 server: whoever moves that file waits, and nobody else does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app.http.services import Services
from app.main import create_app
from app.settings import Settings
from app.tenants import create_key
from tests.api.conftest import assert_problem, serving
from tests.conftest import S3Bucket
from tests.factories import onnx_models
from tests.factories.stalling import Staller, stalling

SLOW = onnx_models.mlp(seed=1).SerializeToString()
DIGEST = hashlib.sha256(SLOW).hexdigest()
OF_A_TENANT = 8  # threads that make resources


@pytest.fixture
def staller(fresh_bucket: S3Bucket) -> Iterator[Staller]:
    with stalling(fresh_bucket.server.endpoint_url) as found:
        yield found


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest, settings: Settings, fresh_bucket: S3Bucket, staller: Staller) -> Settings:
    """On SQLite one open transaction is enough to block every other writer."""
    changes: dict[str, Any] = {
        "require_keys": True,
        "storage": fresh_bucket.settings(S3_ENDPOINT_URL=staller.url),
    }
    if request.param == "postgres":
        changes["database_url"] = request.getfixturevalue("migrated_postgres")
    return settings.model_copy(update=changes)


@pytest.fixture
def served(settings: Settings) -> Iterator[tuple[str, Services]]:
    app = create_app(settings, dispatch=lambda job: True)
    with serving(app) as url:
        yield url, app.state.services


def client_of(served: tuple[str, Services], tenant: str) -> httpx.Client:
    url, services = served
    headers = {"Authorization": f"Bearer {create_key(services.db, tenant, 'test')}"}
    return httpx.Client(base_url=url, headers=headers, timeout=60)


def create(client: httpx.Client, content: bytes) -> httpx.Response:
    return client.post("/v1/models?filename=m.onnx", content=content)


def others(client: httpx.Client, seed: int) -> None:
    """What another one does meanwhile: make a model, and delete it."""
    made = create(client, onnx_models.mlp(seed=seed).SerializeToString())
    assert made.status_code == 201, made.text
    assert client.delete(made.json()["links"]["self"]).status_code == 204


@pytest.mark.parametrize("what", ["the bytes", "the look that follows"])
def test_a_creation_that_stalls_holds_up_no_other(served: tuple[str, Services], staller: Staller, what: str) -> None:
    def holds(method: str, path: str) -> bool:
        if DIGEST not in path:
            return False
        return method == "PUT" if what == "the bytes" else method == "HEAD" and ("PUT", path) in staller.passed

    staller.holds = holds
    with client_of(served, "a") as client, client_of(served, "b") as other, ThreadPoolExecutor(1) as threads:
        slow = threads.submit(create, client, SLOW)
        try:
            staller.wait_held()
            others(client, 2)
            others(other, 3)
            assert not slow.done()
        finally:
            staller.release()
        assert slow.result().status_code == 201
        found = client.get(slow.result().json()["links"]["download"], follow_redirects=True)
        assert found.content == SLOW


def test_all_the_creations_of_a_tenant_that_stall_hold_up_no_other_tenants(
    served: tuple[str, Services], staller: Staller
) -> None:
    models = [onnx_models.mlp(seed=10 + n).SerializeToString() for n in range(OF_A_TENANT + 2)]
    digests = [hashlib.sha256(model).hexdigest() for model in models]
    staller.holds = lambda method, path: method == "PUT" and any(digest in path for digest in digests)
    with client_of(served, "a") as client, client_of(served, "b") as other, ThreadPoolExecutor(len(models)) as threads:
        slow = [threads.submit(create, client, model) for model in models]
        try:
            staller.wait_held(OF_A_TENANT)
            others(other, 3)
            assert not any(creation.done() for creation in slow)
        finally:
            staller.release()
        assert {creation.result().status_code for creation in slow} == {201}


def test_a_deletion_that_stalls_holds_up_none_either(served: tuple[str, Services], staller: Staller) -> None:
    """The same content is refused until it is over: it might be taken after it was stored."""
    with client_of(served, "a") as client, client_of(served, "b") as other, ThreadPoolExecutor(1) as threads:
        path = create(client, SLOW).json()["links"]["self"]
        staller.holds = lambda method, path: method == "DELETE" and DIGEST in path
        deletion = threads.submit(client.delete, path)
        try:
            staller.wait_held()
            others(client, 2)
            others(other, 3)
            assert create(other, SLOW).status_code == 201, "another tenant's"
            assert_problem(create(client, SLOW), 503, "content_missing")
        finally:
            staller.release()
        assert deletion.result().status_code == 204
        again = create(client, SLOW)
        assert again.status_code == 201, again.text
        found = client.get(again.json()["links"]["download"], follow_redirects=True)
        assert found.content == SLOW
