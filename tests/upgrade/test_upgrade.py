"""From the release before to this one, under load, on a real PostgreSQL, Redis and S3 server: the migration beside the
old processes, the API processes one by one, the worker, and back. Nobody tries anything twice, and nothing is lost.

`ANNEAL_UPGRADE_ROUNDS`: jobs that end in each phase (1); so many more for a longer form.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from app.settings import Settings
from tests.conftest import S3Bucket
from tests.factories import onnx_models
from tests.factories.deployment import FAST, write_case
from tests.factories.previous_release import THIS_RELEASE, NoHistory, Tree, check_out, previous_release
from tests.factories.rolling import Load, expect, plain_environment
from tests.factories.switch import Switch
from tests.factories.webhooks import Receiver, receiving
from tests.servers import free_port, launched

ROUNDS = int(os.environ.get("ANNEAL_UPGRADE_ROUNDS", "1"))
ENDED_JOBS = 20_000  # of before: what the migration has to do with
PHASE_S = 120 * ROUNDS
MODEL = onnx_models.mlp().SerializeToString()
_HISTORY = """
    INSERT INTO source_models (id, tenant_id, name, filename, format, sha256, size_bytes, inputs, outputs, detail,
        created_at)
    SELECT 'mdl_old', id, 'old', 'old.onnx', 'onnx', repeat('0', 64), 1, '[]', '[]', '{}', now() FROM tenants
        WHERE name = 'test';
    INSERT INTO jobs (id, tenant_id, model_id, status, progress, spec, queue, stages, engine_ids, correlation_id,
        version, attempts, fencing_token, dispatches, webhook_attempts, spent_seconds, created_at, finished_at)
    SELECT 'job_0' || n, tenant_id, id, 'failed', 1, '{}', 'anneal.cpu', '[]', '[]', 'old', 2, 1, 1, 1, 0, 1,
        now() - interval '1 day', now() - interval '1 day'
    FROM source_models, generate_series(1, %d) n WHERE id = 'mdl_old';
"""


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    try:
        return check_out(tmp_path_factory.mktemp("previous") / "tree")
    except NoHistory as missing:
        pytest.skip(str(missing))


@dataclass
class Upgrade:
    """Processes of both releases on the same servers."""

    home: Path
    environment: dict[str, str]
    switch: Switch
    previous: Tree
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    def run(self, tree: Tree, *arguments: str) -> str:
        return tree.run(self.environment, sys.executable, "-m", *arguments)

    def start(self, name: str, tree: Tree, *arguments: str, **environment: str) -> None:
        with (self.home / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [*launched(), sys.executable, "-m", *arguments],
                env={**tree.environment(self.environment), **environment},
                cwd=tree.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_api(self, name: str, tree: Tree) -> None:
        """It is asked for requests when this returns."""
        port = self.ports[name] = free_port()
        self.start(name, tree, "app", "api", ANNEAL_PORT=str(port))
        self.switch.add(port)
        self.wait_for(lambda: self.switch.is_ready(port))

    def start_worker(self, name: str, tree: Tree) -> None:
        self.start(name, tree, "workers", WORKER_NAME=name)

    def end(self, name: str) -> None:
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    def end_old_api(self, name: str) -> None:
        """It knows of no draining: as its own documentation says, it is taken out first."""
        self.switch.remove(self.ports[name])
        self.end(name)

    def wait_for(self, true: Any, timeout_s: float = PHASE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            gone = [name for name, process in self.running.items() if process.poll() is not None]
            assert not gone, f"{gone} ended:\n{self.logs()}"
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in self.home.glob("*.log"))

    def close(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Jobs:
    """Submitted one after the other, each followed to its end and read in all its forms."""

    folder: Path
    seed: int
    submitted: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    workers: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def one(self, client: httpx.Client) -> None:
        self._count += 1
        seed = self.seed + self._count
        model_path, data_path = write_case(self.folder, seed)
        model = expect(client.post("/v1/models?filename=m.onnx", content=model_path.read_bytes()), 201).json()
        data = expect(client.post("/v1/datasets?filename=d.npz", content=data_path.read_bytes()), 201).json()
        spec = {
            "model_id": model["id"],
            "calibration": {"dataset_id": data["id"]},
            "validation": {"dataset_id": data["id"], "max_accuracy_loss_percent": 100},
            "target": {"backends": ["onnxruntime"]},
            "benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
            "budget_seconds": 10,
        }
        job = expect(client.post("/v1/jobs", json=spec), 202).json()
        self.submitted.append(job["id"])
        path = f"/v1/jobs/{job['id']}"
        while job["status"] in ("queued", "running"):
            job = expect(client.get(f"{path}?wait=2&for=end"), 200).json()
        assert job["status"] == "succeeded", job
        report = expect(client.get(f"{path}/report"), 200).json()
        assert report["job_id"] == job["id"]
        page = expect(client.get(f"{path}/report", headers={"Accept": "text/html"}), 200)
        assert "</html>" in page.text
        expect(client.get(f"{path}/manifest"), 200)
        events = expect(client.get(f"{path}/events"), 200).text
        self.workers[job["id"]] = next(w for w in ("old-worker", "new-worker") if f'"{w}"' in events)
        engine = expect(client.get(f"/v1/engines/{job['engine_ids'][0]}"), 200).json()
        bundle = expect(client.get(engine["links"]["bundle"], follow_redirects=True), 200)
        assert bundle.content[:2] == b"PK"
        self.ended.append(job["id"])


@pytest.fixture
def upgrade(
    tmp_path: Path, fresh_postgres: str, fresh_redis: str, fresh_bucket: S3Bucket, previous: Tree
) -> Iterator[Upgrade]:
    home = tmp_path / "home"
    home.mkdir()
    servers = {"DATABASE_URL": fresh_postgres, "BROKER_URL": fresh_redis, **fresh_bucket.variables}
    more = {"WORKER_LOCK_DIR": str(home), "WEBHOOK_ALLOW_PRIVATE": "true", "ANNEAL_DRAIN_S": "3"}
    environment = plain_environment(home, {**FAST, **servers, **more})
    with Switch([]) as switch:
        found = Upgrade(home, environment, switch, previous)
        try:
            yield found
        finally:
            found.close()


@pytest.mark.timeout(600 * ROUNDS)
def test_from_the_release_before_to_this_one_and_back(upgrade: Upgrade, tmp_path: Path) -> None:
    old, new = upgrade.previous, THIS_RELEASE
    upgrade.run(old, "app", "migrate")
    key = upgrade.run(old, "app", "create-key", "--tenant", "test").splitlines()[0]
    headers = {"Authorization": f"Bearer {key}"}
    database = Settings(DATABASE_URL=upgrade.environment["DATABASE_URL"]).database.replace("+psycopg", "")
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (
            previous_release().revision,
        )
        connection.execute((_HISTORY % ENDED_JOBS).encode())
    upgrade.start_api("old-api-1", old)
    upgrade.start_api("old-api-2", old)
    upgrade.start_worker("old-worker", old)
    upgrade.wait_for(lambda: httpx.get(f"{upgrade.switch.url}/readyz").json()["status"] == "ready")

    # Each request by a connection of its own: the release before ends idle ones when it is asked to end.
    load, jobs = Load(upgrade.switch.url, headers, keep_alive=False), Jobs(tmp_path, 100)
    load.keep_doing("look", lambda client: expect(client.get("/v1/jobs?limit=20"), 200), 0.1)
    load.keep_doing("upload", lambda client: expect(client.post("/v1/models?filename=m.onnx", content=MODEL), 201), 0.2)
    load.keep_doing("job", jobs.one)

    def some_end(worker: str) -> None:
        before = len(jobs.submitted)
        upgrade.wait_for(
            lambda: (
                load.problems
                or sum(jobs.workers.get(j) == worker and j in jobs.ended for j in jobs.submitted[before:]) >= ROUNDS
            )
        )
        assert not load.problems, upgrade.logs()

    with ExitStack() as stack:
        stack.callback(load.end)
        some_end("old-worker")
        upgrade.run(new, "app", "migrate")
        some_end("old-worker")

        upgrade.start_api("new-api-1", new)
        upgrade.end_old_api("old-api-1")
        upgrade.start_api("new-api-2", new)
        upgrade.end_old_api("old-api-2")
        receiver = stack.enter_context(receiving())
        with httpx.Client(base_url=upgrade.switch.url, headers=headers) as client:
            expect(client.post("/v1/webhooks", json={"url": receiver.url}), 201)
        some_end("old-worker")

        # A worker that knows of endpoints tells what the old one ended; which gives its job back.
        told = [job_id for job_id in jobs.ended if jobs.workers[job_id] == "old-worker"][-1]
        assert not receiver.requests
        upgrade.start_worker("new-worker", new)
        upgrade.wait_for(lambda: _told(receiver, told))
        upgrade.end("old-worker")
        some_end("new-worker")

        # This release's own processes, one by one: nothing has to be taken out first.
        for name in ("new-api-1", "new-api-2"):
            upgrade.start_api(f"{name}-again", new)
            upgrade.end(name)
        some_end("new-worker")

        # And back: the release before serves beside a worker of this one.
        upgrade.start_api("old-api-3", old)
        upgrade.end("new-api-1-again")
        upgrade.end("new-api-2-again")
        some_end("new-worker")
        upgrade.start_worker("old-worker", old)
        upgrade.end("new-worker")
        some_end("old-worker")
    assert not load.problems, "\n".join(load.problems) + upgrade.logs()
    assert set(jobs.submitted) == set(jobs.ended)
    _ended_once(database, jobs.submitted)


def _told(receiver: Receiver, job_id: str) -> bool:
    return any(job_id.encode() in body for _, body in receiver.requests)


def _ended_once(database: str, job_ids: list[str]) -> None:
    query = """
        SELECT j.status, (SELECT count(*) FROM job_events e WHERE e.job_id = j.id AND e.type = 'state'
            AND e.data ->> 'status' IN ('succeeded', 'failed', 'cancelled'))
        FROM jobs j WHERE j.id = ANY(%s)
    """
    with psycopg.connect(database) as connection:
        assert connection.execute(query, [job_ids]).fetchall() == [("succeeded", 1)] * len(job_ids)
