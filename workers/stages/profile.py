"""Stage `profile`: where the shipped engine spends its time, and whether it is bound by memory."""

from __future__ import annotations

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from workers import devices
from workers.artifacts import names_in
from workers.data import Samples, synthetic_feeds
from workers.kernel import WARM_UP_RUNS, LayerTime, Stage, StageContext, StageOptions, StageResult, backends
from workers.measure.axes import fixed_batch

if TYPE_CHECKING:
    from workers.kernel import Arrays

_RUNS = 200
_LEAST_RUNS = 5
_RUN_SECONDS = 2.0
_DISTORTED = 1.5  # sum of the layers over what the engine takes unprofiled: beyond it the profiler's own cost rules
_TOP = 12
_COPY_BYTES = 128 << 20  # beyond any cache
_COPY_ROUNDS = 5


class ProfileOptions(StageOptions):
    """`batch`: samples in the profiled inference; `shapes`: as in the job's spec, for synthetic inputs."""

    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)
    batch: int = Field(default=1, ge=1)
    shapes: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)


class Profile(Stage[ProfileOptions]):
    """inputs: engine, [data]. No outputs.

    data: layers (the slowest: name, op_type, ms, share of the profiled time), by_op {op type: share}, layer_count,
    layers_ms (the layers' sum), distorted (why the layers say nothing of the engine, or None), runs, inference_ms
    (unprofiled, inputs bound), engine_bytes, copy_bytes_per_s (what this machine's memory gives to one thread per core,
    read and written bytes counted), weight_bandwidth_share (bytes of the engine read once per inference, over the
    bandwidth: near 1 = the inference waits for memory), batch. Times are medians of `runs` runs. Layers are None where
    the library has no profiler.
    """

    name = "profile"
    version = 4
    Options = ProfileOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    hardware_bound = True
    exclusive_device = True

    def run(self, ctx: StageContext, options: ProfileOptions) -> StageResult:
        backend = backends()[options.backend]()
        session = backend.load(ctx.inputs["engine"], options.runtime)
        try:
            feeds, batch = _feeds(ctx, session.inputs, session.outputs, options)
            runs, inference_ms = _timed(session.bind(feeds))
        finally:
            session.close()
        ctx.reporter.progress(0.4, "layer by layer")
        layers = backend.layer_times(ctx.inputs["engine"], options.runtime, feeds, runs)
        ctx.reporter.progress(0.8, "memory bandwidth")
        ours = devices.of_backend(options.backend).reads_machine_memory  # the speed of no other memory is measured
        bandwidth = copy_bandwidth(int(ctx.hardware.get("cores") or 1)) if ours else None
        folder = ctx.inputs["engine"]
        size = sum((folder / name).stat().st_size for name in names_in(folder))
        data: dict[str, Any] = {
            "batch": batch,
            "inference_ms": inference_ms,
            "engine_bytes": size,
            "copy_bytes_per_s": round(bandwidth) if bandwidth else None,
            "weight_bandwidth_share": round(size / (inference_ms / 1e3) / bandwidth, 4) if bandwidth else None,
            "runs": runs,
            **_shares(layers),
            "distorted": _distorted(layers, inference_ms),
        }
        return StageResult(data=data)


def _feeds(ctx: StageContext, inputs: Any, outputs: Any, options: ProfileOptions) -> tuple[Arrays, int]:
    batch = fixed_batch(inputs) or options.batch
    if "data" not in ctx.inputs:
        return synthetic_feeds(inputs, batch, options.shapes, options.seed), batch
    samples = Samples(ctx.only_file("data"), inputs, outputs, max_samples=batch)
    return next(samples.batches(batch)).filled(batch), batch


def _timed(call: Any) -> tuple[int, float]:
    """How many runs to profile, and the median time of one in ms, after some to warm up."""
    begun = time.perf_counter()
    for _ in range(WARM_UP_RUNS):
        call()
        if time.perf_counter() - begun > _RUN_SECONDS:
            break
    took: list[float] = []
    begun = time.perf_counter()
    while len(took) < _RUNS and (time.perf_counter() - begun < _RUN_SECONDS or len(took) < _LEAST_RUNS):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return len(took), 1e3 * float(np.median(took))


def _distorted(layers: list[LayerTime] | None, inference_ms: float) -> str | None:
    total = sum(layer.ms for layer in layers or ())
    if total <= _DISTORTED * inference_ms:
        return None
    return (
        f"by the library's profiler the layers take {total:.3g} ms together, the engine without it "
        f"{inference_ms:.3g} ms: what the profiler itself costs hides where the time goes"
    )


def _shares(layers: list[LayerTime] | None) -> dict[str, Any]:
    total = sum(layer.ms for layer in layers or ())
    if not layers or total <= 0:
        return {"layers": None, "by_op": None, "layer_count": None, "layers_ms": None}
    by_op: dict[str, float] = defaultdict(float)
    for layer in layers:
        by_op[layer.op_type] += layer.ms / total
    return {
        "layers": [
            {"name": t.name[:200], "op_type": t.op_type, "ms": round(t.ms, 5), "share": round(t.ms / total, 4)}
            for t in layers[:_TOP]
        ],
        "by_op": {op: round(share, 4) for op, share in sorted(by_op.items(), key=lambda item: -item[1])[:_TOP]},
        "layer_count": len(layers),
        "layers_ms": round(total, 5),
    }


def copy_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads copy together, bytes read and written both counted; the best of a few
    rounds (STREAM's way: J. McCalpin, 1995)."""
    size = _COPY_BYTES // max(threads, 1)
    pairs = [(np.ones(size, np.uint8), np.empty(size, np.uint8)) for _ in range(threads)]

    def copy(pair: tuple[Any, Any]) -> None:
        np.copyto(pair[1], pair[0])

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_COPY_ROUNDS):
            start = time.perf_counter()
            list(pool.map(copy, pairs))
            best = min(best, time.perf_counter() - start)
    return 2.0 * size * threads / best
