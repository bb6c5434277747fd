"""Real archives, honest and hostile, made with zipfile and tarfile (and by hand where those refuse)."""

from __future__ import annotations

import errno
import io
import os
import random
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.archives import Member, extract, list_members, open_member
from app.errors import AppError
from app.settings import LimitSettings

MIB = 1 << 20
FILES = {"model.onnx": b"onnx bytes", "data/weights.bin": bytes(range(256)) * 40}


def make_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w", tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=tar_format) as t:  # type: ignore[call-overload]  # mode is a plain str here
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "deflated zip": make_zip,
    "stored zip": lambda p, f: make_zip(p, f, zipfile.ZIP_STORED),
    "pax tar": make_tar,
    "gnu tar": lambda p, f: make_tar(p, f, tar_format=tarfile.GNU_FORMAT),
    "ustar": lambda p, f: make_tar(p, f, tar_format=tarfile.USTAR_FORMAT),
    "tar.gz": lambda p, f: make_tar(p, f, "w:gz"),
}


@contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(AppError) as caught:
        yield
    assert (caught.value.code, caught.value.status) == (code, 422), caught.value
    assert caught.value.detail
    assert caught.value.remedy


def unpack(
    path: Path, into: Path, max_bytes: int = 100 * MIB, max_members: int = 100, ratio: float = 200
) -> list[Path]:
    return extract(path, into, max_bytes=max_bytes, max_members=max_members, max_ratio=ratio)


def left(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize("kind", MAKERS)
def test_lists_reads_and_extracts_what_is_there(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "a", FILES)
    assert list_members(path, LimitSettings()) == [Member(n, len(d)) for n, d in FILES.items()]
    for name, data in FILES.items():
        with open_member(path, name, LimitSettings()) as stream:
            assert b"".join(iter(lambda s=stream: s.read(1000), b"")) == data  # type: ignore[misc]  # bound at once
    out = unpack(path, tmp_path / "out")
    assert [p.relative_to(tmp_path / "out").as_posix() for p in out] == list(FILES)
    assert [p.read_bytes() for p in out] == list(FILES.values())


@pytest.mark.parametrize("kind", ["stored zip", "pax tar"])
def test_what_is_not_compressed_can_be_seeked(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "a", FILES)
    with open_member(path, "data/weights.bin", LimitSettings()) as stream:
        assert stream.seekable()
        stream.seek(255)
        assert stream.read(2) == b"\xff\x00"
        stream.seek(40 * 256 - 1)
        assert stream.read(10) == b"\xff"


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_unicode_names_folders_and_dot_prefixes(tmp_path: Path, tar_format: int) -> None:
    names = ["./model.onnx", "a" * 60 + "/" + "b" * 60 + "/" + "c" * 90, "gewichte-ü/ä.bin"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tar_format) as t:
        folder = tarfile.TarInfo(".")
        folder.type = tarfile.DIRTYPE
        t.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            t.addfile(info, io.BytesIO(b"abc"))
    assert [m.name for m in list_members(path, LimitSettings())] == ["model.onnx", *names[1:]]


UNSAFE = ["../x", "a/../../x", "/etc/x", "a\\b", "..\\x", "C:x", "c:/x", "x" * 300, "a/.."]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name) for kind in MAKERS for name in UNSAFE if not (kind == "ustar" and len(name) > 100)
    ],  # ustar ends there
)
def test_unsafe_paths(tmp_path: Path, kind: str, name: str) -> None:
    path = MAKERS[kind](tmp_path / "a", {"ok": b"1", name: b"2"})
    with refused("archive_unsafe_path"):
        list_members(path, LimitSettings())
    with refused("archive_unsafe_path"):
        unpack(path, tmp_path / "in" / "out")
    assert left(tmp_path) == [path]


def test_nul_and_invalid_utf8_in_names(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"aXb": b"1"})
    path.write_bytes(path.read_bytes().replace(b"aXb", b"a\0b"))
    with refused("archive_unsafe_path"):
        list_members(path, LimitSettings())
    path = make_tar(tmp_path / "a.tar", {"x\udcff": b"1"}, tar_format=tarfile.GNU_FORMAT)
    with refused("archive_unsafe_path"):
        list_members(path, LimitSettings())


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tar(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as t:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        t.addfile(info)
    with refused("archive_link"):
        list_members(path, LimitSettings())
    with refused("archive_link"):
        unpack(path, tmp_path / "out")


def test_link_in_zip(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr(info, "/etc/passwd")
    with refused("archive_link"):
        list_members(tmp_path / "a.zip", LimitSettings())


def test_sparse_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as t:
        info = tarfile.TarInfo("hole")
        info.pax_headers = {"GNU.sparse.realsize": str(1 << 60), "GNU.sparse.major": "1"}
        t.addfile(info)
    with refused("archive_link"):
        list_members(path, LimitSettings())


@pytest.mark.parametrize("kind", MAKERS)
def test_size_count_and_ratio_limits(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "a", {"a": os.urandom(3000), "b": os.urandom(3000)})
    with refused("archive_too_large"):
        unpack(path, tmp_path / "o1", max_bytes=5000)
    with refused("archive_too_large"):
        list_members(path, LimitSettings(unpacked_bytes=5000))
    with refused("archive_too_many_members"):
        unpack(path, tmp_path / "o2", max_members=1)
    zeros = MAKERS[kind](tmp_path / "z", {"zeros": bytes(20 * MIB)})
    if kind in ("deflated zip", "tar.gz"):
        with refused("archive_bomb"):
            unpack(zeros, tmp_path / "o3")
        with refused("archive_bomb"):
            list_members(zeros, LimitSettings())
        assert unpack(zeros, tmp_path / "o4", ratio=2000)
    else:
        assert unpack(zeros, tmp_path / "o4")
    assert not left(tmp_path / "o1") if (tmp_path / "o1").exists() else True


def hand_made_zip(entries: list[tuple[str, bytes, int, int, int]], bodies: bytes) -> bytes:
    """Central directory entries (name, deflated body unused, crc, file size, header offset) over given bodies."""
    directory = b""
    for name, deflated, crc, size, offset in entries:
        raw = name.encode()
        directory += (
            struct.pack(
                "<4s6H3L5H2L",
                b"PK\x01\x02",
                20,
                20,
                0,
                8,
                0,
                0,
                crc,
                len(deflated),
                size,
                len(raw),
                0,
                0,
                0,
                0,
                0,
                offset,
            )
            + raw
        )
    n = len(entries)
    return bodies + directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, n, n, len(directory), len(bodies), 0)


def local(name: str, deflated: bytes, crc: int, size: int) -> bytes:
    raw = name.encode()
    return (
        struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(deflated), size, len(raw), 0) + raw + deflated
    )


def deflate(data: bytes) -> bytes:
    c = zlib.compressobj(9, zlib.DEFLATED, -15)
    return c.compress(data) + c.flush()


def test_a_header_that_lies_about_the_size(tmp_path: Path) -> None:
    real = bytes(20 * MIB)
    body = deflate(real)
    for size, crc in ((10, zlib.crc32(real)), (30 * MIB, zlib.crc32(real))):
        path = tmp_path / f"{size}.zip"
        path.write_bytes(hand_made_zip([("x", body, crc, size, 0)], local("x", body, crc, size)))
        with pytest.raises(AppError) as caught:
            unpack(path, tmp_path / "out", ratio=2000)
        assert caught.value.code == "archive_invalid"
        assert not left(tmp_path / "out")


def test_overlapping_members_are_a_bomb(tmp_path: Path) -> None:
    """One kernel of compressed zeros that many entries point at (D. Fifield, "A better zip bomb", WOOT 2019)."""
    real = bytes(MIB)
    body = deflate(real)
    crc = zlib.crc32(real)
    path = tmp_path / "a.zip"
    names = [f"f{i:02}" for i in range(90)]
    path.write_bytes(hand_made_zip([(n, body, crc, MIB, 0) for n in names], local(names[0], body, crc, MIB)))
    with refused("archive_bomb"):
        unpack(path, tmp_path / "out", ratio=100_000)


def test_encrypted_duplicate_and_odd_methods(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "e.zip", {"x": b"abc"})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with refused("archive_encrypted"):
        list_members(path, LimitSettings())
    make_zip(tmp_path / "d.zip", {"x": b"1", "y": b"2"})
    (tmp_path / "d.zip").write_bytes((tmp_path / "d.zip").read_bytes().replace(b"y", b"x"))
    with refused("archive_duplicate_member"):
        list_members(tmp_path / "d.zip", LimitSettings())
    for files in ({"x": b"1", "./x": b"2"}, {"x": b"1", "x/y": b"2"}):
        with refused("archive_duplicate_member"):
            list_members(make_tar(tmp_path / "d.tar", files), LimitSettings())
    with refused("archive_invalid"):
        list_members(make_zip(tmp_path / "l.zip", {"x": b"1"}, zipfile.ZIP_LZMA), LimitSettings())


@pytest.mark.parametrize("kind", MAKERS)
def test_truncation_anywhere_is_an_error_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    files = {"a.bin": random.Random(1).randbytes(5000), "b.bin": random.Random(2).randbytes(5000)}
    whole = MAKERS[kind](tmp_path / "whole", files).read_bytes()
    path = tmp_path / "cut"
    for cut in (1, 20, 300, 1000, 4000, 6000, 10_000):
        path.write_bytes(whole[:cut])
        with refused("archive_invalid"):
            unpack(path, tmp_path / "out")
        assert not (tmp_path / "out").exists() or not left(tmp_path / "out")


def test_a_broken_checksum_is_found_when_extracting(tmp_path: Path) -> None:
    for kind in ("stored zip", "tar.gz"):
        path = MAKERS[kind](tmp_path / "a", {"x": random.Random(3).randbytes(10_000)})
        raw = bytearray(path.read_bytes())
        raw[5000] ^= 0xFF
        path.write_bytes(raw)
        with refused("archive_invalid"):
            unpack(path, tmp_path / "out")
        assert not (tmp_path / "out").exists() or not left(tmp_path / "out")


def test_a_huge_directory_or_header_is_not_read_into_memory(tmp_path: Path) -> None:
    """A central directory of 64 MiB, and a pax header that claims 8 GiB."""
    path = tmp_path / "a.zip"
    size = 64 * MIB
    with path.open("wb") as f:
        f.write(b"PK\x03\x04")
        f.seek(4 + size)
        f.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, size, 4, 0))
    tar = tmp_path / "a.tar"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, (8 << 30) - 1
    tar.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    tracemalloc.start()
    with refused("archive_too_many_members"):
        list_members(path, LimitSettings())
    with refused("archive_invalid"):
        list_members(tar, LimitSettings())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MIB


def test_extracting_never_overwrites_and_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "a.zip", FILES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        unpack(path, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"mine"
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    real_open = Path.open

    def onto_full_disk(self: Path, mode: str = "r", *args: int) -> io.IOBase:
        if mode != "xb":
            return real_open(self, mode, *args)  # type: ignore[call-overload,no-any-return]  # passes on what it got
        return real_open(full, "wb", buffering=0)

    monkeypatch.setattr(Path, "open", onto_full_disk)
    with pytest.raises(AppError) as caught:
        unpack(path, tmp_path / "elsewhere")
    assert caught.value.code == "storage_full"
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_not_an_archive(tmp_path: Path) -> None:
    for data in (b"", b"hello", bytes(2000), b"\x1f\x8bgarbage", b"PK\x03\x04garbage"):
        (tmp_path / "x").write_bytes(data)
        with refused("archive_invalid"):
            list_members(tmp_path / "x", LimitSettings())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(MAKERS)), seed=st.integers(0, 2**32), flips=st.integers(1, 8))
def test_random_damage_never_crashes(tmp_path: Path, kind: str, seed: int, flips: int) -> None:
    source = tmp_path / kind
    if not source.exists():
        MAKERS[kind](source, FILES)
    raw = bytearray(source.read_bytes())
    rng = random.Random(seed)
    for _ in range(flips):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    (tmp_path / "hurt").write_bytes(raw)
    out = tmp_path / f"out{seed}{flips}"
    code = "archive_"
    try:
        for p in unpack(tmp_path / "hurt", out):
            assert p.resolve().is_relative_to(out.resolve())
            p.unlink()
    except AppError as e:
        code = e.code
    assert code.startswith("archive_")
