"""How `benchmarks/gpu` times a call: by CUDA events in the stream it works in, and by the wall clock beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workers.devices.cuda.runtime import Cuda, Stream

WARM_UP_S = 0.3
ROUNDS = 10


@dataclass
class Contender:
    """`submit` puts one run into the stream and need not wait for it."""

    name: str
    submit: Callable[[], Any]
    gpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    failed: str | None = None

    def figures(self, batch: int) -> dict[str, Any]:
        if self.failed is not None or not self.gpu_ms:
            return {"failed": self.failed or "not run"}
        gpu, wall = np.asarray(self.gpu_ms), np.asarray(self.wall_ms)
        p50 = float(np.median(wall))
        return {
            "gpu_p50_ms": round(float(np.median(gpu)), 4),
            "gpu_p90_ms": round(float(np.percentile(gpu, 90)), 4),
            "wall_p50_ms": round(p50, 4),
            "wall_p90_ms": round(float(np.percentile(wall, 90)), 4),
            "samples_per_s": round(batch / p50 * 1e3, 1),
            "runs": len(gpu),
        }


def contest(cuda: Cuda, stream: Stream, contenders: Sequence[Contender], seconds: float) -> None:
    """All in turns, `ROUNDS` times, `seconds` each in all; who fails drops out."""
    start, end = cuda.event(), cuda.event()

    def once(contender: Contender) -> tuple[float, float]:
        begin = time.perf_counter()
        start.record(stream)
        contender.submit()
        end.record(stream)
        end.synchronize()
        return end.elapsed_ms(start), (time.perf_counter() - begin) * 1e3

    for contender in contenders:
        try:
            until = time.perf_counter() + WARM_UP_S
            while time.perf_counter() < until:
                once(contender)
        except Exception as error:  # whatever a library raises
            contender.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        for index in rng.permutation(len(contenders)):
            contender = contenders[index]
            if contender.failed is not None:
                continue
            once(contender)
            until = time.perf_counter() + seconds / ROUNDS
            while time.perf_counter() < until:
                gpu, wall = once(contender)
                contender.gpu_ms.append(gpu)
                contender.wall_ms.append(wall)
    start.close()
    end.close()


def cosine(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Smallest over the samples of all outputs."""
    least = 1.0
    for name, array in wanted.items():
        a = np.asarray(array, np.float64).reshape(len(array), -1)
        b = np.asarray(found[name], np.float64).reshape(len(array), -1)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        least = min(least, float((np.sum(a * b, axis=1) / np.maximum(norms, 1e-30)).min()))
    return round(least, 6)
