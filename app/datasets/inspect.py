"""What an uploaded data set is: its arrays and how many samples; read from the `.npy` headers alone, never unpickled.

Memory is flat. Every refusal is `invalid_dataset`, or one of the `archive_*` codes of `app.archives`.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NotRequired, TypedDict, cast

from app.archive_streams import SeekableFile, Window
from app.archives import Archive, ArchiveLimits, Limits, Member, archive_kind, open_archive
from app.datasets.npy_header import read_npy_header
from app.errors import AppError, invalid_dataset, storage_full
from app.names import forbidden_character, printable

_CHUNK = 1 << 20
_MAX_ARRAYS = 1000
_MAX_NAME = 512
_MAKE_NPZ = "Make one with `numpy.savez('data.npz', **{input_name: array, ...})`; the first axis counts the samples."
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"\x93NUMPY", "a single .npy array"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x80", "a pickled object, and unpickling runs code from the file"),
)


class ArrayInfo(TypedDict):
    """One array: `shape` is that of a sample, without the first axis; None for a size that differs between shards.
    `first_axis`: its size where it is not the number of samples; None for a single number."""

    name: str
    dtype: str
    shape: list[int | None]
    first_axis: NotRequired[int | None]


@dataclass(frozen=True)
class DatasetInfo:
    """`samples` over all shards; `shards` is 1 for an `.npz`."""

    format: Literal["npz", "archive"]
    samples: int
    arrays: list[ArrayInfo]
    shards: int


@dataclass(frozen=True)
class _Shard:
    samples: int
    arrays: list[ArrayInfo]
    unpacked_bytes: int


def describe_dataset(path: Path, filename: str, limits: ArchiveLimits, scratch: Path) -> dict[str, Any]:
    """The columns of an uploaded data set's row, as JSON. Raises what `inspect_dataset` raises."""
    info = inspect_dataset(path, filename, limits, scratch)
    return {"format": info.format, "samples": info.samples, "arrays": info.arrays}


def inspect_dataset(path: Path, filename: str, limits: ArchiveLimits, scratch: Path | None = None) -> DatasetInfo:
    """`filename` is what the client calls the file. `scratch`: a folder for compressed shards; None: beside `path`."""
    bounds = Limits.of(limits)
    with path.open("rb") as file:
        head = file.read(512)
        if not head:
            raise invalid_dataset("The file is empty.", remedy=_MAKE_NPZ)
        kind = archive_kind(file)
    if kind is None:
        what = next(
            (what for magic, what in _FOREIGN if head.startswith(magic)), "neither an .npz nor an archive of them"
        )
        raise invalid_dataset(f"The file is not a data set: it is {what}.", remedy=_MAKE_NPZ)
    with _archive_damage_is_invalid_dataset():
        if kind == "zip" and filename.lower().endswith(".npz"):
            with path.open("rb") as file:
                shard = _inspect_npz(file, "the .npz", bounds)
            return DatasetInfo("npz", shard.samples, shard.arrays, 1)
        with open_archive(path, bounds) as archive:
            return _inspect_archive(archive, filename, scratch or path.parent, bounds)


@contextmanager
def _archive_damage_is_invalid_dataset() -> Iterator[None]:
    """A damaged archive is a file that is not what it says; unsafe ones keep their own codes."""
    try:
        yield
    except AppError as e:
        if e.code != "archive_invalid":
            raise
        raise invalid_dataset(e.detail, remedy=e.remedy) from e


def _inspect_archive(archive: Archive, filename: str, scratch: Path, limits: Limits) -> DatasetInfo:
    if filename.lower().endswith(".npz"):
        raise invalid_dataset(f"The file is named {filename[:200]!r} and is a .tar archive.", remedy=_MAKE_NPZ)
    # What macOS puts beside the files is none of the data.
    members = [m for m in archive.members if not PurePosixPath(m.name).name.startswith(("._", ".DS_Store"))]
    if members and all(m.name.endswith(".npy") for m in members):
        raise invalid_dataset(
            "The archive holds .npy arrays, not .npz shards.", remedy="If it is an .npz, name it so; else: " + _MAKE_NPZ
        )
    for member in members:
        if not member.name.lower().endswith(".npz"):
            raise invalid_dataset(
                f"The archive holds {member.name!r}, which is no .npz.", remedy="Pack nothing but .npz shards."
            )
    first: _Shard | None = None
    first_name = ""
    arrays: list[ArrayInfo] = []
    samples = unpacked = 0
    for member in members:
        with _seekable(archive, member, scratch) as file:
            shard = _inspect_npz(file, f"the shard {member.name!r}", limits)
        unpacked += shard.unpacked_bytes
        limits.check(unpacked, archive.packed_bytes)
        if first is None:
            first, first_name = shard, member.name
        _check_agreement(first, first_name, shard, member.name)
        arrays = _over_shards(arrays or shard.arrays, shard.arrays, (first.samples, shard.samples))
        samples += shard.samples
    if first is None:
        raise invalid_dataset("The archive holds no .npz shard.", remedy=_MAKE_NPZ)
    return DatasetInfo("archive", samples, arrays, len(members))


@contextmanager
def _seekable(archive: Archive, member: Member, scratch: Path) -> Iterator[SeekableFile]:
    """The shard itself where it lies uncompressed in the archive, else a temporary copy of it."""
    stream = archive.open(member.name)
    if isinstance(stream, Window):
        yield stream
        return
    try:
        with tempfile.TemporaryFile(dir=scratch) as copy:
            size = 0
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                copy.write(chunk)
            if size != member.size:
                raise invalid_dataset(f"The shard {member.name!r} says {member.size} bytes and holds {size}.")
            yield cast(BinaryIO, copy)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise storage_full() from e
        raise


def _inspect_npz(file: SeekableFile, where: str, limits: Limits) -> _Shard:
    if archive_kind(file) != "zip":
        raise invalid_dataset(f"{where[0].upper()}{where[1:]} is not an .npz file.", remedy=_MAKE_NPZ)
    with open_archive(file, limits, names_are_paths=False) as npz:
        if len(npz.members) > _MAX_ARRAYS:
            raise invalid_dataset(f"There are more than {_MAX_ARRAYS} arrays in {where}.", remedy=_MAKE_NPZ)
        if npz.members and all(m.name.lower().endswith(".npz") for m in npz.members):
            raise invalid_dataset(
                f"There are .npz shards in {where}.",
                remedy="Name the archive of shards .zip, and do not nest archives.",
            )
        headers = [_inspect_array(npz, member, where) for member in npz.members]
    if not headers:
        raise invalid_dataset(f"There is no array in {where}.", remedy=_MAKE_NPZ)
    samples = _sample_count([shape for _, _, shape in headers])
    counted = next((name for name, _, shape in headers if shape and shape[0] == samples), None)
    if samples is None or counted is None:
        raise invalid_dataset(
            f"The array {headers[0][0]!r} in {where} is a single number, without an axis of samples.",
            tensor=headers[0][0],
            remedy="Store one entry per sample, e.g. `numpy.full(samples, value)`.",
        )
    arrays = []
    for name, dtype, shape in headers:
        info = ArrayInfo(name=name, dtype=dtype, shape=list(shape[1:]))
        if not shape or shape[0] != samples:
            # With more axes it may be a model's state or a set, which the job tells; a lone list is one entry a sample.
            if len(shape) == 1 and shape[0] != 1:
                raise invalid_dataset(
                    f"In {where} the array {name!r} has {shape[0]} samples and {counted!r} has {samples}.",
                    tensor=name,
                    remedy="Give every array the same first axis: one entry per sample.",
                )
            info["first_axis"] = shape[0] if shape else None
        arrays.append(info)
    if samples == 0:
        raise invalid_dataset(f"There is no sample in {where}.", remedy="Store at least one sample.")
    return _Shard(samples, arrays, sum(m.size for m in npz.members))


def _sample_count(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The size of a first axis that most arrays have on some axis, of several the largest; None where all are single
    numbers."""
    firsts = {shape[0] for shape in shapes if shape}
    return max(firsts, key=lambda size: (sum(size in shape for shape in shapes), size), default=None)


def _inspect_array(npz: Archive, member: Member, where: str) -> tuple[str, str, tuple[int, ...]]:
    """The array's name, dtype and shape."""
    if not member.name.endswith(".npy") or member.name == ".npy" or len(member.name) > _MAX_NAME:
        raise invalid_dataset(f"There is {member.name[:200]!r} in {where}, which is no .npy array.", remedy=_MAKE_NPZ)
    name = member.name.removesuffix(".npy")
    if character := forbidden_character(name):
        raise invalid_dataset(
            f"The name of the array {name[:200]!r} in {where} holds the control character {character}.",
            tensor=printable(name[:200]),
            remedy="Name the arrays as the model's inputs and outputs are named.",
        )
    header = read_npy_header(npz.open(member.name), name, where)
    if header.total_bytes != member.size:
        state = "truncated" if member.size < header.total_bytes else "too long"
        raise invalid_dataset(
            f"The array {name!r} in {where} is {state}: it has {member.size} bytes and its header tells of "
            f"{header.total_bytes}.",
            tensor=name,
            remedy="Write the file again with `numpy.savez`.",
        )
    return name, header.dtype, tuple(header.shape)


def _check_agreement(first: _Shard, first_name: str, shard: _Shard, shard_name: str) -> None:
    ours = {a["name"]: a for a in shard.arrays}
    theirs = {a["name"]: a for a in first.arrays}
    if different := sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (shard_name, first_name) if different[0] in ours else (first_name, shard_name)
        raise invalid_dataset(
            f"The shard {has!r} has the array {different[0]!r} and {lacks!r} has not.",
            tensor=different[0],
            remedy="Store the same arrays in every shard.",
        )
    for name, array in ours.items():
        other = theirs[name]
        if array["dtype"] != other["dtype"] or len(array["shape"]) != len(other["shape"]):
            raise invalid_dataset(
                f"The array {name!r} is {array['dtype']} {array['shape']} per sample in the shard {shard_name!r}, and "
                f"{other['dtype']} {other['shape']} in {first_name!r}.",
                tensor=name,
                remedy="Store the arrays of every shard with the same type, and with as many axes.",
            )


def _over_shards(first: Sequence[ArrayInfo], shard: Sequence[ArrayInfo], samples: tuple[int, int]) -> list[ArrayInfo]:
    """What is true of the arrays of both; `samples`: how many each has."""
    others, found = {a["name"]: a for a in shard}, []
    for array in first:
        other = others[array["name"]]
        same = [a if a == b else None for a, b in zip(array["shape"], other["shape"], strict=True)]
        both = ArrayInfo(name=array["name"], dtype=array["dtype"], shape=same)
        if "first_axis" in array or "first_axis" in other:
            firsts = [a.get("first_axis", n) for a, n in zip((array, other), samples, strict=True)]
            both["first_axis"] = firsts[0] if firsts[0] == firsts[1] else None
        found.append(both)
    return found
