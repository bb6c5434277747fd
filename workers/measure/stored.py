"""The original's outputs on disk, batch by batch, so that it runs once for all candidates: a zip of `.npy` (never
pickled) and an index that says which samples of which model they are for."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.failures import FailureKind, StageFailure
from workers.kernel import TensorSpec

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

_INDEX, _FILE = "index.json", "outputs.zip"
_PLAIN = "fiubc"  # dtypes that an .npy holds as they are


class OutputWriter:
    """Writes outputs until they take more than `most_bytes`: then nothing is kept, and `reason` says why."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most = folder, most_bytes
        self._zip: zipfile.ZipFile | None = zipfile.ZipFile(folder / _FILE, "w", zipfile.ZIP_STORED)
        self.counts: list[int] = []
        self.bytes = 0
        self.reason: str | None = None

    def add(self, outputs: Arrays, count: int, total: int) -> bool:
        """One batch with `count` real samples of `total` that will come; False where nothing is kept any longer."""
        assert self._zip is not None
        names = sorted(outputs)
        odd = next((n for n in names if outputs[n].dtype.kind not in _PLAIN), None)
        if odd is not None:
            return self._give_up(f"output {odd!r} is {outputs[odd].dtype}")
        self.bytes += sum(outputs[n].nbytes for n in names)
        expected = self.bytes * total // max(sum(self.counts) + count, 1)
        if max(self.bytes, expected) > self._most:
            return self._give_up(f"they take about {expected} bytes, over the limit of {self._most}")
        for i, name in enumerate(names):
            info = zipfile.ZipInfo(f"{len(self.counts)}.{i}.npy")  # its date is fixed: the same bytes every time
            with self._zip.open(info, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(outputs[name], order="C"), allow_pickle=False)
        self.counts.append(count)
        return True

    def _give_up(self, reason: str) -> bool:
        assert self._zip is not None
        self.reason = reason
        self._zip.close()
        self._zip = None
        (self._folder / _FILE).unlink()
        self.counts, self.bytes = [], 0
        return False

    def close(self, names: Sequence[str], facts: Mapping[str, Any]) -> None:
        if self._zip is not None:
            self._zip.close()
        index = {"stored": self.reason is None, "counts": self.counts, "names": sorted(names), **facts}
        (self._folder / _INDEX).write_text(json.dumps(index, sort_keys=True))


class StoredOutputs:
    """Reads them. `stored`: whether there are any."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._index = json.loads((folder / _INDEX).read_text())
            self.stored = bool(self._index["stored"])
            self.batch = int(self._index["batch_size"])
            self.counts: list[int] = [int(c) for c in self._index["counts"]]
            self.inputs = [_spec(x) for x in self._index["inputs"]]
            self.outputs = [_spec(x) for x in self._index["outputs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise expected_mismatch(f"their index cannot be read ({type(error).__name__})") from error

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raise `expected_mismatch` where they are of another model, other samples or another way of running."""
        for name, value in facts.items():
            if self._index.get(name) != value:
                raise expected_mismatch(f"{name} is {self._index.get(name)!r}, wanted is {value!r}")

    def batches(self) -> Iterator[tuple[int, dict[str, Array]]]:
        """(real samples, outputs) of every batch, in the order in which they were written."""
        try:
            with zipfile.ZipFile(self._folder / _FILE) as archive:
                for k, count in enumerate(self.counts):
                    arrays = {}
                    for i, name in enumerate(self._index["names"]):
                        with archive.open(f"{k}.{i}.npy") as file:
                            arrays[str(name)] = np.lib.format.read_array(file, allow_pickle=False)
                    yield count, arrays
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise expected_mismatch(f"they cannot be read ({type(error).__name__})") from error


def spec_json(spec: TensorSpec) -> list[Any]:
    return [spec.name, spec.dtype, list(spec.shape), None if spec.values is None else list(spec.values)]


def expected_mismatch(why: str) -> StageFailure:
    return StageFailure(
        "expected_mismatch",
        f"The stored outputs of the original do not belong to this comparison: {why}.",
        FailureKind.REQUEST,
        remedy="Run the stage `reference_outputs` with the same model, data and options.",
    )


def _spec(parts: Sequence[Any]) -> TensorSpec:
    name, dtype, shape, values = parts
    return TensorSpec(str(name), str(dtype), tuple(shape), None if values is None else (values[0], values[1]))
