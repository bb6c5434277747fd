"""Data sets of what people have: written in shards, as the service reads them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from anneal_client import ConversionFailed
from anneal_client.data import Dataset, from_arrays, from_dataloader, from_dataset
from anneal_client.sources import data_source
from app.archives import ArchiveLimits
from app.datasets.inspect import DatasetInfo, inspect_dataset
from app.settings import Settings


def read(made: Dataset) -> list[dict[str, Any]]:
    files = sorted(made.path.glob("*.npz")) if made.path.is_dir() else [made.path]
    return [dict(np.load(file, allow_pickle=False)) for file in files]


def inspected(made: Dataset, folder: Path) -> DatasetInfo:
    """As the service sees what would be uploaded."""
    source = data_source(made.path)
    path = folder / source.filename
    path.write_bytes(b"".join(source.blocks(0, source.size)))
    limits: ArchiveLimits = Settings(home=folder).limits
    return inspect_dataset(path, source.filename, limits)


def test_arrays_with_the_axis_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anneal_client.data.arrays.SHARD_BYTES", 4096)
    monkeypatch.setattr("anneal_client.data.shards.SHARD_BYTES", 4096)
    x, state = np.arange(400.0).reshape(100, 4), np.arange(2400.0).reshape(3, 100, 8)
    edges = np.arange(6).reshape(2, 3)
    made = from_arrays({"x": x, "state": state, "edges": edges}, np.arange(100), axes={"state": 1, "edges": None})
    assert made.inputs == {"state": {"batch_axis": 1}, "edges": {"batch_axis": None}}
    shards = read(made)
    assert len(shards) > 1
    assert np.array_equal(np.concatenate([s["state"] for s in shards], 1), state)
    assert np.array_equal(np.concatenate([s["x"] for s in shards]), x)
    assert np.array_equal(np.concatenate([s["labels"] for s in shards]), np.arange(100))
    assert all(np.array_equal(s["edges"], edges) for s in shards)
    assert made.samples == 100
    assert inspected(made, tmp_path).shards == len(shards)


def test_a_single_shard_is_an_npz(tmp_path: Path) -> None:
    made = from_arrays({"x": torch.ones(5, 2, dtype=torch.bfloat16)}, name="few", max_samples=3)
    assert made.path.name == "few.npz"
    assert inspected(made, tmp_path).samples == 3
    assert read(made)[0]["x"].dtype == np.float32
    made.close()
    assert not made.path.exists()


def test_a_dataloader(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.randn(10, 3), torch.arange(10)), batch_size=4)
    (shard,) = read(from_dataloader(loader, ["x"]))
    assert shard["x"].shape == (10, 3)
    assert shard["labels"].tolist() == list(range(10))
    assert set(read(from_dataloader(loader, ["x", "y"]))[0]) == {"x", "y"}
    assert set(read(from_dataloader(loader, ["x"], labels=False))[0]) == {"x"}
    assert from_dataloader(loader, ["x"], max_samples=5).samples == 5
    batches = [{"ids": torch.ones(2, n, dtype=torch.int64), "label": torch.zeros(2)} for n in (3, 5, 3)]
    shards = read(from_dataloader(batches))
    assert sorted((s["ids"].shape, sorted(s)) for s in shards) == [
        ((2, 5), ["ids", "labels"]),
        ((4, 3), ["ids", "labels"]),
    ]
    nested = [((torch.ones(2, 3), torch.ones(2, 1)), torch.zeros(2))]
    assert set(read(from_dataloader(nested, ["a", "b"]))[0]) == {"a", "b", "labels"}
    for bad, inputs, words in (
        (loader, None, "Name the model's inputs"),
        (loader, ["a", "b", "c"], "named are 3"),
        (batches, ["mask"], "not mask"),
        ([(torch.ones(2, 3), torch.ones(3))], ["x"], "x 2, labels 3"),
        ([], ["x"], "no sample"),
        ([{"text": ["a", "b"]}], None, "not numbers"),
    ):
        with pytest.raises(ConversionFailed, match=words):
            from_dataloader(bad, inputs)


def test_rows_of_unlike_lengths() -> None:
    rows = [{"text": list(range(n)), "cls": n} for n in (2, 3, 2, 4)]
    shards = read(from_dataset(rows, {"ids": "text"}, labels="cls"))
    assert sorted((s["ids"].shape, s["labels"].tolist()) for s in shards) == [
        ((1, 3), [3]),
        ((1, 4), [4]),
        ((2, 2), [2, 2]),
    ]
    (padded,) = read(from_dataset(rows, {"ids": "text"}, labels="cls", pad={"ids": -1}))
    assert padded["ids"].tolist() == [[0, 1, -1, -1], [0, 1, 2, -1], [0, 1, -1, -1], [0, 1, 2, 3]]
    doubled = from_dataset(rows, ["n"], transform=lambda b: {"n": [[2.0 * c] for c in b["cls"]]}, max_samples=3)
    assert read(doubled)[0]["n"].tolist() == [[4.0], [6.0], [4.0]]
    with pytest.raises(ConversionFailed, match="There is no column image: there are text, cls"):
        from_dataset(rows, ["image"])


def test_memory_is_flat_in_the_size_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anneal_client.data.shards.SHARD_BYTES", 1 << 20)
    monkeypatch.setattr("anneal_client.data.shards.HELD_BYTES", 4 << 20)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for number in range(64):  # 32 MB, in shapes that all differ
            yield {"x": np.zeros((4, 128 - number % 16, 128), np.float64)}

    tracemalloc.start()
    try:
        made = from_dataloader(batches())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert made.samples == 256
    assert peak < 16 << 20
    assert sum(f.stat().st_size for f in made.path.iterdir()) > 28 << 20
