"""Safe reading of untrusted `.zip`, `.tar` and `.tar.gz` files.

Names are checked before anything is read, links and devices are refused, and unpacked bytes are counted while they
come out of the decompressor: what an archive says of its own sizes is never trusted. Memory stays flat. Every refusal
is an `AppError` with status 422 and one of the codes `archive_invalid`, `archive_unsafe_path`, `archive_link`,
`archive_too_large`, `archive_too_many_members`, `archive_bomb`, `archive_encrypted`, `archive_duplicate_member`.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self, cast

from app.archive_streams import (
    CHUNK,
    REPACK,
    ArchiveLimits,
    Guarded,
    Inflated,
    Limits,
    Part,
    SeekableFile,
    Stream,
    Window,
    archive_error,
    damage_reported,
    invalid_archive,
)
from app.errors import storage_full
from app.tar_headers import TarEntry, is_tar_header, read_tar

__all__ = [
    "Archive",
    "ArchiveLimits",
    "Limits",
    "Member",
    "Stream",
    "archive_kind",
    "extract",
    "list_members",
    "open_archive",
    "open_member",
]

ArchiveKind = Literal["zip", "tar", "tar.gz"]

# Central directory bytes allowed per member: 46 fixed ones, a name and some extra fields.
_DIRECTORY_BYTES_PER_MEMBER = 256
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class Member:
    """A regular file in an archive: normalised relative path, declared size in bytes."""

    name: str
    size: int


def archive_kind(file: SeekableFile) -> ArchiveKind | None:
    """What the first bytes say; leaves the position at 0."""
    file.seek(0)
    head = file.read(512)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    return "tar" if is_tar_header(head) else None


def safe_name(name: str) -> str:
    """`name` without `.` parts and a trailing slash ("" for the root itself); refuses what could leave the folder."""
    shown = repr(name[:200])
    problem = None
    if "\0" in name:
        problem = "holds a NUL character"
    elif "\\" in name:
        problem = "holds a backslash"
    elif name.startswith("/") or re.match(r"[A-Za-z]:", name):
        problem = "is an absolute path"
    elif ".." in name.split("/"):
        problem = "leaves its folder with '..'"
    elif any(0xD800 <= ord(c) <= 0xDFFF for c in name):
        problem = "is not valid UTF-8"
    elif len(name.encode()) > 1024 or any(len(part.encode()) > 255 for part in name.split("/")):
        problem = "is too long"
    if problem:
        raise archive_error("archive_unsafe_path", f"The member name {shown} {problem}.", REPACK)
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _check_distinct(names: Iterable[str], *, paths: bool = True) -> None:
    seen: set[str] = set()
    folders: set[str] = set()
    for name in names:
        if not name:
            raise invalid_archive("A member has no name.")
        if name in seen:
            raise archive_error("archive_duplicate_member", f"The member {name!r} is there twice.", REPACK)
        seen.add(name)
        parts = name.split("/") if paths else []
        folders.update("/".join(parts[:i]) for i in range(1, len(parts)))
    if both := sorted(seen & folders):
        raise archive_error("archive_duplicate_member", f"{both[0]!r} is a file and a folder at once.", REPACK)


class Archive:
    """An open archive. Use as a context manager; `members` lists its regular files in their order."""

    kind: ArchiveKind

    def __init__(self, file: SeekableFile, limits: Limits) -> None:
        self._file, self._limits = file, limits
        self.packed_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.members: tuple[Member, ...] = ()

    def open(self, name: str) -> Stream:
        """A stream over one member, seekable where nothing has to be inflated. Valid until the next call."""
        raise NotImplementedError

    def verified(self, name: str) -> Stream:
        """A forward-only stream that also checks the member's checksum where the format has one."""
        return self.open(name)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Zip(Archive):
    kind: ArchiveKind = "zip"

    def __init__(self, file: SeekableFile, limits: Limits, *, names_are_paths: bool) -> None:
        super().__init__(file, limits)
        cap = max(CHUNK, limits.max_members * _DIRECTORY_BYTES_PER_MEMBER + (1 << 16))
        with damage_reported():
            self._zip = zipfile.ZipFile(cast(IO[bytes], Guarded(file, cap)))
        infos = self._zip.infolist()
        limits.check_count(len(infos))
        self._infos: dict[str, zipfile.ZipInfo] = {}
        names: list[str] = []
        for info in infos:
            name = safe_name(info.orig_filename) if names_are_paths else info.filename
            self._check_entry(info)
            if not info.is_dir():
                names.append(name)
                self._infos[name] = info
        _check_distinct(names, paths=names_are_paths)
        self._check_overlap(infos)
        self.members = tuple(Member(n, self._infos[n].file_size) for n in names)
        limits.check(sum(m.size for m in self.members), self.packed_bytes)

    @staticmethod
    def _check_entry(info: zipfile.ZipInfo) -> None:
        name = repr(info.filename[:200])
        if not info.filename:
            raise invalid_archive("It has a member without a name.")
        if info.flag_bits & 0x41:
            raise archive_error(
                "archive_encrypted", f"The member {name} is encrypted.", "Pack the files without a password."
            )
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise archive_error("archive_link", f"The member {name} is a link or a device.", "Pack only regular files.")
        # The other methods' decoders take as much memory as the archive asks for.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise invalid_archive(
                f"The member {name} uses compression method {info.compress_type}; only deflate is read."
            )
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise invalid_archive(f"The member {name} states two different sizes.")

    def _check_overlap(self, infos: list[zipfile.ZipInfo]) -> None:
        end = 0
        for info in sorted(infos, key=lambda i: i.header_offset):
            if info.header_offset < end:
                raise archive_error("archive_bomb", f"The member {info.filename[:200]!r} overlaps another one.", REPACK)
            end = info.header_offset + 30 + info.compress_size
        if end > self.packed_bytes:
            raise invalid_archive("The archive is damaged or incomplete: a member reaches beyond the end of the file.")

    def open(self, name: str) -> Stream:
        info = self._infos[name]
        if info.compress_type != zipfile.ZIP_STORED:
            return self.verified(name)
        self._file.seek(info.header_offset)
        with damage_reported():
            magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if magic != b"PK\x03\x04" or start + info.file_size > self.packed_bytes:
            raise invalid_archive(f"The archive is damaged or incomplete at the member {name!r}.")
        return Window(self._file, start, info.file_size)

    def verified(self, name: str) -> Stream:
        with damage_reported():
            return Inflated(self._zip.open(self._infos[name]), self._limits, self.packed_bytes)


class _Tar(Archive):
    def __init__(self, file: SeekableFile, limits: Limits, kind: ArchiveKind) -> None:
        super().__init__(file, limits)
        self.kind = kind
        self._stream = self._rewound()
        self._entries: dict[str, TarEntry] = {}
        names: list[str] = []
        total = count = 0
        with damage_reported():
            for entry in read_tar(self._stream):
                count += 1
                limits.check_count(count)
                name = safe_name(entry.name)
                if entry.kind == "other":
                    raise archive_error(
                        "archive_link", f"The member {name!r} is a link or a device.", "Pack only regular files."
                    )
                if entry.kind == "file":
                    total += entry.size
                    limits.check(total, self.packed_bytes)
                    names.append(name)
                    self._entries[name] = entry
        _check_distinct(names)
        self.members = tuple(Member(n, self._entries[n].size) for n in names)

    def _rewound(self) -> Stream:
        self._file.seek(0)
        if self.kind == "tar":
            return Window(self._file, 0, self.packed_bytes)
        inflater = cast(IO[bytes], gzip.GzipFile(fileobj=self._file, mode="rb"))
        return Inflated(inflater, self._limits, self.packed_bytes)

    def open(self, name: str) -> Stream:
        entry = self._entries[name]
        if self.kind == "tar":
            return Window(self._file, entry.offset, entry.size)
        if self._stream.tell() > entry.offset:
            self._stream = self._rewound()
        self._stream.seek(entry.offset)
        return Part(self._stream, entry.size)


def open_archive(source: Path | SeekableFile, limits: Limits, *, names_are_paths: bool = True) -> Archive:
    """Opens by content and checks every entry. `names_are_paths=False` is for `.npz`, whose members are array names
    that nobody unpacks ("x:0" is a fine one)."""
    file: SeekableFile = source.open("rb") if isinstance(source, Path) else source
    try:
        kind = archive_kind(file)
        if kind is None:
            raise invalid_archive("The file is neither a .zip nor a .tar nor a .tar.gz.")
        if kind == "zip":
            return _Zip(file, limits, names_are_paths=names_are_paths)
        return _Tar(file, limits, kind)
    except BaseException:
        file.close()
        raise


def list_members(path: Path, limits: ArchiveLimits) -> list[Member]:
    """The regular files in the archive, in their order."""
    with open_archive(path, Limits.of(limits)) as archive:
        return list(archive.members)


@contextmanager
def open_member(path: Path, name: str, limits: ArchiveLimits) -> Iterator[Stream]:
    """A stream over one member; `KeyError` where there is none of that name."""
    with open_archive(path, Limits.of(limits)) as archive:
        yield archive.open(name)


def extract(path: Path, into: Path, *, max_bytes: int, max_members: int, max_ratio: float) -> list[Path]:
    """Unpacks every regular file below `into` (made where missing) and gives their paths in the archive's order.

    Existing files are never overwritten. After an error nothing that was unpacked is left. A full disk is
    `storage_full`.
    """
    limits = Limits(max_bytes, max_members, max_ratio)
    written: list[Path] = []
    total = 0
    with open_archive(path, limits) as archive:
        try:
            for member in archive.members:
                target = into / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = archive.verified(member.name)
                with target.open("xb") as out:
                    written.append(target)
                    size = 0
                    while chunk := stream.read(CHUNK):
                        size += len(chunk)
                        limits.check(total + size, archive.packed_bytes)
                        out.write(chunk)
                if size != member.size:
                    raise invalid_archive(f"The member {member.name!r} says {member.size} bytes and holds {size}.")
                total += size
        except BaseException as e:
            for target in written:
                target.unlink(missing_ok=True)
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise storage_full() from e
            raise
    return written
