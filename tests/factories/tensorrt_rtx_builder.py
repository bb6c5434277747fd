"""`python -m tests.factories.tensorrt_rtx_builder`: a real CPU worker with the real TensorRT for RTX."""

from __future__ import annotations

import sys

from workers import service
from workers.__main__ import main
from workers.pipeline.isolated import IsolatedRunner

service.IsolatedRunner = lambda **how: IsolatedRunner(["tests.factories.tensorrt_rtx_builds"], **how)  # type: ignore[attr-defined]

if __name__ == "__main__":
    sys.exit(main())
