"""The provider of `clients/airflow` in a real Airflow 3, on SQLite. Run by `make test-airflow`: Airflow is large."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.factories.deployment import Deployment, deployment
from tests.factories.plugins import EXAMPLE, install
from tests.integration.test_plugin import sum_of_constants
from tests.integrations.conftest import CLIENT, KEPT, MISSED
from tests.integrations.environments import REPOSITORY, environment
from tests.servers import free_port, launched, stop

PROVIDER = REPOSITORY / "clients" / "airflow"
CHECK = Path(__file__).with_name("check.py")

pytestmark = pytest.mark.timeout(400)


@dataclass
class Airflow:
    """An installation with its own home. `processes` by what they are."""

    home: Path
    variables: dict[str, str]
    api_port: int

    def python(self, *arguments: object, **variables: str) -> dict[str, Any]:
        command = [environment("airflow") / "bin" / "python", *arguments]
        done = subprocess.run(
            [str(part) for part in command],
            env={**self.variables, **variables},
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=150,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.home / f"{arguments[0]}-{time.monotonic_ns()}.log").open("wb")
        airflow = environment("airflow") / "bin" / "airflow"
        with log:
            return subprocess.Popen(
                [*launched(), str(airflow), *arguments],
                env=self.variables,
                cwd=self.home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def logs(self) -> str:
        files = [*self.home.glob("*.log"), *self.home.glob("logs/**/*.log")]
        return "\n".join(f"--- {p.relative_to(self.home)}\n{p.read_text(errors='replace')[-3000:]}" for p in files)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.home / "airflow.db", timeout=30)) as database:
            return database.execute(query).fetchall()

    def wait_for_server(self, timeout_s: float) -> None:
        """Until its API answers: a task that begins before that has failed."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if (
                    httpx.get(f"http://127.0.0.1:{self.api_port}/api/v2/version", timeout=5).status_code
                    == httpx.codes.OK
                ):
                    return
            time.sleep(0.3)
        raise TimeoutError(f"Airflow's API server does not answer\n{self.logs()}")

    def wait_for(self, task: str, *states: str, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        found: list[tuple[Any, ...]] = []
        while time.monotonic() < deadline:
            found = self.rows(f"select state from task_instance where task_id = '{task}'")
            if found and found[0][0] in states:
                return str(found[0][0])
            time.sleep(0.2)
        raise TimeoutError(f"{task} is {found}, not {states}\n{self.logs()}")


@pytest.fixture(scope="module")
def anneal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "site").mkdir()
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(folder / "site", project["name"], project["version"], project["entry-points"], EXAMPLE / "anneal_toy.py")
    with deployment(folder / "home", {"PYTHONPATH": str(folder / "site")}) as found:
        found.start_worker()
        found.wait_ready()
        yield found


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory, anneal: Deployment) -> Airflow:
    home = tmp_path_factory.mktemp("airflow")
    site = home / "site"
    site.mkdir()
    project = tomllib.loads((PROVIDER / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["version"], project["entry-points"])
    port = free_port()
    settings = {
        "CORE__DAGS_FOLDER": str(home / "dags"),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": "2",
        "CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "API_AUTH__JWT_SECRET": "a secret of this test alone, of enough bytes for HS512: 0123456789abcdef",
        "SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "5",
        "TRIGGERER__JOB_HEARTBEAT_SEC": "1",
        "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "4",
        # On a busy machine Airflow's own server takes longer than its workers wait by default.
        "WORKERS__EXECUTION_API_TIMEOUT": "90",
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "600",
        "LOGGING__LOGGING_LEVEL": "INFO",
    }
    kept = {n: os.environ[n] for n in ("PATH", "LANG") if n in os.environ}
    variables = {
        **kept,
        **{f"AIRFLOW__{name}": value for name, value in settings.items()},
        "HOME": str(home),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW_CONN_ANNEAL_DEFAULT": json.dumps({"conn_type": "anneal", "host": anneal.url}),
        "AIRFLOW_CONN_ANNEAL_NOWHERE": json.dumps({"conn_type": "anneal", "host": "127.0.0.1", "port": 1}),
        "PATH": f"{environment('airflow') / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{site}:{PROVIDER}:{CLIENT}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    found = Airflow(home, variables, port)
    (home / "dags").mkdir()
    migrate = found.start("db", "migrate")
    assert migrate.wait(timeout=120) == 0, found.logs()
    return found


def test_airflow_knows_the_provider_and_its_connections(airflow: Airflow, anneal: Deployment) -> None:
    found = airflow.python(CHECK, "provider")
    assert found["provider"]
    assert (found["package"], found["class"]) == ("anneal-airflow", "anneal_airflow.hook.AnnealHook")
    assert found["answer"][0], found["answer"]
    assert not found["none"][0]
    assert "connection_failed" in found["none"][1]
    assert found["addresses"] == [
        ["https://a.example", "k"],
        ["http://a.example:8000", "k"],
        ["https://a.example/base/", None],
        ["http://a.example:81/base", None],
        ["http://a.example", None],
        ["http://127.0.0.1", None],
    ]


def test_a_job_outlives_the_triggerer_that_waited_for_it(airflow: Airflow, anneal: Deployment, tmp_path: Path) -> None:
    """A scheduler, an API server, a DAG processor and a triggerer, which is killed while the job runs."""
    model = sum_of_constants(tmp_path / "sum.onnx")
    bundle = tmp_path / "bundle.zip"
    airflow.variables |= {"MODEL": str(model), "SPEC": json.dumps(KEPT), "BUNDLE": str(bundle)}
    (airflow.home / "dags" / "release.py").write_text((PROVIDER / "example_dag.py").read_text())
    server = ("api-server", "--port", str(airflow.api_port), "--host", "127.0.0.1", "--workers", "1")
    started = [airflow.start(*server)]
    try:
        airflow.wait_for_server(120)
        started += [airflow.start("scheduler", "--skip-serve-logs"), airflow.start("dag-processor")]
        first = airflow.start("triggerer", "--skip-serve-logs")
        started.append(first)
        airflow.wait_for("optimize", "deferred", timeout_s=120)
        deadline = time.monotonic() + 30
        while not airflow.rows("select 1 from trigger where triggerer_id is not null") and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        with anneal.client() as client:
            (job,) = client.jobs()
            assert job["status"] in ("queued", "running")
            client.wait(job["id"])
        assert airflow.wait_for("optimize", "deferred", timeout_s=1) == "deferred", "nobody heard of the job's end"
        started.append(airflow.start("triggerer", "--skip-serve-logs"))
        assert airflow.wait_for("deploy", "success", "failed", "upstream_failed", timeout_s=150) == "success", (
            airflow.logs()
        )
    finally:
        for process in reversed(started):
            stop(process)
    assert zipfile.is_zipfile(bundle)
    with anneal.client() as client:
        jobs = list(client.jobs())
    assert len(jobs) == 1, "the trigger that went on started no other job"


def test_the_dag_runs_by_dag_test_and_fails_where_a_limit_is_missed(
    airflow: Airflow, anneal: Deployment, tmp_path: Path
) -> None:
    model = str(sum_of_constants(tmp_path / "sum.onnx"))
    bundle = tmp_path / "bundle.zip"
    path = f"{airflow.variables['PYTHONPATH']}:{PROVIDER}"
    told = {"PYTHONPATH": path, "MODEL": model, "BUNDLE": str(bundle)}
    found = airflow.python(CHECK, "run", **told, SPEC=json.dumps(KEPT))
    assert found["state"] == "success", found
    value = found["values"]["optimize"]
    assert value["promise"] in ("kept", "unproven"), "unproven where this machine is busy"
    assert value["figures"]["speedup"] > 1
    assert found["values"]["deploy"].startswith(value["engine_id"])
    assert zipfile.is_zipfile(bundle)
    missed = airflow.python(CHECK, "run", **told, SPEC=json.dumps(MISSED))
    assert (missed["state"], missed["tasks"]) == ("failed", {"optimize": "failed", "deploy": "upstream_failed"})
