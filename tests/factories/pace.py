"""Budgets of jobs in tests, by what this machine takes: the same job took three to four times as long on a machine
without AVX-512 as on the one that the budgets were chosen on."""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime

_MODEL = Path(__file__).resolve().parents[2] / "examples" / "digits" / "model.onnx"
_CHOSEN_ON_S = 0.45e-3  # a call of that model there, with one thread
_MOST = 3.0


@functools.cache
def slowness() -> float:
    """How much longer a call of a small network takes here than where budgets were chosen: 1 to 3."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(_MODEL), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: np.zeros((1, 1, 8, 8), np.float32)}
    took = []
    for _ in range(60):
        began = time.perf_counter()
        session.run(None, feeds)
        took.append(time.perf_counter() - began)
    return min(max(statistics.median(took) / _CHOSEN_ON_S, 1.0), _MOST)


def paced(seconds: float) -> int:
    """A job's budget that was enough there, as it is enough here. Seconds, whole ones."""
    return round(seconds * slowness())
