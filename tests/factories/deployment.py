"""A whole deployment of real processes: the API and any number of workers, on the embedded default or on servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import redis
from sqlalchemy import select

from anneal_client import Client
from app.db.base import make_engine
from app.db.orm import Job
from app.db.uow import Database
from app.settings import Settings
from app.tenants import create_key
from tests.factories import onnx_models
from tests.factories.migrated import migrate
from tests.factories.pace import paced
from tests.servers import free_port, launched

FAST = {
    "WORKER_LEASE_S": "2",
    "WORKER_HEARTBEAT_S": "0.5",
    "WORKER_SWEEP_S": "0.5",
    "WORKER_REDISPATCH_S": "2",
    "WORKER_STAGE_TIMEOUT_S": "60",
    "ANNEAL_SHUTDOWN_S": "3",
}


@dataclass
class Deployment:
    """`environment` holds all that its processes are told."""

    home: Path
    environment: dict[str, str]
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    api_key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What says who asks, for plain HTTP."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def settings(self) -> Settings:
        """As far as they say where its rows are."""
        return Settings(home=self.home, DATABASE_URL=self.environment.get("DATABASE_URL", ""))

    def client(self) -> Client:
        return Client(self.url, self.api_key)

    def database(self) -> Database:
        return Database(make_engine(self.settings.database))

    def create_key(self, tenant: str) -> str:
        """As `python -m app create-key --tenant TENANT` makes one."""
        db = self.database()
        try:
            return create_key(db, tenant, "default")
        finally:
            db.close()

    def run(self, *arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout.strip()

    def start(self, *arguments: str, name: str = "") -> subprocess.Popen[bytes]:
        """`name`: of its log, by default the module's."""
        with (self.home / f"{name or arguments[0]}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*launched(), sys.executable, "-m", *arguments],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_api(self) -> None:
        self.start("app", "api")
        self.wait_for(lambda: httpx.get(f"{self.url}/healthz").status_code == 200)

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self.start("workers")

    def start_hurried_worker(self) -> subprocess.Popen[bytes]:
        """For jobs whose figures nobody looks at."""
        return self.start("tests.factories.hurried", name="workers")

    def wait_for(self, ready: Any, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if ready():
                    return
            time.sleep(0.05)
        raise TimeoutError(self.logs())

    def wait_ready(self, timeout_s: float = 90) -> None:
        """Until a worker is live and everything else answers."""
        self.wait_for(lambda: self.readiness()["status"] == "ready", timeout_s)

    def readiness(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/readyz").json()
        return found

    def empty_broker(self) -> None:
        """What a broker without persistence does at a restart."""
        url = self.environment.get("BROKER_URL")
        if url:
            with redis.Redis.from_url(url) as client:
                client.flushall()
        else:
            for path in (self.home / "broker" / "messages").iterdir():
                path.unlink(missing_ok=True)

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-6000:]}" for p in self.home.glob("*.log"))

    def worker_log(self) -> str:
        return "\n".join(p.read_text(errors="replace") for p in sorted(self.home.glob("workers-*.log")))

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                kill(process)


@contextlib.contextmanager
def deployment(home: Path, extra: Mapping[str, str] | None = None, port: int | None = None) -> Iterator[Deployment]:
    """A migrated deployment with the API up and no worker yet. `port`: where somebody knows it already."""
    port = port or free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ANNEAL_", "WORKER_", "STORAGE_"))}
    environment |= {"ANNEAL_HOME": str(home), "ANNEAL_PORT": str(port), "WORKER_LOCK_DIR": str(home / "locks")}
    environment |= {**FAST, **(extra or {})}
    home.mkdir(parents=True, exist_ok=True)
    found = Deployment(home, environment, port)
    try:
        migrate(found.settings)
        if {"DATABASE_URL", "BROKER_URL", "STORAGE_URL"} & set(extra or ()):  # no longer the embedded default
            found.api_key = found.create_key("test")
        found.start_api()
        yield found
    finally:
        found.close()
        shutil.rmtree(home / "work", ignore_errors=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to that one process, as the kernel's OOM killer would: what it started has to notice by itself."""
    process.kill()
    process.wait()


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def gone(processes: list[psutil.Process], timeout_s: float = 10) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def job_row(db: Database, job_id: str) -> Job:
    with db.read() as session:
        job = session.scalar(select(Job).where(Job.id == job_id))
    assert job is not None
    return job


def wait_for_stage(db: Database, job_id: str, stages: set[str], timeout_s: float = 90) -> str | None:
    """The stage of `stages` that is running right now; None once the job has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = job_row(db, job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return None
        if job.status == "running" and job.stages:
            last = job.stages[-1]
            if last["status"] == "running" and last["name"] in stages:
                return str(last["name"])
        time.sleep(0.002)
    raise TimeoutError(f"{job_id} did not come to {stages}")


def write_case(folder: Path, seed: int) -> tuple[Path, Path]:
    """A small classifier and labelled data for it; another seed gives other content, so nothing is cached."""
    model = onnx_models.save(onnx_models.mlp(features=16, hidden=64, classes=4, seed=seed), folder / f"net{seed}.onnx")
    rng = np.random.default_rng(seed)
    data = folder / f"data{seed}.npz"
    inputs = rng.normal(size=(200, 16)).astype(np.float32)
    np.savez(data, **{onnx_models.mlp(features=16).graph.input[0].name: inputs})
    return model, data


def submit_case(client: Client, folder: Path, seed: int, **fields: Any) -> dict[str, Any]:
    model_path, data_path = write_case(folder, seed)
    model = client.upload_model(model_path)
    data = client.upload_dataset(data_path)
    spec: dict[str, Any] = {
        "model_id": model["id"],
        "calibration": {"dataset_id": data["id"]},
        "validation": {"dataset_id": data["id"], "max_accuracy_loss_percent": 100},
        "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
        "budget_seconds": paced(10),
    }
    return client.submit({**spec, **fields})
