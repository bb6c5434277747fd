"""Builds the documentation's site: `python -m tests.integrations.docs_site FOLDER`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.integrations.environments import REPOSITORY, environment


def build(folder: Path) -> str:
    """Into `folder`; what it said. Raises RuntimeError where a page or a link is missing."""
    command = [str(environment("docs") / "bin" / "mkdocs"), "build", "--strict", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout + done.stderr


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
