"""Several processes of one engine, loaded and driven at the same time: what a machine yields when it is shared.

The load is a closed loop: every instance starts its next call when the one before has ended. All run before the common
window opens and until it is over, so that each call inside it met the others at work.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from app.domain.failures import StageFailure
from workers.measure.disturbance import Disturbance, together
from workers.measure.engine_child import Feeds, WarmUp
from workers.measure.engine_process import INFERENCE_LIMIT_S, LOAD_LIMIT_S, EngineProcess

Array = np.ndarray[Any, Any]

SETTLE_S = 0.03  # all instances run this long before the window opens
_LEAST_CALLS = 2  # of every instance inside the window: a rate needs two
_TRIES = 3


class Layout(BaseModel):
    """`instances` processes with `threads` compute threads each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instances: int = Field(ge=1, le=256)
    threads: int = Field(ge=1, le=1024)

    def __str__(self) -> str:
        return f"{self.instances}×{self.threads}"


@dataclass(frozen=True)
class Driven:
    """One common window. `latencies`: ns, of all instances together; `calls_per_s`: theirs added up."""

    latencies: Array
    calls_per_s: float
    seconds: float
    disturbance: Disturbance


def default_layouts(cores: int, *, threads_matter: bool = True) -> list[Layout]:
    """Every way to share `cores` evenly, from one instance on all to one on each, and one instance on one core. Where
    threads make no difference (the work is not done by CPU threads): one, two and four instances."""
    if not threads_matter:
        return [Layout(instances=n, threads=1) for n in (1, 2, 4)]
    shared = [Layout(instances=n, threads=cores // n) for n in range(1, cores + 1) if cores % n == 0]
    one = Layout(instances=1, threads=1)
    return shared if one in shared else [*shared, one]


def usable_cores(quota: float | None) -> list[int]:
    """The cores that this process may use; no more than the container's limit of CPU time pays for."""
    cores = sorted(os.sched_getaffinity(0))
    return cores if quota is None or not math.isfinite(quota) else cores[: max(1, int(quota))]


class Instances:
    """The processes of one layout. Every call raises the first StageFailure of any of them, after all have answered."""

    def __init__(
        self,
        name: str,
        backend: str,
        folder: Path,
        runtime: Mapping[str, Any],
        layout: Layout,
        feeds: Feeds,
        cores: Sequence[int] | None = None,
    ) -> None:
        """`cores`: each instance is pinned to `layout.threads` of its own, where there are so many; None pins none."""
        self.layout = layout
        self.processes: list[EngineProcess] = []
        wanted = layout.instances * layout.threads
        own = None if cores is None or len(cores) < wanted else cores
        for i in range(layout.instances):
            mine = None if own is None else own[i * layout.threads : (i + 1) * layout.threads]
            self.processes.append(EngineProcess(f"{name} #{i + 1}", backend, folder, runtime, feeds, mine))
        self.pinned = own is not None

    def __enter__(self) -> Instances:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return all(process.pid for process in self.processes)

    def load(self) -> None:
        """All at once, as a server that starts them would."""
        self._all("load", limit_s=LOAD_LIMIT_S)

    def prepare(self, batch: int, seconds: float = math.inf) -> list[str]:
        """As `EngineProcess.prepare`, in all."""
        broken = self._all("prepare", batch, seconds, limit_s=2 * INFERENCE_LIMIT_S)
        return sorted({name for names in broken for name in names})

    def warm_up(self, cap_s: float, iterations: int) -> float:
        """All at the same time; the largest of their medians in ns."""
        found: list[WarmUp] = self._all("warm_up", cap_s, iterations, limit_s=cap_s + INFERENCE_LIMIT_S)
        return max(w.p50_ns for w in found)

    def drive(self, seconds: float, p50_ns: float) -> Driven:
        """A common window of at least `seconds`, longer where a call of `p50_ns` does not fit into it often enough.

        An instance's rate is that between the first and the last call that ended inside the window: what the window
        cuts off at its ends does not count.
        """
        seconds = max(seconds, (_LEAST_CALLS + 1) * p50_ns / 1e9)
        for _ in range(_TRIES):
            start = time.perf_counter_ns() + int(SETTLE_S * 1e9)
            stop = start + int(seconds * 1e9)
            limit = SETTLE_S + 20 * seconds + INFERENCE_LIMIT_S / 2
            answers: list[tuple[Array, Array, Disturbance]] = self._all("drive", start, stop, limit_s=limit)
            if all(len(ends) >= _LEAST_CALLS for ends, _, _ in answers):
                rates = [(len(ends) - 1) * 1e9 / float(ends[-1] - ends[0]) for ends, _, _ in answers]
                latencies = np.concatenate([found for _, found, _ in answers])
                return Driven(latencies, sum(rates), seconds, together([d for _, _, d in answers]))
            seconds *= 2
        raise StageFailure(
            "engine_timeout",
            f"The instances did not all finish {_LEAST_CALLS} calls within {seconds / 2:.1f} s.",
            remedy="Use a smaller batch size or fewer instances.",
            cacheable=False,
        )

    def memory_mb(self) -> float:
        """Peak memory of all instances in MB (10⁶ bytes). Pages that several processes share (libraries, mapped
        weights) count once, split between them."""
        return sum(memory_bytes(process.pid) for process in self.processes) / 1e6

    def close(self) -> None:
        for process in self.processes:
            process.close()

    def _all(self, command: str, *args: Any, limit_s: float) -> list[Any]:
        started: list[EngineProcess] = []
        answers: list[Any] = []
        failure: StageFailure | None = None
        for process in self.processes:
            try:
                process.begin(command, *args)
                started.append(process)
            except StageFailure as error:
                failure = failure or error
        for process in started:
            try:
                answers.append(process.finish(command, limit_s))
            except StageFailure as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return answers


def memory_bytes(pid: int) -> int:
    """The proportional set size, and what the resident memory was above its present size at its peak."""
    status = _fields(Path(f"/proc/{pid}/status"))
    try:
        pss = _fields(Path(f"/proc/{pid}/smaps_rollup"))["Pss"]
    except (OSError, KeyError):  # a kernel without it, or a process that may not be looked into
        return status["VmHWM"]
    return pss + max(0, status["VmHWM"] - status["VmRSS"])


def _fields(path: Path) -> dict[str, int]:
    """`Name:  123 kB` lines in bytes; the kernel's "kB" are 1024 bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}
