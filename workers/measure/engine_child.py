"""The child's side of `engine_process`: one engine, loaded, warmed up and timed, as it is told over a pipe."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import math
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.failures import StageFailure
from workers import kernel
from workers.measure.disturbance import Disturbance, Reading, Window, usual_cores
from workers.measure.stats import settled

Array = np.ndarray[Any, Any]
Feeds = Mapping[int, Sequence[dict[str, Array]]]  # batch size → distinct inputs
Prepared = Feeds | Mapping[int | str, Sequence[dict[str, Array]]]  # and, by its label, a shape beside the typical

WARM_UP_CAP_S = 10.0
WARM_UP_ITERATIONS = 50
WARM_UP_SECONDS = 1.0
_WARM_WINDOW_NS = 30_000_000
MAX_WINDOW_SAMPLES = 200_000  # a window of a very small model ends here: its memory stays bounded
SETTLE_ITERATIONS = 5
_SETTLE_NS = 20_000_000
SETTLED_WITHIN = 1.25  # of the engine's best: then its threads are where they were
LONGEST_SETTLE_S = 0.08
_REST_STEP_S = 0.004
_AT_REST = 0.25  # of a core: below it, nothing computes in the process any more
_LONGEST_REST_S = 0.2
SETTLE_BELOW_NS = 200_000_000  # a longer call brings its own caches and threads back
_LEAST_INPUTS = 2  # never one tensor, however short the time
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Loaded:
    """What `load` found: milliseconds it took, and the model's tensors."""

    load_ms: float
    inputs: tuple[kernel.TensorSpec, ...]
    outputs: tuple[kernel.TensorSpec, ...]


@dataclass(frozen=True)
class WarmUp:
    """`p50_ns`: median of the last window. `settled`: it became no faster any more (`stats.settled`)."""

    iterations: int
    seconds: float
    settled: bool
    p50_ns: float


class Engine:
    def __init__(self, backend: str, folder: Path, runtime: Mapping[str, Any], feeds: Prepared) -> None:
        self._backend_name = backend
        self._folder = folder
        self._runtime = runtime
        self._feeds: Mapping[Any, Sequence[dict[str, Array]]] = feeds
        self._session: kernel.Session | None = None
        self._prepared: list[dict[str, Array]] = []
        self._calls: list[Callable[[], Any]] = []
        self._next = 0
        self._cores = usual_cores()

    @property
    def session(self) -> kernel.Session:
        assert self._session is not None, "load comes first"
        return self._session

    def load(self) -> Loaded:
        backend = kernel.backends()[self._backend_name]()
        backend.import_library()
        start = time.perf_counter_ns()
        self._session = backend.load(self._folder, self._runtime)
        elapsed = time.perf_counter_ns() - start
        return Loaded(elapsed / 1e6, tuple(self._session.inputs), tuple(self._session.outputs))

    def infer(self, feeds: dict[str, Array]) -> tuple[float, list[str]]:
        start = time.perf_counter_ns()
        outputs = self.session.run(feeds)
        elapsed = time.perf_counter_ns() - start
        return elapsed / 1e6, _not_finite(outputs)

    def prepare(self, batch: int | str, seconds: float) -> list[str]:
        broken: set[str] = set()
        self._prepared, self._calls, self._next = [], [], 0
        start = time.perf_counter()
        for feeds in self._feeds[batch]:
            if len(self._calls) >= _LEAST_INPUTS and time.perf_counter() - start > seconds:
                break
            broken.update(_not_finite(self.session.run(feeds)))
            self._prepared.append(feeds)
            self._calls.append(self.session.call(feeds))
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection inside a window would be Python's cost, not the engine's
        return sorted(broken)

    def bind(self) -> None:
        self._calls, self._next = [self.session.bind(feeds) for feeds in self._prepared], 0

    def warm_up(self, cap_s: float, least: int) -> WarmUp:
        medians: list[float] = []
        iterations, start = 0, time.perf_counter_ns()
        while True:
            window = self._timed(_WARM_WINDOW_NS, 1)
            iterations += len(window)
            medians.append(float(np.median(window)))
            seconds = (time.perf_counter_ns() - start) / 1e9
            enough = iterations >= least or seconds >= min(WARM_UP_SECONDS, cap_s)
            if (enough and settled(medians)) or seconds >= cap_s:
                self._rest()
                return WarmUp(iterations, seconds, settled(medians), medians[-1])

    def window(self, seconds: float, iterations: int, back_ns: float, settle_s: float) -> Window:
        """Caches and threads come back after the other engines' turns: a process that wakes up may find two of its
        threads on one core, and stays at half its speed until the scheduler has moved one."""
        start = end = time.perf_counter_ns()
        done = 0
        while not math.isinf(back_ns):
            begin = end
            self._call_next()
            end = time.perf_counter_ns()
            done += 1
            usual = done >= SETTLE_ITERATIONS or end - start > _SETTLE_NS
            if (usual and end - begin <= back_ns) or end - start > settle_s * 1e9:
                break
        before = Reading.now(self._cores)
        latencies = self._timed(int(seconds * 1e9), iterations)
        disturbance = before.until(Reading.now(self._cores))
        self._rest()
        return Window(latencies, disturbance)

    def drive(self, start_ns: int, stop_ns: int) -> tuple[Array, Array, Disturbance]:
        """Call after call until `stop_ns` (`time.perf_counter_ns`, one clock for all processes): end and latency of
        each call that ended between `start_ns` and `stop_ns`, and what disturbed them."""
        calls, count, i = self._calls, len(self._calls), self._next
        clock = time.perf_counter_ns
        ends: list[int] = []
        latencies: list[int] = []
        before, end = Reading.now(self._cores), clock()
        while end < stop_ns:
            start = clock()
            calls[i]()
            end = clock()
            if start_ns <= end <= stop_ns and len(ends) < MAX_WINDOW_SAMPLES:
                ends.append(end)
                latencies.append(end - start)
            i = (i + 1) % count
        self._next = i
        disturbance = before.until(Reading.now(self._cores))
        return np.array(ends, dtype=np.int64), np.array(latencies, dtype=np.int64), disturbance

    def profile(self, batch: int) -> dict[str, Any]:
        return dict(self.session.profile(self._feeds[batch][0]) or {})

    def peak_memory_mb(self) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6  # the kernel's "kB" are 1024 bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    def _call_next(self) -> None:
        self._calls[self._next]()
        self._next = (self._next + 1) % len(self._calls)

    def _rest(self) -> None:
        """Until no thread of this process computes. Those of ONNX Runtime wait for work in a busy loop, for 40 ms after
        a call: on a core that would be taken from the engine whose turn is next."""
        for _ in range(int(_LONGEST_REST_S / _REST_STEP_S)):
            busy, start = time.process_time(), time.perf_counter()
            time.sleep(_REST_STEP_S)
            if time.process_time() - busy < _AT_REST * (time.perf_counter() - start):
                return

    def _timed(self, duration_ns: int, iterations: int) -> Array:
        calls, count, i = self._calls, len(self._calls), self._next
        clock = time.perf_counter_ns
        latencies: list[int] = []
        begin = end = clock()
        while (end - begin < duration_ns and len(latencies) < MAX_WINDOW_SAMPLES) or len(latencies) < iterations:
            call = calls[i]
            start = clock()
            call()
            end = clock()
            latencies.append(end - start)
            i = (i + 1) % count
        self._next = i
        return np.array(latencies, dtype=np.int64)


def _not_finite(outputs: Mapping[str, Array]) -> list[str]:
    return [n for n, a in outputs.items() if a.dtype.kind in "fc" and not np.isfinite(a).all()]


def serve(conn: Connection, parent: int, engine: Engine, cores: Sequence[int] | None) -> None:
    """Answer commands until the parent closes the pipe; never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.disable()
        if cores:
            os.sched_setaffinity(0, cores)  # before the library makes its threads
        gc.freeze()  # what was inherited is not this process's to free: a session's threads did not come with it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        while True:
            command, args = conn.recv()
            try:
                answer = (True, getattr(engine, command)(*args))
            except StageFailure as failure:
                answer = (False, failure.to_json())
            except MemoryError:
                answer = (False, _no_memory().to_json())
            except Exception as error:  # whatever a library raises on an untrusted model
                traceback.print_exc()
                detail = f"The engine raised {type(error).__name__}: {error}"[:500]
                answer = (False, StageFailure("inference_failed", detail).to_json())
            conn.send(answer)
    except (EOFError, ConnectionError):
        code = 0
    finally:
        os._exit(code)


def _no_memory() -> StageFailure:
    return StageFailure(
        "out_of_memory",
        "The engine needed more memory than there is.",
        remedy="Use a smaller model or batch size, or a machine with more memory.",
        cacheable=False,
    )
