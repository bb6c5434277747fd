"""Tables: data sets of Hugging Face's `datasets`, data frames of pandas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from anneal_client.data.shards import ShardWriter, as_array
from anneal_client.errors import ConversionFailed
from anneal_client.exporting.checks import need
from anneal_client.prepared import Dataset

_ROWS = 256


def from_dataset(
    dataset: Iterable[Mapping[str, Any]],
    inputs: Mapping[str, str] | Sequence[str],
    *,
    labels: str | None = None,
    transform: Callable[[dict[str, list[Any]]], Mapping[str, Any]] | None = None,
    pad: Mapping[str, float] | None = None,
    name: str = "data",
    max_samples: int | None = None,
) -> Dataset:
    """A data set of a `datasets.Dataset` or `IterableDataset`, or of any iterable of rows.

    `inputs`: columns by the model's inputs, {"pixel_values": "image"}, or their names where they are the same.
    `labels`: the column of labels. `transform`: from a dict of columns (lists) to one, as `Dataset.map` with
    `batched=True` takes it: a tokenizer, a picture processor. `pad`: what fills up rows of unlike lengths, by input
    (the longest of some 256 rows is the length of all of these); without it, rows of each length come into shards of
    their own. Raises `ConversionFailed`.
    """
    np = need("numpy", "data")
    columns = dict(inputs) if isinstance(inputs, Mapping) else {n: n for n in inputs}
    if labels is not None:
        columns["labels"] = labels
    writer = ShardWriter(name, max_samples=max_samples)
    for batch in _batches(dataset):
        made = batch if transform is None else transform(dict(batch))
        missing = [c for c in columns.values() if c not in made]
        if missing:
            detail = f"There is no column {', '.join(missing)}: there are {', '.join(map(str, made))}."
            raise ConversionFailed("columns_missing", detail)
        for part in _stacked(np, {n: made[c] for n, c in columns.items()}, pad or {}):
            writer.add(part)
        if writer.full:
            break
    return writer.finish()


def from_pandas(
    frame: Any,
    inputs: Mapping[str, str | Sequence[str]] | Sequence[str] | None = None,
    *,
    labels: str | None = None,
    dtype: str | None = "float32",
    name: str = "data",
    max_samples: int | None = None,
) -> Dataset:
    """A data set of a pandas data frame.

    `inputs`: by the model's inputs, the columns of a matrix [samples, columns], {"X": ["age", "income"]}, or one column
    [samples, 1]; a list of columns is an input each; without it all columns but `labels` are the matrix `X`. `dtype`:
    of the inputs (None: as they are). Raises `ConversionFailed`.
    """
    np = need("numpy", "data")
    if inputs is None:
        wanted: dict[str, list[str]] = {"X": [c for c in frame.columns if c != labels]}
    elif isinstance(inputs, Mapping):
        wanted = {n: [c] if isinstance(c, str) else list(c) for n, c in inputs.items()}
    else:
        wanted = {c: [c] for c in inputs}
    known = set(frame.columns)
    missing = [c for columns in (*wanted.values(), [labels] if labels else []) for c in columns if c not in known]
    if missing:
        detail = f"There is no column {', '.join(map(repr, missing))}: there are {', '.join(map(str, frame.columns))}."
        raise ConversionFailed("columns_missing", detail)
    writer = ShardWriter(name, max_samples=max_samples)
    rows = 1 << 14
    for start in range(0, len(frame), rows):
        part = frame.iloc[start : start + rows]
        batch = {n: _matrix(np, part, columns, dtype) for n, columns in wanted.items()}
        if labels is not None:
            batch["labels"] = part[labels].to_numpy()
        writer.add(batch)
        if writer.full:
            break
    return writer.finish()


def _matrix(np: Any, part: Any, columns: Sequence[str], dtype: str | None) -> Any:
    try:
        return np.stack([part[c].to_numpy(dtype=dtype) for c in columns], axis=1)
    except (TypeError, ValueError) as wrong:
        bad = [c for c in columns if part[c].dtype.kind not in "biuf"]
        raise ConversionFailed(
            "not_numbers",
            f"The columns {', '.join(map(str, bad or columns))} hold no numbers: {wrong}.",
            remedy="Encode them as the model's training did, or leave them out with `inputs`.",
        ) from wrong


def _batches(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Columns of some rows each."""
    if hasattr(dataset, "iter"):
        yield from dataset.iter(batch_size=_ROWS)
        return
    rows = iter(dataset)
    while some := list(islice(rows, _ROWS)):
        yield {column: [row[column] for row in some] for column in some[0]}


def _stacked(np: Any, columns: Mapping[str, Any], pad: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """The rows as arrays: padded where that was asked for, else by their shapes."""
    rows = {n: [as_array(np, value) for value in column] for n, column in columns.items()}
    for name, fill in pad.items():
        if name in rows:
            rows[name] = _padded(np, rows[name], fill)
    by_shape: dict[Any, list[int]] = {}
    for index, shapes in enumerate(zip(*([r.shape for r in column] for column in rows.values()), strict=True)):
        by_shape.setdefault(shapes, []).append(index)
    for indices in by_shape.values():
        yield {n: np.stack([column[i] for i in indices]) for n, column in rows.items()}


def _padded(np: Any, rows: list[Any], fill: float) -> list[Any]:
    if len({row.ndim for row in rows}) != 1:
        raise ConversionFailed("ranks_differ", "Rows of one input differ in how many axes they have.")
    longest = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    return [
        np.pad(row, [(0, most - size) for most, size in zip(longest, row.shape, strict=True)], constant_values=fill)
        for row in rows
    ]
