"""The faults of the soak: each strikes one part of the cluster for a while, and takes care that it comes back."""

from __future__ import annotations

import contextlib
import hashlib
import random
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import redis

from tests import servers
from tests.cluster.cluster import LEASE_S, Cluster, Managed
from tests.factories import onnx_models


@dataclass
class Injector:
    """Draws faults by seed, one after the other. `key`: of the tenant in whose name uploads are interrupted."""

    cluster: Cluster
    key: str
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)
        self.faults: dict[str, Callable[[], bool]] = {
            "worker killed": lambda: self._kill(self._worker()),
            "worker stopped beyond its lease": self._stop_worker,
            "stage's process killed": lambda: self._kill_named("anneal-stage"),
            "zygote killed": lambda: self._kill_named("anneal-zygote"),
            "all workers killed": self._kill_all_workers,
            "Redis flushed": self._flush,
            "Redis restarted": lambda: self._restart(self.cluster.redis, 2.0),
            "PostgreSQL restarted": lambda: self._restart(self.cluster.postgres, 1.0),
            "PostgreSQL killed": lambda: self._restart(self.cluster.postgres, 0.5, signal.SIGQUIT),
            "PostgreSQL hung": lambda: self._hang(self.cluster.postgres, 1.5 * LEASE_S),
            "S3 killed": lambda: self._restart(self.cluster.s3, 4.0, signal.SIGKILL),
            "S3 hung": lambda: self._hang(self.cluster.s3, 6.0),
            "API killed in mid-upload": lambda: self._kill_api_while(self._upload),
            "API killed at complete": lambda: self._kill_api_while(self._complete),
            "API killed about a commit": lambda: self._kill_api_while(self._create),
        }

    def run(self, until: float, count: int) -> None:
        """About `count` faults, evenly until then; every kind comes again and again."""
        kinds: list[str] = []
        pause = max((until - time.monotonic()) / max(count, 1), 0.5)
        while time.monotonic() < until:
            due = time.monotonic() + pause
            kinds = kinds or self._draw.sample(sorted(self.faults), len(self.faults))
            kind = kinds.pop()
            try:
                if self.faults[kind]():
                    self.done[kind] += 1
            except Exception as error:  # what strikes must not fall itself: the fault does not count, and is told
                self.failed.append(f"{kind}: {type(error).__name__}: {error}")
            time.sleep(max(due - time.monotonic(), 0.2))

    # Workers

    def _worker(self) -> Managed:
        return self._draw.choice([w for w in self.cluster.workers if not w.down()] or self.cluster.workers)

    def _kill(self, managed: Managed) -> bool:
        managed.kill()
        return True

    def _kill_all_workers(self) -> bool:
        for worker in self.cluster.workers:
            worker.kill()
        return True

    def _stop_worker(self) -> bool:
        with self._worker().stopped(2 * LEASE_S):
            pass
        return True

    def _kill_named(self, name: str) -> bool:
        """Of any worker; looked for a while, as stages come and go."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for worker in self._draw.sample(self.cluster.workers, len(self.cluster.workers)):
                for process in worker.family():
                    with contextlib.suppress(Exception):
                        if process.name() == name:
                            process.kill()
                            return True
            time.sleep(0.02)
        return False

    # Servers

    def _flush(self) -> bool:
        with redis.Redis.from_url(self.cluster.environment["BROKER_URL"], socket_timeout=5) as client:
            client.flushall()
        return True

    def _restart(self, managed: Managed, away_s: float, number: signal.Signals = signal.SIGINT) -> bool:
        managed.held = True
        try:
            managed.signal(number)
            assert managed.process is not None
            managed.process.wait(30)
            time.sleep(away_s)
            managed.stop()
            self._start(managed)
        finally:
            managed.held = False
        return True

    def _start(self, managed: Managed) -> None:
        for attempt in range(5):
            try:
                managed.start()
                return
            except servers.ServerFailed:
                if attempt == 4:
                    raise
                time.sleep(1)

    def _hang(self, managed: Managed, seconds: float) -> bool:
        with managed.stopped(seconds):
            pass
        return True

    # The API, in the middle of something

    def _kill_api_while(self, work: Callable[[str], None]) -> bool:
        """It is killed at a random moment of `work`; what was asked may or may not have happened."""
        api = self._draw.choice(self.cluster.apis)
        url = self.cluster.urls[self.cluster.apis.index(api)]

        def quietly() -> None:
            with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
                work(url)

        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        time.sleep(self._draw.uniform(0.02, 0.6))
        api.kill()
        thread.join(30)
        return True

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def _raw(self) -> bytes:
        return onnx_models.mlp(features=64, hidden=4096, seed=self._draw.randrange(1 << 30)).SerializeToString()

    def _upload(self, url: str) -> None:
        raw, name = self._raw(), secrets.token_hex(4)

        def slowly() -> object:
            for start in range(0, len(raw), 1 << 16):
                yield raw[start : start + (1 << 16)]
                time.sleep(0.02)

        path = f"{url}/v1/models?name={name}&filename=net.onnx"
        httpx.post(path, content=slowly(), headers=self._headers, timeout=20)  # type: ignore[arg-type]

    def _session(self, url: str) -> str:
        raw = self._raw()
        body = {"filename": "net.onnx", "size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        upload = httpx.post(f"{url}/v1/uploads", json=body, headers=self._headers, timeout=20).json()
        for target in upload["part_urls"]:
            httpx.put(target if target.startswith("http") else f"{url}{target}", content=raw, timeout=20)
        return str(upload["id"])

    def _complete(self, url: str) -> None:
        other = next(u for u in self.cluster.urls if u != url)
        upload = self._session(other)
        httpx.post(f"{url}/v1/uploads/{upload}/complete", headers=self._headers, timeout=20)
        httpx.post(f"{url}/v1/models", json={"name": upload, "upload_id": upload}, headers=self._headers, timeout=20)

    def _create(self, url: str) -> None:
        raw = onnx_models.mlp(seed=self._draw.randrange(1 << 30)).SerializeToString()
        path = f"{url}/v1/models?name={secrets.token_hex(4)}&filename=net.onnx"
        model = httpx.post(path, content=raw, headers=self._headers, timeout=20).json()
        spec = {"model_id": model["id"], "budget_seconds": 20, "precisions": ["fp32"]}
        httpx.post(f"{url}/v1/jobs", json=spec, headers=self._headers, timeout=20)
