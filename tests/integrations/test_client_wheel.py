"""The client's wheel in an environment without any ML library: built, installed, used on a service that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.factories import onnx_models
from tests.factories.deployment import deployment, write_case
from tests.integrations.environments import REPOSITORY, environment

SCRIPT = """
import asyncio, importlib.util, sys
from pathlib import Path
from anneal_client import AsyncClient, Client, EngineUnusable, Progress

for name in ("numpy", "onnx", "onnxruntime", "torch", "pydantic", "app", "workers"):
    assert importlib.util.find_spec(name) is None, name
url, model, data, folder = sys.argv[1], *map(Path, sys.argv[2:])
spec = {"benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True}, "budget_seconds": 10}
with Client(url) as client:
    uploaded = client.upload_model(model)
    assert uploaded.format == "archive", uploaded
    result = client.optimize(uploaded, data, on_event=Progress(), timeout_s=120, **spec)
    assert result.job.status == "succeeded"
    assert result.report.final_metrics["speedup"]
    (engine,) = client.engines(job_id=result.job.id)
    assert client.download_bundle(engine.id, folder / "bundle.zip").stat().st_size == engine.bundle_size_bytes
    try:
        result.engine
    except EngineUnusable as missing:
        assert missing.code == "engine_library_missing", missing
        assert "pip install -r" in missing.remedy
    else:
        raise AssertionError("an engine without its library")

async def again():
    async with AsyncClient(url) as client:
        assert [job.id async for job in client.jobs(model_id=uploaded.id)] == [result.job.id]
        assert (await client.wait(result.job.id)).status == "succeeded"

asyncio.run(again())
print("used", uploaded.id)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    source = folder / "source"  # building leaves folders beside what it builds
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY / "clients" / "python", source, ignore=ignored)
    subprocess.run([*command, str(folder), str(source)], check=True, timeout=120)
    (found,) = folder.glob("anneal_client-*.whl")
    return found


def test_every_module_is_in_it(wheel: Path) -> None:
    package = REPOSITORY / "clients" / "python" / "anneal_client"
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if name.startswith("anneal_client/")}
    assert names == {str(p.relative_to(package.parent)) for p in package.rglob("*") if p.suffix in (".py", ".typed")}


@pytest.fixture(scope="module")
def wheelhouse(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and what it needs, as an index would have them."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    shutil.copy(wheel, folder)
    locked = Path(__file__).with_name("requirements-client.txt")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, "--requirement", str(locked)], check=True, timeout=120)
    return folder


def outcome(command: list[str | Path], **variables: str | Path) -> str:
    told = {"HOME": variables.pop("home"), "PATH": "/usr/bin:/bin", "ANNEAL_URL": "http://127.0.0.1:9", **variables}
    done = subprocess.run(
        [str(part) for part in command],
        env={name: str(value) for name, value in told.items()},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return f"{done.returncode} {done.stdout}{done.stderr}"


def test_uvx_runs_it_without_installing(wheelhouse: Path, tmp_path: Path) -> None:
    uvx = [environment("tools") / "bin" / "uvx", "--offline", "--no-index", "--find-links", wheelhouse]
    variables = {"home": tmp_path, "UV_CACHE_DIR": tmp_path / "cache", "UV_PYTHON": sys.executable}
    (wheel,) = wheelhouse.glob("anneal_client-*.whl")
    told = outcome([*uvx, "--from", wheel, "anneal", "--version"], **variables)
    assert told.startswith("0 anneal-client 0.1.0"), told
    told = outcome([*uvx, "--from", "anneal-client", "anneal", "serve"], **variables)
    assert told.startswith("1 "), told
    assert "The service is not installed beside this client." in told


def test_pipx_installs_it(wheelhouse: Path, tmp_path: Path) -> None:
    (wheel,) = wheelhouse.glob("anneal_client-*.whl")
    variables = {
        "home": tmp_path,
        "PIPX_HOME": tmp_path / "pipx",
        "PIPX_BIN_DIR": tmp_path / "bin",
        "PIPX_DEFAULT_PYTHON": sys.executable,
        # It installs by uv where there is one, else by pip.
        **{"UV_NO_INDEX": "1", "UV_FIND_LINKS": wheelhouse, "UV_OFFLINE": "1", "UV_CACHE_DIR": tmp_path / "cache"},
        **{"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheelhouse},
    }
    told = outcome([environment("tools") / "bin" / "pipx", "install", wheel], **variables)
    assert told.startswith("0 "), told
    anneal = tmp_path / "bin" / "anneal"
    assert outcome([anneal, "--version"], home=tmp_path) == "0 anneal-client 0.1.0\n"
    told = outcome([anneal, "jobs", "--json"], home=tmp_path)
    assert told.startswith("6 "), told
    assert "connection_failed" in told


def test_it_is_all_that_a_user_needs(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    # What the lock file names is taken from the environment that was made of it: no other download.
    (site,) = folder.glob("lib/python3*/site-packages")
    (locked,) = environment("client").glob("lib/python3*/site-packages")
    (site / "locked.pth").write_text(f"{locked}\n")
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", str(wheel)], check=True, timeout=120)
    _, data = write_case(tmp_path, 7)
    model = onnx_models.save_external(
        onnx_models.mlp(features=16, hidden=64, classes=4, seed=7), tmp_path / "model.onnx", location="model.onnx.data"
    )
    with deployment(tmp_path / "home") as deployed:
        deployed.start_worker()
        deployed.wait_ready()
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"ANNEAL_CACHE": str(tmp_path / "cache")}
        arguments = [deployed.url, str(model), str(data), str(tmp_path)]
        done = subprocess.run(
            [python, "-c", SCRIPT, *arguments],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr
    assert "succeeded" in done.stderr, "the progress was told"
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
