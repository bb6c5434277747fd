"""Virtual environments of the integration tests: one for each lock file `requirements-<name>.txt`, made on first use
and kept as long as the file's digest is the same. Of npm's packages likewise."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / ".venv-integrations"
_INSTALL_TIMEOUT_S = 280


class NotInstalled(RuntimeError):
    """An environment could not be made; the message carries the end of what pip or npm said."""


class NoSystemPackage(RuntimeError):
    """A program that comes with the system's packages is not there, and this machine lets us install none."""


def environment(name: str) -> Path:
    """The folder of the environment. The lock file names every package: nothing else is installed."""
    requirements = Path(__file__).with_name(f"requirements-{name}.txt")
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = FOLDER / f"{name}-{digest}"
    # Two test runs at once must not install into the same folder: the lock file is the lock.
    with requirements.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").is_file():
            for stale in FOLDER.glob(f"{name}-{'?' * len(digest)}"):  # not those of NAME-more
                shutil.rmtree(stale)
            _run([sys.executable, "-m", "venv", str(folder)])
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            # Python compiles what is imported: a fraction of it.
            _run([*pip, "--no-compile", "--no-deps", "--requirement", str(requirements)])
            (folder / "installed").touch()
    return folder


def node_environment(name: str) -> Path:
    """The same of npm's packages: a folder with what `NAME/package-lock.json` names, and the programs of `NAME`."""
    source = Path(__file__).with_name(name)
    files = [source / "package.json", source / "package-lock.json", *sorted(source.glob("*.mjs"))]
    npm = shutil.which("npm")
    if npm is None:
        raise NoSystemPackage("npm is missing: install your system's packages `nodejs` and `npm`.")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    folder = FOLDER / f"{name}-{digest}"
    with files[1].open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").is_file():
            for stale in FOLDER.glob(f"{name}-{'?' * len(digest)}"):
                shutil.rmtree(stale)
            folder.mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder)
            _run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], folder)
            (folder / "installed").touch()
    return folder


def _run(command: list[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired as slow:
        raise NotInstalled(f"no end after {slow.timeout} s: {' '.join(command)}") from None
    if done.returncode != 0:
        raise NotInstalled(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
