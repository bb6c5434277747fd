"""Data sets: `.npz`, or `.zip`/`.tar` of `.npz` shards, streamed row by row; never unpickled, never extracted by path.

A shard holds one array per model input, in the model's layout with the samples along its batch axis (the first one, as
a rule: `workers.measure.axes`), and optional references: `labels`, or arrays named by the model's outputs. An input
without a batch axis is whole in every sample of its shard; where none has one, a shard is one sample. Every pass reads
blocks of a few MiB, so that memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.failures import StageFailure, data_failure
from workers.kernel import TensorSpec
from workers.measure.arrays import LABELS, check_finite, check_input, check_labels, check_reference, is_one_hot, keyword
from workers.measure.axes import batch_axes
from workers.measure.npz import Member, Shard, guarded, open_shards
from workers.measure.parts import members, part_of
from workers.measure.rows import in_layout, in_rows, joined, sliced, taken
from workers.measure.shares import Part
from workers.measure.synthetic import numpy_dtype, resolved_shape, synthetic_feeds

__all__ = [
    "LABELS",
    "Batch",
    "Samples",
    "numpy_dtype",
    "part_of",
    "resolved_shape",
    "sample_digests",
    "synthetic_feeds",
]

Array = np.ndarray[Any, Any]
Layout = tuple[tuple[str, tuple[int, ...]], ...]  # (input, shape of a sample)

BLOCK_BYTES = 8 << 20
KEPT_BYTES = 32 << 20


@dataclass(frozen=True)
class Batch:
    """`feeds`: input → array in the model's layout, with the samples along its batch axis (`axes`; whole where that is
    None). `references`: name → array, first axis = samples. `digests`: hex SHA-256 of each sample's inputs."""

    feeds: dict[str, Array]
    references: dict[str, Array]
    digests: list[str]
    axes: Mapping[str, int | None]

    def __len__(self) -> int:
        return len(self.digests)

    def filled(self, size: int) -> dict[str, Array]:
        """The inputs of exactly `size` samples: repeated where there are fewer."""
        rows = np.arange(size) % len(self)
        return {name: taken(self.feeds[name], axis, rows) for name, axis in self.axes.items()}


def sample_digests(feeds: Mapping[str, Array]) -> list[str]:
    """Hex SHA-256 of each sample's inputs: names, dtypes, shapes without the sample axis, and bytes."""
    names = sorted(feeds)
    arrays = [np.ascontiguousarray(feeds[name]) for name in names]
    heads = [f"{n}\0{a.dtype.str}\0{a.shape[1:]}\0".encode() for n, a in zip(names, arrays, strict=True)]
    digests = []
    for row in range(len(arrays[0]) if arrays else 0):
        sha = hashlib.sha256()
        for head, array in zip(heads, arrays, strict=True):
            sha.update(head)
            sha.update(array[row].tobytes())
        digests.append(sha.hexdigest())
    return digests


class _Few:
    """The `most` samples with the smallest digests seen so far (`largest`: the largest), as long as they take at most
    32 MiB together: a small choice of a large data set is read in one pass."""

    def __init__(self, most: int, *, largest: bool = False) -> None:
        self._most, self._bytes = most, 0
        self._sign = 1 if largest else -1
        self._heap: list[tuple[int, int]] = []  # the one to go first, of equal ones the last
        self.rows: dict[int, dict[str, Array]] | None = {}

    def offer(self, digest: str, index: int, arrays: Mapping[str, Array], row: int) -> None:
        if self.rows is None:
            return
        entry = (self._sign * int(digest, 16), -index)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            gone = self.rows.pop(-heapq.heapreplace(self._heap, entry)[1])
            self._bytes -= sum(a.nbytes for a in gone.values())
        else:
            return
        self.rows[index] = {n: a[row : row + 1].copy() for n, a in arrays.items()}
        self._bytes += sum(a.nbytes for a in self.rows[index].values())
        if self._bytes > KEPT_BYTES:
            self.rows = None

    def hold(self, indices: Array) -> None:
        """Forget them all where one of these is not among them."""
        if self.rows is not None and any(int(i) not in self.rows for i in indices):
            self.rows = None


class Samples:
    """Streams one part of a data set file.

    The constructor reads the file once: it checks every array and computes the digests (32 bytes a sample are kept).
    Where the part has more than `max_samples`, those with the smallest digests are taken (of the confirming ones those
    with the largest): a choice that is random with regard to the file's order (which is often sorted by class) and the
    same every time; up to 32 MiB of samples stay in memory, and are not read again. Identical samples are of the same
    part (`measure.parts`).

    Raises StageFailure of kind DATA: `dataset_missing_input`, `dataset_extra_array`, `dataset_dtype_mismatch`,
    `dataset_shape_mismatch`, `dataset_not_finite`, `dataset_empty`, `dataset_pickled`, `dataset_unreadable`.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec] = (),
        *,
        part: Part = "all",
        shared: bool = False,
        max_samples: int | None = None,
        exclude: Collection[str] = (),
        layout: Layout | None = None,
    ) -> None:
        """`shared`: the data set calibrates, too, and only its validation side selects and confirms. `exclude`: digests
        of samples to leave out, e.g. those that calibrated the engine; `excluded` counts them. `layout`:
        only samples whose inputs have these shapes are read (`workers.measure.shapes.layouts`)."""
        self._path = path
        self._layout = layout
        self._exclude = frozenset(exclude)
        self.excluded = 0
        self._inputs = {spec.name: spec for spec in inputs}
        self._axes = batch_axes(inputs)
        self._outputs = {spec.name: spec for spec in outputs}
        self._dtypes = {spec.name: numpy_dtype(spec) for spec in inputs}
        self.part: Part = part
        self.shared = shared
        self.total = 0
        self.usable = 0  # samples of the part that are not excluded, before `max_samples`
        self.reference_names: tuple[str, ...] = ()
        self.distinct = 0  # of those that were taken
        self.one_hot_labels = False  # of all samples of the data set: a single one among zeros
        self._few = _Few(max_samples, largest=part == "confirm") if max_samples is not None else None
        self._selected, self._digests = self._scan(max_samples)

    def __len__(self) -> int:
        return len(self._selected)

    def digest(self) -> str:
        """Hex SHA-256 over the digests of all samples in this part, in order."""
        return hashlib.sha256(self._digests.tobytes()).hexdigest()

    def digests(self) -> list[str]:
        """The hex digest of every sample of this part, in order."""
        return [row.tobytes().hex() for row in self._digests]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The part's samples in the file's order, `batch_size` at a time; the last batch may be smaller, and so may the
        one before a shard whose samples have another shape."""
        pending: list[Batch] = []
        count = 0
        for piece in self._pieces():
            if pending and not _same_layout(pending[0], piece):
                yield _joined(pending)
                pending, count = [], 0
            pending.append(piece)
            count += len(piece)
            if count >= batch_size:
                whole = _joined(pending)
                full = count // batch_size * batch_size
                for start in range(0, full, batch_size):
                    yield _cut(whole, start, start + batch_size)
                pending, count = ([_cut(whole, full, count)], count - full) if full < count else ([], 0)
        if pending:
            yield _joined(pending)

    # Reading

    def _scan(self, max_samples: int | None) -> tuple[Array, Array]:
        digests: list[Array] = []
        references: set[str] | None = None
        one_hot = True
        for start, arrays in self._blocks(check=True):
            here = {name for name in arrays if name not in self._inputs}
            if references is not None and references != here:
                raise data_failure(
                    "dataset_shape_mismatch",
                    f"Not every shard has the references {sorted(references ^ here)}.",
                    remedy="Give all shards the same arrays.",
                )
            references = here
            one_hot &= is_one_hot(arrays.get(LABELS))
            found = sample_digests({name: arrays[name] for name in self._inputs})
            self.total = start + len(found)
            if found:
                raw = b"".join(map(bytes.fromhex, found))
                digests.append(np.frombuffer(raw, dtype=np.uint8).reshape(-1, 32))
            if self._few is not None:
                for i, digest in enumerate(found):
                    if digest not in self._exclude and self._may_be_taken(digest):
                        self._few.offer(digest, start + i, arrays, i)
        if not digests:
            raise self._empty()
        self.reference_names = tuple(sorted(references or ()))
        self.one_hot_labels = one_hot
        selected, rows = self._taken(np.concatenate(digests), max_samples)
        self.distinct = len(np.unique(rows, axis=0))
        return selected, rows

    def _may_be_taken(self, digest: str) -> bool:
        halved = self.shared or self.part in ("calibration", "validation")
        side = "calibration" if self.part == "calibration" else "validation"
        return not halved or self.part == "all" or part_of(digest) == side

    def _taken(self, rows: Array, max_samples: int | None) -> tuple[Array, Array]:
        """Indices and digests of the part's samples, at most so many."""
        every = np.ones(len(rows), bool)
        left_out = np.array([row.tobytes().hex() in self._exclude for row in rows]) if self._exclude else ~every
        of_part = members(rows, self.part, shared=self.shared, eligible=~left_out)
        self.excluded = int(left_out.sum())
        selected = np.flatnonzero(of_part)
        if not len(selected):
            raise self._empty()
        self.usable = len(selected)
        if max_samples is not None and len(selected) > max_samples:
            order = np.lexsort((selected, *rows[selected].T[::-1]))
            if self.part == "confirm":
                order = np.lexsort((selected, *(255 - rows[selected]).T[::-1]))
            selected = np.sort(selected[order[:max_samples]])
        if self._few is not None:
            self._few.hold(selected)
        return selected, rows[selected]

    def _empty(self) -> StageFailure:
        if self.total == 0:
            return data_failure(
                "dataset_empty", "The data set has no samples.", remedy="Upload a data set with at least one sample."
            )
        if self.excluded:
            return data_failure(
                "dataset_empty",
                f"All {self.excluded} samples of the validation data stand in the calibration data, too.",
                remedy="Upload validation samples that were not used for calibration.",
            )
        return data_failure(
            "dataset_empty",
            f"None of the data set's {self.total} samples falls into its {self.part} part.",
            remedy="Upload more distinct samples, or separate data sets for calibration and validation.",
        )

    def _pieces(self) -> Iterator[Batch]:
        """The selected rows of each block."""
        if self._few is not None and self._few.rows is not None:
            for index, digest in zip(self._selected, self._digests, strict=True):
                yield self._batch(self._few.rows[int(index)], [digest.tobytes().hex()])
            return
        for start, arrays in self._blocks(check=False):
            if start > self._selected[-1]:
                return
            size = len(arrays[next(iter(self._inputs))])
            low, high = np.searchsorted(self._selected, [start, start + size])
            if low == high:
                continue
            rows = self._selected[low:high] - start
            picked = {name: np.ascontiguousarray(array[rows]) for name, array in arrays.items()}
            yield self._batch(picked, [row.tobytes().hex() for row in self._digests[low:high]])

    def _batch(self, arrays: Mapping[str, Array], digests: list[str]) -> Batch:
        return Batch(
            feeds={name: in_layout(arrays[name], self._axes[name]) for name in self._inputs},
            references={name: array for name, array in arrays.items() if name not in self._inputs},
            digests=digests,
            axes=self._axes,
        )

    def _blocks(self, *, check: bool) -> Iterator[tuple[int, dict[str, Array]]]:
        """Blocks of rows over all shards: (index of the first row, arrays by name)."""
        first = 0
        with open_shards(self._path) as shards:
            for shard in shards:
                members = in_rows(shard.members(), list(self._inputs.values()), self._axes, shard.label)
                rows = self._checked_rows(shard, members)
                if rows == 0 or not self._wanted(members):
                    continue
                row_bytes = max(1, sum(member.row_bytes for member in members.values()))
                step = max(1, BLOCK_BYTES // row_bytes)
                with ExitStack() as stack, guarded(shard.label):
                    readers = {n: stack.enter_context(m.reader()) for n, m in sorted(members.items())}
                    for start in range(0, rows, step):
                        size = min(step, rows - start)
                        arrays = {name: reader.read_rows(size) for name, reader in readers.items()}
                        if check:
                            for name, array in arrays.items():
                                check_finite(name, array, first + start, shard.label)
                        yield first + start, arrays
                first += rows

    def _wanted(self, members: Mapping[str, Member]) -> bool:
        return self._layout is None or all(members[name].shape[1:] == shape for name, shape in self._layout)

    def _checked_rows(self, shard: Shard, members: Mapping[str, Member]) -> int:
        """How many samples the shard has; raises where its arrays do not fit the model."""
        for name in self._inputs:
            if name not in members:
                raise data_failure(
                    "dataset_missing_input",
                    f"{shard.label} has no array for the model's input {name!r}; it has {sorted(members)}.",
                    tensor=name,
                    remedy=f"Save it as np.savez(..., {keyword(name)}=array).",
                )
        for name, member in members.items():
            if name in self._inputs:
                check_input(shard.label, self._inputs[name], self._dtypes[name], member, self._axes[name])
            elif name in self._outputs:
                check_reference(shard.label, self._outputs[name], member)
            elif name == LABELS:
                check_labels(shard.label, member)
            else:
                known = [*self._inputs, LABELS, *self._outputs]
                raise data_failure(
                    "dataset_extra_array",
                    f"{shard.label} has an array {name!r} that is no input or output of the model.",
                    tensor=name,
                    remedy=f"Remove it; arrays may be named {', '.join(known)}.",
                )
        counts = {name: member.shape[0] for name, member in members.items()}
        if len(set(counts.values())) > 1:
            odd = next((n for n, c in counts.items() if c != next(iter(counts.values()))), None)
            raise data_failure(
                "dataset_shape_mismatch",
                f"The arrays of {shard.label} have different sample counts: {counts}.",
                tensor=odd,
                remedy="Give every array the same first axis: one row per sample.",
            )
        return next(iter(counts.values()), 0)


def _same_layout(a: Batch, b: Batch) -> bool:
    """Whether both fit into one batch: shapes of a sample, and what is whole in every sample."""
    for name, axis in a.axes.items():
        x, y = a.feeds[name], b.feeds[name]
        same = np.array_equal(x, y) if axis is None else _without(x.shape, axis) == _without(y.shape, axis)
        if not same:
            return False
    if all(axis is None for axis in a.axes.values()):
        return False  # a sample is an input by itself
    return all(x.shape[1:] == b.references[name].shape[1:] for name, x in a.references.items())


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    return Batch(
        feeds={n: joined([b.feeds[n] for b in batches], axis) for n, axis in first.axes.items()},
        references={n: np.concatenate([b.references[n] for b in batches]) for n in first.references},
        digests=[d for b in batches for d in b.digests],
        axes=first.axes,
    )


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(
        feeds={n: sliced(batch.feeds[n], axis, start, stop) for n, axis in batch.axes.items()},
        references={n: a[start:stop] for n, a in batch.references.items()},
        digests=batch.digests[start:stop],
        axes=batch.axes,
    )
