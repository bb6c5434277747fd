"""A real worker (`python -m workers`) whose jobs do nothing but wait: everything around their stages is as it is.

    python benchmarks/_trivial_worker.py FOLDER SECONDS

Writes a line for each job to FOLDER/<its name>: when its work began and ended, by the machine's monotonic clock. What
lies between the end of one and the beginning of the next is the service's: the job's end in the database, the claim of
the next and its lease, the workspace, the rows of job and model. The jobs end as failed, as one does whose model is
refused.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from app.domain.failures import FailureKind, StageFailure
from app.settings import load_settings
from workers import attempts
from workers.__main__ import main

SECONDS = float(sys.argv[2])
NOTES = Path(sys.argv[1]) / load_settings().worker.name  # once: to read the settings takes milliseconds


class Trivial:
    """In the place of the optimizer."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def run(self) -> None:
        began = time.monotonic()
        time.sleep(SECONDS)
        with NOTES.open("a") as notes:
            notes.write(f"{began} {time.monotonic()}\n")
        raise StageFailure("trivial", "There was nothing to do.", FailureKind.MODEL)


attempts.Optimizer = Trivial

if __name__ == "__main__":
    sys.exit(main())
