"""Where the client keeps what it may need again: engines that were loaded, uploads that did not finish."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`ANNEAL_CACHE`, else the system's folder for caches. Anything in it may be deleted at any time."""
    if given := os.environ.get("ANNEAL_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "anneal"
