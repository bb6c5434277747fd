"""How much an engine loses, in percent, by the one judge that all are held to.

Per output: `top1` (the original's hits against the labels less the engine's, in points), or against the original's
outputs `agreement` (1 − share of equal largest values), `cosine` (1 − mean cosine over the samples),
`normalized_error` (‖a − b‖ / ‖a‖). Of several outputs the worst counts. An output that is missing, misshapen or not
finite where the original's is loses everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

ALL = 100.0


def top1(original: Array, engine: Array, labels: Array) -> float:
    hits = [float((x.argmax(axis=-1) == labels).mean()) for x in (original, engine)]
    return 100 * (hits[0] - hits[1])


def agreement(original: Array, engine: Array) -> float:
    axis = 1 if original.ndim == 4 else -1  # [N, classes, H, W]
    return 100 * float((original.argmax(axis=axis) != engine.argmax(axis=axis)).mean())


def cosine(original: Array, engine: Array) -> float:
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (original, engine))
    product = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return 100 * (1 - float(np.mean((a * b).sum(axis=1) / np.maximum(product, 1e-300))))


def normalized_error(original: Array, engine: Array) -> float:
    a, b = original.astype(np.float64), engine.astype(np.float64)
    return 100 * float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-300))


MEASURES = {"agreement": agreement, "cosine": cosine, "normalized_error": normalized_error}


def loss(
    judge: Mapping[str, str], original: Mapping[str, Array], engine: Mapping[str, Array], labels: Array | None
) -> dict[str, Any]:
    """`loss_percent` of the worst output, `output`, `measure`, `outputs` (all), `broken` (why, or None)."""
    losses: dict[str, float] = {}
    for name, measure in judge.items():
        a, b = original[name], engine.get(name)
        if b is None or b.shape != a.shape:
            return lost(name, measure, "no such output" if b is None else f"shape {b.shape}, not {a.shape}")
        if not np.isfinite(b[np.isfinite(a)]).all():
            return lost(name, measure, "NaN or Infinity")
        if measure == "top1":
            assert labels is not None, "top1 needs labels"
            losses[name] = top1(a, b, labels)
        else:
            losses[name] = MEASURES[measure](a, b)
    worst = max(losses, key=lambda n: losses[n])
    rounded = {n: round(v, 5) for n, v in losses.items()}
    return {
        "loss_percent": rounded[worst], "output": worst, "measure": judge[worst], "outputs": rounded, "broken": None
    }  # fmt: skip


def lost(output: str, measure: str, why: str) -> dict[str, Any]:
    return {"loss_percent": ALL, "output": output, "measure": measure, "outputs": {}, "broken": f"{output}: {why}"}
