"""Installs the package of `eight_toys` for workers to find, and asks for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.factories.plugins import EXAMPLE, install

COUNT = 8
POINTS = {
    "anneal.backends": {"toy-eight": "eight_toys:EightToys"},
    "anneal.stages": {"toy_slow_fold": "eight_toys:SlowFold"},
}
SPEC: dict[str, Any] = {
    "benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
    "target": {"backends": ["toy-eight"]},
    "budget_seconds": 120,
}


def installed(site: Path) -> Path:
    """The folder to put into PYTHONPATH."""
    site.mkdir(parents=True)
    shutil.copy(EXAMPLE / "anneal_toy.py", site)
    install(site, "eight-toys", "0.1.0", POINTS, Path(__file__).with_name("eight_toys.py"))
    return site
