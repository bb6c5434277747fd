"""Every stage that explains fails in a way of its own: the profiler crashes, the sweep finds no GPU memory, and the
ablation's timing is killed. Imported where stages run; run as a module it is such a worker."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers.kernel import StageResult
from workers.stages.benchmark import Benchmark
from workers.stages.profile import Profile
from workers.stages.sweep import Sweep

_measure = Benchmark.run


def _crash(*_: Any) -> StageResult:
    ctypes.string_at(0)
    raise AssertionError("unreachable")


def _no_memory(*_: Any) -> StageResult:
    raise StageFailure("gpu_out_of_memory", "The GPU has no memory left.", FailureKind.REQUEST)


def _killed_while_ablating(self: Benchmark, ctx: Any, options: Any) -> StageResult:
    if options.compare_to is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return _measure(self, ctx, options)


Profile.run = _crash  # type: ignore[method-assign]
Sweep.run = _no_memory  # type: ignore[method-assign]
Benchmark.run = _killed_while_ablating  # type: ignore[method-assign]

if __name__ == "__main__":
    from workers import service
    from workers.__main__ import main
    from workers.pipeline.isolated import IsolatedRunner

    service.IsolatedRunner = lambda **how: IsolatedRunner([__spec__.name], **how)  # type: ignore[attr-defined]
    sys.exit(main())
