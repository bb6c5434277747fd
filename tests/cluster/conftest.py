"""One cluster for all of its tests; each leaves it as it was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from anneal_client import Client
from tests.cluster.callers import Callers
from tests.cluster.cluster import SETTINGS, Cluster, Managed, cluster
from tests.cluster.topology import COUNTS
from tests.factories import every_stage
from tests.factories.deployment import submit_case
from tests.factories.pace import paced
from tests.integrations.conftest import pytest_runtest_call, pytest_runtest_setup  # noqa: F401  # what is missing

DISKS = {"postgres": 1024, "s3": 512}  # megabytes
SPEC: dict[str, Any] = {
    "target": {"backends": ["onnxruntime"]},
    "precisions": ["fp32"],
    "benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
    "budget_seconds": paced(20),
}


@dataclass
class Front:
    """The cluster as a tenant sees it, through the proxy."""

    cluster: Cluster
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.cluster.url, headers=self.headers, **{"timeout": 60, **options})

    def client(self) -> Client:
        return Client(self.cluster.url, self.key)

    def callers(self) -> Callers:
        return Callers(self.cluster.url, self.key)

    def submit(self, client: Client, folder: Path, seed: int, **fields: Any) -> dict[str, Any]:
        return submit_case(client, folder, seed, **{**SPEC, **fields})


@pytest.fixture(scope="session")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("cluster")
    settings = {**SETTINGS, "PYTHONPATH": str(every_stage.installed(folder / "site"))}
    sizes = {"workers": COUNTS["worker"], "apis": COUNTS["api"]}
    with cluster(folder, **sizes, settings=settings, whole=True, disks=DISKS) as found:
        wait_for(lambda: live_workers(found) == COUNTS["worker"])
        yield Front(found, found.run("app", "create-key", "--tenant", "cluster-tests"))
        family = [process for managed in found.everything() for process in managed.family()]
    _, left = psutil.wait_procs(family, timeout=5)
    assert left == [], "all has ended, and nothing goes on"


def live_workers(found: Cluster) -> int:
    told = httpx.get(f"{found.url}/readyz", timeout=10).json()["checks"]["worker"]["detail"]
    return int(told.split()[0]) if told.endswith("live") else 0


def wait_for(true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if true():
                return
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def healthy(found: Cluster) -> bool:
    """Every API process answers by itself, and the proxy."""
    return all(httpx.get(f"{url}/healthz", timeout=5).status_code == 200 for url in (*found.urls, found.url))


def requests_of(url: str) -> float:
    """That an API process has answered so far, other than the proxy's own and what is asked here."""
    total = 0.0
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        if line.startswith("anneal_http_requests_total{") and 'route="/v1/' in line:
            total += float(line.rpartition(" ")[2])
    return total


@contextlib.contextmanager
def away(managed: Managed) -> Iterator[None]:
    """Whatever is done to it, the supervisor leaves it alone; afterwards it is there again."""
    managed.held = True
    try:
        yield
    finally:
        if managed.down():
            managed.stop()
            managed.start()
        managed.held = False
