"""Data sets: streaming, the split by content, and a typed error for everything a file can get wrong."""

from __future__ import annotations

import io
import pickle
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.failures import FailureKind, StageFailure
from workers import data
from workers.data import Samples, part_of, sample_digests, synthetic_feeds
from workers.kernel import TensorSpec

X = TensorSpec("x", "float32", ("batch", 3))
LOGITS = TensorSpec("logits", "float32", ("batch", 4))


def npz(path: Path, *, compressed: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def rows(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32)


def shard_bytes(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name, content in members.items():
                target.writestr(name, content)
    return path


def fails(path: Path, *inputs: TensorSpec, **options: Any) -> StageFailure:
    with pytest.raises(StageFailure) as caught:
        Samples(path, inputs or (X,), (LOGITS,), **options)
    failure = caught.value
    assert failure.kind is FailureKind.DATA
    assert failure.remedy
    return failure


@pytest.mark.parametrize("compressed", [False, True])
def test_batches_have_the_size_asked_for_and_keep_the_order(tmp_path: Path, compressed: bool) -> None:
    x, labels = rows(10), np.arange(10)
    samples = Samples(npz(tmp_path / "d.npz", compressed=compressed, x=x, labels=labels), [X])
    batches = list(samples.batches(4))
    assert [len(b) for b in batches] == [4, 4, 2]
    assert np.array_equal(np.concatenate([b.feeds["x"] for b in batches]), x)
    assert np.array_equal(np.concatenate([b.references["labels"] for b in batches]), labels)
    assert [d for b in batches for d in b.digests] == sample_digests({"x": x}) == samples.digests()
    assert samples.reference_names == ("labels",)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path, suffix: str) -> None:
    x = rows(7)
    members = {"b/2.npz": shard_bytes(x=x[3:]), "a/1.npz": shard_bytes(x=x[:3])}
    samples = Samples(archive(tmp_path / f"d{suffix}", members), [X])
    assert len(samples) == 7
    (batch, rest) = samples.batches(5)
    assert np.array_equal(np.concatenate([batch.feeds["x"], rest.feeds["x"]]), x)


def test_parts_are_disjoint_complete_and_follow_the_content(tmp_path: Path) -> None:
    x = np.concatenate([rows(50), rows(50)])  # every sample twice
    path = npz(tmp_path / "d.npz", x=x)
    sides = {part: Samples(path, [X], part=part) for part in ("calibration", "validation")}
    assert sum(map(len, sides.values())) == 100
    assert not set(sides["calibration"].digests()) & set(sides["validation"].digests())
    assert all(part_of(d) == part for part, side in sides.items() for d in side.digests())
    assert sides["calibration"].digest() != sides["validation"].digest()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 20, 300])
def test_what_the_search_looks_at_never_confirms(tmp_path: Path, n: int, shared: bool) -> None:
    x = np.concatenate([rows(n), rows(n)])  # every sample twice
    paths = [npz(tmp_path / f"{i}.npz", x=a) for i, a in enumerate((x, x[::-1]))]
    parts: tuple[Any, ...] = ("calibration", "select", "confirm") if shared else ("select", "confirm")
    found = [[Samples(path, [X], part=part, shared=shared) for part in parts] for path in paths]
    sides = [set(side.digests()) for side in found[0]]
    if len(sides[-1] | sides[-2]) == 1:  # a single one does both
        assert sides[-1] == sides[-2]
    else:
        assert sum(map(len, sides)) == len(set.union(*sides)) == n
        assert len(sides[-1]) >= 0.6 * (len(sides[-1]) + len(sides[-2])) or len(sides[-1]) == len(sides[-2]) == 1
        assert sum(len(side) for side in found[0]) == 2 * n
    assert sides == [set(side.digests()) for side in found[1]], "whatever their order in the file"
    assert all(side.distinct * 2 == len(side) for side in found[0])


def test_few_samples_of_a_part_are_the_same_whether_kept_or_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = npz(tmp_path / "d.npz", x=rows(200), labels=np.arange(200))
    for kept in (32 << 20, 0):
        monkeypatch.setattr("workers.data.KEPT_BYTES", kept)
        labels = {}
        for part in ("select", "confirm"):
            some, every = Samples(path, [X], part=part, max_samples=20), Samples(path, [X], part=part)
            assert (len(some), some.usable, len(every)) == (20, len(every), {"select": 66, "confirm": 134}[part])
            assert set(some.digests()) < set(every.digests())
            labels[part] = [v for b in some.batches(8) for v in b.references["labels"].tolist()]
        assert not set(labels["select"]) & set(labels["confirm"])


def test_max_samples_takes_an_unbiased_choice_that_repeats(tmp_path: Path) -> None:
    x, labels = rows(400), np.repeat(np.arange(4), 100)  # sorted by class
    path = npz(tmp_path / "d.npz", x=x, labels=labels)
    chosen = [
        np.concatenate([b.references["labels"] for b in Samples(path, [X], max_samples=80).batches(16)]) for _ in "ab"
    ]
    assert np.array_equal(*chosen)
    assert len(chosen[0]) == 80
    assert (np.bincount(chosen[0], minlength=4) > 5).all()


def test_a_small_choice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.concatenate([rows(300), rows(20)])  # some twice
    members = {f"{i}.npz": shard_bytes(x=x[i * 40 : i * 40 + 40], labels=np.arange(40)) for i in range(8)}
    path = archive(tmp_path / "d.zip", members)
    passes = []
    opened = data.open_shards
    monkeypatch.setattr(data, "open_shards", lambda p: passes.append(p) or opened(p))
    for most in (1, 7, 64, 400):
        del passes[:]
        monkeypatch.setattr(data, "KEPT_BYTES", 1 << 20)
        few = Samples(path, [X], max_samples=most)
        kept = list(few.batches(16))
        assert len(passes) == 1
        monkeypatch.setattr(data, "KEPT_BYTES", 0)
        again = list(Samples(path, [X], max_samples=most).batches(16))
        assert [b.digests for b in kept] == [b.digests for b in again]
        for a, b in zip(kept, again, strict=True):
            assert np.array_equal(a.feeds["x"], b.feeds["x"])
            assert np.array_equal(a.references["labels"], b.references["labels"])
            assert sample_digests(a.feeds) == a.digests
        assert sum(map(len, kept)) == len(few) == min(most, 320)


def test_samples_that_calibrated_can_be_left_out(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", x=rows(10))
    used = Samples(path, [X]).digests()[:4]
    samples = Samples(path, [X], exclude=used)
    assert (len(samples), samples.excluded) == (6, 4)
    assert not set(used) & set(samples.digests())
    assert fails(path, exclude=Samples(path, [X]).digests()).code == "dataset_empty"


def test_shards_with_another_shape_start_a_new_batch(tmp_path: Path) -> None:
    ids = TensorSpec("ids", "int64", ("batch", "seq"))
    members = {"1.npz": shard_bytes(ids=np.ones((3, 5), np.int64)), "2.npz": shard_bytes(ids=np.ones((3, 7), np.int64))}
    samples = Samples(archive(tmp_path / "d.zip", members), [ids])
    assert [b.feeds["ids"].shape for b in samples.batches(2)] == [(2, 5), (1, 5), (2, 7), (1, 7)]


def test_fortran_order_and_big_endian_are_read(tmp_path: Path) -> None:
    x = rows(6)
    for odd in (np.asfortranarray(x), x.astype(">f4")):
        (batch,) = Samples(npz(tmp_path / "d.npz", x=odd), [X]).batches(6)
        assert np.array_equal(batch.feeds["x"], x)
        assert batch.feeds["x"].dtype == np.dtype("float32")


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BLOCK_BYTES", 1 << 16)
    wide = TensorSpec("x", "float32", ("batch", 1000))
    path = npz(tmp_path / "d.npz", compressed=True, x=np.zeros((8000, 1000), np.float32))  # 32 MB
    tracemalloc.start()
    samples = Samples(path, [wide])
    assert sum(len(b) for b in samples.batches(8)) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


@pytest.mark.parametrize(
    ("arrays", "code", "tensor"),
    [
        ({"labels": np.arange(3)}, "dataset_missing_input", "x"),
        ({"x": rows(3), "typo": rows(3)}, "dataset_extra_array", "typo"),
        ({"x": rows(3).astype(np.float64)}, "dataset_dtype_mismatch", "x"),
        ({"x": np.zeros((3, 3), np.int64)}, "dataset_dtype_mismatch", "x"),
        ({"x": np.zeros((3, 4), np.float32)}, "dataset_shape_mismatch", "x"),
        ({"x": np.zeros(3, np.float32)}, "dataset_shape_mismatch", "x"),
        ({"x": np.float32(1)}, "dataset_shape_mismatch", "x"),
        ({"x": rows(3), "labels": np.arange(2)}, "dataset_shape_mismatch", "labels"),
        ({"x": rows(3), "labels": np.float32(1)}, "dataset_shape_mismatch", "labels"),
        ({"x": rows(3), "labels": np.ones(3, complex)}, "dataset_dtype_mismatch", "labels"),
        ({"x": rows(3), "labels": np.array([1, np.nan, 1])}, "dataset_not_finite", "labels"),
        ({"x": rows(3), "labels": np.array(["a"] * 3)}, "dataset_dtype_mismatch", "labels"),
        ({"x": rows(3), "logits": np.zeros((3, 5), np.float32)}, "dataset_shape_mismatch", "logits"),
        ({"x": rows(3), "logits": np.zeros((3, 4), np.int64)}, "dataset_dtype_mismatch", "logits"),
        ({"x": np.array([[1, 2, None]] * 3, dtype=object)}, "dataset_pickled", "x"),
        ({"x": rows(0)}, "dataset_empty", None),
        ({}, "dataset_empty", None),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], code: str, tensor: str | None) -> None:
    if arrays:
        path = npz(tmp_path / "d.npz", **arrays)
    else:
        path = archive(tmp_path / "d.zip", {})
    failure = fails(path)
    assert (failure.code, failure.tensor) == (code, tensor)


def test_a_lossy_cast_is_left_to_the_user(tmp_path: Path) -> None:
    failure = fails(npz(tmp_path / "d.npz", x=rows(3).astype(np.float64)))
    assert "float64" in failure.detail
    assert "astype(np.float32)" in (failure.remedy or "")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_sample_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    x = rows(20)
    x[13, 1] = value
    failure = fails(npz(tmp_path / "d.npz", x=x))
    assert (failure.code, failure.tensor) == ("dataset_not_finite", "x")
    assert "Sample 13" in failure.detail


def test_one_sample_leaves_one_part_empty(tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", x=rows(1))
    assert len(Samples(path, [X])) == 1
    missing = {"calibration", "validation"} - {part_of(sample_digests({"x": rows(1)})[0])}
    failure = fails(path, part=missing.pop())
    assert failure.code == "dataset_empty"


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("the pickle was loaded",))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    assert fails(npz(tmp_path / "d.npz", x=np.array([_Bomb()], dtype=object))).code == "dataset_pickled"
    (tmp_path / "p.npz").write_bytes(pickle.dumps(_Bomb()))
    assert fails(tmp_path / "p.npz").code == "dataset_unreadable"


def _header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "members",
    [
        {"x.npy": b"no array"},
        {"x.npy": b""},
        {"x.npy": _header("(1000000000000, 3)")},
        {"x.npy": _header("(-4, 3)")},
        {"x.npy": _header("(2, 3)") + b"\0" * 20},
        {"x.npy": _header("__import__('os').getpid()")},
        {"readme.txt": b"hello"},
        {"a.npz": b"PK not really"},
        {"a.npz": shard_bytes(x=rows(2)), "b.txt": b"hello"},
    ],
)
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_broken_archives(tmp_path: Path, members: dict[str, bytes], suffix: str) -> None:
    assert fails(archive(tmp_path / f"d{suffix}", members)).code == "dataset_unreadable"


def test_endless_rows_of_nothing_are_refused(tmp_path: Path) -> None:
    spec = TensorSpec("x", "float32", ("batch", "n"))
    path = archive(tmp_path / "d.zip", {"x.npy": _header("(1000000000000000, 0)")})
    assert fails(path, spec).code == "dataset_shape_mismatch"


def test_links_and_compressed_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        info = tarfile.TarInfo("a.npz")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert fails(tmp_path / "d.tar").code == "dataset_unreadable"
    with tarfile.open(tmp_path / "d.tgz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.npz"))
    assert fails(tmp_path / "d.tgz").code == "dataset_unreadable"


def test_every_truncation_and_flipped_byte_gives_a_typed_error_or_the_same_data(tmp_path: Path) -> None:
    whole = npz(tmp_path / "d.npz", compressed=True, x=rows(8)).read_bytes()
    good = Samples(tmp_path / "d.npz", [X]).digest()
    target = tmp_path / "broken.npz"
    for i in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[i] ^= 0xFF
        for content in (whole[:i], bytes(flipped)):
            target.write_bytes(content)
            try:
                digest, kind = Samples(target, [X]).digest(), None
            except StageFailure as failure:
                digest, kind = None, failure.kind
            assert digest == good or kind is FailureKind.DATA


def test_string_inputs_cannot_hold_data(tmp_path: Path) -> None:
    text = TensorSpec("x", "string", ("batch",))
    assert fails(npz(tmp_path / "d.npz", x=np.array(["a"])), text).code == "dataset_dtype_mismatch"


def test_synthetic_inputs_are_plausible_and_repeat() -> None:
    inputs = [
        TensorSpec("pixels", "float32", ("batch", 3, "h", "w")),
        TensorSpec("input_ids", "int64", ("batch", "seq")),
        TensorSpec("attention_mask", "int64", ("batch", "seq")),
        TensorSpec("token_type_ids", "int64", ("batch", "seq")),
        TensorSpec("fixed", "float16", (2, 5)),
    ]
    shapes = {"input_ids": {"min": [1, 8], "opt": [4, 16], "max": [8, 64]}}
    feeds = synthetic_feeds(inputs, 4, shapes, seed=3)
    assert {n: a.shape for n, a in feeds.items()} == {
        "pixels": (4, 3, 224, 224),
        "input_ids": (4, 16),
        "attention_mask": (4, 16),
        "token_type_ids": (4, 16),
        "fixed": (2, 5),
    }
    assert feeds["attention_mask"].all()
    assert not feeds["token_type_ids"].any()
    assert feeds["input_ids"].any()
    assert feeds["input_ids"].max() < 10
    assert abs(float(feeds["pixels"].std()) - 1) < 0.01
    again, other = synthetic_feeds(inputs, 4, shapes, seed=3), synthetic_feeds(inputs, 4, shapes, seed=4)
    assert all(np.array_equal(feeds[n], again[n]) for n in feeds)
    assert not np.array_equal(feeds["pixels"], other["pixels"])
