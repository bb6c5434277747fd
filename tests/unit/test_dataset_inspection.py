"""What an uploaded data set is, or why it is none: real files written by numpy, and damaged ones."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.datasets.inspect import DatasetInfo, inspect_dataset
from app.errors import AppError
from app.settings import LimitSettings

LIMITS = LimitSettings()


def npz(compressed: bool = False, **arrays: Any) -> bytes:
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **arrays)
    return out.getvalue()


def npy(header: str, data: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    raw = header.encode()
    size = len(raw) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(2 if version == 1 else 4, "little") + raw + data


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return out.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:  # type: ignore[call-overload]  # mode is a plain str here
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


PACKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "d.zip": zipped,
    "stored.zip": lambda f: zipped(f, zipfile.ZIP_STORED),
    "d.tar": tarred,
    "d.tar.gz": lambda f: tarred(f, "w:gz"),
}

Inspect = Callable[..., DatasetInfo]


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    def run(data: bytes, filename: str = "data.npz", limits: LimitSettings = LIMITS) -> DatasetInfo:
        path = tmp_path / "upload"
        path.write_bytes(data)
        try:
            return inspect_dataset(path, filename, limits)
        finally:
            assert [p.name for p in tmp_path.iterdir()] == ["upload"]

    return run


def refusal(
    inspect: Inspect,
    data: bytes,
    filename: str = "data.npz",
    code: str = "invalid_dataset",
    limits: LimitSettings = LIMITS,
) -> AppError:
    with pytest.raises(AppError) as caught:
        inspect(data, filename, limits)
    error = caught.value
    assert (error.code, error.status) == (code, 422), error
    assert error.detail
    assert error.remedy, error.detail
    json.dumps(error.members()).encode()
    return error


X = np.zeros((6, 3, 4), np.float32)
LABELS = np.arange(6)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz(inspect: Inspect, compressed: bool) -> None:
    info = inspect(npz(compressed, **{"x": X, "labels": LABELS, "scope/ids:0": LABELS, "a:0": LABELS}))
    assert (info.format, info.samples, info.shards) == ("npz", 6, 1)
    assert info.arrays == [
        {"name": "x", "dtype": "float32", "shape": [3, 4]},
        {"name": "labels", "dtype": "int64", "shape": []},
        {"name": "scope/ids:0", "dtype": "int64", "shape": []},
        {"name": "a:0", "dtype": "int64", "shape": []},
    ]


@pytest.mark.parametrize(
    "dtype", ["bool", *(f"{s}int{b}" for s in ("", "u") for b in (8, 16, 32, 64)), "float16", "float64"]
)
def test_every_dtype_and_memory_order(inspect: Inspect, dtype: str) -> None:
    info = inspect(npz(x=np.zeros((2, 3, 4), dtype), f=np.asfortranarray(np.ones((2, 5), dtype))))
    assert [a["dtype"] for a in info.arrays] == [dtype, dtype]
    assert [a["shape"] for a in info.arrays] == [[3, 4], [5]]


@pytest.mark.parametrize("packer", PACKERS)
def test_shards(inspect: Inspect, packer: str) -> None:
    shards = {f"s/{i}.npz": npz(i % 2 == 0, x=X[: i + 1], labels=LABELS[: i + 1]) for i in range(4)}
    info = inspect(PACKERS[packer]({**shards, "._0.npz": b"junk"}), packer)
    assert (info.format, info.samples, info.shards) == ("archive", 1 + 2 + 3 + 4, 4)
    assert [a["name"] for a in info.arrays] == ["x", "labels"]


@pytest.mark.parametrize("packer", PACKERS)
def test_shards_must_agree(inspect: Inspect, packer: str) -> None:
    good = npz(x=X, labels=LABELS)
    for bad, array in (
        (npz(x=X), "labels"),
        (npz(x=X, labels=LABELS, more=LABELS), "more"),
        (npz(x=X.astype(np.float64), labels=LABELS), "x"),
        (npz(x=X[:, 0], labels=LABELS), "x"),
    ):
        error = refusal(inspect, PACKERS[packer]({"a.npz": good, "b.npz": bad}), packer)
        assert error.tensor == array
        assert "'b.npz'" in error.detail


@pytest.mark.parametrize("packer", PACKERS)
def test_shards_may_differ_in_length(inspect: Inspect, packer: str) -> None:
    info = inspect(PACKERS[packer]({"a.npz": npz(x=X), "b.npz": npz(x=X[:, :2])}), packer)
    assert [a["shape"] for a in info.arrays] == [[None, 4]]


def test_arrays_whose_samples_are_on_another_axis_or_on_none(inspect: Inspect) -> None:
    count = len(X)
    info = inspect(npz(state=np.zeros((2, count, 5)), x=X, edges=np.zeros((2, 40)), rate=np.int64(16000)))
    assert info.samples == count
    found = {a["name"]: (a["shape"], a.get("first_axis", count)) for a in info.arrays}
    assert found == {"state": ([count, 5], 2), "x": ([3, 4], count), "edges": ([40], 2), "rate": ([], None)}


def test_shards_that_are_none(inspect: Inspect) -> None:
    assert "notes.txt" in refusal(inspect, zipped({"a.npz": npz(x=X), "notes.txt": b"x"}), "d.zip").detail
    assert "a.npz" in refusal(inspect, zipped({"a.npz": b"not an npz"}), "d.zip").detail
    assert "a.npz" in refusal(inspect, tarred({"a.npz": tarred({"x.npy": b""})}), "d.tar").detail
    refusal(inspect, zipped({}), "d.zip")
    refusal(inspect, zipped({"a.npz": npz(x=X)}), "d.npz")
    refusal(inspect, npz(x=X), "d.zip")
    refusal(inspect, tarred({"a.npz": npz(x=X)}), "d.npz")
    refusal(inspect, zipped({"a.npz": npz(x=X), "../b.npz": npz(x=X)}), "d.zip", "archive_unsafe_path")


def test_pickles_text_and_structures(inspect: Inspect) -> None:
    ragged = np.empty(2, object)
    ragged[:] = [[1], [1, 2]]
    records = np.zeros(2, [("a", "<f4"), ("b", "<i8")])
    for array, word in (
        (ragged, "pickled"),
        (np.array(["a", "b"]), "text"),
        (np.array([b"a", b"b"]), "text"),
        (records, "structured"),
        (np.zeros(2, ">f4"), "big-endian"),
        (np.zeros(2, np.complex64), "<c8"),
        (np.zeros(2, "datetime64[s]"), "<M8"),
        (np.zeros(2, "V3"), "V3"),
    ):
        error = refusal(inspect, npz(ok=np.zeros(2), bad=array))
        assert error.tensor == "bad"
        assert word in error.detail


def test_sample_counts(inspect: Inspect) -> None:
    assert inspect(npz(x=X[:1])).samples == 1
    assert "no sample" in refusal(inspect, npz(x=X[:0])).detail
    error = refusal(inspect, npz(x=X, labels=LABELS[:5]))
    assert error.tensor == "labels"
    assert "5" in error.detail
    assert refusal(inspect, npz(x=np.float32(1))).tensor == "x"
    assert "no array" in refusal(inspect, npz()).detail


def test_what_is_no_data_set(inspect: Inspect) -> None:
    single = io.BytesIO()
    np.save(single, X)
    for data, word in (
        (b"", "empty"),
        (b"a,b\n1,2\n", "neither an .npz"),
        (single.getvalue(), ".npy"),
        (b"PAR1" + bytes(100), "Parquet"),
        (b"\x80\x04\x95", "pickled"),
        (npz(x=X)[:-30], "damaged"),
        (npz(x=X)[:100], "damaged"),
        (zipped({"x.txt": b"1"}), "x.txt"),
    ):
        assert word in refusal(inspect, data).detail


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_header_versions(inspect: Inspect, version: int) -> None:
    assert inspect(zipped({"x.npy": npy(GOOD, bytes(24), version)})).arrays[0]["shape"] == [3]


@pytest.mark.parametrize(
    "array",
    [
        b"",
        b"\x93NUMPY",
        b"\x94NUMPY\x01\x00",
        npy(GOOD, bytes(24), version=4),
        npy(GOOD, bytes(23)),
        npy(GOOD, bytes(25)),
        npy(GOOD, length=60_000),
        npy(GOOD, version=2, length=1 << 31),
        npy(GOOD[:-10], bytes(24)),
        npy("[]"),
        npy("{'descr': '<f4', 'fortran_order': False}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': 3}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2.0,)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': __import__('os')}"),
        npy("{'descr': '', 'fortran_order': False, 'shape': (2,)}"),
        npy("(" * 9000),
        npy("-" * 9000 + "1"),
        npy("{" * 5000 + "}" * 5000),
        npy("\\x00" * 100),
    ],
)
def test_damaged_arrays(inspect: Inspect, array: bytes) -> None:
    assert refusal(inspect, zipped({"ok.npy": npy(GOOD, bytes(24)), "x.npy": array})).tensor == "x"


def test_limits(inspect: Inspect) -> None:
    big = npz(True, x=np.zeros((20, 1 << 20), np.int8))
    refusal(inspect, big, code="archive_bomb")
    refusal(inspect, npz(x=X), code="archive_too_large", limits=LimitSettings(unpacked_bytes=100))
    refusal(inspect, npz(a=X, b=X), code="archive_too_many_members", limits=LimitSettings(archive_members=1))
    # Each shard keeps the limits, all of them together do not.
    shards = {f"{i}.npz": npz(True, x=np.zeros((20, 1000))) for i in range(5)}
    refusal(inspect, tarred(shards), "d.tar", "archive_too_large", LimitSettings(unpacked_bytes=400_000))
    halves = {f"{i}.npz": npz(True, x=np.zeros((7, 1 << 20), np.int8)) for i in range(3)}
    refusal(inspect, zipped(halves, zipfile.ZIP_STORED), "d.zip", "archive_bomb")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 10), packer=st.sampled_from(["data.npz", *PACKERS]))
def test_random_damage_never_crashes(inspect: Inspect, seed: int, flips: int, packer: str) -> None:
    raw = npz(seed % 2 == 0, x=X, labels=LABELS)
    data = bytearray(raw if packer == "data.npz" else PACKERS[packer]({"a.npz": raw, "b.npz": raw}))
    rng = random.Random(seed)
    for _ in range(flips):
        data[rng.randrange(len(data))] = rng.randrange(256)
    code = "invalid_dataset"
    try:
        inspect(bytes(data), packer)
    except AppError as e:
        code = e.code
    assert code == "invalid_dataset" or code.startswith("archive_")


def test_flat_memory_and_no_numpy(tmp_path: Path) -> None:
    """In its own process: 256 MiB of samples in compressed shards."""
    rng = np.random.default_rng(0)
    shard = npz(x=np.repeat(rng.integers(0, 255, (64, 1 << 18), np.uint8), 4, axis=1))
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for i in range(4):
            z.writestr(f"{i}.npz", shard)
    code = (
        "import resource, sys; from pathlib import Path; from app.settings import LimitSettings\n"
        "from app.datasets.inspect import inspect_dataset\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "info = inspect_dataset(Path(sys.argv[1]), 'd.zip', LimitSettings())\n"
        "assert (info.samples, info.shards) == (256, 4), info\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "assert 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 << 10


@pytest.mark.parametrize("bad", ["\n", "\x1b", "\x7f"])
def test_control_characters_in_the_names_of_arrays(inspect: Inspect, bad: str) -> None:
    for data, filename in ((npz(**{f"a{bad}b": X}), "d.npz"), (zipped({"s.npz": npz(**{f"a{bad}b": X})}), "d.zip")):
        error = refusal(inspect, data, filename)
        assert f"U+{ord(bad):04X}" in error.detail
        assert error.tensor == "a\ufffdb"


def test_nul_in_the_name_of_an_array(inspect: Inspect) -> None:
    data = npz(aXb=X).replace(b"aXb.npy", b"a\0b.npy")
    refusal(inspect, data)
