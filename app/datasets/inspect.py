"""What an uploaded data set is: its arrays and how many samples; read from the `.npy` headers alone, never unpickled.

Memory is flat. Every refusal is `invalid_dataset`, or one of the `archive_*` codes of `app.archives`.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, TypedDict, cast

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
    """One array: `shape` is that of a sample, without the first axis."""

    name: str
    dtype: str
    shape: list[int]


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


def describe_dataset(path: Path, filename: str, limits: ArchiveLimits) -> dict[str, Any]:
    """The columns of an uploaded data set's row, as JSON. Raises what `inspect_dataset` raises."""
    info = inspect_dataset(path, filename, limits)
    return {"format": info.format, "samples": info.samples, "arrays": info.arrays}


def inspect_dataset(path: Path, filename: str, limits: ArchiveLimits) -> DatasetInfo:
    """`filename` is what the client calls the file. Scratch space for compressed shards is taken beside `path`."""
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
            return _inspect_archive(archive, filename, path.parent, bounds)


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
    samples = unpacked = 0
    for member in members:
        with _seekable(archive, member, scratch) as file:
            shard = _inspect_npz(file, f"the shard {member.name!r}", limits)
        unpacked += shard.unpacked_bytes
        limits.check(unpacked, archive.packed_bytes)
        if first is None:
            first, first_name = shard, member.name
        _check_agreement(first, first_name, shard, member.name)
        samples += shard.samples
    if first is None:
        raise invalid_dataset("The archive holds no .npz shard.", remedy=_MAKE_NPZ)
    return DatasetInfo("archive", samples, first.arrays, len(members))


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
        arrays: list[ArrayInfo] = []
        counts: dict[str, int] = {}
        for member in npz.members:
            info, count = _inspect_array(npz, member, where)
            arrays.append(info)
            counts[info["name"]] = count
    if not arrays:
        raise invalid_dataset(f"There is no array in {where}.", remedy=_MAKE_NPZ)
    samples = counts[arrays[0]["name"]]
    for name, count in counts.items():
        if count != samples:
            raise invalid_dataset(
                f"In {where} the array {name!r} has {count} samples and {arrays[0]['name']!r} has {samples}.",
                tensor=name,
                remedy="Give every array the same first axis: one entry per sample.",
            )
    if samples == 0:
        raise invalid_dataset(f"There is no sample in {where}.", remedy="Store at least one sample.")
    return _Shard(samples, arrays, sum(m.size for m in npz.members))


def _inspect_array(npz: Archive, member: Member, where: str) -> tuple[ArrayInfo, int]:
    """The array's description and its number of samples."""
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
    if not header.shape:
        raise invalid_dataset(
            f"The array {name!r} in {where} is a single number, without an axis of samples.",
            tensor=name,
            remedy="Store one entry per sample, e.g. `numpy.full(samples, value)`.",
        )
    return ArrayInfo(name=name, dtype=header.dtype, shape=list(header.shape[1:])), header.shape[0]


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
        if array != other:
            raise invalid_dataset(
                f"The array {name!r} is {array['dtype']} {array['shape']} per sample in the shard {shard_name!r}, and "
                f"{other['dtype']} {other['shape']} in {first_name!r}.",
                tensor=name,
                remedy="Store the arrays of every shard with the same type and shape per sample.",
            )
