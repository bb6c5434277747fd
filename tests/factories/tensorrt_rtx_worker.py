"""`python -m tests.factories.tensorrt_rtx_worker`: a real worker that believes it has an L4 and TensorRT for RTX."""

from __future__ import annotations

import sys
from typing import Any

import tests.factories.hurried
import tests.factories.tensorrt_rtx_installed  # noqa: F401  (its import puts the stand-ins in place)
from tests.factories.tensorrt_rtx_standin import GPU
from workers import service
from workers.__main__ import main
from workers.hardware import describe
from workers.pipeline.isolated import IsolatedRunner

MODULES = ["tests.factories.tensorrt_rtx_installed", "tests.factories.hurried"]


def _describe(gpu: str = "") -> dict[str, Any]:
    return {**describe(gpu), "id": "gpu-nvidia-l4", "gpu": GPU}


service.describe = _describe  # type: ignore[attr-defined]
service.IsolatedRunner = lambda **how: IsolatedRunner(MODULES, **how)  # type: ignore[attr-defined]

if __name__ == "__main__":
    sys.exit(main())
