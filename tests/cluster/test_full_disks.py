"""The disk of the database, and that of the S3 server, without a byte left: who asks is told so, jobs wait, and nothing
is lost once there is room again."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.cluster import Managed
from tests.cluster.conftest import Front, healthy, live_workers, wait_for
from tests.cluster.test_faults import SLOW, holder
from tests.cluster.topology import COUNTS
from tests.factories import onnx_models
from tests.factories.deployment import Deployment, job_row
from tests.factories.small_disk import full

FULL_S = 12.0
CODES = {"storage_full", "storage_unavailable", "database_unavailable", "api_unreachable"}

pytestmark = pytest.mark.timeout(300)


def disk_of(front: Front, server: str) -> Path:
    disk = front.cluster.disks.get(server)
    if disk is None:
        pytest.skip("this user may not mount a small disk")
    return disk


def start_again(managed: Managed) -> None:
    """As its operator's supervisor does: PostgreSQL ends itself where it cannot write its log."""
    if managed.down():
        managed.stop()
        managed.start()


def upload(http: httpx.Client, number: int) -> httpx.Response:
    raw = onnx_models.mlp(features=64, hidden=512, seed=number).SerializeToString()
    return http.post(f"/v1/models?name=full-{number}&filename=net.onnx", content=raw)


def asked(http: httpx.Client, seconds: float, first: int) -> tuple[Counter[str], list[str]]:
    """What uploads are answered for so long, one after the other: by status and code; and the models that were made."""
    told, made, number, until = Counter[str](), list[str](), first, time.monotonic() + seconds
    while time.monotonic() < until:
        number += 1
        try:
            answer = upload(http, number)
        except httpx.HTTPError as error:
            told[type(error).__name__] += 1
            continue
        body: dict[str, Any] = answer.json()
        told[f"{answer.status_code} {body.get('code', 'made')}"] += 1
        if answer.status_code == 201:
            made.append(body["id"])
        else:
            assert answer.status_code in (502, 503, 507), answer.text
            assert body["code"] in CODES, answer.text
            assert body["remedy"], "it says what mends it"
    return told, made


@pytest.mark.parametrize("server", ["postgres", "s3"])
def test_a_full_disk_costs_nothing_that_was_taken(front: Front, tmp_path: Path, server: str) -> None:
    disk, managed = disk_of(front, server), {"postgres": front.cluster.postgres, "s3": front.cluster.s3}[server]
    wait_for(lambda: live_workers(front.cluster) == COUNTS["worker"], 180)
    with front.client() as client, front.http(timeout=30) as http:
        job = front.submit(client, tmp_path, seed=30 if server == "s3" else 31, **SLOW)
        wait_for(lambda: holder(front, job["id"]))
        with full(disk):
            told, made = asked(http, FULL_S, 1000 if server == "s3" else 2000)
        start_again(managed)
        print(f"{server}: uploads while its disk was full: {dict(told)}")
        assert set(told) - {"201 made"}, "somebody met it"
        wait_for(lambda: healthy(front.cluster))
        wait_for(lambda: upload(http, 3000).status_code == 201)
        ended = client.wait(job["id"], check=False)
        assert ended["status"] == "succeeded", ended["error"]
        for model_id in made:
            assert http.get(f"/v1/models/{model_id}").status_code == 200, "what was taken is there"
        assert client.wait(front.submit(client, tmp_path, seed=32)["id"])["status"] == "succeeded"
    db = Deployment(front.cluster.folder, front.cluster.environment, 0).database()
    try:
        print(f"{server}: the job was taken {job_row(db, job['id']).fencing_token} times")
    finally:
        db.close()
