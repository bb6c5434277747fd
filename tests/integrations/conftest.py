"""A service that platforms use: real, with one worker, and a model for which a faster engine is sure to be found."""

from __future__ import annotations

import json
import os
import subprocess
import time
import tomllib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.factories.deployment import Deployment, deployment
from tests.factories.pace import paced
from tests.factories.plugins import EXAMPLE, install
from tests.integration.test_plugin import sum_of_constants
from tests.integrations.environments import REPOSITORY, NoSystemPackage, environment

CLIENT = REPOSITORY / "clients" / "python"
# The toy engine of `examples/plugin` adds once where the original adds 300 times: faster by far, whatever the machine
# does meanwhile, and its `infer.py` needs numpy only.
KEPT: dict[str, Any] = {
    "benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
    "target": {"backends": ["toy"]},
    "budget_seconds": paced(10),
}
MISSED: dict[str, Any] = {**KEPT, "constraints": {"max_size_mb": 0.000001}}


def _skipped(missing: NoSystemPackage) -> None:
    """README asks for a Python registry, whose environments have to come together; it asks for no system packages."""
    pytest.skip(str(missing)[-1500:])


def _time_is_up() -> bool:
    """`.ci/run` says when no further test may begin (`ANNEAL_TESTS_UNTIL`, seconds since 1970): a slow machine tells
    what it left out, where its time would end it in the middle."""
    until = os.environ.get("ANNEAL_TESTS_UNTIL")
    return until is not None and time.time() > float(until)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    if _time_is_up():
        pytest.skip("LEFT OUT: the time of this run is up; `make test-integrations` runs it")
    try:
        return (yield)
    except NoSystemPackage as missing:
        return _skipped(missing)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except NoSystemPackage as missing:
        return _skipped(missing)


@dataclass(frozen=True)
class Service:
    """`model`: an `.onnx` with the input and output `input` and `output`, float32 [batch, 16]."""

    deployed: Deployment
    model: Path

    @property
    def url(self) -> str:
        return self.deployed.url


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    site = folder / "site"
    site.mkdir()
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["version"], project["entry-points"], EXAMPLE / "anneal_toy.py")
    with deployment(folder / "home", {"PYTHONPATH": str(site)}) as deployed:
        deployed.start_worker()
        deployed.wait_ready()
        yield Service(deployed, sum_of_constants(folder / "sum.onnx"))


def asked(
    name: str, script: Path, *arguments: object, variables: Mapping[str, str] | None = None, timeout_s: float = 120
) -> dict[str, Any]:
    """What a script says, as the JSON of its last line, that runs in the environment `name` with the client."""
    command = [environment(name) / "bin" / "python", script, *arguments]
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("MLFLOW_", "AIRFLOW_", "ANNEAL_"))}
    told = {**kept, "PYTHONPATH": str(CLIENT), "PYTHONDONTWRITEBYTECODE": "1", **(variables or {})}
    done = subprocess.run(
        [str(part) for part in command], env=told, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
