"""The GPU's time of one call, by kernel: what takes how much of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

_CALLS = 20
# The first that fits. Triton's kernels are named after the operators that Inductor fused into them.
_PARTS = (
    ("attention", r"fmha|flash|attention|cutlassF|sdpa|softmax"),
    ("normalization and sums", r"^triton_(per|red)_|layer_?norm|batch_?norm|reduce_kernel"),
    ("elementwise, rounding", r"^triton_poi_|elementwise|vectorized|copy|Memcpy|Memset|cast|transpose|nchw"),
    ("convolutions", r"conv|fprop|implicit|depthwise|dgrad|winograd"),
    ("matrix products", r"gemm|nvjet|cublas|cutlass|splitK|s16816|wgmma|triton_tem|triton_mm|addmm|_scaled_mm|gemv"),
)


def kernels(call: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """By name: microseconds and launches of one call, the mean of some."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profiled.key_averages():
        time_us = float(getattr(event, "self_device_time_total", 0.0))
        if time_us > 0:
            found[event.key] = {"us": round(time_us / _CALLS, 2), "launches": round(event.count / _CALLS, 2)}
    return dict(sorted(found.items(), key=lambda each: -each[1]["us"]))


def part_of(kernel: str) -> str:
    return next((part for part, names in _PARTS if re.search(names, kernel)), "other")


def parts(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Milliseconds by kind of work."""
    sums: dict[str, float] = {name: 0.0 for name, _ in _PARTS}
    for kernel, figures in found.items():
        sums[part_of(kernel)] = sums.get(part_of(kernel), 0.0) + figures["us"] / 1e3
    return {name: round(ms, 3) for name, ms in sums.items() if ms}
