"""Packages with backends and stages of their own, really built and installed: a wheel, in a folder for `PYTHONPATH`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "plugin"


def wheel_of(project: Path, scratch: Path) -> Path:
    """Built from a copy, so that nothing is left beside the sources. `scratch`: a folder that is made."""
    copy, out = scratch / "project", scratch / "wheels"
    shutil.copytree(project, copy, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy))
    (made,) = out.glob("*.whl")
    return made


def install_wheel(wheel: Path, site: Path) -> None:
    """Into the folder `site`, without what it depends on: that is where the worker runs."""
    _pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))


def install(folder: Path, name: str, version: str, points: dict[str, dict[str, str]], *modules: Path) -> None:
    """What `install_wheel` leaves, without building one: its modules, and its metadata."""
    for module in modules:
        shutil.copy(module, folder)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [line for group, at in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in at.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def project(
    folder: Path, name: str, version: str, points: Mapping[str, Mapping[str, str]], modules: Mapping[str, str]
) -> Path:
    """The sources of such a package. `points`: group → name → object; `modules`: name → source."""
    folder.mkdir(parents=True)
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    groups = [
        line
        for group, at in points.items()
        for line in (f'[project.entry-points."{group}"]', *(f"{key} = {json.dumps(to)}" for key, to in at.items()))
    ]
    told = [
        *("[build-system]", 'requires = ["setuptools"]', 'build-backend = "setuptools.build_meta"'),
        *("[project]", f'name = "{name}"', f'version = "{version}"', *groups),
        *("[tool.setuptools]", f"py-modules = {json.dumps([*modules])}"),
    ]
    (folder / "pyproject.toml").write_text("\n".join(told) + "\n")
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
