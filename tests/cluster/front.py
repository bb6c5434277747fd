"""What stands before the cluster and what watches it: Caddy from a wheel, Prometheus from the system's packages."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import yaml

from tests import servers
from tests.cluster import topology
from tests.integrations import promtool
from tests.integrations.environments import NoSystemPackage, environment


def watcher() -> str | None:
    """Why there is no Prometheus to be had here; None where there is."""
    try:
        promtool.prometheus()
    except NoSystemPackage as missing:
        return str(missing)
    return None


def caddy() -> Path:
    """Installed on first use. Raises `NotInstalled`."""
    return environment("caddy") / "bin" / "caddy"


@contextlib.contextmanager
def proxy(folder: Path, port: int, apis: Sequence[int]) -> Iterator[subprocess.Popen[bytes]]:
    """Before the API processes at these ports, with the configuration of the compose file."""
    home = folder / "proxy"
    home.mkdir(exist_ok=True)
    command: list[str | Path] = [caddy(), "run", "--config", topology.CADDYFILE, "--adapter", "caddyfile"]

    def ready() -> bool:
        return _answers(f"http://{topology.HOST}:{port}/healthz")

    with servers.running(command, log=home / "log", ready=ready, told=topology.of_proxy(port, apis)) as process:
        yield process


@contextlib.contextmanager
def prometheus(
    folder: Path, port: int, apis: Sequence[int], workers: Sequence[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """It watches these API processes and workers, by the rules of the compose file. Raises `NoSystemPackage`."""
    home = folder / "prometheus"
    home.mkdir(exist_ok=True)
    for rules in ("recording.yml", "alerts.yml"):
        shutil.copy(topology.PROMETHEUS / rules, home)
    (home / "prometheus.yml").write_text(yaml.safe_dump(topology.of_prometheus(apis, workers, "2s")))
    command: list[str | Path] = [promtool.prometheus(), f"--config.file={home / 'prometheus.yml'}"]
    command += [f"--web.listen-address={topology.HOST}:{port}", f"--storage.tsdb.path={home / 'data'}"]
    ready_url = f"http://{topology.HOST}:{port}/-/ready"
    with servers.running(command, log=home / "log", ready=lambda: _answers(ready_url), timeout_s=60) as process:
        yield process


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
