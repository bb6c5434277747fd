"""Prometheus and its `promtool`: the installed ones, else those of Debian's package `prometheus`, unpacked and kept."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

from tests.integrations.environments import FOLDER, NoSystemPackage

_TIMEOUT_S = 200


def promtool() -> Path:
    """Raises `NoSystemPackage` where there is none, and no apt to fetch it with."""
    return _program("promtool")


def prometheus() -> Path:
    """The server; raises likewise."""
    return _program("prometheus")


def _program(name: str) -> Path:
    if found := shutil.which(name):
        return Path(found)
    folder = FOLDER / "prometheus"
    tool = folder / "usr/bin" / name
    with Path(__file__).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tool.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                _run(["apt-get", "update", "-qq"], folder)
                _run(["apt-get", "download", "-qq", "prometheus"], folder)
                (package,) = folder.glob("prometheus_*.deb")
                _run(["dpkg-deb", "--extract", str(package), str(folder)], folder)
                package.unlink()
            except (OSError, ValueError) as error:
                raise NoSystemPackage(f"{name} is neither installed nor to be had from Debian's packages") from error
    return tool


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise NoSystemPackage(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")
