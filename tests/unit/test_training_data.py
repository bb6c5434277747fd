"""The order in which a training reads its samples: by chance, the same every time, in bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from workers.data import Samples
from workers.graph.qat import batches
from workers.kernel import TensorSpec

COUNT, SIDE = 3000, 32
SPEC = [TensorSpec("image", "float32", ("batch", 1, SIDE, SIDE))]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """12 MB; the first number of each sample is its own."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    images = np.random.default_rng(0).standard_normal((COUNT, 1, SIDE, SIDE), dtype=np.float32)
    images[:, 0, 0, 0] = np.arange(COUNT)
    np.savez(path, image=images)
    return Samples(path, SPEC)


def _order(samples: Samples, seed: int, epoch: int) -> list[int]:
    made = batches.shuffled(samples, 32, seed, epoch)
    return [int(number) for batch in made for number in batch.feeds["image"][:, 0, 0, 0]]


def test_every_sample_once_by_chance_and_the_same_every_time(samples: Samples) -> None:
    first = _order(samples, 7, 0)
    assert len(first) == len(set(first)) == COUNT // 32 * 32
    assert first != sorted(first)
    assert _order(samples, 7, 0) == first
    assert _order(samples, 7, 1) != first
    assert _order(samples, 8, 0) != first


def test_memory_does_not_grow_with_the_data_set(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours in the file are shuffled among each other, as many as are held; blocks of it are read."""
    monkeypatch.setattr(batches, "_HELD_BYTES", 1 << 20)
    monkeypatch.setattr("workers.data.BLOCK_BYTES", 1 << 20)
    tracemalloc.start()
    count = sum(len(batch) for batch in batches.shuffled(samples, 32, 7, 0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count >= COUNT - 12 * 32, "a rest that fills no batch is left out, of each part that is held"
    assert peak < 6 << 20
