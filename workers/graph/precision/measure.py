"""What the converters need to know of the data: how much each channel matters; and how far a converted graph is from
the original on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from workers.graph import rewriting as graphs
from workers.graph.calibrate import statistics as calibration
from workers.graph.interpreter import open_session

Array = np.ndarray[Any, Any]
Batches = Callable[[int], Iterable[Mapping[str, Array]]]


def mean_squares(model: Path, tensors: Sequence[str], batches: Batches) -> dict[str, Array]:
    """Mean square of every channel (the last axis) of `tensors` over the data. Tensors of unknown rank are left out."""
    augmented: ModelProto = onnx.load(model, load_external_data=False)
    shapes = graphs.shapes(augmented)
    usable = [t for t in tensors if len(shapes.get(t, ())) >= 2]
    for index, tensor in enumerate(usable):
        axes = numpy_helper.from_array(np.arange(len(shapes[tensor]) - 1), f"importance_{index}_axes")
        augmented.graph.initializer.append(axes)
        inputs = [f"importance_{index}_square", axes.name]
        augmented.graph.node.append(helper.make_node("Mul", [tensor, tensor], inputs[:1]))
        augmented.graph.node.append(helper.make_node("ReduceMean", inputs, [f"importance_{index}"], keepdims=0))
    names = [f"importance_{i}" for i in range(len(usable))]
    augmented.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    path = model.with_name(f"importance-{model.name}")  # external data is found beside it
    onnx.save(augmented, path)
    session = open_session(path, optimize=True)
    path.unlink()
    fixed = next((i.shape[0] for i in session.get_inputs() if i.shape and isinstance(i.shape[0], int)), None)
    sums: list[Any] = [0.0] * len(names)
    seen = 0
    for feeds in batches(fixed or calibration.BATCH_SIZE):
        count = next(iter(feeds.values())).shape[0]
        rows = np.arange(fixed or count) % count
        values = session.run(names, {n: a[rows] for n, a in feeds.items()}) if names else []
        sums = [s + v.astype(np.float64) * count for s, v in zip(sums, values, strict=True)]
        seen += count
    return {t: (s / max(seen, 1)).astype(np.float32) for t, s in zip(usable, sums, strict=True) if np.ndim(s) == 1}


def likeness(wanted: Mapping[str, Array], found: Mapping[str, Array]) -> dict[str, Any]:
    """`cosine`: smallest over the float outputs; `relative_error`: largest ‖found - wanted‖ / ‖wanted‖; `finite`."""
    cosines, errors, finite = [1.0], [0.0], True
    for name, array in wanted.items():
        if array.dtype.kind != "f" or name not in found:
            continue
        a, b = array.astype(np.float64).reshape(-1), found[name].astype(np.float64).reshape(-1)
        finite = finite and bool(np.isfinite(b).all())
        if not np.isfinite(a).all() or not np.isfinite(b).all() or a.size != b.size:
            continue
        norm, other = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        if norm > 0:
            cosines.append(float(a @ b) / (norm * other) if other > 0 else 0.0)
            errors.append(float(np.linalg.norm(a - b)) / norm)
    return {"finite": finite, "cosine": round(min(cosines), 8), "relative_error": round(max(errors), 8)}
