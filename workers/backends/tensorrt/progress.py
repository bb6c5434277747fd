"""Progress of a TensorRT build, and how it is ended early."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from workers.backends.tensorrt.library import Library
from workers.kernel import Reporter

if TYPE_CHECKING:
    import tensorrt

BUILDING = (0.1, 0.95)  # of the stage's progress


class Progress:
    """Progress of a build, told by TensorRT from any of its threads; ends the build when cancelled.

    `cancelled` is this side's own flag: TensorRT answers a cancelled and a failed build alike, with nothing.
    """

    def __init__(self, reporter: Reporter, max_seconds: float | None = None) -> None:
        self.cancelled = False
        self._reporter = reporter
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name → parent, steps, steps done
        self._furthest = 0.0

    def cancel(self) -> None:
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[phase] = (parent, max(1, steps), 0)

    def step(self, phase: str, step: int) -> bool:
        """False where the build shall end."""
        with self._lock:
            parent, steps, _ = self._phases.get(phase, (None, 1, 0))
            self._phases[phase] = (parent, steps, step + 1)
            self._tell(phase)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.cancelled = True
        return not self.cancelled

    def finish(self, phase: str) -> None:
        with self._lock:
            parent, steps, _ = self._phases.pop(phase, (None, 1, 1))
            if parent is None:
                self._phases[phase] = (None, steps, steps)
                self._tell(phase)

    def _tell(self, phase: str) -> None:
        """The share of the outermost phase, and of the phases inside it where they stand; never backwards."""
        roots = [name for name, (parent, _, _) in self._phases.items() if parent is None]
        share = sum(self._share(name) for name in roots) / len(roots) if roots else 0.0
        self._furthest = max(self._furthest, min(1.0, share))
        low, high = BUILDING
        self._reporter.progress(low + (high - low) * self._furthest, f"TensorRT: {phase}")

    def _share(self, name: str, depth: int = 0) -> float:
        _, steps, done = self._phases[name]
        if done >= steps or depth > 8:
            return min(1.0, done / steps)
        inner = [self._share(n, depth + 1) for n, (parent, _, _) in self._phases.items() if parent == name]
        return min(1.0, (done + (max(inner) if inner else 0.0)) / steps)


def make_monitor(library: Library, progress: Progress) -> tensorrt.IProgressMonitor:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.load()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                return progress.step(phase_name, step)
            except Exception:  # an exception here would end the build without a word
                return not progress.cancelled

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
