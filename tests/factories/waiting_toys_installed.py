"""Installs the package of `waiting_toys` for workers to find."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.factories.plugins import EXAMPLE, install

POINTS = {
    "anneal.backends": {
        "toy-per-sample": "waiting_toys:PerSample",
        "toy-any-batch": "waiting_toys:AnyBatch",
        "toy-any-graph": "waiting_toys:OfAnyGraph",
    },
    "anneal.stages": {"toy_fold": "anneal_toy:Fold"},
}


def installed(site: Path, original_s: float) -> Path:
    """The folder to put into PYTHONPATH. `original_s`: what a call of the original takes here, by which they wait."""
    site.mkdir(parents=True)
    shutil.copy(EXAMPLE / "anneal_toy.py", site)
    install(site, "waiting-toys", "0.1.0", POINTS, Path(__file__).with_name("waiting_toys.py"))
    (site / "waiting_toys.txt").write_text(f"{original_s}")
    return site
