"""One engine in one process of its own: loaded, warmed up and timed there, so that a crash, a hang or a lack of memory
ends that engine and nothing else.

The process is forked from the stage's own (which has the libraries imported and holds no session), is told what to do
over a pipe, and dies with its parent.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers.measure.disturbance import Window
from workers.measure.engine_child import (
    LONGEST_SETTLE_S,
    SETTLE_BELOW_NS,
    SETTLE_ITERATIONS,
    SETTLED_WITHIN,
    WARM_UP_ITERATIONS,
    Array,
    Engine,
    Loaded,
    Prepared,
    WarmUp,
    serve,
)

LOAD_LIMIT_S = 300.0
INFERENCE_LIMIT_S = 120.0


class EngineProcess:
    """The parent's handle. Every call raises StageFailure where the engine fails, and the process is then gone.

    Codes: those of the backend, `engine_crashed`, `engine_timeout`, `out_of_memory`, `inference_failed`.
    """

    def __init__(
        self,
        name: str,
        backend: str,
        folder: Path,
        runtime: Mapping[str, Any],
        feeds: Prepared | None = None,
        cores: Sequence[int] | None = None,
    ) -> None:
        """Fork. `feeds` are inherited, not copied; a process that is to load in a clean memory gets none. `cores`: the
        only ones that it may run on."""
        self.name = name
        parent = os.getpid()
        self._conn, theirs = Pipe()
        with warnings.catch_warnings():
            # Python 3.12+ warns where the process has threads; a library's that sleep without a lock do no harm.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self._conn.close()
            serve(theirs, parent, Engine(backend, folder, runtime, feeds or {}), cores)
        theirs.close()

    def load(self) -> Loaded:
        """Load the engine; its library is imported before the clock starts."""
        answer: Loaded = self._call("load", limit_s=LOAD_LIMIT_S)
        return answer

    def infer(self, feeds: dict[str, Array]) -> tuple[float, list[str]]:
        """One inference: (milliseconds, names of outputs that hold NaN or Infinity)."""
        answer: tuple[float, list[str]] = self._call("infer", feeds, limit_s=INFERENCE_LIMIT_S)
        return answer

    def prepare(self, batch: int | str, seconds: float = math.inf, limit_s: float = math.inf) -> list[str]:
        """Run every distinct input of this batch size once; the calls of a user on them are what is timed from now on.
        Names of outputs with NaN or Infinity. After `seconds` the rest is left out; two are always taken. `limit_s`:
        when the engine is given up."""
        answer: list[str] = self._call("prepare", batch, seconds, limit_s=min(limit_s, 2 * INFERENCE_LIMIT_S))
        return answer

    def bind(self) -> None:
        """From now on the cheapest calls (`kernel.Session.bind`) are timed, on the inputs that were prepared."""
        self._call("bind", limit_s=2 * INFERENCE_LIMIT_S)

    def warm_up(self, cap_s: float, iterations: int = WARM_UP_ITERATIONS) -> WarmUp:
        """Until it becomes no faster (`stats.settled`), after at least `iterations` or 1 s; at most `cap_s`."""
        answer: WarmUp = self._call("warm_up", cap_s, iterations, limit_s=cap_s + INFERENCE_LIMIT_S)
        return answer

    def window(self, seconds: float, iterations: int, expected_ns: float, settle_s: float = LONGEST_SETTLE_S) -> Window:
        """Latencies in ns (int64) of at least `iterations` calls and `seconds`, and what disturbed them, after a few
        uncounted ones, and more of those where the engine is not yet back at `expected_ns`, the best it has shown:
        `settle_s` at most."""
        usual = max(seconds, (iterations + SETTLE_ITERATIONS) * expected_ns / 1e9)
        back = SETTLED_WITHIN * expected_ns if expected_ns < SETTLE_BELOW_NS else math.inf
        limit_s = 20 * usual + INFERENCE_LIMIT_S / 2
        answer: Window = self._call("window", seconds, iterations, back, settle_s, limit_s=limit_s)
        return answer

    def profile(self, batch: int) -> dict[str, Any]:
        """Where the time of a run at this batch size goes (`kernel.Session.profile`); empty where nothing tells."""
        answer: dict[str, Any] = self._call("profile", batch, limit_s=2 * INFERENCE_LIMIT_S)
        return answer

    def peak_memory_mb(self) -> float:
        """Largest resident memory of the process so far, libraries and interpreter included, in MB (10⁶ bytes)."""
        answer: float = self._call("peak_memory_mb", limit_s=INFERENCE_LIMIT_S)
        return answer

    def close(self) -> None:
        """End the process; also after a failure, any number of times."""
        self._conn.close()
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _call(self, command: str, *args: Any, limit_s: float) -> Any:
        self.begin(command, *args)
        return self.finish(command, limit_s)

    def begin(self, command: str, *args: Any) -> None:
        """Tell the process what to do and go on; its answer has to be taken by `finish` before the next command."""
        if not self.pid:
            raise self._failure("engine_crashed", f"Engine {self.name!r} has ended before.")
        try:
            self._conn.send((command, args))
        except ConnectionError:
            raise self._ended(command) from None

    def finish(self, command: str, limit_s: float) -> Any:
        """The answer to `command`; raises as every call does."""
        try:
            if not self._conn.poll(limit_s):
                self.close()
                raise self._failure(
                    "engine_timeout",
                    f"Engine {self.name!r} did not finish {command!r} within {limit_s:.0f} s.",
                    remedy="Use a smaller model or batch size.",
                    cacheable=False,
                )
            ok, value = self._conn.recv()
        except (EOFError, ConnectionError):
            raise self._ended(command) from None
        if not ok:
            raise StageFailure.from_json(value)
        return value

    def _ended(self, command: str) -> StageFailure:
        self._conn.close()
        status = self._reap()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return self._failure(
                "out_of_memory",
                f"Engine {self.name!r} was killed during {command!r}, as a process is that takes too much memory.",
                remedy="Use a smaller model or batch size, or a machine with more memory.",
                cacheable=False,
            )
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        return self._failure(
            "engine_crashed",
            f"Engine {self.name!r} crashed during {command!r} ({how}).",
            remedy="Check that the model runs at this batch size on this library.",
        )

    def _failure(self, code: str, detail: str, **where: Any) -> StageFailure:
        return StageFailure(code, detail, FailureKind.MODEL, **where)

    def _reap(self) -> int:
        pid, self.pid = self.pid, 0
        return os.waitpid(pid, 0)[1] if pid else 0
