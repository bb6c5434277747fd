"""How `benchmarks/gpu` times a call: by CUDA events in the stream that it works in, and by the wall clock beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]
_WARM_UP_SHARE = 0.15  # of a turn's time: a GPU's clocks follow its load


def captured(call: Call) -> Call:
    """`call` as a CUDA graph; its input and output tensors stay where they are."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own has no annotation
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def clocked(call: Call, stream: Any, seconds: float) -> tuple[list[float], list[float]]:
    """GPU and wall times in ms of calls for `seconds`; `call` puts its work into `stream` and need not wait for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # likewise
    gpu: list[float] = []
    wall: list[float] = []
    started = time.perf_counter()
    while not gpu or time.perf_counter() < started + seconds:
        start = time.perf_counter()
        begin.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        if start > started + _WARM_UP_SHARE * seconds or not gpu:
            wall.append(1e3 * (time.perf_counter() - start))
            gpu.append(begin.elapsed_time(end))
    return (gpu[1:] or gpu), (wall[1:] or wall)


def figures(turns: Sequence[tuple[list[float], list[float]]]) -> dict[str, float]:
    """Medians of all turns; `choosing_ms` and `judging_ms`: of every other turn each, so that what is picked by one
    half is compared by the other."""

    def median(found: Sequence[list[float]]) -> float:
        return round(float(np.median(np.concatenate(found))), 4)

    gpu, wall = [t[0] for t in turns], [t[1] for t in turns]
    halves = {"choosing_ms": gpu[::2], "judging_ms": gpu[1::2] or gpu}
    return {"gpu_ms": median(gpu), "ms": median(wall), **{name: median(half) for name, half in halves.items()}}


def cosine(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Smallest over the samples of all outputs."""
    least = 1.0
    for name, array in wanted.items():
        a = np.asarray(array, np.float64).reshape(len(array), -1)
        b = np.asarray(found[name], np.float64).reshape(len(array), -1)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        least = min(least, float((np.sum(a * b, axis=1) / np.maximum(norms, 1e-30)).min()))
    return round(least, 6)
