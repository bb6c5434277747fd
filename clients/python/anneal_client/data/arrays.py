"""Arrays that are there, in memory or mapped from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anneal_client.data.shards import SHARD_BYTES, ShardWriter, as_array
from anneal_client.exporting.checks import need
from anneal_client.prepared import Dataset


def from_arrays(
    arrays: Mapping[str, Any],
    labels: Any = None,
    *,
    axes: Mapping[str, int | None] | None = None,
    name: str = "data",
    max_samples: int | None = None,
) -> Dataset:
    """A data set of arrays (or tensors) by the model's inputs, in the model's own layout.

    `axes`: of an input whose samples do not lie along the first axis, the one they lie along (a recurrent state
    [layers, batch, size]: 1); None for an input without a batch, which is given whole. `optimize` tells them to the
    job; with `submit`, say `inputs=data.inputs`. Raises `ConversionFailed`.
    """
    np = need("numpy", "data")
    given = {n: a if isinstance(a, np.ndarray) else as_array(np, a) for n, a in arrays.items()}
    if labels is not None:
        given["labels"] = as_array(np, labels)
    writer = ShardWriter(name, axes=axes, max_samples=max_samples)
    along = {n: (axes or {}).get(n, 0) for n in given}
    sizes = [a.shape[along[n]] for n, a in given.items() if along[n] is not None and a.ndim > along[n]]
    total = max(sizes, default=0)
    sample_bytes = max(1, sum(a.nbytes for n, a in given.items() if along[n] is not None) // max(1, total))
    rows = max(1, SHARD_BYTES // sample_bytes)
    for start in range(0, max(total, 1), rows):
        if writer.full:
            break
        part = slice(start, start + rows)
        writer.add(
            {n: a[(*[slice(None)] * axis, part)] if (axis := along[n]) is not None else a for n, a in given.items()}
        )
    return writer.finish()
