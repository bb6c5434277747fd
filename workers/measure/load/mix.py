"""What is requested: batches and shapes in the shares of the traffic, on the user's samples where there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.failures import FailureKind, StageFailure
from app.domain.traffic import Traffic
from workers.kernel import TensorSpec
from workers.measure.axes import batch_axes
from workers.measure.inputs import InputSource
from workers.measure.load.target import Feeds
from workers.measure.shapes import TYPICAL, Dims, Shape, layouts, of_layout

Array = np.ndarray[Any, Any]
Accepts = Mapping[str, Sequence[Sequence[int | None] | None]]

_MOST_LAYOUTS = 8  # of a data set, the most frequent; the rest are rare
_MOST_BYTES = 256 << 20  # of all requests that are kept ready


@dataclass(frozen=True)
class Kind:
    """Requests of one batch size and one shape; `share` of all."""

    label: str
    batch: int
    dims: Dims
    share: float
    feeds: Sequence[Feeds]


@dataclass(frozen=True)
class Mix:
    """`words`: where the requests come from."""

    kinds: Sequence[Kind]
    words: str

    @property
    def samples(self) -> float:
        """Of a request, on average."""
        return sum(kind.share * kind.batch for kind in self.kinds)

    def drawn(self, count: int, seed: int) -> Array:
        """The kind of each request, by their shares."""
        shares = np.array([kind.share for kind in self.kinds])
        return np.random.default_rng([seed, 1]).choice(len(shares), count, p=shares / shares.sum())

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "label": k.label,
                "batch": k.batch,
                "dims": {name: list(shape) for name, shape in k.dims.items()},
                "share": round(k.share, 6),
            }
            for k in self.kinds
        ]


def mix_of(
    traffic: Traffic,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    data: Path | None,
    ranges: Mapping[str, Any] | None,
    accepts: Accepts,
    seed: int,
) -> Mix:
    """The requests of this traffic. `accepts`: the sizes that the engine takes, as the bundle's manifest says them.
    Raises StageFailure (`traffic_outside_engine`) where it does not take all of them."""
    source = InputSource(data, inputs, outputs, ranges, seed)
    shapes, words = _shapes(traffic, source, inputs, data)
    kinds: list[Kind] = []
    for batch, of_batch in sorted(traffic.batch_mix.items()):
        for shape, of_shape in shapes:
            feeds = source.at(shape, batch)
            _check(feeds[0], inputs, accepts, f"{shape.label} at batch size {batch}")
            dims = {name: array.shape for name, array in feeds[0].items()}
            kinds.append(Kind(f"{shape.label} × {batch}", batch, dims, of_batch * of_shape, feeds))
            size = sum(array.nbytes for kind in kinds for given in kind.feeds for array in given.values())
            if size > _MOST_BYTES:
                kinds = [_fewer(kind) for kind in kinds]
    whole = sum(kind.share for kind in kinds)
    return Mix([Kind(k.label, k.batch, k.dims, k.share / whole, k.feeds) for k in kinds], words)


def _shapes(
    traffic: Traffic, source: InputSource, inputs: Sequence[TensorSpec], data: Path | None
) -> tuple[list[tuple[Shape, float]], str]:
    """The shapes with their shares, and in words where those come from."""
    of = "the data set's samples" if data is not None else "random inputs (no data set was given)"
    if traffic.shape_mix is not None:
        told = [
            (Shape(f"shape {i + 1}", {name: tuple(dims) for name, dims in part.dims.items()}), part.share)
            for i, part in enumerate(traffic.shape_mix)
        ]
        return told, f"shapes by the job's shape_mix, made of {of}"
    axes = batch_axes(inputs)
    found = {} if data is None else layouts(data, inputs, axes)
    names = {spec.name for spec in inputs}
    whole = [(layout, n) for layout, n in found.items() if n and {name for name, _ in layout} == names]
    if len(whole) < 2:
        return [(source.shapes.typical, 1.0)], f"one shape, {source.shapes.why}, made of {of}"
    most = sorted(whole, key=lambda item: -item[1])[:_MOST_LAYOUTS]
    total = sum(n for _, n in most)
    shapes = [
        (Shape(f"{TYPICAL if not i else 'shape'} {i + 1}", of_layout(inputs, layout, axes), layout=layout), n / total)
        for i, (layout, n) in enumerate(most)
    ]
    fewer = f", the {len(most)} most frequent of {len(whole)}" if len(most) < len(whole) else ""
    return shapes, f"shapes in the shares of the data set{fewer}, made of its samples"


def _fewer(kind: Kind) -> Kind:
    return Kind(kind.label, kind.batch, kind.dims, kind.share, kind.feeds[: max(2, len(kind.feeds) // 2)])


def _check(feeds: Feeds, inputs: Sequence[TensorSpec], accepts: Accepts, label: str) -> None:
    """What the engine refuses, before it is asked."""
    for spec in inputs:
        shape = feeds[spec.name].shape
        bounds = [*(accepts.get(spec.name) or []), *([None] * len(spec.shape))]
        for axis, (size, dim) in enumerate(zip(shape, spec.shape, strict=True)):
            least, most = bounds[axis] or (None, None)
            if isinstance(dim, int):
                least = most = dim
            if (least is not None and size < least) or (most is not None and size > most):
                allowed = f"{least or 0} to {most}" if most is not None else f"at least {least}"
                allowed = f"{most} only" if least == most else allowed
                raise StageFailure(
                    "traffic_outside_engine",
                    f"The traffic has requests ({label}) with size {size} on axis {axis} of input {spec.name!r}; the "
                    f"engine takes {allowed}.",
                    FailureKind.REQUEST,
                    tensor=spec.name,
                    remedy="Give the job data or `shapes` of all sizes that are in use, so that its engines are "
                    "proven at them, or leave these out of the traffic.",
                )
