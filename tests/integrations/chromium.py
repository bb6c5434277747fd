"""A Chromium for the tests of the pages: the one that is installed, else Debian's package."""

from __future__ import annotations

import os
import shutil
import subprocess

from tests.integrations.environments import NoSystemPackage

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_INSTALL_TIMEOUT_S = 280


def chromium() -> str:
    """Its path. Raises `NoSystemPackage` with what to do, where there is none and none can be installed."""
    found = _installed()
    if found is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise NoSystemPackage("The pages are tested in Chromium: install your system's package `chromium`.")
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, check=False,
                timeout=_INSTALL_TIMEOUT_S,
            )  # fmt: skip
            if done.returncode:
                raise NoSystemPackage(f"apt-get {command[0]}\n{(done.stdout + done.stderr)[-4000:]}")
        found = _installed()
    if found is None:
        raise NoSystemPackage("apt-get installed no chromium")
    return found


def _installed() -> str | None:
    return next((path for name in _NAMES if (path := shutil.which(name))), None)
