"""PostgreSQL, Redis, an S3 server, API processes and workers, with a proxy in front and Prometheus beside where they
are wanted, as real processes on this machine. Each can be killed, stopped (SIGSTOP) and started again; a supervisor
starts again what died, as an operator's would."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import boto3
import httpx
import psutil
import psycopg
from botocore.config import Config

from tests import servers, swift_server
from tests.cluster import topology
from tests.cluster.front import prometheus, proxy, watcher
from tests.factories.small_disk import small_disk

ROOT = Path(__file__).resolve().parents[2]
_STARTER = ThreadPoolExecutor(1)
LEASE_S = 4.0
NO_DISKS: Mapping[str, int] = MappingProxyType({})
SETTINGS = {
    "WORKER_LEASE_S": str(LEASE_S),
    "WORKER_HEARTBEAT_S": "1",
    "WORKER_SWEEP_S": "1",
    "WORKER_REDISPATCH_S": "4",
    "WORKER_STAGE_TIMEOUT_S": "60",
    "WORKER_MAX_ATTEMPTS": "50",
    "LIMIT_UPLOAD_EXPIRES_S": "90",
    "COLLECT_EVERY_S": "15",
    "COLLECT_GRACE_S": "90",
    "ANNEAL_LOG_JSON": "true",
}


@dataclass
class Managed:
    """One server or process of the cluster. `make`: runs it until its context ends. `told`: what one of ours finds in
    its environment beside, from its next start."""

    name: str
    make: Callable[[], AbstractContextManager[subprocess.Popen[bytes]]]
    process: subprocess.Popen[bytes] | None = None
    held: bool = False  # a fault keeps it down: the supervisor leaves it alone
    starts: int = 0
    started: float = 0.0  # when it was last (`time.time()`)
    told: dict[str, str] = field(default_factory=dict)
    _context: AbstractContextManager[subprocess.Popen[bytes]] | None = None

    def start(self) -> None:
        """In a thread that outlives all others: the kernel ends a process with the thread that started it."""
        _STARTER.submit(self._start).result()

    def _start(self) -> None:
        self._context, self.started = self.make(), time.time()
        self.process = self._context.__enter__()
        self.starts += 1

    def stop(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            context.__exit__(None, None, None)

    def family(self) -> list[psutil.Process]:
        """It and all that it started."""
        if self.process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def signal(self, number: signal.Signals, *, whole: bool = False) -> None:
        for process in self.family() if whole else self.family()[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self, *, whole: bool = False) -> None:
        """SIGKILL to that one process; `whole`: and at once to all that it started."""
        self.signal(signal.SIGKILL, whole=whole)
        if self.process is not None:
            self.process.wait()

    def down(self) -> bool:
        return self.process is None or self.process.poll() is not None

    @contextlib.contextmanager
    def stopped(self, seconds: float) -> Iterator[None]:
        """It and all that it started stand still for so long."""
        self.held = True
        self.signal(signal.SIGSTOP, whole=True)
        try:
            yield
            time.sleep(seconds)
        finally:
            self.signal(signal.SIGCONT, whole=True)
            self.held = False


@dataclass
class Cluster:
    """`postgres`, `redis`, `s3`: the servers; `apis`, `workers`: ours, at `ports` and with metrics at `metrics_ports`.
    `proxy`, `prometheus`: where it is whole, at `url` and `prometheus_url`; or why there is no Prometheus. `disks`: of
    `postgres` and `s3`, where each has one of its own."""

    folder: Path
    environment: dict[str, str]
    postgres: Managed
    redis: Managed
    s3: Managed
    s3_server: swift_server.S3Server
    bucket: str
    apis: list[Managed] = field(default_factory=list)
    workers: list[Managed] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    metrics_ports: list[int] = field(default_factory=list)
    proxy: Managed | None = None
    prometheus: Managed | None = None
    url: str = ""
    prometheus_url: str = ""
    without_prometheus: str | None = None
    disks: dict[str, Path] = field(default_factory=dict)
    ending: threading.Event = field(default_factory=threading.Event)
    begun: float = field(default_factory=time.time)

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def everything(self) -> list[Managed]:
        seen = [managed for managed in (self.proxy, self.prometheus) if managed is not None]
        return [self.postgres, self.redis, self.s3, *self.apis, *self.workers, *seen]

    def supervise(self) -> None:
        """Until `ending`: what is down and not held is started again."""
        while not self.ending.wait(0.5):
            for managed in [*self.apis, *self.workers]:
                if managed.down() and not managed.held:
                    managed.stop()
                    with contextlib.suppress(servers.ServerFailed, OSError):
                        managed.start()

    def run(self, *arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout.strip()

    def client_of_s3(self) -> object:
        return boto3.client(
            "s3",
            endpoint_url=self.s3_server.endpoint_url,
            aws_access_key_id=self.s3_server.access_key_id,
            aws_secret_access_key=self.s3_server.secret_access_key,
            region_name=self.s3_server.region,
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 3}),
        )

    def left_over(self) -> list[str]:
        """Processes of this cluster's APIs and workers that still run. Children that run models get no environment but
        what Python needs: they are known by their names and by this checkout, of which nothing else may run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                mine = process.environ().get("ANNEAL_SOAK") == self.environment["ANNEAL_SOAK"]
                stage = process.name().startswith("anneal-") and process.create_time() > self.begun
                if (mine or (stage and _of_here(process))) and process.pid != os.getpid():
                    found.append(f"{process.pid} {process.name()}")
        return found


def _of_here(process: psutil.Process) -> bool:
    """Whether it runs this checkout's code: others may run theirs."""
    said = [*process.cmdline(), process.environ().get("PYTHONPATH", "")]
    return any(str(ROOT) in text for text in said)


@contextlib.contextmanager
def cluster(
    folder: Path,
    *,
    workers: int,
    apis: int = 2,
    settings: Mapping[str, str] = SETTINGS,
    whole: bool = False,
    port: int | None = None,
    before_s3: Callable[[str], str] = lambda url: url,
    disks: Mapping[str, int] = NO_DISKS,
) -> Iterator[Cluster]:
    """All of it, migrated and ready, with the supervisor running. `whole`: with the proxy (`port`) and Prometheus.
    `before_s3`: the URL of what stands before the S3 server at this one. `disks`: megabytes of the disks of `postgres`
    and `s3`; those who may not mount one have none."""
    with ExitStack() as stack:
        mounted: dict[str, Path] = {}

        @contextlib.contextmanager
        def disk(name: str, at: Path, owner: pwd.struct_passwd | None = None) -> Iterator[None]:
            with small_disk(at, disks.get(name), owner) as made:
                mounted.update({} if made is None else {name: made})
                yield

        postgres, database_url = _postgres(stack, partial(disk, "postgres"))
        redis_port, password = servers.free_port(), secrets.token_hex(8)
        redis = Managed("redis", lambda: _redis(folder, redis_port, password))
        s3_server, s3 = stack.enter_context(_s3(partial(disk, "s3")))
        s3_server = replace(s3_server, endpoint_url=before_s3(s3_server.endpoint_url))
        bucket, broker_url = "anneal", f"redis://:{password}@127.0.0.1:{redis_port}/0"
        environment = {
            **_inherited(),
            **settings,
            **topology.shared(database_url, broker_url, bucket, s3_server),
            "ANNEAL_SOAK": secrets.token_hex(4),
        }
        found = Cluster(folder, environment, postgres, redis, s3, s3_server, bucket, disks=mounted)
        redis.start()
        found.client_of_s3().create_bucket(Bucket=bucket)  # type: ignore[attr-defined]
        found.run("app", "migrate")
        _add_ours(found, apis, workers)
        supervisor = threading.Thread(target=found.supervise, daemon=True)
        try:
            for managed in [*found.apis, *found.workers]:
                managed.start()
            supervisor.start()
            _wait(lambda: all(httpx.get(f"{url}/healthz", timeout=2).status_code == 200 for url in found.urls))
            if whole:
                _add_front(found, servers.free_port() if port is None else port)
            yield found
        finally:
            found.ending.set()
            if supervisor.is_alive():
                supervisor.join(30)
            for managed in [*found.apis, *found.workers]:  # all at once: each may take seconds
                managed.signal(signal.SIGTERM)
            for managed in reversed(found.everything()):
                managed.stop()


def _inherited() -> dict[str, str]:
    ours = ("ANNEAL_", "WORKER_", "STORAGE_", "S3_", "AWS_", "LIMIT_", "COLLECT_", "RETAIN_", "WEBHOOK_", "METRICS_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)}


def _wait(ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if ready():
                return
        time.sleep(0.1)
    raise TimeoutError("the API did not come up")


def _add_ours(cluster: Cluster, apis: int, workers: int) -> None:
    """API processes and workers, each with a home of its own."""
    cluster.ports = [servers.free_port() for _ in range(apis)]
    cluster.metrics_ports = [servers.free_port() for _ in range(workers)]
    for i, port in enumerate(cluster.ports):
        home = cluster.folder / f"api{i}"
        cluster.apis.append(_ours(cluster, home, ["app", "api"], topology.of_api(home, port)))
    for i, port in enumerate(cluster.metrics_ports):
        home = cluster.folder / f"worker{i}"
        told = topology.of_worker(home, cluster.folder, port)
        cluster.workers.append(_ours(cluster, home, ["workers"], {**told, "WORKER_NAME": home.name}))


def _ours(cluster: Cluster, home: Path, module: Sequence[str], told: Mapping[str, str]) -> Managed:
    home.mkdir(exist_ok=True)
    environment = {**cluster.environment, **told}

    @contextlib.contextmanager
    def make() -> Iterator[subprocess.Popen[bytes]]:
        with (home / "log").open("ab") as log:
            command = [*servers.launched(), sys.executable, "-m", *module]
            env = {**environment, **managed.told}
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            servers.stop(process, patience_s=20)

    managed = Managed(home.name, make)
    return managed


def _add_front(cluster: Cluster, port: int) -> None:
    """The proxy, and what watches, where that can be had."""
    cluster.url = f"http://127.0.0.1:{port}"
    cluster.proxy = Managed("proxy", lambda: proxy(cluster.folder, port, cluster.ports))
    cluster.proxy.start()
    cluster.without_prometheus = watcher()
    if cluster.without_prometheus is None:
        watched, ports = servers.free_port(), (cluster.ports, cluster.metrics_ports)
        cluster.prometheus_url = f"http://127.0.0.1:{watched}"
        cluster.prometheus = Managed("prometheus", lambda: prometheus(cluster.folder, watched, *ports))
        cluster.prometheus.start()


def _postgres(stack: ExitStack, disk: Callable[..., AbstractContextManager[None]]) -> tuple[Managed, str]:
    """A server that keeps its data when it is killed, unlike that of the tests."""
    user = servers.unprivileged()
    folder = stack.enter_context(servers.temporary_folder("postgres", owner=user))
    stack.enter_context(disk(folder / "disk", owner=user))
    binaries, data = servers.postgres_installation(folder, user), folder / "disk" / "data"
    password = secrets.token_hex(8)
    servers.init_database(binaries, data, password, user)
    port = servers.free_port()
    managed = Managed("postgres", lambda: servers.postmaster(binaries, data, password, user, port=port, durable=True))
    managed.start()
    stack.callback(managed.stop)
    url = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE anneal")
    return managed, url.rpartition("/")[0] + "/anneal"


@contextlib.contextmanager
def _redis(folder: Path, port: int, password: str) -> Iterator[subprocess.Popen[bytes]]:
    command: list[str | Path] = [servers.redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
    command += ["--requirepass", password, *topology.REDIS]
    with servers.running(command, log=folder / "redis.log", ready=lambda: servers.answers(port)) as process:
        yield process


@contextlib.contextmanager
def _s3(disk: Callable[[Path], AbstractContextManager[None]]) -> Iterator[tuple[swift_server.S3Server, Managed]]:
    """Swift; what is killed and stopped is its proxy, the process that clients speak to."""
    with swift_server.swift_with_proxy(disk) as (server, proxy):
        managed = Managed("s3", proxy)
        managed.start()
        swift_server.wait_healthy(server.endpoint_url)
        yield server, managed
