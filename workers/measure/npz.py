"""Untrusted `.npz` files and archives of them, read in row blocks: nothing is unpickled or extracted by path."""

from __future__ import annotations

import errno
import lzma
import math
import shutil
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from app.domain.failures import StageFailure, data_failure

MAX_ROW_BYTES = 1 << 30
MAX_FORTRAN_BYTES = 256 << 20
MAX_MEMBERS = 10_000
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    KeyError,
    NotImplementedError,  # a compression method that Python does not know
    RuntimeError,  # an encrypted member
    OverflowError,
    MemoryError,
    RecursionError,
    SyntaxError,
)


def unreadable(label: str, why: str) -> StageFailure:
    return data_failure(
        "dataset_unreadable",
        f"{label} cannot be read: {why}",
        remedy="Upload an .npz made by numpy.savez, or a .zip or .tar that holds nothing but such .npz files.",
    )


@contextmanager
def guarded(label: str) -> Iterator[None]:
    """Turns what the archive and array libraries raise on broken content into `dataset_unreadable`."""
    try:
        yield
    except StageFailure:
        raise
    except _BROKEN as error:
        raise unreadable(label, f"{type(error).__name__}: {error}"[:300]) from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a seek to a nonsense offset: the content's fault, not the disk's
            raise unreadable(label, str(error)[:300]) from error
        raise


class RowReader:
    """Rows of one array along its batch axis, in order."""

    def __init__(self, member: Member, handle: IO[bytes]) -> None:
        self._member = member
        self._handle = handle
        self._whole: np.ndarray[Any, Any] | None = None
        self._next = 0
        _read_header(handle)
        if member.axis != 0 or (member.fortran_order and len(member.shape) > 1):
            flat = np.frombuffer(self._exactly(member.stored_bytes), dtype=member.dtype)
            whole = flat.reshape(member.stored, order="F" if member.fortran_order else "C")
            if member.axis is None:
                self._whole = np.broadcast_to(whole, member.shape)
            else:
                self._whole = np.ascontiguousarray(np.moveaxis(whole, member.axis, 0))

    def read_rows(self, count: int) -> np.ndarray[Any, Any]:
        """The next `count` rows in native byte order."""
        if self._whole is not None:
            rows = self._whole[self._next : self._next + count]
        else:
            raw = self._exactly(self._member.row_bytes * count)
            rows = np.frombuffer(raw, dtype=self._member.dtype).reshape(count, *self._member.shape[1:])
        self._next += count
        if self._next == self._member.shape[0]:
            self._handle.read(1)  # the end of the member: only here zipfile compares the checksum
        return rows.astype(self._member.dtype.newbyteorder("="), copy=False)

    def _exactly(self, size: int) -> bytearray:
        out = bytearray(size)
        view, done = memoryview(out), 0
        while done < size:
            chunk = self._handle.read(min(size - done, 4 << 20))
            if not chunk:
                raise EOFError(f"array {self._member.name!r} ends {size - done} bytes too early")
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
        return out


@dataclass(frozen=True)
class Member:
    """One array of a shard, as its header says it. `stored`: its shape; `shape`: with the axis of the samples first,
    `axis` of the stored one, or None where every sample has the whole array."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo
    name: str
    dtype: np.dtype[Any]
    stored: tuple[int, ...]
    fortran_order: bool
    shape: tuple[int, ...]
    axis: int | None = 0

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        return math.prod(self.stored) * self.dtype.itemsize

    def along(self, axis: int | None, rows: int, label: str) -> Member:
        """The same array with its samples along another axis, or, for None, whole in each of `rows` samples."""
        if axis is not None and not self.stored:
            raise data_failure(
                "dataset_shape_mismatch",
                f"Array {self.name!r} of {label} is a scalar.",
                tensor=self.name,
                remedy="Make the first axis the samples.",
            )
        if axis == 0 or (axis is not None and axis >= len(self.stored)):
            return self
        if self.stored_bytes > MAX_FORTRAN_BYTES:
            raise data_failure(
                "dataset_unreadable",
                f"Array {self.name!r} of {label} has no samples on its first axis, and is too large for that.",
                tensor=self.name,
                remedy=f"Save it in shards of at most {MAX_FORTRAN_BYTES >> 20} MiB.",
            )
        rest = self.stored if axis is None else self.stored[:axis] + self.stored[axis + 1 :]
        return replace(self, shape=(rows if axis is None else self.stored[axis], *rest), axis=axis)

    @contextmanager
    def reader(self) -> Iterator[RowReader]:
        with self.archive.open(self.info) as handle:
            yield RowReader(self, handle)


@dataclass(frozen=True)
class Shard:
    """One `.npz`; `label` is how messages name it."""

    archive: zipfile.ZipFile
    label: str

    def members(self) -> dict[str, Member]:
        """The arrays by name, from their headers alone."""
        found: dict[str, Member] = {}
        for info in self.archive.infolist():
            if not info.filename.endswith(".npy"):
                raise unreadable(self.label, f"it holds {info.filename[:80]!r}, which is not an array.")
            name = info.filename[: -len(".npy")]
            if name in found:
                raise unreadable(self.label, f"it holds two arrays named {name[:80]!r}.")
            with guarded(self.label):
                found[name] = self._member(info, name)
        if not found:
            raise data_failure(
                "dataset_empty", f"{self.label} holds no arrays.", remedy="Save at least one array per model input."
            )
        return found

    def _member(self, info: zipfile.ZipInfo, name: str) -> Member:
        with self.archive.open(info) as handle:
            shape, fortran_order, dtype = _read_header(handle)
            header_bytes = handle.tell()
        if dtype.hasobject:
            raise data_failure(
                "dataset_pickled",
                f"Array {name!r} of {self.label} holds Python objects; pickles are never loaded.",
                tensor=name,
                remedy="Save plain numeric arrays.",
            )
        if any(not isinstance(n, int) or n < 0 for n in shape):
            raise unreadable(self.label, f"array {name!r} has shape {shape}.")
        member = Member(self.archive, info, name, dtype, shape, bool(fortran_order), shape)
        size = member.stored_bytes
        if header_bytes + size != info.file_size:
            held = info.file_size - header_bytes
            raise unreadable(self.label, f"array {name!r} of shape {list(shape)} needs {size} bytes, it holds {held}.")
        if 0 in shape[1:]:
            raise data_failure(
                "dataset_shape_mismatch",
                f"The samples of array {name!r} in {self.label} are empty: shape {list(shape)}.",
                tensor=name,
                remedy="Save at least one element per sample.",
            )
        if member.row_bytes > MAX_ROW_BYTES:
            raise unreadable(
                self.label, f"one sample of {name!r} takes {member.row_bytes} bytes (at most {MAX_ROW_BYTES})."
            )
        if member.fortran_order and len(shape) > 1 and size > MAX_FORTRAN_BYTES:
            raise data_failure(
                "dataset_unreadable",
                f"Array {name!r} of {self.label} is in Fortran order and too large to be turned in memory.",
                tensor=name,
                remedy="Save np.ascontiguousarray(array).",
            )
        return member


def _read_header(handle: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about headers written by Python 2
        version = np.lib.format.read_magic(handle)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(handle)
        if version in ((2, 0), (3, 0)):
            return np.lib.format.read_array_header_2_0(handle)
    raise ValueError(f"unknown .npy version {version}")


@contextmanager
def open_shards(path: Path) -> Iterator[Iterator[Shard]]:
    """The shards of a data set file in the order of their names. What kind of file it is, its content says."""
    with guarded("The data set"):
        with path.open("rb") as handle:  # not `is_zipfile`: a tar whose last member is an .npz ends like a zip
            is_zip = handle.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
        is_tar = not is_zip and tarfile.is_tarfile(path)
    if is_zip:
        with guarded("The data set"):
            archive = zipfile.ZipFile(path)
        with archive:
            yield _zip_shards(archive)
    elif is_tar:
        with guarded("The data set"):
            tar = tarfile.open(path, "r:")  # noqa: SIM115  (closed by the `with` below)
        with tar:
            yield _tar_shards(tar)
    else:
        raise unreadable("The data set", "it is neither an .npz nor a .zip or .tar.")


def _zip_shards(archive: zipfile.ZipFile) -> Iterator[Shard]:
    files = sorted((i for i in archive.infolist() if not i.is_dir()), key=lambda i: i.filename)
    if files and all(i.filename.endswith(".npy") for i in files):
        yield Shard(archive, "The data set")
        return
    for info in _only_npz([(i.filename, i) for i in files]):
        label = f"Shard {info.filename[:80]!r}"
        # A deflated member cannot be read from several places at once; a copy without a name can.
        with tempfile.TemporaryFile() as copy:
            with guarded(label), archive.open(info) as source:
                shutil.copyfileobj(source, copy, 4 << 20)
            yield from _one_shard(copy, label)


def _tar_shards(tar: tarfile.TarFile) -> Iterator[Shard]:
    with guarded("The data set"):
        members = []
        for entry in tar:
            if entry.isdir():
                continue
            if not entry.isreg():
                raise unreadable("The data set", f"{entry.name[:80]!r} is a link or a device.")
            members.append((entry.name, entry))
            if len(members) > MAX_MEMBERS:
                break
    for entry in _only_npz(sorted(members, key=lambda m: m[0])):
        label = f"Shard {entry.name[:80]!r}"
        with guarded(label):
            handle = tar.extractfile(entry)
        assert handle is not None  # a regular file
        with handle:
            yield from _one_shard(handle, label)


def _only_npz(members: list[tuple[str, Any]]) -> Iterator[Any]:
    if not members:
        raise data_failure(
            "dataset_empty", "The data set holds no files.", remedy="Upload an .npz, or an archive of .npz shards."
        )
    if len(members) > MAX_MEMBERS:
        raise unreadable("The data set", f"it holds more than {MAX_MEMBERS} files.")
    for name, _ in members:
        if not name.endswith(".npz"):
            raise unreadable("The data set", f"it holds {name[:80]!r}; only .npz shards belong into the archive.")
    yield from (member for _, member in members)


def _one_shard(handle: IO[bytes], label: str) -> Iterator[Shard]:
    with guarded(label):
        archive = zipfile.ZipFile(handle)
    with archive:
        yield Shard(archive, label)
