"""Cold start and peak memory of an engine, in a process that did nothing before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from app.domain.failures import StageFailure
from workers.measure.engine_child import Feeds, Loaded
from workers.measure.engine_process import EngineProcess
from workers.measure.figures import rounded


@dataclass
class Cold:
    """Milliseconds and MB (10⁶ bytes). `call_ms`: what an inference takes after the first one, which on a GPU also
    loads libraries and chooses kernels, a thousand times as long. `refused`: larger batch sizes that did not run, and
    how they failed. `gpu_memory_mb`: of an engine on a GPU, what it takes there."""

    load_ms: float
    first_inference_ms: float
    call_ms: float
    peak_memory_mb: float
    gpu_memory_mb: float | None = None
    refused: dict[int, StageFailure] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "cold_start_ms": rounded(self.load_ms + self.first_inference_ms),
            "load_ms": rounded(self.load_ms),
            "first_inference_ms": rounded(self.first_inference_ms),
            "peak_memory_mb": rounded(self.peak_memory_mb),
            "gpu_memory_mb": rounded(self.gpu_memory_mb),
        }


def cold_start(process: EngineProcess, loaded: Loaded, feeds: Feeds, *, again: bool = False) -> Cold:
    """The first inference at the smallest batch size (`again`: and a second one, for `call_ms`), then one at each
    larger for the peak of the memory.

    Raises StageFailure where the smallest batch size fails.
    """
    smallest, *larger = sorted(feeds)
    first_ms, _ = process.infer(feeds[smallest][0])
    cold = Cold(loaded.load_ms, first_ms, first_ms, process.peak_memory_mb())
    if again:
        cold.call_ms, _ = process.infer(feeds[smallest][0])
    for batch in larger:
        try:
            process.infer(feeds[batch][0])
            cold.peak_memory_mb = process.peak_memory_mb()
        except StageFailure as failure:
            cold.refused[batch] = failure
    return cold
