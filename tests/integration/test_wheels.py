"""Both wheels, really built and installed into a new environment: the service migrates and serves from there, and the
command `anneal` runs it, uses it and stops it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from email import message_from_bytes
from pathlib import Path

import httpx
import pytest

from tests.factories import onnx_models
from tests.factories.deployment import FAST
from tests.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
START_S = 60

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Built from copies, so that nothing is left in the checkout."""
    found, folder = {}, tmp_path_factory.mktemp("wheels")
    for name, source in (("anneal", ROOT), ("anneal_client", ROOT / "clients" / "python")):
        copy = tmp_path_factory.mktemp(name)
        for path in parts(source):
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / path, copy / path)
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy))
        (found[name],) = folder.glob(f"{name}-*.whl")
    return found


PACKAGES = ("app", "workers", "migrations", "anneal_client")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")


def parts(folder: Path) -> list[Path]:
    """What the distribution in `folder` is made of."""
    found = [p for name in PACKAGES if (folder / name).is_dir() for p in (folder / name).rglob("*") if p.is_file()]
    found += [folder / name for name in BESIDE if (folder / name).is_file()]
    return [p.relative_to(folder) for p in found if "__pycache__" not in p.parts]


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheels. What they depend on is that of this environment, which takes no time, but for
    PyTorch, which nobody has at first."""
    folder = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    for base in [Path(p) for p in sys.path if p.endswith("site-packages")]:
        for entry in base.iterdir():
            left_out = entry.name.startswith(("torch", "onnxscript", "anneal", "__editable__", "_virtualenv"))
            if not left_out and entry.suffix != ".pth" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    run(str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", *map(str, wheels.values()))
    return folder


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for one, with PyTorch and its exporter: the names and versions, none of the gigabytes."""
    folder = tmp_path_factory.mktemp("registry")
    for name, version in (("torch", "2.9.0"), ("onnxscript", "0.5.7")):
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise ImportError('nothing but a name')\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


def test_everything_of_the_packages_is_in_the_wheels(wheels: dict[str, Path]) -> None:
    for name, source in (("anneal", ROOT), ("anneal_client", ROOT / "clients" / "python")):
        with zipfile.ZipFile(wheels[name]) as wheel:
            there = set(wheel.namelist())
        # What makes a migration, and what its tests go by.
        apart = {"migrations/script.py.mako", "migrations/previous_release.toml"}
        wanted = {str(p) for p in parts(source) if p.parts[0] in PACKAGES} - apart
        assert not wanted - there, f"{name}: they are missing in the wheel"


def test_the_client_alone_needs_no_ml_library(
    wheels: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As `pipx install` and `uvx` have it: the wheel, and what it requires."""
    folder = tmp_path_factory.mktemp("alone")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    run(*pip, str(wheels["anneal_client"]))
    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    with zipfile.ZipFile(wheels["anneal_client"]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        required = [*message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist", [])]
    names = installed_for(required)
    assert len(names) < 12, f"a light client: {names}"
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for file in {f.parts[0] for f in distribution.files or ()} - {"..", "__pycache__"}:
            (site / file).symlink_to(Path(str(distribution.locate_file(file))))
    variables = {"PATH": os.environ["PATH"], "ANNEAL_CONFIG_DIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

    def anneal(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bin" / "anneal"), *arguments]
        return subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "optimize" in anneal("--help").stdout
    assert anneal("--url", "http://127.0.0.1:9", "doctor").returncode == 6
    assert "anneal[cpu,openvino]" in anneal("serve").stderr, "what to install"
    assert "complete" in anneal("completions", "bash").stdout


def installed_for(required: Iterable[str]) -> set[str]:
    """The distributions that these requirements take, without extras, and all below them."""
    found: set[str] = set()
    asked = [line for line in required if "extra ==" not in line]
    while asked:
        name = re.split(r"[^A-Za-z0-9._-]", asked.pop(), maxsplit=1)[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another Python or system
            below = importlib.metadata.requires(name) or []
            if name not in found:
                found.add(name)
                asked += [line for line in below if "extra ==" not in line]
    return found


@contextlib.contextmanager
def serving(environment: Path, folder: Path, *options: str, **variables: str) -> Iterator[str]:
    """`anneal serve` in a folder that holds an `app.py` of somebody else; ended as Ctrl-C does."""
    port = free_port()
    (folder / "app.py").write_text("raise SystemExit('this is not the service')")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ANNEAL_", "WORKER_", "PYTHON"))}
    command = [str(environment / "bin" / "anneal"), "serve", "--port", str(port), "--home", str(folder / "home")]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *options],
            env={**kept, **FAST, "WORKER_LOCK_DIR": str(folder), **variables},
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _ready(url):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _ready(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/readyz").json()["status"] == "ready")
    except httpx.HTTPError:
        return False


def test_the_installed_service_migrates_serves_and_gets_what_it_lacks(
    environment: Path, registry: Path, tmp_path: Path
) -> None:
    def anneal(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / "anneal"), "--url", url, *arguments]
        variables = {"PATH": os.environ["PATH"], "ANNEAL_CONFIG_DIR": str(tmp_path)}
        return subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)

    model = onnx_models.save(onnx_models.mlp(), tmp_path / "net.onnx")
    with serving(environment, tmp_path) as url:
        assert (tmp_path / "home" / "anneal.db").is_file()
        doctor = anneal("doctor")
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
        assert "anneal serve --with torch" in doctor.stdout, "what reads a .pt2 is missing"
        submitted = anneal("optimize", str(model), "--budget", "10s", "--json")
        assert submitted.returncode == 0, submitted.stderr
        assert anneal("cancel", json.loads(submitted.stdout)["id"]).returncode == 0
    where = run(str(environment / "bin" / "python"), "-P", "-c", "import app; print(app.__file__)", cwd=tmp_path)
    assert where.startswith(str(environment)), "it was the installed one, whatever lies where the tests stand"
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry)}
    with serving(environment, tmp_path, "--with", "torch", **pip) as url:
        assert "pt2" in json.loads(anneal("capabilities", "--json").stdout)["formats"]
    with serving(environment, tmp_path, "--with", "torch", PIP_NO_INDEX="1") as url:
        assert "torch is there already" in (tmp_path / "log").read_text()
