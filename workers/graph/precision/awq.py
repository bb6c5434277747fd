"""Scales channels before int4: where activations are large, the weights that they meet are made larger, and lose less.

After J. Lin et al., "AWQ: Activation-aware Weight Quantization", 2023: X is divided by s = r^alpha, r the root mean
square of each channel, and the rows of W multiplied by it; alpha is the one of a grid with the least expected error of
the products. Done where the division disappears in constants above X (a LayerNorm's, a product's before it), so that
the graph has the same nodes as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, numpy_helper

from workers.graph import equalize
from workers.graph.precision import int4

_ALPHAS = np.linspace(0.1, 1.0, 10)  # beside 0: as it is
_LEAST_GAIN = 0.02  # of the error: below, the weights stay as they are
_LARGEST_SCALE = 64.0


def scale_channels(
    model: ModelProto, wanted: Mapping[int, tuple[int, int]], mean_squares: Mapping[str, Any]
) -> dict[str, Any]:
    """Scale the inputs of those products of `model` (in place, float32) that are `wanted` as in `int4.targets`, and
    answer their new `mean_squares` [channels], by tensor name. Scaled tensors are those whose entry differs."""
    blocks = {model.graph.node[index].name: found for index, found in wanted.items()}
    known = dict(mean_squares)
    for site in equalize.sites(model):
        square = known.get(site.tensor)
        if square is None or np.shape(square) != (site.channels,) or not np.isfinite(square).all():
            continue
        scale = _best_scale(model, site, blocks, np.asarray(square, np.float64))
        if scale is not None and equalize.divide(model, site, scale):
            known[site.tensor] = np.asarray(square / scale**2, np.float32)
    return known


def _best_scale(
    model: ModelProto, site: equalize.Site, blocks: Mapping[str, tuple[int, int]], square: Any
) -> Any | None:
    """s [channels] with a geometric mean of one; None where no exponent of the grid gains enough."""
    weights = {i.name: i for i in model.graph.initializer}
    products = []  # weight with its channels first, and the block size
    for node in model.graph.node:
        if node.name in site.nodes and node.name in blocks:
            axis, block = blocks[node.name]
            array = numpy_helper.to_array(weights[node.input[1]]).astype(np.float32)
            products.append((np.moveaxis(array, axis, 0), block))
    alive = square > 0
    if not products or not alive.any():
        return None
    logs = np.where(alive, 0.5 * np.log(np.where(alive, square, 1.0)), 0.0)
    logs[alive] -= logs[alive].mean()
    untouched = sum(_error(w, block, square, np.ones_like(square)) for w, block in products)
    best, least = None, (1 - _LEAST_GAIN) * untouched
    for alpha in _ALPHAS:
        scale = np.clip(np.exp(alpha * logs), 1 / _LARGEST_SCALE, _LARGEST_SCALE)
        error = sum(_error(w, block, square, scale) for w, block in products)
        if error < least:
            best, least = scale, error
    return best


def _error(weight: Any, block: int, square: Any, scale: Any) -> float:
    """Expected squared error of X·W, summed over the outputs, X's channels taken as uncorrelated."""
    scaled = weight * scale[:, None].astype(np.float32)
    lost = (int4.rounded(scaled, block) - scaled) / scale[:, None]
    return float((lost**2).sum(axis=1) @ square)
