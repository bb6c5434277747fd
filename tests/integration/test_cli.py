"""The command line against a real service with a worker: one job watched to its verdict, what it left fetched and run,
one whose limits nothing keeps, one that fails."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories.deployment import Deployment, deployment, kill, write_case

pytestmark = pytest.mark.timeout(240)

FAST_JOB = [
    "--budget",
    "12s",
    "--min-seconds",
    "0.1s",
    "--batch",
    "1",
    "--backend",
    "onnxruntime",
    "--max-loss",
    "100%",
]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("home")) as found:
        found.start_hurried_worker()
        found.wait_ready()
        yield found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_case(tmp_path_factory.mktemp("case"), seed=71)


def anneal(deployed: Deployment, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**deployed.environment, "ANNEAL_URL": deployed.url, "ANNEAL_CONFIG_DIR": str(deployed.home / "none")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "anneal_client.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120, **more)


@pytest.fixture(scope="module")
def watched(
    deployed: Deployment, case: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The job of this module: submitted and watched in a pipe."""
    kept = tmp_path_factory.mktemp("kept")
    model, data = case
    then = ["--watch", "--html", str(kept / "report.html"), "--out", str(kept / "bundle.zip"), "--timeout", "100s"]
    return anneal(deployed, "optimize", str(model), "--data", str(data), *FAST_JOB, *then), kept


@pytest.fixture(scope="module")
def job_id(watched: tuple[subprocess.CompletedProcess[str], Path]) -> str:
    return next(word for word in watched[0].stdout.split() if word.startswith("job_"))


def test_a_job_is_watched_to_its_verdict(watched: tuple[subprocess.CompletedProcess[str], Path], job_id: str) -> None:
    done, kept = watched
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr, "a pipe gets no escape codes"
    assert "running" in done.stdout
    assert "as fast" in done.stdout or "the original" in done.stdout
    assert f"anneal report {job_id}" in done.stdout
    assert "<html" in (kept / "report.html").read_text()
    assert "infer.py" in {Path(name).name for name in zipfile.ZipFile(kept / "bundle.zip").namelist()}


def test_for_a_script_there_is_one_document(deployed: Deployment, job_id: str) -> None:
    done = anneal(deployed, "watch", job_id, "--json")
    told = json.loads(done.stdout)
    assert told["exit_code"] == done.returncode
    assert told["verdict"] in ("promise kept", "not faster", "unproven")
    assert told["job"]["status"] == "succeeded"
    assert told["report"]["final_metrics"]
    assert done.stderr == ""


def test_the_report_in_every_form(deployed: Deployment, job_id: str, tmp_path: Path) -> None:
    text = anneal(deployed, "report", job_id)
    assert text.returncode == 0
    assert "What was tried" in text.stdout
    assert json.loads(anneal(deployed, "report", job_id, "--json").stdout)["job_id"] == job_id
    assert anneal(deployed, "report", job_id, "--html", str(tmp_path / "r.html")).returncode == 0
    assert "<html" in (tmp_path / "r.html").read_text()
    assert anneal(deployed, "report", job_id, "--markdown", "-").stdout.startswith("### ")
    wrong = anneal(deployed, "report", job_id, "--html", str(tmp_path / "no" / "r.html"))
    assert (wrong.returncode, "remedy" in wrong.stderr) == (1, True)
    beside = anneal(deployed, "compare", job_id, job_id)
    assert beside.stdout.count(job_id) == 2


def test_the_engine_is_fetched_and_timed(deployed: Deployment, job_id: str, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    done = anneal(deployed, "engines", "pull", job_id, "--unpack", "-o", str(folder))
    assert done.returncode == 0, done.stderr
    assert (folder / "infer.py").is_file()
    again = anneal(deployed, "engines", "pull", job_id, "--unpack", "-o", str(folder))
    assert (again.returncode, "there already" in again.stderr) == (2, True)
    timed = anneal(deployed, "bench", str(folder), "--batch", "1,4", "--seconds", "0.2", "--json")
    assert timed.returncode == 0, timed.stdout + timed.stderr
    assert [row["batch"] for row in json.loads(timed.stdout)["results"]] == [1, 4]
    assert all(row["p50_ms"] > 0 for row in json.loads(timed.stdout)["results"])
    assert job_id in anneal(deployed, "engines").stdout
    pulled = anneal(deployed, "engines", "pull", job_id, "-o", str(tmp_path / "b.zip"), "--json")
    path = json.loads(pulled.stdout)["path"]
    assert anneal(deployed, "bench", path, "--seconds", "0.1").returncode == 0
    without = anneal(deployed, "bench", path, "--python", "/nowhere/python")
    assert (without.returncode, "requirements.txt" in without.stderr) == (2, True)


def test_limits_that_nothing_keeps_exit_with_4(deployed: Deployment, case: tuple[Path, Path]) -> None:
    model, data = case
    wanted = ["--data", str(data), *FAST_JOB, "--budget", "40s", "--p99", "0.000001ms", "--watch"]  # it ends at once
    done = anneal(deployed, "optimize", str(model), *wanted)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "no_feasible_candidate" in done.stdout
    assert "p99_latency_ms to more than" in done.stdout, "the remedy"


def test_a_job_that_fails_says_why_and_exits_with_5(
    deployed: Deployment, case: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = case
    with np.load(data) as arrays:
        (name,) = arrays.files
        broken = np.array(arrays[name])
    broken[3] = np.nan
    np.savez(tmp_path / "nan.npz", **{name: broken})
    done = anneal(deployed, "optimize", str(model), "--data", str(tmp_path / "nan.npz"), *FAST_JOB, "--watch")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "dataset_not_finite" in done.stdout
    assert "→" in done.stdout, "the remedy"


def test_who_watches_sees_no_more_of_a_restart_than_a_pause(deployed: Deployment, tmp_path: Path) -> None:
    model, data = write_case(tmp_path, seed=72)
    sent = anneal(deployed, "optimize", str(model), "--data", str(data), *FAST_JOB, "--json")
    job_id = json.loads(sent.stdout)["id"]
    command = [sys.executable, "-m", "anneal_client.cli", "--url", deployed.url, "watch", job_id]
    watching = subprocess.Popen(
        command, env=deployed.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert watching.stdout is not None
        assert "queued" in watching.stdout.readline()
        (api,) = (p for p in deployed.processes if p.poll() is None and "app" in p.args)
        kill(api)
        deployed.start_api()
        out, _ = watching.communicate(timeout=100)
    finally:
        watching.kill()
    assert watching.returncode in (0, 3), out
    assert f"anneal report {job_id}" in out


def test_on_a_terminal_it_is_drawn_and_in_no_colour_without_colours(deployed: Deployment, job_id: str) -> None:
    for extra, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        shown = _in_a_terminal(deployed, ["watch", job_id], extra)
        assert "\x1b[J" in shown, "the block is drawn again"
        assert ("\x1b[1;" in shown or "\x1b[2m" in shown) is coloured
        assert "anneal engines pull" in shown


def _in_a_terminal(deployed: Deployment, arguments: list[str], extra: dict[str, str]) -> str:
    master, slave = pty.openpty()
    environment = {k: v for k, v in deployed.environment.items() if k not in ("NO_COLOR", "CI")}
    environment |= {"ANNEAL_URL": deployed.url, "TERM": "xterm-256color", "PYTHONDONTWRITEBYTECODE": "1", **extra}
    command = [sys.executable, "-m", "anneal_client.cli", *arguments]
    process = subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    found: list[bytes] = []

    def read() -> None:
        try:
            while block := os.read(master, 65536):
                found.append(block)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process.wait(timeout=60)
    reader.join(10)
    os.close(master)
    return b"".join(found).decode(errors="replace")
